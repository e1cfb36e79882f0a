"""Savings of frozen blocks, PEFT and recomputation: images per second, memory for the backward.

    python benchmarks/finetuning.py [--model timm:vit_small_patch16_224] [--batch-size 8]

A step is forward, backward and AdamW on random images, float32, random weights. "Kept for the
backward" is the memory of all tensors that autograd saves, except parameters. `no_grad` is the same
network with its frozen blocks explicitly under torch.no_grad: the lowest possible cost.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import net
from benchmarks.measuring import heads, line, timed
from net import Architecture

SETTINGS: dict[str, dict[str, Any]] = {
    "all of it trains": {},
    "--grad-checkpointing": {"recompute": True},
    "--freeze-stem": {"freeze_stem": True},
    "--freeze-blocks 6": {"freeze_blocks": 6},
    "--freeze-blocks 6, no_grad": {"freeze_blocks": 6, "no_grad": True},
    "--freeze-blocks all": {"freeze_blocks": "all"},
    "--peft lora:8": {"peft": "lora:8"},
    "--peft bitfit": {"peft": "bitfit"},
    "--peft prompts:10,bitfit": {"peft": "prompts:10,bitfit"},
}


def build(model: str, recompute: bool = False, no_grad: bool = False, **described: Any) -> Any:
    """A network in training mode."""
    torch.manual_seed(0)
    network = net.build(Architecture(model, 128, **described))
    if recompute:
        network.recompute_blocks()
    if no_grad:
        parts = dict(network.model.named_modules())
        rested = network.blocks()[: described["freeze_blocks"] + 1]
        for name in (name for block in rested for name in block if name in parts):
            parts[name].forward = torch.no_grad()(parts[name].forward)
    return network


def kept_for_backward(network: Any, images: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward, except parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    alive = []  # kept alive, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (alive.append(tensor), pack(tensor))[1], lambda tensor: tensor
    ):
        network(images).embedding.square().sum()
    return sum(seen.values())


def milliseconds(network: Any, images: torch.Tensor, repeats: int) -> float:
    """The median of a few steps."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        network(images).embedding.square().sum().backward()
        optimiser.step()

    taken = [timed(step, "cpu") for _ in range(repeats + 1)]
    return 1000 * median(taken[1:])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="timm:vit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    kept = "kept for the backward, MB per image"
    print(heads(("setting", "numbers that train", "images a second", kept)))
    for name, setting in SETTINGS.items():
        network = build(args.model, **setting)
        size = network.architecture.image_size or network.input.size
        images = torch.randn(args.batch_size, 3, size, size)
        speed = 1000 * args.batch_size / milliseconds(network, images, args.repeats)
        kept = kept_for_backward(network, images) / args.batch_size / 1e6
        trained, total = network.counts()
        numbers = [f"{trained:,} ({trained / total:.1%})", f"{speed:.1f}", f"{kept:.1f}"]
        print(line([f"`{name}`", *numbers]))


if __name__ == "__main__":
    main()
