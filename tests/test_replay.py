"""When a step is replayed from a recording, and when it is computed.

That both give the same bits on a GPU is tested in test_gpu.py.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch
from torch import nn

import net
import net.replay
import training.setup
import training.state
from net.replay import CALLS_BEFORE, Replay, Tape, _Played, in_separate_memory


class Machine:
    """A layer, how often it was computed, and recordings that only count how often they play."""

    def __init__(self) -> None:
        self.layer = nn.Linear(4, 3)
        self.computed = self.played = self.made = 0
        self.tapes: list[Played] = []
        self.failure: RuntimeError | None = None
        self.replay = Replay(self.compute, list(self.layer.parameters()), list, self.record)

    def compute(self, images: torch.Tensor) -> torch.Tensor:
        self.computed += 1
        return self.layer(images)

    def record(self, compute, images, trained, buffers) -> Played:
        if self.failure is not None:
            raise self.failure
        self.made += 1
        return Played(self)

    def step(self, size: int = 5) -> None:
        self.replay(torch.ones(size, 4)).sum().backward()


class Played:
    """A recording of a machine's layer."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def play(self, images: torch.Tensor) -> torch.Tensor:
        self.machine.played += 1
        self.machine.tapes.append(self)
        return self.machine.layer(images)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_what_comes_often_is_recorded_once_and_replayed(machine):
    for _ in range(CALLS_BEFORE + 4):
        machine.step()
    assert (machine.computed, machine.made, machine.played) == (CALLS_BEFORE, 1, 4)


def test_each_shape_has_its_recording(machine):
    for size in (5, 3) * (CALLS_BEFORE + 1):
        machine.step(size)
    assert (machine.made, machine.played) == (2, 2)
    for _ in range(CALLS_BEFORE + 1):
        machine.step(2)
    assert machine.made == 2


def test_other_trained_parameters_are_recorded_anew(machine):
    for _ in range(CALLS_BEFORE + 1):
        machine.step()
    machine.layer.bias.requires_grad_(False)
    for _ in range(CALLS_BEFORE + 1):
        machine.step()
    assert machine.made == 2


def test_a_second_batch_under_way_has_a_recording_of_its_own(machine):
    def step() -> None:
        first, second = machine.replay(torch.ones(5, 4)), machine.replay(torch.ones(5, 4))
        (first + second).sum().backward()

    for _ in range(CALLS_BEFORE + 2):
        step()
    assert (machine.computed, machine.made, machine.played) == (2 * CALLS_BEFORE, 2, 4)
    assert len(set(map(id, machine.tapes))) == 2


def test_a_second_batch_that_comes_later_is_computed_until_it_is_recorded(machine):
    for _ in range(CALLS_BEFORE + 1):
        machine.step()
    assert machine.made == 1
    for _ in range(CALLS_BEFORE + 1):
        first, second = machine.replay(torch.ones(5, 4)), machine.replay(torch.ones(5, 4))
        (first + second).sum().backward()
    assert machine.made == 2 and machine.computed == 2 * CALLS_BEFORE


def test_more_batches_under_way_are_computed(machine):
    for _ in range(CALLS_BEFORE + 2):
        features = [machine.replay(torch.ones(5, 4)) for _ in range(4)]
        sum(features).sum().backward()
    assert machine.made == 2 and machine.played == 4


def test_without_gradients_nothing_is_recorded(machine):
    for _ in range(CALLS_BEFORE + 1):
        with torch.no_grad():
            machine.replay(torch.ones(5, 4))
    machine.layer.requires_grad_(False)
    for _ in range(CALLS_BEFORE + 1):
        machine.replay(torch.ones(5, 4))
    assert not machine.made and not machine.played


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("operation not permitted\nwhen stream is capturing", "operation not permitted"),
        ("", "RuntimeError"),
    ],
)
def test_what_cannot_be_recorded_is_computed_and_said_once(words, said, machine, caplog):
    machine.failure = RuntimeError(words)
    for _ in range(CALLS_BEFORE + 3):
        machine.step()
    assert machine.computed == CALLS_BEFORE + 3 and not machine.played
    assert [record.message for record in caplog.records] == [
        f"the step cannot be recorded on the GPU, which makes it slower: {said}"
    ]


def test_what_is_recorded_goes_with_its_network():
    network = net.build(net.Architecture("resnet10", 8, width=0.25))
    network.record()
    loss = network(torch.zeros(2, 3, 32, 32)).embedding.sum()
    loss.backward()
    seen = weakref.ref(network)
    del network, loss
    assert seen() is None


class Sum(Tape):
    """A recording of x · (a + b), which stands for one on a GPU."""

    def __init__(self, first: nn.Parameter, second: nn.Parameter, images: torch.Tensor) -> None:
        self.trained = [first, second]
        self._features = ((first + second) * images).sum()
        found = torch.autograd.grad(self._features, self.trained)
        self._gradients = in_separate_memory(found)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._features.detach()

    def backward(self, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(each.detach() for each in self._gradients)


def test_parameters_that_are_added_to_each_other_are_clipped_once():
    images = torch.tensor([3.0, 4.0])
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    _Played.apply(Sum(*parameters, images), images, *parameters).backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for parameter in parameters:  # the norm of both gradients is 5 √2
        torch.testing.assert_close(parameter.grad, images / (5 * 2**0.5))


# --- beside an evaluation -------------------------------------------------------------------------


class Kept:
    """A recording that computes, and stands for the memory that one has."""

    made = 0

    def __init__(self, compute, *_) -> None:
        self.play = compute
        Kept.made += 1


@pytest.fixture
def small_gpu(monkeypatch) -> list[str]:
    """A GPU on which an evaluation does not fit beside a recorded step; how each look ended."""
    looks, measure = [], training.state.measure

    def looked(network: net.EmbeddingNet, *args, **how):
        looks.append("full" if network.is_recorded else "fits")
        if network.is_recorded:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if looks[-2:-1] == ["full"]:
            assert all(parameter.grad is None for parameter in network.parameters())
        return measure(network, *args, **how)

    monkeypatch.setattr(Kept, "made", 0)
    monkeypatch.setattr(net.replay, "recorded", Kept)
    monkeypatch.setattr(training.setup, "can_be_recorded", lambda *_: True)
    monkeypatch.setattr(training.state, "measure", looked)
    return looks


def test_an_evaluation_that_does_not_fit_beside_a_recording_has_its_memory(
    small_gpu, images, tmp_path, caplog
):
    folder = tiny.run(images, tmp_path, "small", "--warm 0 --epochs 5")
    rows = tiny.metrics_rows(folder)
    assert len(rows) == 5 and all(row["R@1"] for row in rows)
    assert Kept.made == 1 and small_gpu.count("full") == 1
    (said,) = (record.message for record in caplog.records if "room" in record.message)
    assert said.startswith("the GPU has no room for an evaluation beside the recorded training")


def test_the_last_look_and_the_page_have_the_memory_of_a_recording(small_gpu, images, tmp_path):
    tiny.run(images, tmp_path, "once", "--warm 0 --epochs 5 --eval-every 5 --val-classes 0.5")
    assert small_gpu[-1] == "fits" and Kept.made == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is collected")
def test_a_run_on_a_cpu_collects_no_garbage(images, tmp_path):
    """Which frees nothing there, and takes the longer the more a program has loaded."""
    collected = []

    def note(phase, about):
        collected.append(phase)

    gc.disable()
    gc.callbacks.append(note)
    try:
        tiny.run(images, tmp_path, "run", "--warm 0 --max-steps 1")
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert not collected


def test_a_full_gpu_without_a_recording_is_not_asked_again(images, monkeypatch):
    prepared, asked = tiny.prepare(images), []

    def full(*_, **__):
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training.state, "measure", full)
    with pytest.raises(torch.OutOfMemoryError):
        prepared.evaluate(prepared.data.selection)
    assert asked == [1]
