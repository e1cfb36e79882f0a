"""The table of docs/backbones.md: facts about each backbone, and its speed on this machine.

    python benchmarks/backbones.py                         # the whole table, as Markdown
    python benchmarks/backbones.py --only dino --batches 5
    python benchmarks/backbones.py --facts                 # without the measuring

Facts come from the backbones' records and from timm's configuration. Speed is measured with random
weights, on which it does not depend, at the size in the row: embedding images as in an evaluation,
and a step of Proxy-Anchor with AdamW, both in the precision that train.py chooses. It is the median
over the batches after a first one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import torch

import losses
import net
from benchmarks.measuring import heads, line, timed
from devices import Precision, device_name, pick_device, seed_everything
from utils import sentence_errors


class Row(NamedTuple):
    """A backbone that has been trained on the benchmarks, and the recipe to begin with.

    `size` is the image size for training, if it differs from that of the weights.
    """

    family: str
    model: str
    recipe: str = ""
    size: int | None = None


ROWS = (
    Row("BN-Inception", "bn_inception", "proxy_anchor_cub_bn_inception"),
    Row("GoogLeNet", "googlenet"),
    Row("ResNet", "resnet50", "proxy_anchor_cub_resnet50"),
    Row("EfficientNet-Lite", "efficientnet_lite0"),
    Row("ResNet", "timm:resnet50.tv_in1k"),
    Row("ConvNeXt, IN-22k", "timm:convnext_tiny.fb_in22k"),
    Row("MobileNetV4", "timm:mobilenetv4_conv_small.e2400_r224_in1k"),
    Row("Swin, IN-22k", "timm:swin_tiny_patch4_window7_224.ms_in22k"),
    Row("DeiT, distilled", "timm:deit_small_distilled_patch16_224.fb_in1k", "hyp_cub_deit"),
    Row("ViT, IN-21k", "timm:vit_small_patch16_224.augreg_in21k", "vptsp_cub_vits"),
    Row("ViT, IN-21k then 1k", "timm:vit_small_patch16_224.augreg_in21k_ft_in1k", "hyp_cub_vit"),
    Row("ViT, IN-21k", "timm:vit_base_patch16_224.augreg_in21k", "rsk_cub_vitb16"),
    Row("DINO", "timm:vit_small_patch16_224.dino", "hyp_cub_dino"),
    Row("DINOv2", "timm:vit_small_patch14_reg4_dinov2.lvd142m", "dinov2_cub", size=224),
    Row("DINOv2", "timm:vit_base_patch14_reg4_dinov2.lvd142m", size=224),
    Row("DINOv3", "timm:vit_small_patch16_dinov3.lvd1689m", "frozen_cub_dinov3", size=224),
    Row("DINOv3", "timm:vit_base_patch16_dinov3.lvd1689m", size=224),
    Row("CLIP", "timm:vit_base_patch16_clip_quickgelu_224.openai", "frozen_cub_clip"),
    Row("SigLIP 2", "timm:vit_base_patch16_siglip_224.v2_webli", "frozen_cub_siglip2"),
)

COLUMNS = (
    *("family", "`--model`", "weights' licence", "input, px", "resized", "mean and deviation"),
    *("dims", "pooling", "begin with", "at px", "forward, images/s", "training, images/s"),
)


# --- facts ----------------------------------------------------------------------------------------


def facts(row: Row) -> list[str]:
    """The cells of a row that need no measuring."""
    architecture = net.Architecture(row.model, 512)
    with torch.device("meta"):
        features = architecture.build_backbone().num_features
    spec = architecture.input
    recipe = f"`@recipes/{row.recipe}.txt`" if row.recipe else ""
    return [
        row.family,
        f"`{row.model}`",
        architecture.backbone.licence or "not stated",
        str(spec.size),
        "bicubic" if spec.cubic else "bilinear",
        _constants(spec),
        str(features),
        str(architecture.pooling),
        recipe,
        str(row.size or spec.size),
    ]


def _constants(spec: net.InputSpec) -> str:
    known = {(spec.color, spec.mean, spec.std): name for name, spec in net.INPUTS.items()}
    known |= {("RGB", (0.5,) * 3, (0.5,) * 3): ".5"}
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    return (known | {("RGB", *clip): "CLIP's"})[spec.color, spec.mean, spec.std]


# --- speed ----------------------------------------------------------------------------------------


def speeds(row: Row, batch: int, batches: int) -> list[str]:
    """Images per second, forward and in a training step."""
    device = pick_device(0)
    precision = Precision("auto", device)
    seed_everything(0)
    size = row.size or net.Architecture(row.model, 512).input.size
    takes = net.find_backbone(row.model).takes
    sized = {"image_size": size} if "image_size" in takes else {}
    network = net.build(net.Architecture(row.model, 512, bn_freeze="1", **sized))
    network.to(device, memory_format=precision.memory_format)
    images = torch.randn(batch, 3, size, size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 8
    criterion = losses.ProxyAnchorLoss(100, 512).to(device)
    optimiser = torch.optim.AdamW([*network.parameters(), *criterion.parameters()], lr=1e-5)

    def forward() -> None:
        with torch.inference_mode(), precision.autocast():
            network.embed(images)

    def step() -> None:
        with precision.autocast():
            embedding = network(images).embedding
        loss = criterion(embedding, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    network.eval()
    seen = _rate(forward, batch, batches, device)
    network.train()
    return [seen, _rate(step, batch, batches, device)]


def _rate(work: Callable[[], None], batch: int, batches: int, device: torch.device) -> str:
    taken = [timed(work, device) for _ in range(batches + 1)]
    return f"{batch / statistics.median(taken[1:]):.3g}"


# --- the table ------------------------------------------------------------------------------------


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name has TEXT")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--facts", action="store_true", help="leave out the measuring")
    args = parser.parse_args()
    count = len(COLUMNS) - (2 if args.facts else 0)
    print(heads(COLUMNS[:count]))
    with sentence_errors():
        for row in ROWS:
            if args.only in row.model:
                cells = facts(row)
                cells += [] if args.facts else speeds(row, args.batch_size, args.batches)
                print(line(cells), flush=True)
    device = pick_device(0)
    print(f"\n{device_name(device)}, {Precision('auto', device).name}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
