"""Several processes: the same numbers as one, one voice, and no hang when somebody dies."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import together
import torch
import torch.distributed as dist
from conftest import ROOT, files_in, start_python, wait_for
from together import five_steps, in_float64, largest_difference

import dataset
import devices
import processes
from evaluation import embedding
from processes import joining, rows, watching
from processes.meeting import open_store

METHODS = {
    "Proxy-Anchor": "--loss Proxy_Anchor",
    "AMLoss": "--loss AMLoss --mrg-lr 1e-3",
    "SEC": "--loss semihtriplet --IPC 3 --sec_wei 0.5 --norm_momentum 0.1",
    # As released, the uncertainty has rounding errors for a gradient, which Adam magnifies.
    "IDML": "--loss Proxy_Anchor --introspective paper --mixup 1",
    "DDML": "--loss AMLoss --disent True --al 1 --be 0.1 --gam 1e-5",
    "divide and conquer": "--nb-clusters 4 --mod-epoch 1 --IPC 2 --schedule constant "
    "--loss MarginLoss --lr-beta 1e-3 --sampler distanceweighted --dropout 0.2 --bn-freeze 1",
    "MS": "--loss ms --IPC 3 --head-norm 1",
}
METHOD = pytest.mark.parametrize("method", METHODS)


# --- the same numbers -----------------------------------------------------------------------------


@METHOD
def test_five_steps_are_those_of_one_process(method, images, tmp_path):
    alone = five_steps(images, METHODS[method])
    results = together.run(2, lambda: five_steps(images, METHODS[method]), tmp_path)
    start = tiny.prepare(images, METHODS[method]).network.state_dict()
    moved = [key for key in start if not torch.equal(start[key], alone[f"network {key}"])]
    assert moved, "nothing was trained"
    for result in results:
        assert largest_difference(alone, result) < 1e-5
        assert all(torch.equal(result[key], results[0][key]) for key in result)


@METHOD
def test_nothing_but_rounding_makes_the_difference(method, images, tmp_path, monkeypatch):
    """In float64, with ten times the learning rate, what is left is 1e-9.

    A batch of two images is among them: of the three processes one has none.
    """
    in_float64(monkeypatch)
    steps = partial(
        five_steps, images, f"{METHODS[method]} --lr 1e-3 --lr_p 1e-3", (12, 12, 2, 12, 7)
    )
    alone = steps()
    for result in together.run(3, steps, tmp_path):
        assert largest_difference(alone, result) < 1e-9


def test_the_batchnorms_of_timm_see_the_whole_batch(images, tmp_path, monkeypatch):
    """They have an activation inside, and are not torch's own class."""
    in_float64(monkeypatch)
    steps = partial(
        five_steps, images, "--model timm:test_efficientnet --width 1 --stem imagenet --bn-freeze 0"
    )
    alone = steps()
    for result in together.run(2, steps, tmp_path):
        assert largest_difference(alone, result) < 1e-8


def test_rows_are_gathered_in_order_and_their_gradient_is_counted_once(tmp_path):
    everything = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))

    def work() -> dict[str, torch.Tensor]:
        own = everything[processes.shard(7)].clone().requires_grad_()
        rows = processes.gather_rows(own, 7)
        (rows.square().sum() * 0.5).backward()
        weight = torch.nn.Parameter(torch.ones(3))
        (processes.once(weight) * 2).sum().backward()
        processes.sum_gradients([weight])
        return {"rows": rows.detach(), "gradient": own.grad, "weight": weight.grad}

    results = together.run(3, work, tmp_path)
    assert [len(result["gradient"]) for result in results] == [2, 2, 3]
    for result in results:
        assert torch.equal(result["rows"], everything)
        assert torch.equal(result["weight"], torch.full((3,), 2.0))
    assert torch.equal(torch.cat([result["gradient"] for result in results]), everything)


@pytest.mark.parametrize("count", [1, 7])
def test_images_are_embedded_alike_though_some_processes_have_no_batch(count, images, tmp_path):
    options = tiny.parse(images, "--amp off --batch-size 3")
    few = dataset.Choice.of(options).load("eval").subset(range(count))
    network = tiny.prepare(images).network

    def work() -> torch.Tensor:
        precision = devices.Precision("off", torch.device("cpu"))
        found, readable = embedding.embed(network, few, precision, embedding.Viewing.of(options))
        assert readable.tolist() == [True] * count
        return found

    alone = work()
    for found in together.run(3, work, tmp_path):
        torch.testing.assert_close(found, alone)


def test_what_the_main_process_makes_reaches_all_and_one_flag_is_enough(tmp_path):
    def work() -> dict:
        number = processes.rank()
        made = processes.from_main(lambda: {"made by": processes.rank()})
        all_fine = bool(processes.in_all(torch.tensor(number != 1)))
        return {**made, "largest": processes.largest(number), "all fine": all_fine}

    results = together.run(3, work, tmp_path)
    assert results == [{"made by": 0, "largest": 2, "all fine": False}] * 3


@pytest.mark.parametrize(
    ("visible", "nccl"),
    [
        ("two to each machine", True),
        ("one to each process", True),  # as by srun --gpus-per-task 1
        ("one to each machine", False),
        ("none on one machine", False),
    ],
)
def test_each_process_takes_a_gpu_of_its_own_whoever_started_it(
    visible, nccl, tmp_path, monkeypatch
):
    """Two machines of two processes, as srun starts them: nobody sets LOCAL_RANK."""

    def number() -> int:
        return int(os.environ["RANK"])

    def count() -> int:
        return 2 if visible == "two to each machine" else 1

    def properties(gpu: int) -> SimpleNamespace:
        bus = number() % 2 if visible == "one to each process" else gpu
        return SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0)

    def available() -> bool:
        return visible != "none on one machine" or number() < 2

    monkeypatch.setattr(joining, "host", lambda: f"machine {number() // 2}")
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    begin, backends = dist.init_process_group, []

    def begun(backend: str, **more: object) -> None:
        backends.append(backend)
        begin("gloo", **more)

    monkeypatch.setattr(dist, "init_process_group", begun)

    def work() -> list:
        return [processes.local_rank(), processes.gpu(0), *backends]

    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    gpus = [0, 1, 0, 1] if visible == "two to each machine" else [0, 0, 0, 0]
    found = together.run(4, work, tmp_path, local_ranks=False)
    assert found == [[n % 2, gpu, backend] for n, gpu in enumerate(gpus)]


def test_one_process_is_its_own_trivial_case():
    rows = torch.randn(4, 2, requires_grad=True)
    assert processes.gather_rows(rows, 4) is rows and processes.once(rows) is rows
    assert processes.shard(4) == slice(0, 4) and processes.is_main() and processes.world() == 1
    assert processes.wanted(-1) == max(1, torch.cuda.device_count())


@pytest.mark.parametrize(("total", "count"), [(12, 3), (7, 3), (2, 3), (0, 2), (100, 7)])
def test_shards_cover_all_rows_and_are_even(total, count, monkeypatch):
    monkeypatch.setattr(rows, "world", lambda: count)
    shards = [processes.shard(total, of) for of in range(count)]
    assert [i for s in shards for i in range(total)[s]] == list(range(total))
    sizes = [s.stop - s.start for s in shards]
    assert max(sizes) - min(sizes) <= 1


# --- whole runs -----------------------------------------------------------------------------------


def command(images: Path, logs: Path, name: str, flags: str = "") -> list[str]:
    """A short run: two epochs of three steps, an evaluation after each."""
    run = f"--loss AMLoss --warm 0 --amp off --epochs 2 --batch-size 16 --LOG_DIR {logs}"
    words = [*tiny.NETWORK, *run.split(), "--name", name, *flags.split()]
    return [str(ROOT / "train.py"), "--dataset", f"folder:{images}", *words]


LAUNCH = """
import sys, processes
sys.exit(processes.launch([sys.executable, *sys.argv[2:]], int(sys.argv[1])))
"""


LAUNCHED: list[subprocess.Popen] = []


def launch(count: int, *words: str, **how) -> subprocess.Popen:
    """Starts `processes.launch`, which `--gpu-id -1` calls on a machine with several GPUs."""
    started = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(count), *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **how,
    )
    LAUNCHED.append(started)
    return started


@pytest.fixture(autouse=True)
def none_is_left() -> Iterator[None]:
    """After a test that failed none goes on: processes end with their launcher."""
    yield
    for started in LAUNCHED:
        started.kill()
        started.wait()
    LAUNCHED.clear()


def torchrun(*flags: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *flags]


def assert_same_rows(one: Path, other: Path) -> None:
    first, second = tiny.untimed_rows(one), tiny.untimed_rows(other)
    assert len(first) == len(second) == 2
    for a, b in zip(first, second, strict=True):
        for name in a:
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name


@pytest.mark.slow
def test_two_processes_leave_one_run_folder_like_that_of_one(images, tmp_path):
    tiny.run(images, tmp_path, "one", "--loss AMLoss --warm 0 --amp off --epochs 2 --batch-size 16")
    started = launch(2, *command(images, tmp_path, "two"))
    printed, errors = started.communicate(timeout=200)
    assert started.returncode == 0, errors
    assert printed.count("epoch   1/2") == 1 and "2 processes" in printed
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["one", "two"]
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert_same_rows(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_machines_are_torchrun_twice_with_one_rendezvous(images, tmp_path):
    tiny.run(images, tmp_path, "one", "--loss AMLoss --warm 0 --amp off --epochs 2 --batch-size 16")
    port = free_port()
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "tried"]
    machine = torchrun("--nnodes", "2", "--nproc-per-node", "1", *where)
    started = [
        subprocess.Popen(
            [*machine, *command(images, tmp_path, "two")],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    ended = [each.communicate(timeout=200) for each in started]
    assert [each.returncode for each in started] == [0, 0], ended
    assert sum(printed.count("epoch   1/2") for printed, _ in ended) == 1
    assert_same_rows(tmp_path / "one", tmp_path / "two")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_one_of_which_was_killed_continue_bit_for_bit(images, tmp_path):
    flags = "--save-every 3 --deterministic"
    whole = launch(2, *command(images, tmp_path, "whole", flags))
    assert whole.wait(100) == 0
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = command(images, tmp_path, "run", flags)[1:]
    assert launch(2, str(script), "kill", *run, env=environment).wait(100) == 137
    again = launch(2, str(ROOT / "train.py"), "--resume-run", str(tmp_path / "run"))
    printed, errors = again.communicate(timeout=100)
    assert again.returncode == 0, errors
    assert "step 3" in printed
    first, second = (
        torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "run")
    )
    for part in ("model_state_dict", "criterion_state_dict"):
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to_all", "number", "status"), [(True, signal.SIGINT, 130), (False, signal.SIGTERM, 143)]
)
def test_a_signal_to_the_launcher_or_to_one_process_stops_all_after_a_checkpoint(
    to_all, number, status, images, tmp_path
):
    started = launch(2, *command(images, tmp_path, "run", "--epochs 400 --eval-every 7"))
    wait_for((tmp_path / "run" / "metrics.csv").is_file)
    pids = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(started.pid if to_all else int(pids[1]), number)
    printed, errors = started.communicate(timeout=60)
    assert started.returncode == status, errors
    assert f"train.py --resume-run {tmp_path / 'run'}" in printed and "Traceback" not in errors
    stopped = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["clock"]["step"]
    assert f"at step {stopped}" in printed
    again = [str(ROOT / "train.py"), "--resume-run", str(tmp_path / "run")]
    continued = launch(2, *again, "--max-steps", str(stopped + 3))
    printed, errors = continued.communicate(timeout=100)
    assert continued.returncode == 0, errors
    assert f"step {stopped}" in printed
    steps = [int(row["step"]) for row in tiny.metrics_rows(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == stopped + 3


# --- when somebody dies ---------------------------------------------------------------------------


def test_a_killed_process_is_named_though_others_have_ended_because_of_it(tmp_path, capfd):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    ends = (
        f"open({str(pipe)!r}).read(); sys.exit(1)",  # when the other one is gone
        f"pipe = open({str(pipe)!r}, 'w'); os.kill(os.getpid(), 9)",
    )
    code = f"import os, sys; exec({ends}[int(os.environ['RANK'])])"
    assert processes.launch([sys.executable, "-c", code], 2) == 137
    assert "process 1 of 2 was ended by SIGKILL" in capfd.readouterr().err


FAULTY = """
import os, signal, sys, time
import options, processes, train
from utils import sentence_errors

HOW, STEP = sys.argv[1], train.step

def step(training, batch):
    if processes.rank() == 1 and training.clock.step == 4:
        if HOW == "raise":
            raise ZeroDivisionError("in the middle of a step")
        os.kill(os.getpid(), signal.SIGKILL if HOW == "kill" else signal.SIGSTOP)
    return STEP(training, batch)

train.step = step
with sentence_errors(), processes.joined():
    train.main(options.parse_train(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", ["ZeroDivisionError: in the middle of a step"]),
        ("kill", ["process 1 of 2 was ended by SIGKILL"]),
        ("stop", ["process 1 has been silent for"]),
    ],
)
def test_a_process_that_dies_ends_all_within_a_minute(how, words, images, tmp_path):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words_of_run = command(images, tmp_path, "run")[1:]
    started = launch(2, str(script), how, *words_of_run, env=environment)
    begun = time.monotonic()
    _, errors = started.communicate(timeout=120)
    assert started.returncode not in (0, None)
    assert time.monotonic() - begun < 60 + 30, "30 s of it to start"
    for word in words:
        assert word in errors
    assert (tmp_path / "run" / "args.json").is_file()


@pytest.mark.parametrize("all_stop", [True, False])
def test_a_job_that_is_stopped_and_continued_goes_on(all_stop, tmp_path, monkeypatch):
    """Silence counts only for a process that hears it: one that was awake."""
    monkeypatch.setattr(watching, "BEAT", 0.1)
    monkeypatch.setattr(watching, "SILENCE", 1.0)

    def work() -> int:
        (tmp_path / f"{processes.rank()}.pid").write_text(str(os.getpid()))
        end = time.monotonic() + 6
        while processes.largest(int(time.monotonic() < end)):
            time.sleep(0.05)
        return processes.rank()

    def stop_and_continue() -> None:
        files = [tmp_path / f"{number}.pid" for number in range(2)]
        for file in files:
            wait_for(file.is_file)
        time.sleep(1)
        pids = [int(file.read_text()) for file in files[: 2 if all_stop else 1]]
        for number, pause in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0)):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(pause)

    helper = threading.Thread(target=stop_and_continue)
    helper.start()
    if all_stop:
        assert together.run(2, work, tmp_path) == [0, 1]
    else:
        with pytest.raises(AssertionError, match="the processes ended with"):
            together.run(2, work, tmp_path)
    helper.join()


def test_processes_of_a_test_leave_alone_what_tests_before_it_have_left(tmp_path):
    left = [open_store("127.0.0.1")]
    left.append(left)
    del left  # and nothing but a collection finds it
    assert together.run(2, lambda: gc.collect() >= 0, tmp_path) == [True, True]


LATE = """
import sys, time
import door
door.enter()
import processes
from processes import watching

watching.BEAT = 0.1
stop = watching.Watch.stop

def stop_late(watch):
    time.sleep(1.0 * watch.number)  # as on a machine that is busy with other things
    stop(watch)

watching.Watch.stop = stop_late
with processes.ended_at_once(), processes.joined():
    print("done", flush=True)
"""


def test_who_keeps_the_store_leaves_last(tmp_path):
    """A process that still watched would take it for dead, and end with status 1."""
    (tmp_path / "late.py").write_text(LATE)
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [start_python(tmp_path / "late.py", **environment, RANK=str(n)) for n in range(2)]
    said = [each.communicate(timeout=60) for each in started]
    assert [each.returncode for each in started] == [0, 0], said


class Slow:
    """A store that takes its time with every answer."""

    def __init__(self, store: dist.Store, seconds: float) -> None:
        self.store, self.seconds = store, seconds

    def __getattr__(self, name: str):
        time.sleep(self.seconds)
        return getattr(self.store, name)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0, "process 1 on there has been silent for"),
        (0.02, "process 1 on there has been silent for"),
        (100.0, "the store at there, port 1 has not answered for"),
    ],
)
def test_silence_is_noticed_however_slow_the_store_is(seconds, said, monkeypatch, capfd):
    monkeypatch.setattr(watching, "BEAT", 0.05)
    monkeypatch.setattr(watching, "SILENCE", 0.5)
    store = dist.HashStore()
    for other in range(1, 8):
        store.set(f"alive {other}", "0")  # and never again

    def watch() -> None:
        process = watching.Watch(watching.Line(Slow(store, seconds), "there, port 1"), 0, 8)
        process.machines = ["here", *["there"] * 7]
        process.start()
        process.join(timeout=5)

    child = multiprocessing.get_context("fork").Process(target=watch)
    child.start()
    child.join()
    assert child.exitcode == 1
    assert f"process 0 of 8 stops: {said}" in capfd.readouterr().err


def test_what_takes_too_long_ends_a_process_that_all_others_wait_for(capfd):
    def watch() -> None:
        process = watching.Watch(watching.Line(dist.HashStore(), "there"), 0, 2)
        with process.limit(0.1, "it cannot connect"):
            time.sleep(5)

    child = multiprocessing.get_context("fork").Process(target=watch)
    child.start()
    child.join()
    assert child.exitcode == 1
    assert "process 0 of 2 stops: it cannot connect" in capfd.readouterr().err


@pytest.mark.slow
def test_an_error_in_all_processes_is_reported_once(images, tmp_path):
    started = launch(2, *command(images, tmp_path, "run", "--IPC 5"))
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 2
    assert errors.count("error:") == 1 and "classes of 5" in errors


@pytest.mark.slow
def test_nobody_outlives_the_launcher(images, tmp_path):
    started = launch(2, *command(images, tmp_path, "run", "--epochs 100000 --eval-every 100000"))
    wait_for((tmp_path / "run" / "last.pth").is_file)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(started.pid)], capture_output=True, text=True
    ).stdout.split()
    assert len(children) == 2
    started.send_signal(signal.SIGKILL)
    started.wait()
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in children):
            return
        time.sleep(0.1)
    raise AssertionError("processes went on without their launcher")
