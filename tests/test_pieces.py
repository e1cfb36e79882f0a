"""A batch embedded in pieces (--micro-batch): gradients and draws are those of it whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import together
import torch
from conftest import refusal

import criteria
import dataset.loader
import options
import train
from net.pieces import in_pieces
from training.describing import describe

METHODS = {
    **{f"loss {name}": f"--loss {name} --IPC 3" for name in criteria.LOSSES},
    "loss HIER": "--loss HIER --IPC 3 --loss-args ancestors=24",
    "SEC": "--loss semihtriplet --IPC 3 --sec_wei 0.5 --norm_momentum 0.1",
    "IDML": "--loss Proxy_Anchor --introspective paper --mixup 1",
    "IDML as released": "--loss AMLoss --introspective",
    "mixup": "--loss MS --IPC 3 --mixup 0.4",
    "DDML": "--loss AMLoss --disent True --al 1 --be 0.1 --gam 1e-5",
    "SEC's head": "--loss ms --IPC 3 --head-norm 1 --dropout 0.2",
    "divide and conquer": "--nb-clusters 4 --mod-epoch 1 --IPC 2 --loss MarginLoss --lr-beta 1e-3",
    "mined at random": "--loss MarginLoss --IPC 3 --sampler distanceweighted",
}
FROZEN = "--bn-freeze affine --warm 0"


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is float32 elsewhere is float64 here."""
    to_network = dataset.loader.to_network
    monkeypatch.setattr(dataset.loader, "to_network", lambda *given: to_network(*given).double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def gradients(images: Path, flags: str) -> dict[str, torch.Tensor]:
    """The loss of the first batch, and the gradient of all that learns from it."""
    training = tiny.prepare(images, f"{FROZEN} --amp off {flags}")
    if torch.Tensor.float is torch.Tensor.double:
        training.network.double()
        training.objective.double()
    training.network.train()
    batch = next(train.rest_of_epoch(training))
    loss, _ = train.loss_of(training, batch)
    loss.backward()
    learned = [*training.network.named_parameters(), *training.objective.named_parameters()]
    found = {name: p.grad for name, p in learned if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_whole_batch(method, images, double):
    whole = gradients(images, METHODS[method])
    pieces = gradients(images, f"{METHODS[method]} --micro-batch 5")
    assert whole.keys() == pieces.keys() and len(whole) > 10
    assert any(value.abs().max() > 0 for name, value in whole.items() if "conv" in name)
    for name, value in whole.items():
        scale = value.abs().max().clamp_min(1e-12)
        assert (pieces[name] - value).abs().max() <= 1e-6 * scale, name


def test_no_piece_is_larger_than_was_asked(images):
    training = tiny.prepare(images, f"{FROZEN} --micro-batch 5")
    sizes = []
    training.network.model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    train.loss_of(training, next(train.rest_of_epoch(training)))
    assert sum(sizes) == 12 and max(sizes) <= 5


def test_processes_share_the_pieces(images, double, tmp_path):
    flags = "--loss Proxy_Anchor --micro-batch 2"
    whole = gradients(images, "--loss Proxy_Anchor")

    def work() -> dict[str, torch.Tensor]:
        training = tiny.prepare(images, f"{FROZEN} {flags}")
        training.network.double(), training.objective.double()
        training.network.train()
        loss, _ = train.loss_of(training, next(train.rest_of_epoch(training)))
        training.optimisers.step(loss, 0.0, 0)
        return {n: p.grad for n, p in training.network.named_parameters() if p.grad is not None}

    for result in together.run(2, work, tmp_path):
        for name, value in result.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-9)


class Drawing(torch.nn.Module):
    """A network with dropout and a BatchNorm, which notes what it drew and whether with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)
        self.made: list[torch.Tensor] = []
        self.graphs: list[bool] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        made = torch.nn.functional.dropout(self.norm(self.layer(images)), 0.5)
        self.made.append(made.detach())
        self.graphs.append(made.requires_grad)
        return made


def test_a_piece_that_is_computed_again_draws_the_same_and_moves_no_statistics():
    torch.manual_seed(0)
    network = Drawing()
    parts = list(network.parameters()), list(network.buffers())
    outputs = in_pieces(network, torch.randn(7, 4), 3, *parts)
    assert network.graphs == [False] * 3 and torch.equal(outputs, torch.cat(network.made))
    assert [len(made) for made in network.made] == [3, 2, 2]
    statistics = [buffer.clone() for buffer in network.buffers()]
    assert int(network.norm.num_batches_tracked) == 3
    torch.rand(3)  # a loss that mines at random draws in between
    after = torch.get_rng_state()
    outputs.square().sum().backward()
    assert network.graphs[3:] == [True] * 3
    assert all(map(torch.equal, network.made[:3], network.made[3:]))
    assert all(map(torch.equal, statistics, network.buffers()))
    assert torch.equal(torch.get_rng_state(), after) and network.layer.weight.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:Using backward")  # it leaks memory
def test_a_second_derivative_is_refused_and_never_left_out():
    network = Drawing()
    outputs = in_pieces(network, torch.randn(7, 4), 3, list(network.parameters()), [])
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        outputs.sum().backward(create_graph=True)


def test_a_backbone_that_rests_is_computed_once():
    network = Drawing().requires_grad_(False)
    outputs = in_pieces(network, torch.randn(7, 4), 3, list(network.parameters()), [])
    assert len(network.made) == 3 and not outputs.requires_grad


def test_a_continued_run_in_pieces_ends_the_same(images, tmp_path):
    flags = "--epochs 2 --micro-batch 5 --dropout 0.3 --warm 0"
    whole = tiny.run(images, tmp_path, "whole", flags)
    half = tiny.run(images, tmp_path, "half", f"{flags} --max-steps 3")
    tiny.resume(half, "--max-steps 8 --no-report")
    for part in ("model_state_dict", "optimisers", "random"):
        assert tiny.same(tiny.saved(whole)[part], tiny.saved(half)[part])


def test_bf16_in_pieces_is_close_to_bf16_at_once(images):
    flags = "--loss Proxy_Anchor --amp bf16"
    whole, pieces = (gradients(images, flags + more) for more in ("", " --micro-batch 4"))
    torch.testing.assert_close(pieces["loss"], whole["loss"], rtol=1e-3, atol=0)
    one, other = (each["model.embedding.weight"].flatten() for each in (whole, pieces))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


def test_a_compiled_network_is_not_cut_into_pieces(capsys):
    said = refusal(capsys, options.parse_train, ["--micro-batch", "5", "--compile"])
    assert "--micro-batch" in said and "without --compile" in said


def test_a_batch_norm_that_trains_is_named(images):
    words = "--micro-batch 5: a BatchNorm that trains sees 5 images at a time"
    assert words in describe(tiny.prepare(images, "--micro-batch 5"))
    assert words not in describe(tiny.prepare(images, f"--micro-batch 5 {FROZEN}"))
    assert words not in describe(tiny.prepare(images, ""))
    assert "images at a time" not in describe(tiny.prepare(images, "--micro-batch 12"))
