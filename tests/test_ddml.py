"""DDML as released: its network, loss and gradients; and runs of the network before it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import FIXTURES, run_cli
from released_weights import released_tensor

import net
import train
from evaluation.networks import open_checkpoint
from losses import DisentanglingLoss, Embeddings, ProxyAnchorLoss, compose
from utils import InputError

DISENTANGLED = "--disent True --al 1 --be 0.1 --gam 1e-3 --warm 0"


# --- as released ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> dict[str, torch.Tensor]:
    archive = np.load(FIXTURES / "ddml_network_0.npz")
    return {k: torch.from_numpy(archive[k]) for k in archive.files if k != "state_dict_keys"}


@pytest.fixture(scope="module")
def network() -> net.EmbeddingNet:
    """With the weights of the fixture, by key; after the warm-up of bn-freeze 1."""
    heads = ("embedding", "specific")
    built = net.build(net.Architecture("bn_inception", 64, heads, bn_freeze="1"))
    weights = {key: released_tensor(key, value.shape) for key, value in built.state_dict().items()}
    built.load_state_dict(weights)
    built.freeze_backbone(True)
    built.freeze_backbone(False)
    return built


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the rounding of float32 in the whole network: raw outputs reach the thousands."""
    scale = max(1.0, expected.abs().max().item())
    expected = expected.to(actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * scale)


def test_the_heads_have_their_released_keys(network: net.EmbeddingNet) -> None:
    kept = np.load(FIXTURES / "ddml_network_0.npz")["state_dict_keys"].tolist()
    assert [key for key in network.state_dict() if "embedding" in key] == kept


def test_the_specific_head_stands_on_the_raw_main_head(
    network: net.EmbeddingNet, released: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        outputs = network(released["input"])
    assert_close(outputs.embedding, released["main_0"])
    assert_close(outputs.specific, released["specific_0"])
    assert_close(F.normalize(outputs.embedding), released["main_1"])
    assert_close(F.normalize(outputs.specific), released["specific_1"])
    assert torch.equal(outputs.retrieval, outputs.embedding[:, :64])


def test_loss_and_gradients_are_the_released_ones(
    network: net.EmbeddingNet,
    released: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = {"al": 1.0, "be": 0.1, "gam": 1e-3}
    objective = compose("Proxy_Anchor", 7, 64, {"disentangled": weights}, l2_norm=True)
    base = objective.parts["metric"].criterion.base
    with torch.no_grad():
        base.proxies.copy_(released["proxies"])
    drawn = iter(released["noise_1"])
    monkeypatch.setattr("criteria.ddml.torch.randn", lambda *size, **more: next(drawn))
    network.zero_grad()
    loss = objective(network(released["input"]), released["labels"])
    loss.backward()
    heads = network.model
    assert_close(loss, released["loss_1"])
    for ours, theirs in (("agnostic", "agnostic"), ("specific", "class"), ("split", "split")):
        assert_close(objective.terms[ours], released[f"{theirs}_1"])
    for gradient, theirs in (
        (heads.embedding.weight.grad, "main_weight"),
        (heads.embedding_specific.weight.grad, "specific_weight"),
        (base.proxies.grad, "proxies"),
    ):
        assert_close(gradient, released[f"grad_{theirs}_1"])
    # A few activations lie within float32's rounding of a ReLU's or a maximum's border, where the
    # gradient jumps: in float64 the released network gives ours to 1e-14 and not its own float32.
    expected = released["grad_conv_1"]
    assert (heads.conv1_7x7_s2.weight.grad - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("l2_norm", [True, False])
def test_l2_norm_decides_what_the_criterion_is_fed(l2_norm: bool) -> None:
    """Each 2d vector is divided by its own length, the raw spreads among it."""
    objective = compose("Proxy_Anchor", 5, 4, {"disentangled": {"be": 1.0}}, l2_norm=l2_norm)
    criterion = objective.parts["metric"].criterion
    main, specific, labels = 3 * torch.randn(6, 8), 3 * torch.randn(6, 8), torch.arange(6) % 5
    torch.manual_seed(0)
    loss = objective(Embeddings(main, specific=specific), labels)
    torch.manual_seed(0)
    fed = [F.normalize(head) if l2_norm else head for head in (main, specific)]
    assert torch.equal(loss, criterion(*fed, labels))
    torch.manual_seed(0)
    other = [head if l2_norm else F.normalize(head) for head in (main, specific)]
    assert not torch.isclose(loss, criterion(*other, labels))


def test_without_weights_it_is_its_base_and_says_so(images: Path) -> None:
    base = ProxyAnchorLoss(5, 4)
    criterion = DisentanglingLoss(base)
    main, labels = torch.randn(6, 8), torch.arange(6) % 5
    assert criterion(main, torch.randn(6, 8), labels).item() == base(main[:, :4], labels).item()
    said = train.describe(tiny.prepare(images, "--disent True"))
    assert "trains Proxy_Anchor alone" in said and "--al 1 --be 0.1 --gam 1e-5" in said
    for flags in ("--disent True --gam 1e-3", ""):
        assert "alone" not in train.describe(tiny.prepare(images, flags))


def test_the_specific_terms_train_the_main_head(images: Path) -> None:
    training = tiny.prepare(images, f"{DISENTANGLED} --amp off")
    batch = next(iter(training.loader))
    training.network.zero_grad()
    outputs = training.network(batch.images)
    outputs.specific.sum().backward()
    assert training.network.model.embedding.weight.grad.abs().sum() > 0
    groups = {group["name"]: group["params"] for group in training.optimisers.groups}
    assert any(p is training.network.model.embedding_specific.weight for p in groups["head"])
    training.network.freeze_backbone(True)
    assert training.network.model.embedding_specific.weight.requires_grad


# --- the network before it ------------------------------------------------------------------------


@pytest.fixture
def former(images: Path, tmp_path: Path) -> Path:
    """A run as it was when the specific head stood on the features, stopped after two steps."""
    run = tiny.run(images, tmp_path, "run", f"{DISENTANGLED} --max-steps 2 --amp off")
    for file in run.glob("*.pth"):
        rewrite(file, as_formerly)
    return run


def rewrite(file: Path, change: Callable[[dict], None]) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def as_formerly(content: dict) -> None:
    weights = content["model_state_dict"]
    features = weights["model.embedding.weight"].shape[1]
    del weights["model.embedding_specific.weight"]
    weights["model.specific.weight"] = torch.randn(16, features)
    weights["model.specific.bias"] = weights.pop("model.embedding_specific.bias")


def test_a_run_of_the_former_network_is_not_continued_as_another(
    former: Path, images: Path
) -> None:
    before = {path.name: path.read_bytes() for path in former.iterdir()}
    done = run_cli("train.py", "--resume-run", str(former), "--max-steps", "4", cwd=former.parent)
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    assert re.search(r"another network .*model\.\S*specific.* start a new run$", sentence)
    assert {path.name: path.read_bytes() for path in former.iterdir()} == before


@pytest.mark.parametrize("described", [True, False], ids=["described", "by flags"])
def test_a_run_of_the_former_network_is_still_evaluated(former: Path, described: bool) -> None:
    """By the means of its main head, as it always was."""
    file = former / "last.pth"
    if not described:
        rewrite(file, lambda content: content.pop("network"))
    weights = torch.load(file, weights_only=True)["model_state_dict"]
    opened = open_checkpoint(file).network.eval()
    pictures = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = opened.features(pictures)
        main = F.linear(
            features, weights["model.embedding.weight"], weights["model.embedding.bias"]
        )
        torch.testing.assert_close(opened.embed(pictures), main[:, :8])
    assert opened.heads == ("embedding",)


def test_a_former_network_is_no_start_for_the_present_one(former: Path, images: Path) -> None:
    start = f"{DISENTANGLED} --checkpoint {tiny.best_checkpoint(former)}"
    with pytest.raises(InputError, match="has the heads embedding, the network embedding and spec"):
        tiny.prepare(images, start)
