"""Networks against the released ones: outputs, freezing, heads, masks, weights of every layout."""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import FIXTURES, ROOT, run_code, run_python
from released_weights import released_tensor
from torch import nn

import devices
import net
import net.googlenet
from evaluation.networks import open_checkpoint
from net import Architecture, EmbeddingMasks, backbones, heads, resnet, weights
from net.bn_inception import BNInception
from net.layers import average_conv_norm_relu, conv_norm
from utils import InputError

TINY = {"model": "resnet10", "embedding_size": 8, "width": 0.125, "stem": "small"}


@cache
def fixture(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The released state_dict and the arrays of a network fixture."""
    archive = np.load(FIXTURES / f"net_{name}_0.npz")
    state = {}
    for key, shape in zip(archive["keys"].tolist(), archive["shapes"].tolist(), strict=True):
        state[key] = released_tensor(key, tuple(int(n) for n in shape.split(",") if n))
    arrays = {k: torch.from_numpy(archive[k]) for k in archive.files if k not in ("keys", "shapes")}
    return state, arrays


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bn_inception() -> net.EmbeddingNet:
    """The released BN-Inception; tests only read it."""
    state, _ = fixture("bn_inception")
    network = net.build(Architecture("bn_inception", 512, bn_freeze="affine")).eval()
    net.load_checkpoint(network, {"model_state_dict": state})
    return network


def tiny(
    *, pretrained: str | None = None, masks: EmbeddingMasks | None = None, **described: object
) -> net.EmbeddingNet:
    torch.manual_seed(0)
    return net.build(Architecture(**(TINY | described)), pretrained=pretrained, masks=masks)


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# --- outputs of the released networks -------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_answer_as_released(name: str) -> None:
    state, arrays = fixture(name)
    network = net.build(Architecture(name, 512)).eval()
    network.load_state_dict(state)  # strict, with the classifier that the file carries along
    with torch.no_grad():
        outputs = network(arrays["input"])
        assert_close(F.normalize(outputs.embedding), arrays["embedding"])
        torch.testing.assert_close(network.embed(arrays["input"]), outputs.embedding)
    assert outputs.uncertainty is None and outputs.specific is None


def test_bn_inception_answers_as_released(bn_inception: net.EmbeddingNet) -> None:
    _, arrays = fixture("bn_inception")
    with torch.no_grad():
        assert_close(F.normalize(bn_inception.embed(arrays["input"])), arrays["embedding"])


def test_idml_answers_as_released() -> None:
    state, arrays = fixture("idml_resnet50")
    network = net.build(Architecture("resnet50", 512, ("embedding", "uncertainty"))).eval()
    net.load_checkpoint(network, {f"module.{key}": value for key, value in state.items()})
    with torch.no_grad():
        outputs = network(arrays["input"])
    assert_close(F.normalize(outputs.embedding), arrays["semantic"])
    assert_close(F.normalize(outputs.uncertainty), arrays["uncertainty"])


@pytest.mark.parametrize("name", ["sec_bn_inception", "sec_bn_inception_nobn"])
def test_spherical_networks_answer_as_released(name: str) -> None:
    state, arrays = fixture(name)
    architecture = net.architecture_of(state)
    assert architecture.head_norm == (name == "sec_bn_inception")
    assert (architecture.pooling, architecture.input_spec) == ("avg", "spherical")
    network = net.build(architecture).eval()
    net.load_checkpoint(network, state)
    with torch.no_grad():
        assert_close(network.embed(arrays["input"]), arrays["embedding"])
    assert network.input.size == 227 and network.input.mean == (104.0, 117.0, 123.0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resnets_are_torchvisions(mode: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18()
    ours = net.build(Architecture("resnet18", 4, pooling="avg"))
    ours.model.load_state_dict(theirs.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    getattr(theirs, mode)(), getattr(ours, mode)()
    assert_close(F.normalize(ours.features(images())), F.normalize(theirs(images())))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_googlenet_is_torchvisions(mode: str) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.googlenet(aux_logits=False, init_weights=False)
    ours = net.build(Architecture("GoogLeNet", 4, pooling="avg"))
    theirs.load_state_dict(ours.model.state_dict(), strict=False)
    theirs.fc, theirs.dropout = nn.Identity(), nn.Identity()
    getattr(theirs, mode)(), getattr(ours, mode)()
    batch = images(4, 64)
    assert_close(F.normalize(ours.features(batch)), F.normalize(theirs(batch)))


# --- folding --------------------------------------------------------------------------------------


def layer_pair(kernel: int, bias: bool) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(5, 7, kernel, padding=kernel // 2, bias=bias), nn.BatchNorm2d(7)
    for tensor in (norm.weight, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 1.5)
    return conv, norm


def outcome(function, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> list[torch.Tensor]:
    """Output, gradients of input, convolution and norm, and the running statistics afterwards."""
    x = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    parameters = [*conv.parameters(), *norm.parameters()]
    out = function(x)
    gradients = torch.autograd.grad(out.square().sin().sum(), [x, *parameters])
    return [out, *gradients, norm.running_mean.clone(), norm.running_var.clone()]


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_norm_folds_without_a_trace(bias: bool) -> None:
    conv, norm = layer_pair(3, bias)
    norm.eval()
    expected = outcome(lambda x: norm(conv(x)), conv, norm)
    for ours, reference in zip(
        outcome(lambda x: conv_norm(x, conv, norm), conv, norm), expected, strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (2, 2, 0), (3, 2, 1)])
@pytest.mark.parametrize("ceil_mode, counted", [(False, True), (True, False)])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_averages(size, stride, padding, ceil_mode, counted, form) -> None:
    """Those that replace a GPU's, where torch's are wrong; on a CPU they are right."""
    maps = torch.randn(2, 3, 7, 6).contiguous(memory_format=form).requires_grad_()
    out = F.avg_pool2d(maps, size, stride, padding, ceil_mode, counted)
    weights = torch.randn_like(out)
    ours = devices.gradient_of_averages(
        weights, maps.detach(), [size] * 2, [stride] * 2, [padding] * 2, ceil_mode, counted, None
    )
    torch.testing.assert_close(ours, *torch.autograd.grad(out, maps, weights))


@pytest.mark.parametrize("training", [True, False])
def test_averaging_commutes_with_the_projection(training: bool) -> None:
    results = []
    for function in (
        lambda x, conv, norm: F.relu(norm(conv(F.avg_pool2d(x, 3, 1, 1)))),
        average_conv_norm_relu,
    ):
        conv, norm = layer_pair(1, bias=True)
        norm.train(training)
        results.append(outcome(lambda x, f=function, c=conv, n=norm: f(x, c, n), conv, norm))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


# --- building -------------------------------------------------------------------------------------


def test_names_come_in_any_spelling() -> None:
    for spelling in ("ResNet-10", "RESNET10", "resnet_10"):
        assert tiny(model=spelling).architecture.model == "resnet10"
    with pytest.raises(InputError, match="bn_inception"):
        Architecture("bn_inseption", 8)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pooling": "median"}, "median"),
        ({"stem": "huge"}, "huge"),
        ({"bn_freeze": "2"}, "bn_freeze"),
        ({"input_spec": "grey"}, "grey"),
        ({"embedding_size": 0}, "embedding size 0"),
        ({"heads": ("uncertainty",)}, "embedding"),
        ({"heads": ("embedding", "embedding")}, "once"),
        ({"model": "googlenet"}, "width"),
        ({"masks": EmbeddingMasks(4)}, "masks of 4"),
        ({"heads": ("embedding", "specific"), "masks": EmbeddingMasks(8)}, "disentangling"),
        ({"pretrained": "imagenet"}, "width"),
        ({"pretrained": "imagenet", "width": 1.0, "stem": "imagenet"}, "no ImageNet weights"),
    ],
)
def test_bad_options_are_one_sentence(options: dict, word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        tiny(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 2), ("small", 4), ("tiny", 8)])
def test_stems_reduce_less(stem: str, side: int) -> None:
    with torch.no_grad():
        assert tiny(stem=stem).model(images(1, 64)).shape == (1, 64, side, side)
        assert net.googlenet.GoogLeNet(stem).eval()(images(1, 64)).shape == (1, 1024, side, side)
        inception = BNInception(stem).eval()
        assert inception(images(1, 64)).shape == (1, 1024, side, side)
    assert inception.conv1_7x7_s2.weight.shape == (64, 3, 7, 7)


def test_width_scales_every_channel() -> None:
    narrow, wide = tiny(width=0.25), tiny(width=0.5)
    assert (narrow.model.num_features, wide.model.num_features) == (128, 256)
    assert wide.model.layer2[0].conv1.weight.shape == (64, 32, 3, 3)


@pytest.mark.parametrize("width", [0.125, 0.25])
def test_shortcuts_have_a_stride_however_few_their_channels(width: float) -> None:
    block = tiny(width=width).train().model.layer2[0]
    x = torch.randn(2, block.conv1.in_channels, 9, 9, requires_grad=True)
    projection, norm = block.downsample
    strided = norm(F.conv2d(x, projection.weight, stride=2))
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    expected, answer = F.relu(strided + out), block(x)
    assert torch.equal(answer, expected)
    mine, theirs = (
        torch.autograd.grad(y.square().sum(), projection.weight) for y in (answer, expected)
    )
    assert_close(mine, theirs)


def test_a_narrow_network_survives_odd_batches_on_several_threads(tmp_path: Path) -> None:
    code = (
        "import torch; from net.resnet import BasicBlock, ResNet; torch.set_num_threads(4)\n"
        "network = ResNet(BasicBlock, (1, 1, 1, 1), 'small', 0.125).train()\n"
        "network.to(memory_format=torch.channels_last)\n"
        "for _ in range(6):\n"
        "    images = torch.randn(15, 3, 64, 64).to(memory_format=torch.channels_last)\n"
        "    network(images).sum().backward()\n"
    )
    done = run_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("pooling", ["avg+max", "avg", "max"])
def test_pooling(pooling: str) -> None:
    network = tiny(pooling=pooling).eval()
    maps = network.model(images())
    expected = {"avg": maps.mean((2, 3)), "max": maps.amax((2, 3))}
    expected["avg+max"] = expected["avg"] + expected["max"]
    torch.testing.assert_close(network.features(images()), expected[pooling])


def test_grid_pooling_keeps_places_apart() -> None:
    network = tiny(pooling="grid").eval()
    maps = network.model(images(size=64))
    features = network.features(images(size=64))
    assert features.shape == (2, 16 * 64) and network.embed(images()).shape == (2, 8)
    torch.testing.assert_close(features, maps.flatten(1))  # of 64 pixels a 4 × 4 map is left


@pytest.mark.parametrize("model", ["resnet18", "bn_inception"])
def test_input_specs(model: str) -> None:
    spec = Architecture(model, 8).input
    assert (spec.size, spec.resize) == (224, 256)
    if model == "bn_inception":
        assert (spec.color, spec.scale) == ("BGR", 255.0)
        assert (spec.mean, spec.std) == ((104.0, 117.0, 128.0), (1.0, 1.0, 1.0))
    else:
        assert (spec.color, spec.scale) == ("RGB", 1.0)
        assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# --- which backbones there are --------------------------------------------------------------------


def test_names_and_choices_are_read_without_torch() -> None:
    code = "import sys, net; assert net.MODELS and net.STEMS; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("file", sorted(backbones.FAMILIES))
def test_a_file_holds_the_records_that_the_registry_promises(file: str) -> None:
    records = importlib.import_module(f"net.{file}").BACKBONES
    assert tuple(record.name for record in records) == backbones.FAMILIES[file]


class Mine(nn.Module):
    """One convolution, under a name that released files have for their dead classifier."""

    num_features = 8

    def __init__(self, stem: str, width: float) -> None:
        super().__init__()
        self.fc = nn.Conv2d(3, 8, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """A backbone that is registered, and that no keys give away."""
    file = types.ModuleType("net.mine")
    file.BACKBONES = (backbones.Backbone("mine", Mine),)
    monkeypatch.setitem(sys.modules, "net.mine", file)
    monkeypatch.setitem(backbones.FAMILIES, "mine", ("mine",))
    return Architecture("Mine", 8)


def test_a_new_backbone_is_read_back_from_our_checkpoints_alone(mine: Architecture) -> None:
    saved = net.build(mine, masks=EmbeddingMasks(8, full="sum")).eval()
    checkpoint = {"network": saved.description(), "model_state_dict": saved.state_dict()}
    assert net.architecture_of(checkpoint) == mine
    network = net.build(net.architecture_of(checkpoint)).eval()
    net.load_checkpoint(network, checkpoint)
    assert torch.equal(network.embed(images()), saved.embed(images()))
    with pytest.raises(InputError, match="known architecture"):
        net.architecture_of(saved.state_dict())


def test_a_new_backbone_starts_from_any_file_that_fits(mine: Architecture, tmp_path: Path) -> None:
    saved = net.build(mine).eval()
    file, other = tmp_path / "file.pth", tmp_path / "other.pth"
    torch.save(saved.model.fc.state_dict(prefix="fc."), file)
    started = net.build(mine, pretrained=str(file)).eval()
    assert torch.equal(started.features(images()), saved.features(images()))
    torch.save({"conv.weight": torch.zeros(3)}, other)
    with pytest.raises(
        InputError, match=r"other\.pth does not fit the network: it lacks fc\.weight"
    ):
        net.build(mine, pretrained=str(other))
    with pytest.raises(InputError, match="no ImageNet weights of mine"):
        net.build(mine, pretrained="imagenet")


def test_a_backbone_says_what_it_cannot_have(mine: Architecture) -> None:
    with pytest.raises(InputError, match="stem 'small' is unknown; use imagenet"):
        replace(mine, stem="small")
    with pytest.raises(InputError, match=r"width 0\.5: mine cannot be widened"):
        replace(mine, width=0.5)
    assert [mine.backbone.default_stem(size) for size in (64, 224)] == ["imagenet", "imagenet"]
    known = net.find_backbone("resnet10")
    assert [known.default_stem(size) for size in (64, 127, 128)] == ["small", "small", "imagenet"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"num_features": None}, "mine has no num_features"),
        ({"embedding": nn.Linear(3, 3)}, "mine has a child called embedding, as a head is called"),
    ],
)
def test_a_backbone_that_heads_cannot_be_added_to_is_refused(
    fault: dict, said: str, mine: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(stem: str, width: float) -> nn.Module:
        made = Mine(stem, width)
        for name, value in fault.items():
            setattr(made, name, value)
        return made

    record = backbones.Backbone("mine", build)
    monkeypatch.setattr(sys.modules["net.mine"], "BACKBONES", (record,))
    with pytest.raises(InputError, match=said):
        net.build(mine)


def test_a_backbone_that_cannot_be_used_as_it_stands_says_why(
    mine: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Row(nn.Sequential):
        num_features = 32

    record = backbones.Backbone("mine", lambda stem, width: Row(nn.Conv2d(3, 32, 8, 8)))
    monkeypatch.setattr(sys.modules["net.mine"], "BACKBONES", (record,))
    with pytest.raises(InputError, match=r"mine is an nn\.Sequential"):
        net.build(mine)
    monkeypatch.setattr(sys.modules["net.mine"], "BACKBONES", (replace(record, name="other"),))
    with pytest.raises(InputError, match=r"lists mine in mine, but .*mine\.py has other"):
        net.find_backbone("mine")


MINE = """
from torch import Tensor, nn
from net.backbones import Backbone

class Mine(nn.Module):
    num_features = 32

    def __init__(self, stem: str, width: float) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.BatchNorm2d(32), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images)

BACKBONES = (Backbone("mine", Mine),)
"""


@pytest.mark.slow
def test_one_file_and_one_line_train_evaluate_and_export_a_new_backbone(tmp_path: Path) -> None:
    code, run = tmp_path / "code", tmp_path / "logs" / "run"
    away = ("data", "logs", "wandb", "tests", "docs", "__pycache__", ".*")
    shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(*away))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "emoji").symlink_to(ROOT / "data" / "emoji")
    (code / "net" / "mine.py").write_text(MINE)
    registry = code / "net" / "backbones.py"
    line = 'FAMILIES = {\n    "mine": ("mine",),\n'
    registry.write_text(registry.read_text().replace("FAMILIES = {\n", line))

    def call(*arguments: object) -> str:
        done = run_python(*arguments, cwd=tmp_path, PYTHONPATH=str(code))
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "mine, bn_inception" in " ".join(call(code / "train.py", "--help").split())
    few = "--workers 0 --metrics retrieval --amp off".split()
    flags = "--model Mine --embedding-size 8 --batch-size 32 --wandb disabled --no-report".split()
    call(code / "train.py", *flags, *few, "--name", "run", "--max-steps", 1)
    call(code / "train.py", "--resume-run", run, "--max-steps", 2)
    best, script = run / "emoji_Mine_best.pth", tmp_path / "mine.pt"
    for checkpoint in (best, run / "last.pth"):
        call(code / "evaluate.py", "--resume", checkpoint, *few, "--export", tmp_path / "e.npz")
        assert np.load(tmp_path / "e.npz")["embeddings"].shape[1] == 8
    said = call("-m", "net", "export", run, "--torchscript", script)
    assert "TorchScript and torch differ" in said
    assert torch.jit.load(script)(torch.rand(2, 3, 64, 64) * 255).shape == (2, 8)
    embeds = "from net import load_run; from PIL import Image; "
    embeds += f"print(load_run({str(run)!r})([Image.new('RGB', (64, 64))]).shape)"
    (tmp_path / "embed.py").write_text(embeds)
    assert call(tmp_path / "embed.py") == "(1, 8)\n"


# --- heads ----------------------------------------------------------------------------------------


def test_disentangled_heads_are_twice_as_wide_and_embed_the_means() -> None:
    network = tiny(heads=("embedding", "specific")).eval()
    outputs = network(images())
    assert outputs.embedding.shape == outputs.specific.shape == (2, 16)
    torch.testing.assert_close(network.embed(images()), outputs.embedding[:, :8])


def test_head_initialisation() -> None:
    kaiming = tiny(embedding_size=512).model.embedding
    assert kaiming.bias.abs().max() == 0
    assert kaiming.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    default = tiny(embedding_size=512, head_init="default").model.embedding
    assert default.weight.abs().max() <= 64**-0.5 and default.bias.abs().max() > 0


def test_the_norm_before_the_head_trains_while_the_backbones_are_frozen() -> None:
    network = tiny(head_norm=True, bn_freeze="affine")
    before = network.model.head_norm.running_mean.clone()
    network(images()).embedding.sum().backward()
    assert not torch.equal(before, network.model.head_norm.running_mean)
    assert network.model.head_norm.weight.grad is not None
    assert any(p is network.model.head_norm.weight for p in network.head_parameters())


def test_dropout_acts_in_training_only() -> None:
    network = tiny(dropout=0.5, bn_freeze="1")
    assert not torch.equal(network(images()).embedding, network(images()).embedding)
    network.eval()
    assert torch.equal(network(images()).embedding, network(images()).embedding)


def test_parameter_groups_hold_every_parameter_once() -> None:
    network = tiny(heads=("embedding", "uncertainty"), head_norm=True, masks=EmbeddingMasks(8))
    groups = {group["name"]: group for group in network.parameter_groups(0.1, head_lr=0.2)}
    counted = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in network.parameters())
    assert (groups["backbone"]["lr"], groups["head"]["lr"]) == (0.1, 0.2)
    assert {id(p) for p in groups["head"]["params"]} == {
        id(p)
        for module in (
            network.model.embedding,
            network.model.uncertainty,
            network.model.head_norm,
        )
        for p in module.parameters()
    }


def test_biases_and_norms_can_go_without_weight_decay() -> None:
    network = tiny(head_norm=True)
    groups = {g["name"]: g for g in network.parameter_groups(0.1, decay_all=False)}
    assert set(groups) == {"backbone", "backbone vectors", "head", "head vectors"}
    counted = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in network.parameters())
    assert [id(p) for p in groups["head"]["params"]] == [id(network.model.embedding.weight)]
    undecayed = {id(p) for name in groups if "vectors" in name for p in groups[name]["params"]}
    assert undecayed >= {id(p) for norm in norms(network) for p in norm.parameters()}
    for name, group in groups.items():
        assert ("weight_decay" in group) == ("vectors" in name) and group["lr"] == 0.1
        assert group.get("weight_decay", 0.0) == 0.0


# --- BatchNorm and warm-up ------------------------------------------------------------------------


def norms(network: net.EmbeddingNet) -> list[nn.BatchNorm2d]:
    return [module for module in network.model.modules() if isinstance(module, nn.BatchNorm2d)]


def affine_trains(network: net.EmbeddingNet) -> bool:
    trained = {p.requires_grad for norm in norms(network) for p in norm.parameters()}
    assert len(trained) == 1
    return trained.pop()


@pytest.mark.parametrize("bn_freeze", ["0", "1", "affine", "statistics"])
def test_running_statistics(bn_freeze: str) -> None:
    network = tiny(bn_freeze=bn_freeze).eval().train()
    frozen = bn_freeze != "0"
    assert all(norm.training != frozen for norm in norms(network))
    network(images())
    assert all(
        torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean)) == frozen
        for norm in norms(network)
    )


@pytest.mark.parametrize(
    ("bn_freeze", "at_first", "after_warm_up"),
    [(0, True, True), (1, False, True), ("affine", False, False), ("statistics", True, True)],
)
def test_warm_up_and_the_quirk_of_bn_freeze_1(
    bn_freeze: str | int, at_first: bool, after_warm_up: bool
) -> None:
    network = tiny(bn_freeze=bn_freeze)
    assert affine_trains(network) == at_first
    network.freeze_backbone(False)  # no warm-up: nothing changes
    assert affine_trains(network) == at_first
    network.freeze_backbone(True)
    assert not any(p.requires_grad for p in network.backbone_parameters())
    network(images()).embedding.sum().backward()
    assert all(p.grad is not None for p in network.head_parameters())
    network.freeze_backbone(False)
    assert affine_trains(network) == after_warm_up
    network(images()).embedding.sum().backward()
    for name, parameter in network.model.named_parameters():
        is_norm = "bn" in name or "downsample.1" in name
        assert (parameter.grad is not None) == (after_warm_up or not is_norm), name
    assert all(norm.training == (bn_freeze == 0) for norm in norms(network))


# --- masks ----------------------------------------------------------------------------------------


def test_fixed_masks_are_disjoint_runs() -> None:
    masks = EmbeddingMasks(512, learned=False)
    for _ in range(5):
        masks.split()
    rows = masks.weight
    assert len(masks) == 32 and not rows.requires_grad
    assert (rows.sum(1) == 16).all() and (rows.sum(0) == 1).all()
    assert torch.equal(rows[5].nonzero().flatten(), torch.arange(80, 96))
    small = EmbeddingMasks(2, learned=False)
    small.split()
    with pytest.raises(InputError, match="one dimension"):
        small.split()


def test_learned_children_are_copies_at_2c_and_2c_plus_1() -> None:
    masks = EmbeddingMasks(6, init="normal")
    masks.split()
    with torch.no_grad():
        masks.weight[1] += 1
    parents = masks.weight.detach().clone()
    masks.split()
    assert torch.equal(masks.weight, parents[[0, 0, 1, 1]]) and masks.weight.requires_grad
    masks.freeze()
    assert not masks.weight.requires_grad
    for bad in ({"learned": False, "init": "normal"}, {"init": "zeros"}, {"full": "mean"}):
        with pytest.raises(InputError):
            EmbeddingMasks(6, **bad)


@pytest.mark.parametrize("relu", [True, False])
def test_masks_multiply(relu: bool) -> None:
    masks = EmbeddingMasks(3, relu=relu)
    masks.split()
    masks.weight.data = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    effective = masks.weight.data.relu() if relu else masks.weight.data
    z = torch.ones(2, 3)
    assert torch.equal(masks(z, 0)[1], effective[0])
    assert torch.equal(masks(z), z)
    masks.full = "sum"
    assert torch.equal(masks(z)[0], effective.sum(0))
    masks.full = "l1"
    expected = effective[0] / effective[0].abs().sum() + effective[1] / effective[1].abs().sum()
    torch.testing.assert_close(masks(z)[0], expected)


def test_the_network_masks_raw_embeddings_bias_included() -> None:
    network = tiny(masks=EmbeddingMasks(8, learned=False)).eval()
    network.masks.split()
    nn.init.ones_(network.model.embedding.bias)
    whole, masked = network(images()).embedding, network(images(), cluster=1).embedding
    torch.testing.assert_close(masked, whole * torch.tensor([0.0] * 4 + [1.0] * 4))
    assert torch.equal(network.embed(images()), whole)


def test_a_mask_gets_the_gradient_of_its_cluster_only() -> None:
    network = tiny(masks=EmbeddingMasks(8))
    network.masks.split()
    network(images(), cluster=1).embedding.square().sum().backward()
    assert network.masks.weight.grad[0].abs().sum() == 0
    assert network.masks.weight.grad[1].abs().sum() > 0


# --- checkpoints ----------------------------------------------------------------------------------


def divide_and_conquer_file(network: net.EmbeddingNet, masks: torch.Tensor) -> dict:
    """The released layout: torchvision's keys, features.* aliases, a dead classifier, masks."""
    state = OrderedDict()
    for key, value in network.state_dict().items():
        bare = key.removeprefix("model.")
        state[bare] = value
        if not bare.startswith("embedding"):
            state[f"features.0.{bare}"] = value
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 512), torch.zeros(1000)
    return state | {f"masks.{k}": mask for k, mask in enumerate(masks)}


def test_our_own_checkpoints_return_masks_and_all() -> None:
    saved = tiny(masks=EmbeddingMasks(8, init="normal"), heads=("embedding", "uncertainty"))
    saved.masks.split()
    loaded = tiny(masks=EmbeddingMasks(8), heads=("embedding", "uncertainty"))
    loaded.load_state_dict(saved.state_dict())
    assert len(loaded.masks) == 2
    for ours, theirs in zip(loaded.eval()(images(), 1), saved.eval()(images(), 1), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize(("full", "relu"), [("sum", True), ("l1", False)])
def test_a_description_is_enough_to_build_the_network_again(full: str, relu: bool) -> None:
    masks = EmbeddingMasks(8, init="normal", full=full, relu=relu)
    described = {"heads": ("embedding", "uncertainty"), "pooling": "grid", "input_spec": "white"}
    saved = tiny(masks=masks, **described, head_norm=True, bn_freeze="1").eval()
    checkpoint = {"network": saved.description(), "model_state_dict": saved.state_dict()}
    network = net.build(net.architecture_of(checkpoint)).eval()
    net.load_checkpoint(network, checkpoint)
    assert network.architecture == saved.architecture and network.input == net.INPUTS["white"]
    assert network.description() == saved.description()
    assert torch.equal(network.embed(images()), saved.embed(images()))


def test_descriptions_of_other_versions() -> None:
    saved = tiny(stem="tiny")
    described, state = saved.description(), saved.state_dict()
    older = {entry: described[entry] for entry in ("model", "embedding_size", "stem", "width")}
    checkpoint = {"network": older | {"l2_norm": 1}, "model_state_dict": state}
    assert net.architecture_of(checkpoint) == saved.architecture
    for change, words in (
        ({"attention": 4}, "by attention, which this version does not know; update"),
        ({"model": "resnet9000"}, "cannot be built: unknown model 'resnet9000'"),
        ({"stem": "huge"}, "cannot be built: stem 'huge' is unknown"),
    ):
        with pytest.raises(InputError, match=f"^some.pth describes .*{words}"):
            net.architecture_of({"network": described | change}, "some.pth")
    with pytest.raises(InputError, match=r"^some.pth does not say its network's model"):
        net.architecture_of({"network": {"embedding_size": 8}}, "some.pth")


def test_a_last_checkpoint_that_keeps_flags_only() -> None:
    flags = {"model": "ResNet-10", "embedding_size": 8, "width": 0.125, "stem": "tiny"}
    flags |= {"head_norm": 1, "bn_freeze": "1", "input_spec": None, "pooling": "avg", "lr": 0.1}
    masked = {"masks_sum_for_full_emb": 1, "masks_normalize_before_sum": "l1", "mask_relu": 0}
    heads = ("embedding", "uncertainty")
    described = {"stem": "tiny", "head_norm": True, "bn_freeze": "1", "pooling": "avg"}
    for more, masks in (
        ({}, None),
        (masked, EmbeddingMasks(8, init="normal", full="l1", relu=False)),
    ):
        saved = tiny(heads=heads, masks=masks, **described).eval()
        checkpoint = {"clock": {}, "args": flags | more, "model_state_dict": saved.state_dict()}
        network = net.build(net.architecture_of(checkpoint)).eval()
        net.load_checkpoint(network, checkpoint)
        assert network.architecture == saved.architecture
        assert torch.equal(network.embed(images()), saved.embed(images()))


def test_masks_can_be_left_aside() -> None:
    saved = tiny(masks=EmbeddingMasks(8, init="normal", full="sum"))
    saved.masks.split()
    checkpoint = {"network": saved.description(), "model_state_dict": saved.state_dict()}
    plain, masked = tiny(), tiny(masks=EmbeddingMasks(8))
    for network in (plain, masked):
        nn.init.zeros_(network.model.embedding.weight)
        net.load_checkpoint(network, checkpoint, masks=False)
        assert torch.equal(network.model.embedding.weight, saved.model.embedding.weight)
    assert plain.masks is None
    assert torch.equal(masked.masks.weight, torch.ones(1, 8)) and masked.masks.full == "none"


def test_divide_and_conquer_files_load() -> None:
    saved = tiny(head_init="default").eval()
    masks = torch.rand(4, 8)
    masks[3, 5] = -1.0
    state = divide_and_conquer_file(saved, masks)
    held = net.architecture_of(state)
    assert (held.model, held.embedding_size) == ("resnet10", 8)
    assert (held.pooling, held.input_spec) == ("avg", None)
    for network in (tiny(), tiny(masks=EmbeddingMasks(8))):
        net.load_checkpoint(network.eval(), state)
        assert torch.equal(network.masks.weight, masks)
        assert torch.equal(network.embed(images()), saved.embed(images()))
        expected = saved.embed(images()) * masks[3].relu()
        torch.testing.assert_close(network(images(), 3).embedding, expected)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "net.model."]
)
@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "network", None])
def test_wrappings_are_taken_off(prefix: str, wrapper: str | None) -> None:
    saved = tiny(heads=("embedding", "specific")).eval()
    state = {prefix + key: value for key, value in saved.state_dict().items()}
    checkpoint = {wrapper: state, "epoch": 3} if wrapper else state
    held = net.architecture_of(checkpoint)
    assert (held.embedding_size, held.heads) == (8, ("embedding", "specific"))
    network = tiny(heads=("embedding", "specific")).eval()
    nn.init.zeros_(network.model.embedding_specific.weight)
    net.load_checkpoint(network, checkpoint)
    assert torch.equal(network(images()).specific, saved(images()).specific)


@pytest.mark.parametrize(
    "laid_round",
    [
        lambda network: nn.ModuleDict({"net": network, "criterion": nn.Linear(8, 5)}),
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
    ],
)
def test_the_network_of_a_training_module_is_found(laid_round: Callable[..., nn.Module]) -> None:
    saved = tiny()
    state = laid_round(saved).state_dict()
    network = tiny()
    net.load_checkpoint(network, {"state_dict": state, "pytorch-lightning_version": "2.5"})
    for name, value in saved.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_of_two_networks_in_a_file_none_is_taken() -> None:
    state = nn.ModuleDict({"student": tiny(), "momentum": tiny()}).state_dict()
    with pytest.raises(InputError, match="no embedding network of a known architecture"):
        net.architecture_of(state)


def test_what_others_say_in_our_words_is_not_read(tmp_path: Path) -> None:
    saved = net.build(Architecture("resnet10", 8))
    words = {"args": {"lr": "1e-4"}, "metrics": {"R@1": 0.5}, "epoch": "best", "data": 7, "base": 3}
    torch.save({"model_state_dict": saved.state_dict(), **words}, tmp_path / "theirs.pth")
    opened = open_checkpoint(tmp_path / "theirs.pth")
    assert opened.trained == {} and opened.trained_on is None
    assert torch.equal(opened.network.model.embedding.weight, saved.model.embedding.weight)


def test_options_and_numbers_of_numpy_beside_weights_are_no_obstacle(tmp_path: Path) -> None:
    saved = net.build(Architecture("resnet10", 8))
    beside = {
        "args": argparse.Namespace(lr=1e-4, milestones=[3]),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
        "curve": np.arange(3.0),
    }
    torch.save({"state_dict": saved.state_dict(), **beside}, tmp_path / "theirs.pth")
    assert open_checkpoint(tmp_path / "theirs.pth").network.architecture.model == "resnet10"


def test_a_backbone_alone_is_called_so(tmp_path: Path) -> None:
    bare = {k: v for k, v in tiny().model.state_dict().items() if not k.startswith("embedding.")}
    with pytest.raises(InputError, match=r"a resnet10 without an embedding.*--pretrained FILE"):
        net.architecture_of(bare)


@pytest.mark.parametrize(
    ("save", "words"),
    [
        (lambda network, file: torch.save(network, file), r"also holds \S+, which only running"),
        (lambda network, file: torch.jit.script(nn.ReLU()).save(file), "TorchScript program"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_files_that_are_programs_say_what_to_save_instead(
    save: Callable[[nn.Module, str], None], words: str, tmp_path: Path
) -> None:
    save(tiny(), str(tmp_path / "file.pth"))
    with pytest.raises(InputError, match=f"{words}.*save the state_dict"):
        open_checkpoint(tmp_path / "file.pth")


def test_files_of_another_network_are_named() -> None:
    state = tiny().state_dict()
    for network, words in [
        (net.build(Architecture("resnet18", 8)), ("resnet10", "resnet18", "--model resnet10")),
        (tiny(embedding_size=16), ("size 8", "16", "--embedding-size 8")),
        (tiny(heads=("embedding", "uncertainty")), ("heads embedding,", "uncertainty")),
        (tiny(head_norm=True), ("BatchNorm",)),
        (tiny(width=0.25), ("conv1.weight (8, 3, 3, 3) instead of (16, 3, 3, 3)",)),
    ]:
        with pytest.raises(InputError) as caught:
            net.load_checkpoint(network, state, source="some.pth")
        assert all(word in str(caught.value) for word in ("some.pth", *words))
    with pytest.raises(InputError, match="known architecture"):
        net.load_checkpoint(tiny(), {"weight": torch.zeros(3)})
    del state["model.layer3.0.conv1.weight"]
    with pytest.raises(InputError, match=r"lacks model\.layer3\.0\.conv1\.weight"):
        net.load_checkpoint(tiny(), state)


@pytest.mark.parametrize(
    ("name", "deviation", "bias"),
    [
        ("kaiming", (2 / 64) ** 0.5, 0.0),
        ("xavier_normal_2", 2 * (2 / (16 + 200)) ** 0.5, None),
        ("xavier_uniform_0.5", 0.5 * (2 / (16 + 200)) ** 0.5, None),
        ("kaiming_normal_fan_in", (1 / 200) ** 0.5, None),
        ("kaiming_normal_fan_out", (1 / 16) ** 0.5, None),
        ("trunc_normal", 0.1 * 0.88, 0.1),
        ("pt_splitted", (1 / 3 / 200) ** 0.5, None),
    ],
)
def test_starts_of_a_head(name: str, deviation: float, bias: float | None) -> None:
    torch.manual_seed(0)
    parts = 1 if name == "kaiming" else 4  # 64 rows, of which 16 start together
    head = heads.make_head(200, 64, name, parts=parts)
    assert head.weight.std().item() == pytest.approx(deviation, rel=0.05)
    limit = 200**-0.5
    assert (head.bias == bias).all() if bias is not None else 0 < head.bias.abs().max() <= limit


@pytest.mark.parametrize("name", ["xavier_uniform_big", "zeros", "xavier"])
def test_unknown_starts_of_a_head_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"--head-init {name} is unknown.*xavier_normal_GAIN"):
        Architecture("resnet10", 8, head_init=name)


def test_a_refused_file_changes_nothing() -> None:
    network, state = tiny(), tiny(width=0.25).state_dict()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(InputError):
        net.load_checkpoint(network, state)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    "name",
    ["bn_inception", "efficientnet_lite0", "googlenet", "resnet34", "resnet101", "resnet152"],
)
def test_every_architecture_is_told_by_its_keys(name: str) -> None:
    with torch.device("meta"):
        state = net.build(Architecture(name, 4)).state_dict()
    assert net.architecture_of(state).model == name


def followed(network: net.EmbeddingNet, momentum: float) -> list[tuple[torch.Tensor, ...]]:
    """Three batches through a network: running mean and variance of each BatchNorm, and by hand."""
    norms = [m for m in network.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    expected = {norm: [norm.running_mean.clone(), norm.running_var.clone()] for norm in norms}

    def follow(norm: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        seen = inputs[0].transpose(0, 1).flatten(1)
        mean, variance = expected[norm]
        mean += momentum * (seen.mean(1) - mean)
        variance += momentum * (seen.var(1) - variance)

    hooks = [norm.register_forward_pre_hook(follow) for norm in norms]
    network.train()
    with torch.no_grad():
        for batch in torch.randn(3, 4, 3, 64, 64):
            network(batch)
    for hook in hooks:
        hook.remove()
    return [(norm.running_mean, norm.running_var, *expected[norm]) for norm in norms]


@pytest.mark.parametrize(
    ("described", "momentum"),
    [
        ({"model": "bn_inception"}, 0.9),
        ({"model": "bn_inception", "bn_momentum": 0.1}, 0.1),
        ({"model": "resnet18", "width": 0.25}, 0.1),
        ({"model": "resnet10", "bn_momentum": 0.3}, 0.3),
    ],
)
def test_running_statistics_follow_the_momentum(described: dict, momentum: float) -> None:
    network = tiny(**{"width": 1.0, "stem": "small", "bn_freeze": "0", **described})
    statistics = followed(network, momentum)
    assert (
        len(statistics) == {"bn_inception": 69, "resnet18": 20, "resnet10": 12}[described["model"]]
    )
    for mean, variance, by_hand, variance_by_hand in statistics:
        torch.testing.assert_close(mean, by_hand, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance, variance_by_hand, rtol=1e-4, atol=1e-5)
    read = net.architecture_of({"network": network.description(), "model_state_dict": {}})
    assert read.bn_momentum == momentum


def test_a_backbone_of_your_own_keeps_the_momentum_it_is_built_with(
    mine: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Normed(Mine):
        def __init__(self, stem: str, width: float) -> None:
            super().__init__(stem, width)
            self.norm = torch.nn.BatchNorm2d(8, momentum=0.01)

    record = backbones.Backbone("mine", Normed)
    monkeypatch.setattr(sys.modules["net.mine"], "BACKBONES", (record,))
    assert net.build(mine).model.norm.momentum == 0.01
    assert net.build(replace(mine, bn_momentum=0.5)).model.norm.momentum == 0.5


def test_checkpoints_that_say_no_momentum_had_that_of_torch() -> None:
    network = tiny(model="bn_inception", width=1.0)
    described = network.description()
    del described["bn_momentum"]
    assert net.architecture_of({"network": described, "model_state_dict": {}}).bn_momentum == 0.1
    assert net.architecture_of(network.state_dict()).bn_momentum == 0.9  # a released one


@pytest.mark.parametrize("momentum", [0.0, 1.5])
def test_impossible_momenta_are_refused(momentum: float) -> None:
    with pytest.raises(InputError, match=r"bn_momentum .* above 0 and at most 1"):
        Architecture("resnet10", 8, bn_momentum=momentum)


# --- pretrained -----------------------------------------------------------------------------------


@pytest.fixture
def weights_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Empty folders in place of data/weights and torch's cache; the working folder is new too."""
    monkeypatch.chdir(tmp_path)
    folder, cache_folder = tmp_path / "weights", tmp_path / "hub"
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", folder)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(cache_folder))
    return folder, cache_folder / "checkpoints"


def test_imagenet_weights_are_found_in_pretrained_models(
    weights_places: tuple[Path, Path], tmp_path: Path
) -> None:
    """Where the spherical-embedding code has them; data/weights comes first."""
    name = "bn_inception-52deb4733.pth"
    theirs = tmp_path / "pretrained_models" / name
    theirs.parent.mkdir()
    theirs.touch()
    backbone = backbones.find_backbone("bn_inception")
    assert weights.imagenet_file(backbone).resolve() == theirs
    weights_places[0].mkdir()
    (weights_places[0] / name).touch()
    assert weights.imagenet_file(backbone) == weights_places[0] / name


def serve(monkeypatch: pytest.MonkeyPatch, model: str, file: Path) -> None:
    """Lets a file stand where the ImageNet weights of a ResNet are downloaded from."""
    records = [
        replace(record, imagenet_url=file.as_uri()) if record.name == model else record
        for record in resnet.BACKBONES
    ]
    monkeypatch.setattr(resnet, "BACKBONES", tuple(records))


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("layout", ["backbone", "checkpoint", "torch 0.3"])
def test_pretrained_file(layout: str, tmp_path: Path) -> None:
    saved = tiny()
    state = dict(saved.state_dict())
    if layout != "checkpoint":
        heads = "model.embedding."
        state = {k.removeprefix("model."): v for k, v in state.items() if not k.startswith(heads)}
        state["fc.weight"] = torch.zeros(1000, 64)
    if layout == "torch 0.3":
        state = {k: v[None] if v.dim() == 1 else v for k, v in state.items() if v.dim()}
    torch.save(state, tmp_path / "file.pth")
    torch.manual_seed(1)
    network = net.build(Architecture(**TINY), pretrained=str(tmp_path / "file.pth"))
    torch.testing.assert_close(network.eval().features(images()), saved.eval().features(images()))
    assert not torch.equal(network.model.embedding.weight, saved.model.embedding.weight)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pretrained_file_of_another_training_code(wrapper: str, prefix: str, tmp_path: Path):
    saved = dict(tiny().model.state_dict())
    state = {f"{prefix}{k}": v for k, v in saved.items() if not k.startswith("embedding.")}
    torch.save({wrapper: state, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "file.pth")
    network = net.build(Architecture(**TINY), pretrained=str(tmp_path / "file.pth"))
    assert all(
        torch.equal(network.model.state_dict()[k.removeprefix(prefix)], state[k]) for k in state
    )


def test_pretrained_file_of_another_kind(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"file\.pth holds a resnet10, not a resnet18"):
        net.build(Architecture("resnet18", 8), pretrained=str(tmp_path / "file.pth"))
    torch.save({"scores": [1, 2]}, tmp_path / "file.pth")
    with pytest.raises(InputError, match="no known network"):
        tiny(pretrained=str(tmp_path / "file.pth"))
    with pytest.raises(InputError, match="does not exist"):
        tiny(pretrained=str(tmp_path / "nowhere.pth"))


def test_imagenet_weights_are_found_before_they_are_downloaded(
    weights_places: tuple[Path, Path],
    bn_inception: net.EmbeddingNet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, arrays = fixture("bn_inception")
    released = {
        key.removeprefix("model."): value[None] if value.dim() == 1 else value
        for key, value in state.items()
        if "embedding" not in key and value.dim()
    }
    folder, _ = weights_places
    folder.mkdir()
    torch.save(released, folder / "bn_inception-52deb4733.pth")
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    network = net.build(Architecture("bn_inception", 8), pretrained="imagenet").eval()
    with torch.no_grad():
        expected = bn_inception.features(arrays["input"])
        torch.testing.assert_close(network.features(arrays["input"]), expected)


def test_without_a_network_one_sentence_says_where_to_put_the_file(
    weights_places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(InputError) as caught:
        net.build(Architecture("bn_inception", 8), pretrained="imagenet")
    message, (folder, checkpoints) = str(caught.value), weights_places
    assert "bn_inception-52deb4733.pth" in message and str(folder) in message
    assert "no route to host" in message and "\n" not in message
    assert files_below(checkpoints) == []


def test_a_download_with_another_hash_leaves_nothing(
    weights_places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "served" / "resnet18-f37072fd.pth"
    source.parent.mkdir()
    source.write_bytes(b"cut short")
    serve(monkeypatch, "resnet18", source)
    with pytest.raises(InputError, match="hash"):
        net.build(Architecture("resnet18", 8), pretrained="imagenet")
    assert files_below(weights_places[1]) == []


def test_a_download_is_cached_and_loaded(
    weights_places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    backbone = net.build(Architecture("resnet18", 8)).model
    state = {k: v for k, v in backbone.state_dict().items() if not k.startswith("embedding")}
    served = tmp_path / "served.pth"
    torch.save(state, served)
    digest = hashlib.sha256(served.read_bytes()).hexdigest()[:8]
    served = served.rename(tmp_path / f"resnet18-{digest}.pth")
    serve(monkeypatch, "resnet18", served)
    network = net.build(Architecture("resnet18", 8), pretrained="imagenet")
    assert torch.equal(network.model.conv1.weight, backbone.conv1.weight)
    assert files_below(weights_places[1]) == [served.name]


def test_every_backbone_of_the_papers_has_imagenet_weights() -> None:
    records = map(net.find_backbone, net.MODELS)
    without = [each.name for each in records if not (each.imagenet_url or each.imagenet_package)]
    assert without == ["resnet10"]


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_freeze", ["0", "statistics"])
@pytest.mark.parametrize("model", ["bn_inception", "resnet18", "googlenet", "efficientnet_lite0"])
def test_bfloat16_and_channels_last(model: str, bn_freeze: str) -> None:
    torch.manual_seed(0)
    network = net.build(Architecture(model, 32, bn_freeze=bn_freeze))
    batch = images(16, 64)
    expected = network(batch).embedding.detach()
    network.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = network(batch.contiguous(memory_format=torch.channels_last)).embedding
        evaluated = network.eval().embed(batch)
    outputs.square().mean().backward()
    assert outputs.dtype == evaluated.dtype == torch.float32
    # A fresh network with trained BatchNorms amplifies rounding most; 0.9 tells it from a mistake.
    assert F.cosine_similarity(outputs, expected).min() > (0.9 if bn_freeze == "0" else 0.999)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_bfloat16_stays_near_the_released_outputs(bn_inception: net.EmbeddingNet) -> None:
    _, arrays = fixture("bn_inception")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = bn_inception.embed(arrays["input"])
    torch.testing.assert_close(F.normalize(outputs), arrays["embedding"], rtol=0, atol=2e-3)
