"""Parameter-efficient fine-tuning: a frozen backbone, and the few parameters that are trained.

- LoRA (Hu et al., ICLR 2022): W becomes W + (alpha / rank) B A in every linear layer of the blocks.
- Deep visual prompts (VPT-deep: Jia et al., ECCV 2022): learned tokens are prepended in each block.
- BitFit (Ben Zaken et al., ACL 2022): biases are trained, here also scales and shifts of norms.

The names of the backbone's parameters do not change, so that weights load as without PEFT.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net.blocks import Block, belongs
from net.choices import Peft
from utils import InputError

LORA_KEYS = ("lora_a", "lora_b")
PROMPTS_KEY = "prompts"
ADDED_KEYS = tuple(f".{key}" for key in (*LORA_KEYS, PROMPTS_KEY))
"""The keys of all added parameters end with one of these."""


def add_peft(module: nn.Module, blocks: Sequence[Block], frozen: int, peft: Peft) -> set[str]:
    """Add the parameters of `peft` to all blocks of a backbone that are not entirely frozen.

    Args:
        module: the backbone. blocks: all its blocks, the stem first.
        frozen: how many of the first blocks are entirely frozen.

    Returns:
        The names of the trained parameters: the added ones, and with BitFit biases and norms.

    Raises:
        InputError: the backbone does not support it.
    """
    upper = blocks[max(1, frozen) :]
    if not upper:
        raise InputError(f"--peft {peft} trains nothing, because all blocks are frozen")
    before = {name for name, _ in module.named_parameters()}
    if peft.rank:
        _add_lora(module, upper, peft)
    if peft.prompts:
        _add_prompts(module, blocks[0], upper, peft.prompts)
    trained = {name for name, _ in module.named_parameters()} - before
    if peft.biases:
        open_blocks = [part for block in blocks[frozen:] for part in block]
        trained |= {name for name in _vectors(module) if belongs(name, tuple(open_blocks))}
    return trained


# --- LoRA -----------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """y = x W' + b with W' = W + scale · B A; A is (rank, inputs), B is (outputs, rank).

    Made from a linear layer by changing its class, so that W and b keep their names. The attribute
    `weight` is W', because some attention layers use it and never call the layer.
    """

    scale: float
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """W', (outputs, inputs)."""
        return self._parameters["weight"] + self.scale * (self.lora_b @ self.lora_a)

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) → (…, outputs), by the factors, so that no gradient of W' is computed."""
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self._parameters["weight"], self.bias) + self.scale * change


def _add_lora(module: nn.Module, upper: Sequence[Block], peft: Peft) -> None:
    inside = tuple(part for block in upper for part in block)
    layers = [
        layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and belongs(name, inside)
    ]
    if not layers:
        raise InputError(
            f"--peft {peft}: the blocks of this network have no linear layers, which lora is for; "
            "choose a transformer (--model timm:NAME), or --peft bitfit"
        )
    for layer in layers:
        weight, rank = layer.weight, peft.rank
        layer.__class__ = LoraLinear
        layer.scale = peft.scale
        layer.lora_a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        layer.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))  # as the authors do


def merge_lora(module: nn.Module) -> None:
    """Turns every LoRA layer into the equivalent plain linear layer, in place."""
    for layer in module.modules():
        if isinstance(layer, LoraLinear):
            weight = layer.weight.detach()
            for name in LORA_KEYS:
                delattr(layer, name)
            layer.__class__ = nn.Linear
            layer.weight.data = weight


def merged(weights: Mapping[str, Tensor], peft: Peft) -> dict[str, Tensor]:
    """Converts the weights of a network with LoRA to those of the equivalent plain network."""
    plain = {name: w for name, w in weights.items() if not name.endswith(LORA_KEYS)}
    if peft.rank:
        for name in weights:
            if name.endswith("lora_a"):
                layer = name.removesuffix("lora_a")
                change = weights[f"{layer}lora_b"] @ weights[name]
                plain[f"{layer}weight"] = weights[f"{layer}weight"] + peft.scale * change
    return plain


# --- prompts --------------------------------------------------------------------------------------

_PAIRWISE = re.compile("rel_pos|relative_position|attention_bias")
NO_TOKENS = (
    "--peft prompts needs blocks with attention among all tokens, which this network does not "
    "have; choose a plain ViT (vit, deit, dino, dinov3), or lora"
)


def _add_prompts(module: nn.Module, stem: Block, upper: Sequence[Block], count: int) -> None:
    """Give each block `count` learned tokens, which are removed again after it."""
    layers = [_token_block(module, block) for block in upper]
    widths = {_token_width(layer) for layer in layers}
    if len(widths) > 1:
        raise InputError(NO_TOKENS)
    (width,) = widths
    patches = [
        p[0].numel() for n, p in module.named_parameters() if belongs(n, stem) and p.ndim > 3
    ]
    bound = math.sqrt(6 / ((*patches, width)[0] + width))  # Xavier's, of the patch embedding: VPT
    for layer in layers:
        prompts = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        layer.register_parameter(PROMPTS_KEY, prompts)
        layer.register_forward_pre_hook(_prepend_prompts)
        layer.register_forward_hook(_drop_prompts)
        for part in layer.modules():
            if hasattr(part, "num_prefix_tokens"):  # tokens that are no patches of the image
                part.num_prefix_tokens += count


def _token_block(module: nn.Module, block: Block) -> nn.Module:
    """The module of a block that has attention without biases for pairs of positions.

    Raises:
        InputError: there is no such module.
    """
    modules = dict(module.named_modules())
    found = [modules[name] for name in block if hasattr(modules.get(name), "attn")]
    names = [name for name, _ in found[0].named_parameters()] if found else []
    if len(found) != 1 or any(map(_PAIRWISE.search, names)):
        raise InputError(NO_TOKENS)
    return found[0]


def _token_width(layer: nn.Module) -> int:
    """C of a block's tokens (B, T, C): the size of its first norm."""
    norm = next((part for part in layer.modules() if is_norm(part)), None)
    if getattr(norm, "weight", None) is None:
        raise InputError(NO_TOKENS)
    return len(norm.weight)


def _prepend_prompts(block: nn.Module, inputs: tuple) -> tuple:
    tokens = inputs[0]
    if tokens.dim() != 3:
        raise InputError(NO_TOKENS)
    # Not len(tokens), which would be a constant of an exported network.
    prompts = block.prompts.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
    return (torch.cat([prompts, tokens], dim=1), *inputs[1:])


def _drop_prompts(block: nn.Module, inputs: tuple, tokens: Tensor) -> Tensor:
    if tokens.shape[1:] != inputs[0].shape[1:]:
        raise InputError(NO_TOKENS)
    return tokens[:, len(block.prompts) :]


# --- BitFit ---------------------------------------------------------------------------------------


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, of any library: LayerNorm, BatchNormAct2d, RmsNorm."""
    return "norm" in type(module).__name__.lower()


def _vectors(module: nn.Module) -> set[str]:
    """The names of all biases, and of the scales and shifts of norms."""
    found = set()
    for name, part in module.named_modules():
        for own, parameter in part.named_parameters(recurse=False):
            bias = own == "bias" or own.endswith("_bias")
            if bias or (is_norm(part) and parameter.dim() == 1):
                found.add(f"{name}.{own}".lstrip("."))
    return found


# --- the base -------------------------------------------------------------------------------------


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """32 hexadecimal digits that identify weights with their names and shapes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
