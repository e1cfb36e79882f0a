"""Models of timm: every family trains, continues, is evaluated, exported and opened again."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import tiny
import torch
from conftest import refusal
from safetensors.torch import save_file
from torch import nn

import net
import options
import train
from evaluation.inference import open_model
from net import Architecture, load_run, timm_models, weights
from net.blocks import belongs
from net.export import Graph, export_onnx, export_torchscript
from utils import InputError

SMALL_VIT = "depth=2 embed_dim=32 num_heads=2"


class Member(NamedTuple):
    """A small member of a family: its arguments, side of its images, usual pooling, blocks."""

    name: str
    arguments: str
    size: int
    pooling: str
    blocks: int

    @property
    def flags(self) -> str:
        given = f" --model-args {self.arguments}" if self.arguments else ""
        return f"--model timm:{self.name} --image-size {self.size}{given}"

    def architecture(self, **more: object) -> Architecture:
        args = options.parse_train(f"{self.flags} --embedding-size 8".split())
        return Architecture(**Architecture.entries(vars(args)) | more)

    def of_timm(self, **more: object) -> nn.Module:
        """What timm itself builds, with random weights."""
        torch.manual_seed(0)
        given = dict(options.parse_train(self.flags.split()).model_args) | more
        if timm.get_pretrained_cfg(self.name).fixed_input_size:
            given |= {"img_size": self.size}
        return timm.create_model(self.name, **given).eval()


FAMILIES = {
    "ViT": Member("vit_small_patch16_224.augreg_in21k", SMALL_VIT, 32, "cls", 3),
    "DINO": Member("vit_small_patch8_224.dino", SMALL_VIT, 32, "cls", 3),
    "DINOv2": Member("vit_small_patch14_reg4_dinov2.lvd142m", SMALL_VIT, 28, "cls", 3),
    "DINOv3": Member("vit_small_patch16_dinov3.lvd1689m", SMALL_VIT, 32, "cls", 3),
    "CLIP": Member("vit_base_patch16_clip_quickgelu_224.openai", SMALL_VIT, 32, "cls", 3),
    "SigLIP2": Member("vit_base_patch16_siglip_224.v2_webli", SMALL_VIT, 32, "attention", 3),
    "ConvNeXt": Member("convnext_tiny.fb_in22k", "depths=1,1,2,1 dims=8,8,16,32", 32, "avg", 6),
    "MobileNetV4": Member("mobilenetv4_conv_small_035", "", 32, "avg", 18),
    "ResNet": Member("resnet50.tv_in1k", "layers=1,1,2,1 channels=8,8,8,16", 32, "avg", 6),
    "Swin": Member(
        "swin_tiny_patch4_window7_224.ms_in1k",
        "depths=1,2,1,1 embed_dim=8 num_heads=1,1,2,2",
        56,
        "avg",
        6,
    ),
}
FAMILY = pytest.mark.parametrize("family", FAMILIES)


def pictures(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may need one."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network is out of reach")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- features -------------------------------------------------------------------------------------


@FAMILY
def test_features_are_timms_on_the_same_weights(family: str, tmp_path: Path) -> None:
    member = FAMILIES[family]
    theirs = member.of_timm(num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    file = str(tmp_path / "weights.safetensors")
    network = net.build(member.architecture(), pretrained=file).eval()
    assert network.architecture.pooling == member.pooling
    images = pictures(member.size)
    with torch.no_grad():
        maps = theirs.forward_features(images)
        expected = theirs.forward_head(maps, pre_logits=True)
        if family == "DINOv3":  # timm averages the patches, its authors take the class token
            expected = maps[:, 0]
        features = network.features(images)
    assert features.shape == (2, network.model.num_features) and features.std() > 0
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_a_resnet_of_timm_is_ours_on_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = net.build(Architecture("resnet50", 8, pooling="avg")).eval()
    bare = {k.removeprefix("model."): v for k, v in ours.state_dict().items() if "embedd" not in k}
    torch.save(bare, tmp_path / "resnet50-0676ba61.pth")
    theirs = Architecture("timm:resnet50.tv_in1k", 8)
    network = net.build(theirs, pretrained=str(tmp_path / "resnet50-0676ba61.pth")).eval()
    with torch.no_grad():
        one, other = ours.features(pictures(64)), network.features(pictures(64))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    spec = Architecture("resnet50", 8).input
    assert (theirs.input.mean, theirs.input.std) == (spec.mean, spec.std)


@pytest.mark.parametrize("family", ["DINOv2", "SigLIP2", "ConvNeXt", "MobileNetV4", "Swin"])
@pytest.mark.parametrize("pooling", ["avg", "max", "gem"])
def test_poolings_beside_the_usual_one(family: str, pooling: str) -> None:
    member = FAMILIES[family]
    network = net.build(member.architecture(pooling=pooling)).eval()
    body, images = network.model.body, pictures(member.size)
    with torch.no_grad():
        seen = body.forward_features(images)
        features = network.features(images)
    if seen.dim() == 3:
        rows = seen[:, body.num_prefix_tokens :]
    else:
        rows = (seen if family == "Swin" else seen.movedim(1, 3)).flatten(1, 2)
    powers = rows.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
    pooled = {"avg": rows.mean(1), "max": rows.amax(1), "gem": powers}[pooling]
    if family in ("ConvNeXt", "MobileNetV4"):  # with layers between pooling and classifier
        pooled = body.forward_head(pooled[:, :, None, None], pre_logits=True)
        assert family != "ConvNeXt" or pooled.mean(1).abs().max() < 1e-5  # a LayerNorm
    torch.testing.assert_close(features, pooled, rtol=1e-4, atol=1e-5)


def test_what_a_model_cannot_pool_is_one_sentence() -> None:
    for name, pooling, words in (
        ("resnet10", "cls", "pooling cls: resnet10 cannot be pooled like that; use avg"),
        ("timm:test_convnext", "cls", r"test_convnext.* cannot be pooled .* use avg, max"),
        ("timm:test_vit2", "cls", "cannot be pooled"),  # register tokens, but no class token
        ("timm:test_vit", "attention", "use cls, avg, max"),
        ("timm:test_vit", "grid", "use cls, avg, max"),
    ):
        with pytest.raises(InputError, match=words):
            Architecture(name, 8, pooling=pooling)


def test_the_power_of_gem_is_trained_with_the_head(images: Path) -> None:
    training = tiny.prepare(images, "--pooling gem --lr_p 0 --lr 0.01")
    power = training.network.pool.p
    (group,) = [g for g in training.optimisers.groups if any(p is power for p in g["params"])]
    assert (group["name"], power.tolist()) == ("head", [3.0])
    features = training.network.eval().features(pictures(32))
    maps = training.network.model(pictures(32))
    torch.testing.assert_close(features, maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))
    training.network.train()
    train.step(training, next(iter(training.loader)))
    assert power.item() != 3.0


# --- a whole run ----------------------------------------------------------------------------------

HOW = (
    "--embedding-size 8 --pretrained none --batch-size 12 --workers 0 --wandb disabled "
    "--metrics retrieval --warm 0"
)


def run(images: Path, logs: Path, name: str, flags: str) -> Path:
    where = ["--dataset", f"folder:{images}", "--LOG_DIR", str(logs), "--name", name]
    train.main(options.parse_train([*where, *HOW.split(), *flags.split()]))
    return logs / name


def goes_all_the_way(member: Member, images: Path, logs: Path) -> None:
    whole = run(images, logs, "whole", f"{member.flags} --max-steps 4")
    assert (whole / "report.html").stat().st_size > 10_000
    half = run(images, logs, "half", f"{member.flags} --max-steps 3 --no-report")
    tiny.resume(half, "--max-steps 4")
    for what in ("model_state_dict", "optimisers"):
        assert tiny.same(tiny.saved(whole)[what], tiny.saved(half)[what])
    described = tiny.saved(whole, "best")["network"]
    assert described["model"].startswith(f"timm:{member.name}")
    assert (described["image_size"], described["pooling"]) == (member.size, member.pooling)
    embed = load_run(whole)
    picture = np.full((50, 40, 3), 200, np.uint8)
    picture[10:30] = 30
    assert embed(picture).shape == (1, 8) and np.isfinite(embed(picture)).all()
    model = open_model(whole)
    graph = Graph(model.network, model.viewing.image_size)
    assert export_onnx(graph, logs / "model.onnx") < 1e-4
    assert export_torchscript(graph, logs / "model.pt") < 1e-4


@pytest.mark.parametrize("family", ["DINOv2"])
def test_a_family_goes_all_the_way(family: str, images: Path, tmp_path: Path) -> None:
    goes_all_the_way(FAMILIES[family], images, tmp_path)


@pytest.mark.slow
@FAMILY
def test_every_family_goes_all_the_way(family: str, images: Path, tmp_path: Path) -> None:
    goes_all_the_way(FAMILIES[family], images, tmp_path)


def test_another_size_at_evaluation_resizes_the_position_embeddings(
    images: Path, tmp_path: Path
) -> None:
    member = FAMILIES["DINOv2"]
    network = net.build(member.architecture()).eval()
    content = {"network": network.description(), "model_state_dict": network.state_dict()}
    larger = net.build(member.architecture(image_size=56)).eval()
    assert larger.model.body.pos_embed.shape[1] == 4 * network.model.body.pos_embed.shape[1]
    net.load_checkpoint(larger, content)
    kept = {k: v for k, v in network.state_dict().items() if "pos_embed" not in k}
    assert all(torch.equal(larger.state_dict()[key], value) for key, value in kept.items())
    # A map of one colour everywhere stays so.
    with torch.no_grad():
        network.model.body.pos_embed.fill_(0.25)
    net.load_checkpoint(larger, content)
    torch.testing.assert_close(larger.model.body.pos_embed, torch.full((1, 16, 32), 0.25))


# --- names and inputs -----------------------------------------------------------------------------


def test_a_checkpoint_names_model_weights_and_arguments() -> None:
    held = Architecture("TIMM:test_vit", 8, model_args=[["depth", 2]], image_size=32)
    assert held.model == "timm:test_vit.r160_in1k"  # timm's default weights, by their name
    network = net.build(held)
    content = {"network": network.description(), "model_state_dict": network.state_dict()}
    again = net.architecture_of(content)
    assert again == held and (again.image_size, again.model_args) == (32, (("depth", 2),))
    assert len(network.model.body.blocks) == 2
    assert Architecture("resnet10", 8, image_size=32) == Architecture("resnet10", 8)


@pytest.mark.parametrize("name", [member.name for member in FAMILIES.values()])
def test_the_input_is_what_the_weights_were_trained_with(name: str) -> None:
    config = timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    spec = Architecture(f"timm:{name}", 8).input
    assert (spec.color, spec.scale, spec.mean, spec.std) == ("RGB", 1.0, data["mean"], data["std"])
    assert (3, spec.size, spec.size) == data["input_size"]
    assert spec.resize == int(spec.size / data["crop_pct"])
    assert spec.cubic == (data["interpolation"] == "bicubic")


def test_photographs_are_seen_at_the_size_of_the_weights(images: Path) -> None:
    flags = ["--model", "timm:test_vit"]
    assert options.parse_train([*flags, "--dataset", f"folder:{images}"]).image_size == 160
    assert options.parse_train([*flags, "--dataset", "cub", "--image-size", "96"]).image_size == 96
    assert options.parse_train([*flags, "--dataset", "emoji"]).image_size == 64
    assert options.parse_train(["--dataset", "cub"]).image_size == 224


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model timm:vit_smal_patch16_224", "did you mean vit_small_patch16_224"),
        ("--model timm:xception", "timm has no model 'xception'; did you mean xception71"),
        ("--model timm:qqqqqqqqqq", "timm has no model 'qqqqqqqqqq'; python -c"),
        ("--model timm:vit_small_patch16_224.dinno", "no weights 'dinno' .* did you mean dino"),
        ("--model resnet18 --model-args depth=2", "--model-args has no effect here: .* timm"),
    ],
)
def test_wrong_names_are_one_sentence(
    flags: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert re.search(words, refusal(capsys, options.parse_train, flags.split()))


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"image_size": 100}, "patches of 16 pixels, and 100 is not a multiple .* --image-size 96"),
        ({"model_args": (("depht", 2),)}, "cannot be built .*depht"),
        ({"model_args": (("img_size", 32),)}, "img_size is decided by --image-size"),
        ({"model_args": (("patch_size", 0),)}, "cannot be built"),
        ({"model_args": (("act_layer", ("relu", 3)),)}, "cannot be built"),
        ({"model_args": (("checkpoint_path", "x.pth"),)}, "is decided by --pretrained"),
        ({"model_args": (("cache_dir", "x"),)}, "is decided by --pretrained"),
        ({"model_args": (("pretrained_cfg_overlay", ()),)}, "is decided by --pretrained"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(described: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        net.build(Architecture("timm:test_vit", 8, **described))
    assert "\n" not in str(caught.value)


def test_without_timm_all_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"need the package timm.*pip install timm -c"):
        net.find_backbone("timm:test_vit")
    assert net.build(Architecture("resnet10", 8, width=0.125)).embedding_size == 8


# --- weights --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of data/weights; the hub's cache is empty too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.setattr(weights, "OTHER_FOLDERS", ())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def test_out_of_reach_of_the_hub_one_sentence_says_which_file_goes_where(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        net.build(Architecture("timm:test_vit", 8), pretrained="imagenet")
    said = str(caught.value)
    assert "\n" not in said and "out of reach" in said
    for words in ("timm/test_vit.r160_in1k", "--pretrained FILE.safetensors", str(folder)):
        assert words in said
    theirs = timm.create_model("test_vit").eval()
    save_file(theirs.state_dict(), folder / "test_vit.r160_in1k.safetensors")
    network = net.build(Architecture("timm:test_vit", 8), pretrained="imagenet").eval()
    with torch.no_grad():
        expected = theirs.forward_features(pictures(160))[:, 0]
        torch.testing.assert_close(network.features(pictures(160)), expected)


def wrapped(state: dict, how: str) -> dict:
    prefixed = {
        "DINO's teacher": {"backbone.": "teacher"},
        "timm's training": {"": "state_dict"},
        "several GPUs": {"module.": "model"},
        "several GPUs, compiled": {"_orig_mod.module.": "model"},
        "Lightning's": {"model.model.": "state_dict"},
    }
    ((prefix, key),) = prefixed[how].items()
    return {key: {prefix + name: value for name, value in state.items()}, "epoch": 3}


@pytest.mark.parametrize(
    "how",
    [
        "DINO's teacher",
        "timm's training",
        "several GPUs",
        "several GPUs, compiled",
        "Lightning's",
    ],
)
def test_files_of_training_codes_load_at_another_size(how: str, tmp_path: Path) -> None:
    theirs = timm.create_model("test_vit", num_classes=0).eval()
    torch.save(wrapped(theirs.state_dict(), how), tmp_path / "file.pth")
    small = Architecture("timm:test_vit", 8, image_size=64)
    network = net.build(small, pretrained=str(tmp_path / "file.pth")).eval()
    body = network.model.body
    assert body.pos_embed.shape == (1, 17, 64) and theirs.pos_embed.shape == (1, 101, 64)
    for name, value in theirs.state_dict().items():
        assert name == "pos_embed" or torch.equal(body.state_dict()[name], value)


def test_our_own_run_is_a_start_too(tmp_path: Path) -> None:
    small = Architecture("timm:test_vit", 8, image_size=64)
    saved = net.build(small)
    content = {"network": saved.description(), "model_state_dict": saved.state_dict()}
    torch.save(content, tmp_path / "best.pth")
    started = net.build(
        Architecture("timm:test_vit", 16, image_size=64), pretrained=str(tmp_path / "best.pth")
    )
    for name, value in saved.model.body.state_dict().items():
        assert torch.equal(started.model.body.state_dict()[name], value)
    with pytest.raises(InputError, match=r"holds a timm:test_vit.r160_in1k, not a timm:test_vit2"):
        net.build(Architecture("timm:test_vit2", 8), pretrained=str(tmp_path / "best.pth"))


def test_a_file_of_another_model_is_named(tmp_path: Path) -> None:
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors does not fit the network: it lacks"):
        net.build(Architecture("timm:test_vit", 8), pretrained=str(tmp_path / "other.safetensors"))
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nothing!")
    with pytest.raises(InputError, match=r"torn\.safetensors cannot be read safely"):
        net.build(Architecture("timm:test_vit", 8), pretrained=str(tmp_path / "torn.safetensors"))


# --- parts ----------------------------------------------------------------------------------------


@FAMILY
def test_blocks_are_the_backbone_in_order(family: str) -> None:
    member = FAMILIES[family]
    network = net.build(member.architecture())
    blocks = network.blocks()
    assert len(blocks) == member.blocks
    listed = [id(p) for block in network.block_parameters() for p in block]
    assert sorted(listed) == sorted(map(id, network.backbone_parameters()))
    stem = {"ViT": "patch_embed", "Swin": "patch_embed", "ConvNeXt": "stem", "ResNet": "conv1"}
    if family in stem:
        assert belongs(f"body.{stem[family]}", blocks[0])
    for norm in ("body.norm", "body.head.norm", "body.conv_head", "body.attn_pool"):
        if any(n.startswith(f"{norm}.") for n, _ in network.model.named_parameters()):
            assert belongs(norm, blocks[-1])


@pytest.mark.slow
def test_a_model_of_every_file_of_timm_is_pooled_and_divided_into_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With shapes alone: the meta device computes nothing, and knows no autocast."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    files: dict[str, list[str]] = {}
    for name in timm.list_models():
        files.setdefault(timm.models.model_entrypoint(name).__module__, []).append(name)
    assert len(files) > 80
    for names in files.values():
        name = f"timm:{min(names, key=len)}"
        for pooling in net.find_backbone(name).poolings:
            with torch.device("meta"):
                network = net.build(Architecture(name, 8, pooling=pooling)).eval()
                size = network.input.size
                features = network.features(torch.empty(2, 3, size, size))
            assert features.shape == (2, network.model.num_features), (name, pooling)
        listed = [id(p) for block in network.block_parameters() for p in block]
        assert sorted(listed) == sorted(map(id, network.backbone_parameters())), name
        assert len(network.blocks()) > 1, name


def test_batchnorms_of_timm_rest_and_follow_the_momentum() -> None:
    network = net.build(Architecture("timm:test_efficientnet", 8, bn_freeze="1", bn_momentum=0.3))
    norms = [m for m in network.model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {name: value.clone() for name, value in network.model.named_buffers()}
    network.train()
    network(pictures(64, 4)).embedding.sum().backward()
    assert norms and {norm.momentum for norm in norms} == {0.3}
    assert all(torch.equal(before[name], value) for name, value in network.model.named_buffers())
    assert all(norm.weight.grad is None for norm in norms)


def test_records_are_made_once_and_without_weights() -> None:
    record = timm_models.find("timm:vit_large_patch14_dinov2")
    assert record is timm_models.find("timm:VIT_large_patch14_dinov2.lvd142m")
    assert (record.name, record.image_size) == ("timm:vit_large_patch14_dinov2.lvd142m", 518)
    assert record.hub == "timm/vit_large_patch14_dinov2.lvd142m"
