"""EfficientNet-Lite0 on its real ImageNet weights: outputs, padding, and where they come from."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT

import net
import options
import train
from evaluation.networks import open_checkpoint
from net import Architecture, weights
from net.checkpoints import backbone_of
from net.efficientnet import BACKBONES, STAGES, EfficientNetLite
from net.export import Graph, export_onnx, export_torchscript
from utils import InputError

(RECORD,) = BACKBONES
PACKAGE = RECORD.imagenet_package
WHOLE = {"model": "efficientnet_lite0", "embedding_size": 8, "pooling": "avg"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def released_file() -> Path:
    """The file that the package carries."""
    pytest.importorskip(PACKAGE.module)
    return weights.imagenet_file(RECORD)


@pytest.fixture(scope="module")
def released(released_file: Path) -> dict[str, torch.Tensor]:
    """Its tensors."""
    return torch.load(released_file, weights_only=True)


def start(**described: object) -> net.EmbeddingNet:
    torch.manual_seed(0)
    return net.build(Architecture(**(WHOLE | described)), pretrained="imagenet")


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- outputs --------------------------------------------------------------------------------------


def timm_names() -> dict[str, str]:
    """Our name of each layer → timm's, which counts blocks within their stage."""
    layers = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    number = 0
    for place, stage in enumerate(STAGES):
        ours = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
        theirs = ["conv_dw", "bn1", "conv_pw", "bn2"]
        if stage.expansion > 1:
            ours = ["_expand_conv", "_bn0", *ours]
            theirs = ["conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3"]
        for step in range(stage.blocks):
            for own, their in zip(ours, theirs, strict=True):
                layers[f"_blocks.{number}.{own}"] = f"blocks.{place}.{step}.{their}"
            number += 1
    return layers


@pytest.mark.parametrize("size", [64, 97])
@pytest.mark.parametrize("bn_freeze", ["0", "1"])
def test_features_are_timms_on_the_released_weights(bn_freeze, size, released):
    """Whatever the parity of the image's side, for `SAME` pads by it; BatchNorm folded and not."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    layers = timm_names()
    state = {}
    for key, value in released.items():
        layer, _, entry = key.rpartition(".")
        if layer != "_fc":
            state[f"{layers[layer]}.{entry}"] = value
    theirs.load_state_dict(state)
    ours = start(bn_freeze=bn_freeze)
    batch = images(size=size)
    for network in (theirs, ours):
        network.train(bn_freeze == "0")
    theirs.conv_stem.requires_grad_(True)
    expected, found = theirs(batch), ours.features(batch)
    torch.testing.assert_close(F.normalize(found), F.normalize(expected), rtol=0, atol=1e-5)
    gradients = []
    for features, first in ((expected, theirs.conv_stem), (found, ours.model._conv_stem)):
        gradients.append(torch.autograd.grad(features.sin().sum(), first.weight)[0])
    assert F.cosine_similarity(*(each.flatten() for each in gradients), dim=0) > 0.9999


def test_it_is_fed_as_its_weights_were():
    pixels = torch.tensor([0.0, 127.0, 255.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    seen = []
    network = net.build(Architecture(**WHOLE))
    network.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    Graph(network, 32)(pixels)
    torch.testing.assert_close(seen[0][0, :, 0, 0], torch.tensor([-127 / 128, 0.0, 1.0]))


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 2), ("small", 4), ("tiny", 8)])
def test_every_stem_starts_from_the_same_weights(stem, side, released):
    network = start(stem=stem)
    assert network.model.eval()(images(1, 64)).shape == (1, 1280, side, side)
    for key in ("_conv_stem.weight", "_blocks.15._bn2.running_var"):
        assert torch.equal(network.model.state_dict()[key], released[key])
    # The file's tensors are strided otherwise, which would make every step slower.
    assert all(parameter.is_contiguous() for parameter in network.parameters())
    assert Architecture(**WHOLE).backbone.default_stem(64) == "small"


@pytest.mark.parametrize(("kept", "channels", "side"), [(11, 112, 8), (15, 192, 4), (16, 320, 4)])
def test_it_can_end_early(kept, channels, side, released, tmp_path):
    """With the same weights, from the package, from a file of ours, and back from a checkpoint."""
    del released
    whole, cut = start(stem="small").eval(), start(stem="small", keep_blocks=kept).eval()
    batch = images()
    seen = []
    whole.model._blocks[kept - 1].register_forward_hook(lambda *call: seen.append(call[-1]))
    whole.embed(batch)
    maps = cut.model(batch)
    assert maps.shape == (2, channels, side, side) and len(cut.blocks()) == kept + 1
    torch.testing.assert_close(maps, seen[0])
    checkpoint = {"network": cut.description(), "model_state_dict": cut.state_dict()}
    assert net.architecture_of(checkpoint) == cut.architecture
    torch.save(checkpoint, tmp_path / "cut.pth")
    again = net.build(cut.architecture, pretrained=str(tmp_path / "cut.pth")).eval()
    torch.testing.assert_close(again.model(batch), maps)


def test_blocks_that_are_not_there_cannot_be_kept():
    with pytest.raises(InputError, match=r"keep_blocks 17.*has 16"):
        net.build(Architecture(**WHOLE, keep_blocks=17))
    with pytest.raises(InputError, match="resnet18 cannot be cut short; leave it out"):
        Architecture("resnet18", 8, keep_blocks=3)


def test_a_fresh_one_keeps_the_size_of_its_signal():
    """Depthwise kernels have few outputs each; torch's fan would count those of all groups."""
    torch.manual_seed(0)
    network = EfficientNetLite()
    sizes = []
    for block in network._blocks:
        block._depthwise_conv.register_forward_hook(
            lambda conv, inputs, out: sizes.append((out.std() / inputs[0].std()).item())
        )
    network(images(8))
    assert len(sizes) == 16 and min(sizes) > 0.3


def test_gradients_reach_every_parameter():
    network = net.build(Architecture(**WHOLE))
    network(images()).embedding.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


# --- where the weights come from ------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data/weights, no pretrained_models, and the package cannot be found; a folder for one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "WEIGHTS_FOLDER", tmp_path / "weights")
    monkeypatch.setattr(weights, "OTHER_FOLDERS", ())
    monkeypatch.delitem(sys.modules, PACKAGE.module, raising=False)
    site = tmp_path / "site"
    site.mkdir()
    own = [place for place in sys.path if not (Path(place) / PACKAGE.module).is_dir()]
    monkeypatch.setattr(sys, "path", [str(site), *own])
    return site


def test_without_the_package_one_sentence_says_what_to_install(nowhere):
    with pytest.raises(InputError) as caught:
        start()
    message = str(caught.value)
    assert f"pip install {PACKAGE.requirement}" in message and "not installed" in message
    assert "--pretrained none" in message and "\n" not in message


def test_another_file_is_refused(nowhere):
    file = nowhere / PACKAGE.module / PACKAGE.file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"another")
    with pytest.raises(InputError, match="is not the published file") as caught:
        start()
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_the_package_is_read_but_never_run(released_file, nowhere, tmp_path):
    """Only its file is wanted. data/weights comes first and is checked in the same way."""
    package = nowhere / PACKAGE.module
    file = package / PACKAGE.file
    file.parent.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('this package was imported')")
    file.write_bytes(released_file.read_bytes())
    assert weights.imagenet_file(RECORD) == file
    own = tmp_path / "weights" / file.name
    own.parent.mkdir()
    shutil.copy(file, own)
    assert weights.imagenet_file(RECORD) == own
    own.write_bytes(b"another")
    with pytest.raises(InputError, match="is not the published file"):
        weights.imagenet_file(RECORD)


# --- the same as any other backbone ---------------------------------------------------------------


def test_a_file_is_told_by_its_keys(released, tmp_path):
    """The package's file, and one with a head of ours; B0, which has a squeeze, is another."""
    assert backbone_of(released, "file") == "efficientnet_lite0"
    network = start()
    foreign = network.state_dict()
    found = net.architecture_of(foreign, image_size=64)
    assert (found.model, found.embedding_size, found.stem) == ("efficientnet_lite0", 8, "small")
    with_squeeze = {**foreign, "model._blocks.0._se_reduce.weight": torch.zeros(8, 32, 1, 1)}
    with pytest.raises(InputError, match="no embedding network of a known architecture"):
        net.architecture_of(with_squeeze)
    torch.save(released, tmp_path / "file.pth")
    again = net.build(Architecture(**WHOLE), pretrained=str(tmp_path / "file.pth"))
    for key, value in again.model.state_dict().items():
        assert key.startswith("embedding") or torch.equal(value, foreign[f"model.{key}"])


def test_it_trains_continues_and_is_exported(tmp_path, released):
    """From ImageNet's weights, through the commands' own functions; continued to the bit."""
    folder = tmp_path / "images"
    tiny.write_images(folder)
    flags = "--model efficientnet_lite0 --width 1 --pretrained imagenet --warm 0 --amp off"
    whole = tiny.run(folder, tmp_path, "whole", f"{flags} --max-steps 3")
    halved = tiny.run(folder, tmp_path, "halved", f"{flags} --max-steps 1")
    tiny.resume(halved, "--max-steps 3")
    ends = [tiny.saved(run)["model_state_dict"] for run in (whole, halved)]
    assert tiny.same(*ends)
    head = ends[0]["model._conv_head.weight"]
    assert not torch.equal(head, released["_conv_head.weight"])
    assert F.cosine_similarity(head.flatten(), released["_conv_head.weight"].flatten(), dim=0) > 0.9
    opened = open_checkpoint(whole)
    assert opened.network.architecture.model == "efficientnet_lite0"
    export_torchscript(Graph(opened.network, 32), tmp_path / "net.pt")
    assert torch.jit.load(tmp_path / "net.pt")(torch.rand(3, 3, 32, 32) * 255).shape == (3, 8)
    pytest.importorskip("onnxscript")
    export_onnx(Graph(opened.network, 32), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").stat().st_size > 1e7


# --- precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [0, 4])
def test_depthwise_kernels_that_train_on_a_cpu_do_so_in_float32(frozen, monkeypatch):
    """Those that rest, and all of them in evaluation, use bfloat16, which is faster forward."""
    network = net.build(Architecture(**WHOLE, bn_freeze="1"))
    resting = [network.model._conv_stem, network.model._bn0, *network.model._blocks[:frozen]]
    for module in resting if frozen else []:
        module.requires_grad_(False)
    seen = []
    convolve = F.conv2d

    def spy(x, weight, *rest, groups=1):
        out = convolve(x, weight, *rest, groups=groups)
        seen.extend([out.dtype] if groups > 1 else [])
        return out

    monkeypatch.setattr(F, "conv2d", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(images()).embedding.sum().backward()
        trained, seen = seen[:], []
        with torch.no_grad():
            network.embed(images())
    half, single = torch.bfloat16, torch.float32
    assert trained == [half] * frozen + [single] * (16 - frozen)
    assert seen == [half] * 16
    assert network.model._blocks[-1]._depthwise_conv.weight.grad.abs().sum() > 0


# --- the demo -------------------------------------------------------------------------------------

FEW_CLASSES = "--ratio-classes 0.05 --wandb disabled --no-report --workers 0 --metrics retrieval"


def retrieved(flags: str, folder: Path, name: str) -> float:
    """R@1 in percent on a few test classes of the emoji at the end of a run of train.py."""
    line = f"{flags} {FEW_CLASSES} --LOG_DIR {folder} --name {name}"
    train.main(options.parse_train(line.split()))
    return 100 * float(tiny.metrics_rows(folder / name)[-1]["R@1"])


def test_the_demos_recipe_goes_on_from_what_imagenet_knows(tmp_path, released):
    """A few steps of it are worth more than the same steps of the same network from nothing."""
    del released
    recipe = f"@{ROOT / 'recipes' / 'emoji_imagenet.txt'} --max-steps 4 --batch-size 32 --epochs 1"
    recipe += " --eval-every 1"
    known = retrieved(recipe, tmp_path, "imagenet")
    nothing = retrieved(f"{recipe} --pretrained none --freeze-blocks 0", tmp_path, "none")
    assert known > nothing + 5
