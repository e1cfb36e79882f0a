"""What every command does first: threads, and output that cannot be written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import ROOT, run_code, run_python, start_python
from programs import Program

import door
import machine
from utils import STATUS_BY_KIND

# --- threads --------------------------------------------------------------------------------------

NAMES = (*door.WAITING, "OMP_NUM_THREADS")
COMMANDS = {
    "train": "train.py --dataset emoji",
    "evaluate": "evaluate.py --resume x",
    "report": "report.py x",
    "net": "-m net export x --onnx y",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"KMP_BLOCKTIME": "7"}])
def test_threads_are_settled_before_torch_is_loaded_unless_the_user_has(command, own, tmp_path):
    told = f"import os; print({{n: os.environ[n] for n in {NAMES} if n in os.environ}}, flush=True)"
    (tmp_path / "torch.py").write_text(f"{told}; os._exit(7)")
    known = {k: v for k, v in os.environ.items() if k not in NAMES} | {"OMP_NUM_THREADS": "3"}
    done = subprocess.run(
        [sys.executable, *COMMANDS[command].split()],
        cwd=ROOT,
        env={**known, **own, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    settled = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": door.BRIEFLY}
    assert done.returncode == 7, done.stderr
    assert eval(done.stdout) == {**(own or settled), "OMP_NUM_THREADS": "3"}


def test_threads_are_no_more_than_the_cores_there_are(monkeypatch):
    monkeypatch.setattr(door, "cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    environment = {"GOMP_SPINCOUNT": "5"}
    door.settle_threads(environment)
    assert environment == {"GOMP_SPINCOUNT": "5", "OMP_NUM_THREADS": "3"}
    environment = {"OMP_NUM_THREADS": "9"}
    door.settle_threads(environment)
    assert environment["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/job/step", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "1e5"}, 8),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "400", "cpu/cpu.cfs_period_us": "100"}, 4),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:memory:/", {"cpu.max": "100000 100000"}, 8),
    ],
)
def test_a_containers_share_counts(groups, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    assert machine.cores(tmp_path) == expected


def test_cores_are_those_that_the_process_is_bound_to(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5}, raising=False)
    assert machine.cores() == 1


# --- output that cannot be written ----------------------------------------------------------------


def training(images: Path, logs: Path, **streams: Any) -> Program | subprocess.Popen[str]:
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", logs]
    more = ["--epochs", "2", "--name", "run"]
    return start_python(ROOT / "train.py", *command, *more, streams=streams)


def test_training_goes_on_when_its_reader_goes_away(images, tmp_path):
    run = training(images, tmp_path)
    assert run.stdout.readline()
    run.stdout.close()
    assert (run.stderr.read(), run.wait(100)) == ("", 0)
    assert len(tiny.metrics_rows(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_training_goes_on_when_the_disk_under_its_output_is_full(images, tmp_path):
    with Path("/dev/full").open("w") as full:
        run = training(images, tmp_path, stdout=full)
        said = run.stderr.read()
    assert run.wait(100) == 0 and said.count("\n") == 1
    assert "what is printed is lost from here on (No space left on device)" in said
    assert (tmp_path / "run" / "results.json").is_file()


def answer(images: Path, stdout: Any) -> tuple[int, str]:
    """Status and words of a command whose answer goes to `stdout`."""
    words = ["-m", "dataset", "check", f"folder:{images}"]
    command = start_python(*words, streams={"stdout": stdout})
    _, errors = command.communicate()
    return command.returncode, errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_answer_that_is_lost_is_an_error(images):
    with Path("/dev/full").open("w") as full:
        status, errors = answer(images, full)
    assert status == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: not all of the output could be written")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "command",
    ["train.py --help", "-m net --help", "-m anchorage --help", "-m anchorage completion bash"],
)
def test_help_that_is_lost_is_an_error(command):
    with Path("/dev/full").open("w") as full:
        done = start_python(*command.split(), streams={"stdout": full})
    errors = done.communicate()[1]
    assert done.returncode == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: not all of the output could be written")


def test_a_reader_who_has_seen_enough_is_none(images):
    read, write = os.pipe()
    os.close(read)
    ended = answer(images, write)
    os.close(write)
    assert ended == (0, "")


def test_a_closed_output_is_not_given_to_the_next_file(tmp_path):
    code = "import door, os, sys; door.enter(); os._exit(os.open(sys.argv[1], os.O_CREAT))"
    done = run_python("-c", f"import os; [os.close(n) for n in (0, 1)]; {code}", tmp_path / "file")
    assert done.returncode > 2


@pytest.mark.parametrize(
    "command", ["train.py", "evaluate.py", "search.py", "-m dataset", "-m net"]
)
def test_with_closed_errors_a_command_goes_on_and_puts_none_into_its_output(command):
    """As under a daemon: there is no standard error to write to (`2>&-`)."""
    for word, status in (("--help", 0), ("--nonsense", 2)):
        words = [sys.executable, *command.split(), word]
        shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *words]
        done = subprocess.run(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert done.returncode == status
        assert done.stdout.startswith("usage: ") if status == 0 else done.stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_before_there_is_a_run_ends_a_command_in_a_word(command, tmp_path):
    stopping = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    (tmp_path / "torch.py").write_text(stopping)
    for number, said in (("0", "interrupted\n"), ("1", "")):  # of several processes one speaks
        done = subprocess.run(
            [sys.executable, *COMMANDS[command].split()],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path), "RANK": number},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", said)


LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        f"train.py --resume-run {LONG}",
        f"train.py --pretrained {LONG} --dry-run",
        f"evaluate.py --resume {LONG}",
        f"report.py {LONG}",
        f"search.py info {LONG}",
        f"-m net export {LONG} --onnx y",
    ],
)
def test_a_name_that_no_file_can_have_is_a_sentence(command):
    done = run_python(*command.split())
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"no file can have so long a name: {LONG[:60]}..." in done.stderr


def test_a_full_disk_is_a_sentence_wherever_it_is_met():
    code = "from utils import sentence_errors\nwith sentence_errors():\n"
    done = run_python("-c", f"{code}    open('/dev/full', 'wb', buffering=0).write(b'x')")
    assert done.returncode == 2 and done.stderr.startswith("error: the disk is full (No space")


@pytest.mark.parametrize("made", ["bytearray(1 << 60)", "__import__('torch').empty(1 << 60)"])
def test_full_memory_is_a_sentence_and_for_who_asks_a_status_of_its_own(made, tmp_path):
    code = f"from utils import sentence_errors\nwith sentence_errors(): {made}"
    for variables, status in ({}, 2), ({STATUS_BY_KIND: "1"}, 71):
        done = run_code(code, cwd=tmp_path, **variables)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: this machine's memory is full")


@pytest.mark.parametrize("command", ["search.py info x", "train.py --dataset emoji"])
def test_a_limit_below_what_torch_needs_is_a_sentence(command):
    # As queues set it for a job. One of these loads torch in its main, the other before it.
    limited = 'ulimit -v 600000; exec "$@"'
    done = subprocess.run(
        ["bash", "-c", limited, "bash", sys.executable, *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: a library cannot be loaded" in done.stderr and "ulimit -v" in done.stderr


def test_where_it_does_not_run_it_says_so():
    code = "import sys; sys.modules['fcntl'] = None; import door; door.enter()"
    done = run_python("-c", code)
    assert done.returncode == 2 and done.stderr.startswith("error: this runs on Linux and macOS")
    assert "WSL" in done.stderr and done.stderr.count("\n") == 1


# --- make -----------------------------------------------------------------------------------------

PYTHON = """#!/bin/sh
# One that says of itself that it is of version {version}, and makes environments that say so.
case "$*" in
  *"version_info[:2]"*) echo "{version}" ;;
  *version_info*) exit {old} ;;
  "-m venv"*)
    rm -rf .venv && mkdir -p .venv/bin && cp "$0" .venv/bin/python
    exit {without_pip} ;;
  "-m pip"*) exit {without_pip} ;;
esac
"""


def stand_in(path: Path, version: str, *, pip: bool = True) -> Path:
    """A program that does as a Python of this version does for make."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = int(version in ("3.8", "3.9"))
    path.write_text(PYTHON.format(version=version, old=old, without_pip=int(not pip)))
    path.chmod(0o755)
    return path


def making(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`make .venv/.run` in a folder that has what it needs for that."""
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        if not (folder / name).exists():
            (folder / name).write_bytes((ROOT / name).read_bytes())
    # A make within make test would have its flags, PYTHON=... among them.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", ".venv/.run", *arguments],
        cwd=folder,
        env={**ours, **environment},
        capture_output=True,
        text=True,
    )


def version_made(folder: Path) -> str:
    command = [folder / ".venv/bin/python", "version_info[:2]"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


with_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@with_make
def test_make_lists_its_targets_on_a_terminal_of_80_columns():
    lines = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    listed = {line.split()[1] for line in lines if line.startswith("make ")}
    assert listed == {"demo", "demo-scratch", "shell", "test", "test-all", "gpu-check"}
    assert max(map(len, lines)) <= 80


@with_make
@pytest.mark.parametrize("able", [True, False])
def test_make_begins_again_after_a_start_without_pip(able, tmp_path):
    # As it is left where python3-venv is missing: without pip.
    stand_in(tmp_path / ".venv/bin/python", "3.12", pip=False)
    python = stand_in(tmp_path / "python", "3.12", pip=able)
    done = making(tmp_path, f"PYTHON={python}")
    assert (done.returncode == 0) == able, done.stderr
    assert (tmp_path / ".venv/.run").exists() == able
    assert ("python3-venv" in done.stdout) != able


@with_make
def test_make_begins_again_where_an_upgrade_took_the_python_away(tmp_path):
    python = f"PYTHON={stand_in(tmp_path / 'python', '3.12')}"
    assert making(tmp_path, python).returncode == 0
    (tmp_path / ".venv/bin/python").unlink()
    (tmp_path / ".venv/bin/python").symlink_to(tmp_path / "gone" / "python")
    done = making(tmp_path, python)
    assert done.returncode == 0 and "installed" in done.stdout, done.stderr
    assert version_made(tmp_path) == "3.12"


@with_make
def test_make_takes_the_python_that_it_is_given_where_another_was_there(tmp_path):
    first, second = (stand_in(tmp_path / version, version) for version in ("3.13", "3.12"))
    assert making(tmp_path, f"PYTHON={first}").returncode == 0
    (tmp_path / ".venv/ours").touch()
    assert making(tmp_path, f"PYTHON={first}").stdout == making(tmp_path).stdout
    assert version_made(tmp_path) == "3.13" and (tmp_path / ".venv/ours").exists()
    assert making(tmp_path, f"PYTHON={second}").returncode == 0
    assert version_made(tmp_path) == "3.12" and not (tmp_path / ".venv/ours").exists()


@with_make
def test_an_old_python_matters_only_where_it_would_be_used(tmp_path):
    """A Mac's python3 is 3.9; the environment may be of another."""
    old, new = (stand_in(tmp_path / version, version) for version in ("3.9", "3.12"))
    done = making(tmp_path, f"PYTHON={old}")
    assert done.returncode == 2 and "make .venv/.run PYTHON=python3.12" in done.stdout
    assert not (tmp_path / ".venv").exists()
    assert making(tmp_path, f"PYTHON={new}").returncode == 0
    (tmp_path / ".venv/.run").unlink()
    (tmp_path / "python3").symlink_to(old)
    done = making(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0 and version_made(tmp_path) == "3.12", done.stdout


@with_make
def test_a_shell_has_the_environment_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / 'it\'s $HOME "here"'
    stand_in(folder / ".venv/bin/python", "3.12")
    for name in ("Makefile", "requirements.txt", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".venv/bin/activate").write_text("echo activated\n")
    (folder / ".venv/.run").touch()
    (tmp_path / ".bashrc").write_text("cd /\n")
    # A make within make test would say where it is.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "shell"],
        cwd=folder,
        env={**ours, "HOME": str(tmp_path)},
        input="exit\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("activated\npython is "), done.stderr
