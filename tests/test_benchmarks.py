"""The training benchmark: what it counts, what it prints, and that one bad row ends nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, run_python

from benchmarks import card, gpu_check, precision, profiling
from benchmarks.loops import OurWay, run


def event(category: str, name: str, start: float, length: float, thread: int = 1) -> dict:
    times = {"ts": start, "dur": length}  # microseconds
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": thread, **times}


def test_a_gpu_is_busy_while_any_of_its_streams_computes():
    trace = [
        event("kernel", "conv", 0, 100, thread=7),
        event("kernel", "copy", 50, 100, thread=8),  # beside conv for 50
        event("kernel", "conv", 400, 100, thread=7),
        event("gpu_memcpy", "Memcpy HtoD", 600, 10, thread=8),
        event("gpu_user_annotation", "Optimizer.step", 0, 5000, thread=7),
        event("cuda_runtime", "cudaLaunchKernel", 0, 5000),
        {"ph": "M", "name": "process_name", "pid": 0},
    ]
    found = profiling.busy(trace, profiling.ON_DEVICE)
    assert found.seconds == pytest.approx(260e-6)
    assert {name: calls for name, (_, calls) in found.kernels.items()} == {
        "conv": 2,
        "copy": 1,
        "Memcpy HtoD": 1,
    }
    assert found.kernels["conv"][0] == pytest.approx(200e-6)
    assert next(iter(found.kernels)) == "conv"


def test_the_spread_of_precisions_is_half_of_the_interval_of_the_mean():
    runs = [{"R@1": r, "MAP@R": 0.25, "seconds": 7.0} for r in (0.4, 0.5, 0.6)]
    assert precision.row("bf16", runs) == (  # 4.303 x 0.1 / sqrt 3
        "| bf16 | 3 | 0.5000 ± 0.248 (0.4000–0.6000) | 0.2500 ± 0.000 (0.2500–0.2500) | 7 |"
    )
    assert "±" not in precision.row("bf16", runs[:1])


def test_an_operator_is_not_charged_for_those_it_calls():
    trace = [
        event("cpu_op", "conv2d", 0, 100),
        event("cpu_op", "convolution", 10, 80),
        event("cpu_op", "copy", 20, 30),
        event("cpu_op", "copy", 60, 20),
        event("cpu_op", "add", 100, 5),
        event("cpu_op", "copy", 0, 40, thread=2),
    ]
    found = profiling.busy(trace, {"cpu_op"})
    own = {name: round(seconds * 1e6) for name, (seconds, _) in found.kernels.items()}
    assert own == {"copy": 90, "convolution": 30, "conv2d": 20, "add": 5}
    assert found.seconds == pytest.approx(105e-6)


def test_the_parts_of_a_step(tmp_path):
    images = tiny.write_images(tmp_path, images=12)
    way = OurWay(tiny.parse(images, "--warm 0"))
    found = profiling.profile_step(way, 2)
    assert 0 < found.waited < found.step and found.bare > 0 and 0 < found.asked <= found.step
    assert 0 < found.busy <= found.step
    assert sum(seconds for seconds, _ in found.kernels.values()) == pytest.approx(
        found.busy, rel=0.05
    )
    batch = next(iter(way.training.loader))
    half = batch._replace(images=batch.images[: len(batch.images) // 2])
    assert found.flops == 2 * profiling.flops_of(way.training, half)
    assert found.flops / found.bare < found.peak


def test_a_card_is_asked_while_a_round_runs():
    answer = card.answer_of([sys.executable, "-c", "print('1755 MHz, 641.50 W, 71')"])
    assert answer() == "1755 MHz, 641.50 W, 71 °C"
    assert card.answer_of([sys.executable, "-c", "raise SystemExit(9)"])() == ""
    assert card.answer_of(["no-such-program"])() == ""
    assert card.card_asked(torch.device("cpu"))() == ""


def test_flops_are_those_of_the_layers(tmp_path):
    """Forward, and backward to the weights and to what came in; the first layer's came from us."""
    training = OurWay(tiny.parse(tiny.write_images(tmp_path, images=12), "--warm 0")).training
    batch = next(iter(training.loader))
    counted = []

    def count(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        per_output = layer.weight[0].numel()
        times = 3 if inputs[0].requires_grad else 2
        counted.append(2 * times * per_output * output.numel())

    for layer in training.network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    training.network(batch.images)
    expected = sum(counted)
    assert profiling.flops_of(training, batch) == expected


@pytest.mark.slow
def test_rows_from_jpeg_files_and_a_network_that_does_not_exist():
    done = run_python(
        *("benchmarks/training.py", "--models", "resnet00", "resnet10", "--data", "jpeg"),
        *("--images", 200, "--readings", "cache", "--sizes", 32, "--batch-size", 12),
        *("--bn-freeze", 1, "--batches", 1, "--repeats", 1, "--workers", 1),
    )
    assert done.returncode == 1
    assert "resnet00 32 12 1 failed" in done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| resnet"))
    cells = row.strip("| ").split(" | ")
    assert cells[:5] == ["resnet10", "32", "12", "frozen", "cache"]
    assert float(cells[7].removesuffix(" ×")) > 0


def test_the_limit_ends_it_and_says_where_it_stood():
    done = run_python("benchmarks/training.py", "--models", "bn_inception", "--limit", 1)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and 'File "' in done.stderr


def test_a_round_meets_no_start_of_an_epoch_and_leaves_the_workers_idle(tmp_path):
    images = tiny.write_images(tmp_path, images=12)
    way = OurWay(tiny.parse(images, "--warm 0 --workers 2 --decode exact"))
    seen = []
    way.step = lambda: seen.append(next(way.batches))
    whole = len(way.training.loader)
    for _ in range(2):
        way.begin()
        ran = run(way, 2 * whole + 1, torch.device("cpu"))
        way.end()
        assert len(ran.steps) == 2 * whole + 1 and sum(ran.steps) <= ran.seconds
    index = [batch.index.tolist() for batch in seen]
    assert len(index) == 2 * (2 * whole + 1) and len(set(map(tuple, index))) == len(index)
    assert way.training.loader._source._loader._iterator._tasks_outstanding == 0


def test_runs_that_fail_or_take_too_long_leave_the_table_of_the_others(
    tmp_path, monkeypatch, capsys
):
    flags = ["--epochs", "3", "--seeds", "1", "--recipe", "none.txt"]
    done = tmp_path / "bf16_3_1"
    done.mkdir()
    (done / "results.json").write_text('{"results": {"cub": {"R@1": 0.5, "MAP@R": 0.25}}}')
    (done / "metrics.csv").write_text("epoch,seconds\n3,7.0\n")
    for limit, said in (
        ([], "failed, with exit status 2"),
        (["--limit", "0"], "cut off by --limit"),
    ):
        monkeypatch.setattr(sys, "argv", ["", "--folder", str(tmp_path), *flags, *limit])
        with pytest.raises(SystemExit) as ended:
            precision.main()
        told = capsys.readouterr()
        assert ended.value.code == 1 and f"float32 seed 1: {said}" in told.err
        assert "| bf16 | 1 | 0.5000 (0.5000–0.5000) |" in told.out


def test_all_parts_of_the_check_fit_its_time():
    for quick, limit in ((False, gpu_check.LIMIT), (True, gpu_check.QUICK_LIMIT)):
        parts = gpu_check.chosen_parts(list(gpu_check.PARTS), quick).values()
        assert sum(seconds for _, seconds in parts) <= limit - gpu_check.LAST_WORDS


WITHOUT = """
import importlib.machinery

finder = importlib.machinery.PathFinder
find = finder.find_spec
missing = {missing}
finder.find_spec = classmethod(
    lambda cls, name, *where: None if name.partition(".")[0] in missing else find(name, *where)
)
"""


def run_without(packages: set[str], folder: Path, *arguments: str) -> str:
    """Runs Python as on a machine that lacks some packages; anew, so that it looks for them."""
    (folder / "sitecustomize.py").write_text(WITHOUT.format(missing=packages))
    where = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": str(folder)}}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


OF_OTHERS = {"faiss", "pytorch_metric_learning", "sklearn", "timm", "wandb"}


def test_the_check_finds_its_tests_without_other_packages(tmp_path):
    """pytest runs none at all where a file that it looks at cannot be loaded."""
    asked = shlex.split(gpu_check.TESTS.replace(gpu_check.AT_ONCE, ""))
    said = run_without(
        OF_OTHERS, tmp_path, *asked, "--collect-only", "-q", "-p", "no:cacheprovider"
    )
    assert "test_a_run_from_training_to_a_search" in said


def test_all_tests_of_a_gpu_are_where_the_check_looks():
    marked = [
        path.name for path in (ROOT / "tests").glob("*.py") if f"mark.{'gpu'}" in path.read_text()
    ]
    assert marked == ["test_gpu.py"]


@pytest.mark.slow
def test_losses_are_timed_without_the_library(tmp_path):
    sizes = ["--repeats", "1", "--batch", "12", "--dim", "8", "--classes", "5"]
    timed = ["benchmarks/losses.py", *sizes, "--only", "triplet", "NormSoftmax"]
    said = run_without(OF_OTHERS, tmp_path, *timed)
    assert "no pytorch-metric-learning" in said
    assert [line.split("|")[1].strip() for line in said.splitlines()[-2:]] == [
        "triplet",
        "NormSoftmax",
    ]


def test_too_few_images_to_measure_the_memory_of_a_worker_are_refused_at_once():
    done = run_python("benchmarks/data.py", "--memory-images", 199)
    assert done.returncode == 2 and not done.stdout
    assert "--memory-images: 199 is below the smallest useful value, 200" in done.stderr
