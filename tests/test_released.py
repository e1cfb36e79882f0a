"""Checkpoints of the released codes, in each of their layouts, through evaluate.py's command line.

Weights are those of the network fixtures, which the released networks were run with; what is
expected is computed here from the same weights with torchvision's transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import official_layouts
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import FIXTURES, run_cli
from PIL import Image
from released_weights import released_tensor
from torch import Tensor, nn
from torchvision.transforms import functional as tv

import evaluate
import net
import options
from utils import InputError

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two held-out classes of three photographs of several shapes, in CUB's official layout."""
    root = tmp_path_factory.mktemp("birds")
    official_layouts.write("cub", "official", root, classes=4, images=3)
    rng = np.random.default_rng(0)
    for index, path in enumerate(sorted(root.rglob("*.jpg"))):
        size = ((300, 260), (240, 320), (256, 256))[index % 3]
        coarse = rng.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return root


# --- weights, layouts and answers -----------------------------------------------------------------


@functools.cache
def fixture_weights(name: str) -> State:
    """The released state_dict of a network fixture; not to be changed."""
    archive = np.load(FIXTURES / f"net_{name}_0.npz")
    shapes = [tuple(int(n) for n in text.split(",") if n) for text in archive["shapes"].tolist()]
    return {k: released_tensor(k, s) for k, s in zip(archive["keys"].tolist(), shapes, strict=True)}


def torchvision_resnet(weights: State) -> nn.Module:
    """torchvision's own ResNet-50 up to its last feature map, with a fixture's backbone."""
    backbone = torchvision.models.resnet50()
    own = {k.removeprefix("model."): v for k, v in weights.items()}
    backbone.load_state_dict({k: own[k] for k in backbone.state_dict() if k in own}, strict=False)
    return nn.Sequential(*list(backbone.children())[:-2]).eval()


def resnet_answers(weights: State, pooling: str) -> Callable[[Tensor], Tensor]:
    maps_of = torchvision_resnet(weights)
    head = weights["model.embedding.weight"], weights["model.embedding.bias"]

    def answer(images: Tensor) -> Tensor:
        maps = maps_of(images)
        pooled = maps.mean((2, 3)) + (maps.amax((2, 3)) if pooling == "avg+max" else 0)
        return F.linear(pooled, *head)

    return answer


def inception_answers(weights: State, **built: object) -> Callable[[Tensor], Tensor]:
    """The network that answers the fixtures (test_net.py) with these weights."""
    network = net.build(net.Architecture("bn_inception", 512, **built)).eval()
    net.load_checkpoint(network, weights)
    return network.embed


def imagenet_input(image: Image.Image) -> Tensor:
    """RGB in 0..1, ImageNet's mean and deviation, 224 of 256 pixels."""
    view = tv.center_crop(tv.resize(image, 256), 224)
    return tv.normalize(tv.to_tensor(view), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def caffe_input(image: Image.Image, size: int = 224, red: float = 128.0) -> Tensor:
    """BGR in 0..255 without its mean."""
    pixels = tv.pil_to_tensor(tv.center_crop(tv.resize(image, 256), size)).float()
    return pixels[[2, 1, 0]] - torch.tensor([104.0, 117.0, red])[:, None, None]


def spherical_input(image: Image.Image) -> Tensor:
    return caffe_input(image, size=227, red=123.0)


class Released(NamedTuple):
    """A file of a released code, and what its network answers."""

    file: dict
    model: str
    answers: Callable[[Tensor], Tensor]
    input: Callable[[Image.Image], Tensor]


def proxy_anchor(prefix: str = "") -> Released:
    """Proxy-Anchor, AMLoss: under model_state_dict, with `module.` from several GPUs."""
    weights = fixture_weights("bn_inception")
    file = {"model_state_dict": {prefix + key: value for key, value in weights.items()}}
    return Released(file, "bn_inception", inception_answers(weights), caffe_input)


def idml(prefix: str = "module.") -> Released:
    """IDML: a second head, which evaluation does not look at."""
    weights = fixture_weights("idml_resnet50")
    file = {"model_state_dict": {prefix + key: value for key, value in weights.items()}}
    return Released(file, "resnet50", resnet_answers(weights, "avg+max"), imagenet_input)


def ddml() -> Released:
    """DDML: the main head's means are the embedding; another head stands on its whole output."""
    weights, mean = dict(fixture_weights("bn_inception")), {}
    for part, shape in (("weight", (1024, 1024)), ("bias", (1024,))):
        for head in ("embedding", "embedding_specific"):
            weights[f"model.{head}.{part}"] = released_tensor(f"model.{head}.{part}", shape)
        mean[f"model.embedding.{part}"] = weights[f"model.embedding.{part}"][:512]
    answers = inception_answers(
        {k: v for k, v in weights.items() if ".embedding_specific." not in k} | mean
    )
    return Released({"model_state_dict": weights}, "bn_inception", answers, caffe_input)


def spherical(name: str) -> Released:
    """SEC: a bare state_dict with a head of its own, with or without a BatchNorm."""
    weights = fixture_weights(name)
    built = {"pooling": "avg", "head_norm": name == "sec_bn_inception", "input_spec": "spherical"}
    return Released(weights, "bn_inception", inception_answers(weights, **built), spherical_input)


def divide_and_conquer() -> Released:
    """Divide and conquer: torchvision's names, each tensor also as features.*, 32 masks."""
    weights = fixture_weights("resnet50")
    file = {}
    for number, child in enumerate(
        ("conv1", "bn1", "", "", "layer1", "layer2", "layer3", "layer4")
    ):
        for key, value in weights.items():
            bare = key.removeprefix("model.")
            if child and bare.startswith(f"{child}."):
                file[bare] = value
                file[f"features.{number}{bare.removeprefix(child)}"] = value
    file |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    file |= {f"embedding.{part}": weights[f"model.embedding.{part}"] for part in ("weight", "bias")}
    file |= {f"masks.{k}": released_tensor(f"masks.{k}", (512,)) for k in range(32)}
    return Released(file, "resnet50", resnet_answers(weights, "avg"), imagenet_input)


LAYOUTS: dict[str, Callable[[], Released]] = {
    "proxy-anchor": proxy_anchor,
    "idml": idml,
    "ddml": ddml,
    "sec": lambda: spherical("sec_bn_inception"),
    "sec without BatchNorm": lambda: spherical("sec_bn_inception_nobn"),
    "divide and conquer": divide_and_conquer,
}


def command(released: Released, birds: Path, folder: Path, *more: str) -> list[str]:
    torch.save(released.file, folder / "released.pth")
    return [
        *("--resume", str(folder / "released.pth"), "--model", released.model),
        *("--embedding-size", "512", "--dataset", "cub", "--data-root", str(birds)),
        *("--workers", "0", "--amp", "off", "--ks", "1", "2"),
        *("--export", str(folder / "e.npz"), *more),
    ]


def assert_exported(released: Released, birds: Path, folder: Path) -> None:
    exported = np.load(folder / "e.npz")
    paths = exported["paths"].tolist()
    assert len(paths) == 6 and exported["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    with torch.no_grad():
        images = torch.stack([released.input(Image.open(birds / path)) for path in paths])
        expected = F.normalize(released.answers(images))
        shifted = F.normalize(released.answers(images.roll(1, dims=3)))
    np.testing.assert_allclose(exported["embeddings"], expected.numpy(), rtol=0, atol=5e-5)
    assert (shifted - expected).abs().max() > 5e-4  # a view one pixel off would be noticed


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_released_file_gives_its_own_embeddings(
    layout: str, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    released = LAYOUTS[layout]()
    evaluate.run(options.parse_evaluate(command(released, birds, tmp_path)))
    assert_exported(released, birds, tmp_path)
    assert "6 images, 2 classes" in capsys.readouterr().out


def test_the_command_line_as_a_user_types_it(birds: Path, tmp_path: Path) -> None:
    """With a file of a network that was trained on several GPUs."""
    released = proxy_anchor("module.")
    done = run_cli("evaluate.py", *command(released, birds, tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_exported(released, birds, tmp_path)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet50"], ["a bn_inception", "a resnet50", "--model bn_inception"]),
        (["--embedding-size", "64"], ["size 512", "64", "--embedding-size 512"]),
        (["--head-norm", "1"], ["BatchNorm"]),
        (["--uncertain", "u.csv"], ["no uncertainty head"]),
    ],
)
def test_flags_that_describe_another_network_are_named(
    flags: list[str], words: list[str], birds: Path, tmp_path: Path
) -> None:
    line = command(proxy_anchor(), birds, tmp_path, *flags)
    with pytest.raises(InputError) as refusal:
        evaluate.run(options.parse_evaluate(line))
    assert all(word in str(refusal.value) for word in words)
    assert not (tmp_path / "e.npz").exists()
