"""Losses, training, evaluation and search on a GPU that is none (fake_card.py).

No operator is given tensors of two devices, and a training step makes the host wait for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_card
import pytest
import tiny
import torch
from fake_card import DEVICE, Card, OnCard

import evaluate
import losses
import net
import options
import train

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py has a real one")


@pytest.fixture
def card() -> Iterator[Card]:
    with fake_card.plugged_in() as card:
        yield card


# --- the card itself ------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(card):
    there, here = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
    assert (there * 2 + torch.tensor(1.0)).tolist() == [[3, 3], [3, 3]]
    for wrong in (
        lambda: there + here,
        lambda: here @ there,
        lambda: torch.cat([there, here]),
        lambda: here[there.long()],
    ):
        with pytest.raises(fake_card.TwoDevices):
            wrong()
    with pytest.raises(TypeError):
        there.numpy()


def test_it_notes_what_is_waited_for(card):
    x = torch.arange(4.0).pin_memory().to(DEVICE, non_blocking=True)
    y = torch.where(x > 1, x, 0).sum() * torch.rand(2, device=DEVICE)
    assert not card.waits and y.device == DEVICE
    for waits in (
        lambda: float(x[0]),
        lambda: x.cpu(),
        lambda: x[x > 1],
        lambda: torch.ones(2).to(DEVICE),
        lambda: x.nonzero(),
    ):
        card.waits.clear()
        waits()
        assert len(card.waits) == 1


# --- losses ---------------------------------------------------------------------------------------

OURS = [
    name for name, entry in losses.CRITERIA.items() if not isinstance(entry, losses.LibraryEntry)
]
ATTACHED = {
    "introspective": {"introspective": {"variant": "paper"}},
    "disentangled": {"disentangled": {"al": 1.0, "be": 0.1, "gam": 1e-5}},
    "matryoshka": {"matryoshka": {"sizes": [2, 6]}},
    "sphere": {"sec": {"weight": 1.0, "momentum": 0.5}},
}
LOSSES = {name: (name, {}) for name in OURS} | {
    attached: ("Proxy_Anchor", more) for attached, more in ATTACHED.items()
}
SMALLER = {"HIER": {"ancestors": 16}}


@pytest.mark.parametrize("case", LOSSES)
def test_no_sum_of_a_loss_is_in_half_precision(case, card):
    """Under a GPU's autocast, which this one's tensors know, the loss has the same bits."""
    name, attached = LOSSES[case]
    host = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 0, 1])
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        objective = losses.compose(name, 5, 6, attached, **SMALLER.get(name, {})).to(DEVICE)
        labels = host.to(DEVICE)
        labels.host = host
        wide = 12 if "specific" in objective.heads else 6
        heads = {head: torch.randn(10, wide).to(DEVICE) for head in objective.heads}
        outputs = losses.Embeddings(**{k: head.requires_grad_() for k, head in heads.items()})
        with torch.autocast("cuda", torch.float16, enabled=half):
            loss = objective(outputs, labels)
        loss.backward()
        assert isinstance(loss, OnCard) and loss.dtype == torch.float32
        found.append([loss.detach(), *(x.grad for x in outputs if x is not None)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# --- training -------------------------------------------------------------------------------------

METHODS = {
    "AMLoss": "--loss AMLoss --clip-norm 1 --ema 0.9",
    "float32": "--loss ms --IPC 3 --memory-bank 30 --amp off",
    "fp16": "--amp fp16 --disent True --al 1 --be 0.1 --gam 1e-5",
    "introspective": "--introspective paper",
    "divided": "--nb-clusters 2 --mod-epoch 1 --IPC 2 --warm 0",
    "in parts": "--loss RecallAtK --IPC 3 --micro-batch 5",
    "changed pictures": "--augment ColorHeavy --optimizer rmsprop",
    "from the card": "--decode cache --data-device cuda --cache-size 48",
}
WAIT_ONCE = {
    "PFML": ("--loss PFML --IPC 3", "near.sum"),
    "skipping": ("--on-nan skip", "finite.cpu"),
    "fp16, rmsprop": ("--amp fp16 --optimizer rmsprop", "scaler.step"),
}


def waits_of_a_step(images: Path, flags: str, card: Card) -> list[str]:
    """What the host waits for in a training step and the making of its batch."""
    if "cache" in flags:
        flags += f" --cache-dir {images.parent}"
    training = tiny.prepare(images, f"{flags} --cuda-graphs 0")
    assert training.precision.device == DEVICE
    batches = train.rest_of_epoch(training)
    for _ in range(3):
        card.waits.clear()
        values = train.step(training, next(batches))
    assert all(parameter.device == DEVICE for parameter in training.network.parameters())
    waits = list(card.waits)
    assert torch.isfinite(values["loss"].cpu())
    return waits


@pytest.mark.parametrize("method", METHODS)
def test_a_step_waits_for_nothing(method, images, card):
    assert waits_of_a_step(images, METHODS[method], card) == []


@pytest.mark.parametrize("method", WAIT_ONCE)
def test_a_step_waits_once_where_it_must(method, images, card):
    flags, line = WAIT_ONCE[method]
    (wait,) = waits_of_a_step(images, flags, card)
    assert line in wait


@pytest.mark.slow
def test_a_continued_run_ends_like_an_uninterrupted_one(images, tmp_path, card):
    flags = "--epochs 2 --loss AMLoss --ema 0.9 --mixup 1 --dropout 0.3 --cuda-graphs 0"
    whole = tiny.saved(tiny.run(images, tmp_path, "whole", flags))
    folder = tiny.run(images, tmp_path, "stopped", f"{flags} --max-steps 3")
    tiny.resume(folder, "")
    again = tiny.saved(folder)
    for part in ("model_state_dict", "ema_state_dict", "criterion_state_dict"):
        assert tiny.same(whole[part], again[part])
    assert tiny.same(whole["random"]["cuda"], again["random"]["cuda"])


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_is_evaluated_in_all_ways(images, tmp_path, card):
    run = tiny.run(images, tmp_path, "run", "--epochs 1 --metrics nmi f1 ami --cuda-graphs 0")
    picture = sorted((images / "eval").rglob("*.png"))[0]
    for more in (
        ["--rerank", "--bootstrap", "100"],
        ["--whiten", "4", "--query", str(picture)],
        ["--dims", "4", "--metrics", "retrieval", "nmi", "f1", "ami"],
        ["--export", str(tmp_path / "a.npz")],
    ):
        evaluate.main(options.parse_evaluate(["--resume", str(run), *more]))
    assert net.load_run(run)([picture, picture]).shape == (2, 8)
