"""Matryoshka: the loss on each prefix of the embedding, in training, evaluation and `load_run`."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import together
import torch
import torch.nn.functional as F
from conftest import refusal
from tiny import same, saved
from together import five_steps, in_float64, largest_difference

import evaluate
import losses
import metrics
import options
import train
from evaluation.networks import open_checkpoint
from evaluation.tasks import tasks_of
from net import load_run
from utils import InputError

SIZES = (2, 4, 8)
FLAG = "--matryoshka 2 4 8"


# --- the loss -------------------------------------------------------------------------------------


def test_value_and_gradients_are_those_of_the_plain_formula(one_thread: None) -> None:
    """Σ_m CE(cos(x_{1:m}, W_m)/T, y), with a matrix of its own for every size, in float64."""
    objective = losses.compose("NormSoftmax", 5, 8, {"matryoshka": {"sizes": SIZES}}).double()
    matrices = [part.criterion.proxies for part in objective.parts.values()]
    assert [tuple(matrix.shape) for matrix in matrices] == [(5, 8), (5, 2), (5, 4)]
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (12,))
    found = objective(losses.Embeddings(x), labels)
    gradients = torch.autograd.grad(found, [x, *matrices])
    plain = sum(
        F.cross_entropy(F.normalize(x[:, : w.shape[1]]) @ F.normalize(w).T / 0.05, labels)
        for w in matrices
    )
    torch.testing.assert_close(found, plain)
    for own, expected in zip(gradients, torch.autograd.grad(plain, [x, *matrices]), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "attach"),
    [
        ("AMLoss", {"sec": {"weight": 0.5}}),
        ("ms", {}),
        ("MarginLoss", {"l2": {"weight": 0.1}}),
        ("RecallAtK", {}),
        ("Proxy_Anchor", {"introspective": {"variant": "paper"}}),
        ("Proxy_Anchor", {"disentangled": {"al": 1.0, "be": 0.5, "gam": 0.1}}),
        ("SoftTriple", {}),
    ],
)
def test_each_part_is_the_loss_of_a_network_with_so_many_dimensions(loss, attach, one_thread):
    """What is beside the loss, a constraint on the lengths, sees the whole embedding once."""
    objective = losses.compose(loss, 4, 8, {**attach, "matryoshka": {"sizes": SIZES}})
    labels = torch.arange(12) % 4
    wide = 16 if "specific" in objective.heads else 8
    outputs = losses.Embeddings(**{head: torch.randn(12, wide) for head in objective.heads})
    total = torch.zeros(())
    torch.manual_seed(3)
    for size, name in ((8, "metric"), (2, "d2"), (4, "d4")):
        alone = losses.compose(loss, 4, size, attach if size == 8 else _of_the_loss(attach))
        alone.parts["metric"].criterion.load_state_dict(
            objective.parts[name].criterion.state_dict()
        )
        cut = losses.Embeddings(
            *(
                head
                if head is None
                else torch.cat([part[:, :size] for part in head.chunk(wide // 8, 1)], 1)
                for head in outputs
            )
        )
        with torch.random.fork_rng():
            torch.manual_seed(size)
            total = total + alone(cut, labels)
    drawn = iter((8, 2, 4))
    for part in objective.parts.values():  # whatever one draws, it draws as it does alone
        if part.criterion in [objective.parts[name].criterion for name in ("metric", "d2", "d4")]:
            size = next(drawn)
            part.register_forward_pre_hook(lambda *_, size=size: torch.manual_seed(size) and None)
    torch.testing.assert_close(objective(outputs, labels), total)


def _of_the_loss(attach: dict) -> dict:
    return {name: how for name, how in attach.items() if name in ("introspective", "disentangled")}


def test_own_proxies_of_every_size_are_optimised_like_those_of_the_loss() -> None:
    objective = losses.compose("AMLoss", 5, 8, {"matryoshka": {"sizes": SIZES}})
    groups = objective.parameter_groups(1e-3)
    assert [group["name"] for group in groups] == ["proxies", "margins"] * 3
    assert {group["lr"] for group in groups if group["name"] == "proxies"} == {0.1}
    margins = [part.criterion.margins for part in objective.parts.values()]
    with torch.no_grad():
        for number, each in enumerate(margins):
            each.fill_(number)
    assert objective.class_values()["margin"].tolist() == [0.0] * 5, "those of the whole embedding"


# --- training -------------------------------------------------------------------------------------

COMBINED = {
    "AMLoss, SEC": "--loss AMLoss --sec_wei 0.5",
    "IDML and mixup": "--introspective paper",
    "DDML": "--disent True --al 1 --be 0.1 --gam 1e-5",
    "pairs, micro-batch": "--loss ms --IPC 3 --batch-size 12 --steps 6 --eval-steps 6 "
    "--image-size 32 --micro-batch 5",
    "mined": "--loss MarginLoss --IPC 2 --sampler distanceweighted",
    "library": "--loss SoftTriple",
    "HIST": "--loss HIST --loss-args hidden=8",
    "no head": "--head none --embedding-size 64 --matryoshka 16 64",
}


@pytest.mark.parametrize("flags", COMBINED.values(), ids=COMBINED)
def test_it_trains_with_other_methods(flags: str, images: Path) -> None:
    training = tiny.prepare(images, f"--warm 0 {FLAG} {flags} --max-steps 2")
    start = {k: v.clone() for k, v in training.objective.state_dict().items()}
    batch = next(iter(training.loader))
    for _ in range(2):
        assert np.isfinite(float(train.step(training, batch)["loss"]))
    end = training.objective.state_dict()
    for key in (k for k in start if k.endswith("proxies")):
        assert not torch.equal(start[key], end[key]), key


def test_a_run_logs_every_size_and_goes_on_bit_by_bit(images: Path, tmp_path: Path) -> None:
    flags = f"--loss AMLoss --epochs 2 --warm 0 {FLAG}"
    whole = tiny.run(images, tmp_path, "whole", flags)
    rows = tiny.metrics_rows(whole)
    for name in ("positive", "d2/positive", "d4/margin"):
        assert np.isfinite(float(rows[-1][name]))
    parts = tiny.run(images, tmp_path, "parts", f"{flags} --max-steps {int(rows[0]['step']) + 1}")
    tiny.resume(parts, "")
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "random"):
        assert same(saved(whole)[part], saved(parts)[part]), part


def test_two_processes_are_one(images, tmp_path, monkeypatch) -> None:
    in_float64(monkeypatch)
    steps = partial(five_steps, images, f"--loss AMLoss {FLAG} --lr 1e-3")
    alone = steps()
    for result in together.run(2, steps, tmp_path):
        assert largest_difference(alone, result) < 1e-9


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--matryoshka 4 2 8", ["4 2 8", "larger than the one before"]),
        ("--matryoshka 4 4 8", ["4 4 8", "larger than the one before"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(flags, words, images) -> None:
    with pytest.raises(InputError) as stop:
        tiny.prepare(images, flags)
    assert all(word in str(stop.value) for word in words) and "\n" not in str(stop.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--matryoshka 0 8", ["--matryoshka", "0 is below"]),
        ("--matryoshka 2 4", ["4", "--embedding-size 4", "8"]),
        (f"{FLAG} --nb-clusters 2", ["--matryoshka", "--nb-clusters", "cluster"]),
        (f"{FLAG} --head training", ["--matryoshka", "--head training"]),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(flags, words, images, capsys) -> None:
    said = refusal(capsys, tiny.parse, images, flags)
    assert all(word in said for word in words)


# --- evaluation -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run(images, tmp_path_factory.mktemp("logs"), "run", f"--epochs 1 --warm 0 {FLAG}")


def evaluated(run: Path, flags: str) -> None:
    words = f"--resume {run} --workers 0 --amp off --metrics retrieval {flags}"
    evaluate.main(options.parse_evaluate(words.split()))


def test_a_row_for_each_size_in_every_table(run: Path, tmp_path: Path, capsys) -> None:
    files = {kind: tmp_path / f"table.{kind}" for kind in ("json", "csv", "tex")}
    evaluated(
        run,
        f"--dims 2 4 8 --bootstrap 100 --json {files['json']} --csv {files['csv']} "
        f"--latex {files['tex']}",
    )
    said = capsys.readouterr().out
    opened = open_checkpoint(run)
    (task,) = tasks_of(opened.data)
    results = json.loads(files["json"].read_text())["results"]
    assert [entry["dimensions"] for entry in results] == [2, 4, 8]
    embed = load_run(run, device="cpu", amp="off")
    pixels = [task.queries.read(i) for i in range(len(task.queries))]
    x = torch.from_numpy(embed(pixels))
    for size, entry in zip(SIZES, results, strict=True):
        found = metrics.retrieval_per_query(x[:, :size], task.queries.labels)
        expected = metrics.summarise(found, task.ks)
        assert entry["R@1"] == pytest.approx(expected["R@1"])
        assert entry["MAP@R"] == pytest.approx(expected["MAP@R"], abs=1e-3)
        low, high = entry["interval_95"]["MAP@R"]
        assert low <= entry["MAP@R"] <= high
        assert f", {size} dimensions" in said and f"{entry['MAP@R']:.4f}" in said
        short = load_run(run, device="cpu", amp="off", dims=size)(pixels[:3])
        np.testing.assert_allclose(short, F.normalize(x[:3, :size]).numpy(), atol=1e-6)
    assert len({entry["MAP@R"] for entry in results}) == 3
    with files["csv"].open() as file:
        assert [line["dimensions"] for line in csv.DictReader(file)] == ["2", "4", "8"]
    assert files["tex"].read_text().count(r"dimensions &") == 3


def test_one_size_is_that_of_the_files_too(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.npz"
    evaluated(run, f"--dims 4 --export {file}")
    with np.load(file) as content:
        assert {content[name].shape[1] for name in content.files if content[name].ndim == 2} == {4}


def test_sizes_that_cannot_be_had_are_refused(run: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(InputError, match=r"--dims: .*: 9 dimensions .* have 8"):
        evaluated(run, "--dims 9")
    words = f"--resume {run} --dims 2 4 --export {tmp_path / 'x.npz'}"
    said = refusal(capsys, options.parse_evaluate, words.split())
    assert "--export describes one embedding and --dims names 2" in said
    assert load_run(run, dims=4).thresholds is None  # the run's are those of all dimensions
    with pytest.raises(InputError, match="9 dimensions"):
        load_run(run, dims=9)
    assert not list(tmp_path.iterdir())
