"""Compiles all kernels for an H100, which needs no GPU; run by test_kernels.py in a process.

The interpreter accepts more than the compiler.
"""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import crops, maps

INTEGERS = (
    "rows channels step parts size places height width out_height out_width of_image of_color "
    "of_row of_column taps"
).split()
CONSTANTS = {
    "ROWS": 16,
    "CHANNELS": 32,
    "BLOCK": 256,
    "COLUMNS": 64,
    "TAPS": 8,
    "STRIDE": 2,
    "PADDING": 1,
}
CONSTANTS |= {"BEFORE": 4}
HALF = "maps shortcut out masked gradient folded to_maps".split()
OTHERS = {"epsilon": "fp32", "maxima": "*i32", "pixels": "*u8"}


def compiled(kernel: triton.JITFunction, **types: str) -> None:
    """Compiles a kernel whose flags are all on; arguments have their usual types, or `types`."""
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], constants[place,] = "constexpr", CONSTANTS.get(name, True)
        elif name in types:
            signature[name] = types[name]
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = OTHERS.get(name, "*bf16" if name in HALF else "*fp32")
    source = ASTSource(kernel, signature, constexprs=constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(code.asm["cubin"]) > 1000, kernel


for kernel in (maps.bias_forward, maps.bias_backward, maps.fold_forward, maps.fold_backward):
    compiled(kernel)
compiled(maps.pool_forward, taps="*u8")
compiled(maps.pool_backward, taps="*u8")
compiled(maps.average)
compiled(maps.whole_forward, out="*fp32")
compiled(maps.whole_backward, gradient="*fp32")
compiled(maps.squares, images="*fp32")
compiled(crops.cut, places="*i64", out="*fp32")
print("all compiled")
