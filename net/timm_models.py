"""Any model of timm (`--model timm:NAME` or `timm:NAME.TAG`): features without its classifier.

    python train.py --model timm:vit_small_patch14_reg4_dinov2.lvd142m --image-size 224

timm's configuration of the model says what input it takes, where its weights are and how its
features are pooled. timm is imported only when such a model is named; everything else runs without
it.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from functools import cache, partial
from itertools import takewhile
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from net.backbones import TIMM, Backbone
from net.blocks import Block, as_blocks, numbered_blocks
from net.checkpoints import inside
from net.choices import InputSpec
from net.heads import Pool
from net.shared import SHARED, SharedBatchNorm2d
from utils import InputError, close_names, first_line, installing, nearest_names

# --- the module -----------------------------------------------------------------------------------


class Body(nn.Module):
    """A timm model as a backbone.

    Args:
        body: the model, without a classifier.
        pooling: one of the `poolings` of its record.
    """

    def __init__(self, body: nn.Module, pooling: str) -> None:
        super().__init__()
        self.body = body
        self.num_features = body.head_hidden_size
        self._as_timm = pooling == _own_pooling(body)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """(B, 3, S, S) → what timm calls features: maps (B, F, h, w), (B, h, w, F) or (B, N, F)."""
        return self.body.forward_features(images)

    def pooled(self, images: Tensor, pool: Pool) -> Tensor:
        """(B, 3, S, S) → (B, F): pooled, and passed through the model's layers after pooling.

        With the model's own pooling, timm's code does it, as with `num_classes=0` in timm.
        """
        found = self(images)
        with torch.autocast(images.device.type, enabled=False):  # like the heads
            found = _in_float32(found)
            if self._as_timm:
                return self.body.forward_head(found, pre_logits=True)
            if found.dim() == 3:
                return _after_tokens(self.body, pool(_as_maps(self.body, found, pool.pooling)))
            last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
            pooled = pool(found.movedim(3, 1) if last else found)[:, :, None, None]
            # Pooling does not change a map of one cell, so only the layers after it have an effect.
            return self.body.forward_head(pooled.movedim(1, 3) if last else pooled, pre_logits=True)


def _in_float32(found: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    if isinstance(found, Tensor):
        return found.to(torch.promote_types(found.dtype, torch.float32))
    return [_in_float32(part) for part in found]


def _as_maps(body: nn.Module, tokens: Tensor, pooling: str) -> Tensor:
    """Tokens (B, N, F) as maps (B, F, n, 1): those of the patches, or only the class token."""
    start = body.num_prefix_tokens  # class token and registers
    chosen = tokens[:, :1] if pooling == "cls" else tokens[:, start:]
    return chosen.transpose(1, 2)[..., None]


def _after_tokens(body: nn.Module, features: Tensor) -> Tensor:
    norm = getattr(body, "fc_norm", None)
    return features if norm is None else norm(features)


# --- what kind of model it is ---------------------------------------------------------------------

OF_MAPS = ("avg", "max", "avg+max", "gem")


def _poolings(name: str, body: nn.Module, size: int) -> tuple[str, ...]:
    """The poolings that a model can have, that of its family first.

    `body` is on the meta device, on which a forward pass computes only shapes.
    """
    own = _own_pooling(body)
    with torch.no_grad():
        found = body.forward_features(torch.empty(1, 3, size, size, device="meta"))
    if not isinstance(found, Tensor):
        return (own,)
    if found.dim() == 4:
        return tuple(dict.fromkeys((own, *OF_MAPS)))
    if getattr(body, "num_prefix_tokens", None) is None:
        return (own,)
    has_class = getattr(body, "cls_token", None) is not None
    # timm averages DINOv3's patches; its authors use the class token, as for DINO and DINOv2.
    first = "cls" if has_class and "dinov3" in name else own
    class_token = ("cls",) if has_class else ()
    return tuple(dict.fromkeys((first, own, *class_token, *OF_MAPS)))


def _own_pooling(body: nn.Module) -> str:
    """Our name for the pooling that timm's code of this model does."""
    own = getattr(body, "global_pool", None)
    return {"token": "cls", "map": "attention"}.get(own if isinstance(own, str) else "", "avg")


def _blocks(module: Body) -> list[Block]:
    """timm's own grouping of the layers; layers after the last block belong to that block.

    If blocks are not numbered (RegNet's `s1.b2`, DenseNet's `denselayer3`), the last one cannot be
    told, and every group with a matrix is a block.
    """
    body = module.body
    if not hasattr(body, "group_matcher"):
        return numbered_blocks(module)
    from timm.models import group_parameters

    groups = group_parameters(body, body.group_matcher(coarse=False), reverse=False)
    first, *others = (groups[at] for at in sorted(groups))
    is_block = _has_number
    if not any(_has_number([_shared_name(group)]) for group in others):
        matrices = {name for name, parameter in body.named_parameters() if parameter.dim() > 1}
        is_block = matrices.intersection
    blocks = [list(first)]
    for group in others:
        if len(blocks) > 1 and not is_block(group):
            blocks[-1].extend(group)
        else:
            blocks.append(list(group))
    return as_blocks(module, [[f"body.{name}" for name in group] for group in blocks])


def _has_number(group: Collection[str]) -> bool:
    return any(part.isdigit() for name in group for part in name.split("."))


def _shared_name(group: Collection[str]) -> str:
    """The module that contains all parameters of a group; "" if that is the whole model."""
    columns = zip(*(name.split(".") for name in group), strict=False)
    return ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))


# --- by name --------------------------------------------------------------------------------------


def find(name: str) -> Backbone:
    """The record of `timm:NAME` or `timm:NAME.TAG`; without a tag, it has timm's default tag.

    Raises:
        InputError: timm is not installed, or has no such model or weights.
    """
    return _record(_full_name(name.lower().removeprefix(TIMM)))


def _timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise InputError(
            f"models of timm need the package timm, which cannot be loaded here ({error}); "
            f"{installing('timm')}"
        ) from error


def _full_name(name: str) -> str:
    timm = _timm()
    model, _, tag = name.partition(".")
    known = timm.list_models()  # without deprecated names, which have no weights
    if model not in known:
        near = nearest_names(model, known)
        if not close_names(model, known):
            near = 'python -c "import timm; print(timm.list_models())" lists them all'
        raise InputError(f"timm has no model {model!r}; {near}")
    tags = {full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")}
    if tag and tag not in tags:
        raise InputError(
            f"timm has no weights {tag!r} of {model}; "
            f"{nearest_names(tag, tags) if tags else 'leave the tag out'}"
        )
    tag = tag or timm.get_pretrained_cfg(model).tag
    return f"{model}.{tag}" if tag in tags else model


@cache
def _record(name: str) -> Backbone:
    with torch.device("meta"):
        body = _timm().create_model(name, num_classes=0).eval()
    config = body.pretrained_cfg
    size = config["input_size"][-1]
    return Backbone(
        f"{TIMM}{name}",
        partial(_build, name),
        takes=("image_size", "pooling", "model_args"),
        poolings=_poolings(name, body, size),
        input_spec=_input_of(config),
        image_size=size,
        hub=config.get("hf_hub_id"),
        licence=config.get("license"),
        adapt=partial(_adapt, name),
        blocks=_blocks,
    )


def _input_of(config: Mapping[str, Any]) -> InputSpec:
    """The input that the weights were trained with. (Deviation: for models whose pictures timm
    squashes to a square, we take the central square, as for all others.)
    """
    size = config["input_size"][-1]
    return InputSpec(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=size,
        resize=max(size, int(size / config["crop_pct"])),
        cubic=config["interpolation"] == "bicubic",
    )


# --- weights --------------------------------------------------------------------------------------

_OUTER = ("model", "backbone", "body")
"""Prefixes of the names of weights in training codes."""


def _adapt(name: str, module: Body, content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a file for a model; position embeddings are resized for its images.

    They are converted by timm's own function for the model's family, which takes timm's files and
    those of most authors. The file must have all weights of the model; its other entries
    (classifiers, projections, mask tokens) are left out.
    """
    body = module.body
    weights = _named_as_model(_tensors_in(content), {child for child, _ in body.named_children()})
    family = importlib.import_module(_timm().model_entrypoint(name.partition(".")[0]).__module__)
    translate = getattr(family, "checkpoint_filter_fn", None)
    if translate is not None:
        weights = translate(weights, body)
    own = body.state_dict()
    return {f"body.{key}": value for key, value in weights.items() if key in own}


def _tensors_in(content: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in inside(content).items() if isinstance(v, Tensor | dict)}


def _named_as_model(weights: dict[str, Any], children: Collection[str]) -> dict[str, Any]:
    """Weights whose names are those of the model itself, without those of `_OUTER` in front."""
    for name in _OUTER * 2:  # a training module's `model` may have one of its own
        within = [key for key in weights if key.startswith(f"{name}.")]
        if within and name not in children:
            weights = {key.removeprefix(f"{name}."): weights[key] for key in within}
    return weights


# --- several processes ----------------------------------------------------------------------------


@cache
def _share_norms() -> None:
    """Add timm's BatchNorm with an activation to the layers that several processes share."""
    from timm.layers import BatchNormAct2d

    class SharedNormAct(BatchNormAct2d, SharedBatchNorm2d):
        """`BatchNormAct2d` over the images of all processes."""

        def forward(self, x: Tensor) -> Tensor:
            """(n, C, h, w), this process's part of the batch → the same shape."""
            return self.act(self.drop(SharedBatchNorm2d.forward(self, x)))

    SHARED[BatchNormAct2d] = SharedNormAct


# --- building -------------------------------------------------------------------------------------

_DECIDED_ELSEWHERE = {
    "img_size": "--image-size",
    "global_pool": "--pooling",
    "num_classes": "--embedding-size",
    "in_chans": "pictures, which have three channels",
    "drop_path_rate": "--drop-path",
    **dict.fromkeys(
        "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_model_args pretrained_strict "
        "checkpoint_path cache_dir".split(),
        "--pretrained",
    ),
    "features_only": "--pooling",
}


def _build(
    name: str,
    stem: str,
    width: float,
    *,
    image_size: int | None,
    pooling: str,
    model_args: Collection[tuple[str, Any]] = (),
) -> Body:
    chosen = dict(model_args)
    for argument in chosen:
        if argument in _DECIDED_ELSEWHERE:
            raise InputError(
                f"--model-args {argument} is decided by {_DECIDED_ELSEWHERE[argument]}; leave it "
                "out"
            )
    timm = _timm()
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size is not None and config is not None and config.fixed_input_size:
        chosen["img_size"] = image_size
    _share_norms()
    try:
        body = timm.create_model(name, num_classes=0, **chosen)
    except Exception as error:  # a bad argument raises anything, wherever timm first uses it
        raise InputError(
            f"{TIMM}{name} cannot be built for images of {image_size} pixels with "
            f"{dict(model_args) or 'its own arguments'}: {first_line(error)}"
        ) from error
    _check_patches(name, body, image_size)
    if pooling != "attention" and getattr(body, "attn_pool", None) is not None:
        body.attn_pool = None  # nothing would train it
    return Body(body, pooling)


def _check_patches(name: str, body: nn.Module, image_size: int | None) -> None:
    """Raise InputError if the image is not a whole number of patches."""
    patch = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, tuple) else patch
    if image_size is not None and isinstance(side, int) and image_size % side:
        raise InputError(
            f"{TIMM}{name} sees patches of {side} pixels, and {image_size} is not a multiple "
            f"of that; choose --image-size {max(1, round(image_size / side)) * side}"
        )
