"""Shared pieces of the tests: the real command line in a folder of its own."""

from __future__ import annotations

import os

import door

# Before torch is loaded: on networks this small, threads cost more than they give.
os.environ["OMP_NUM_THREADS"] = "1"
door.settle_threads(os.environ)

import contextlib
import errno
import fcntl
import gc
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import programs
import pytest
from small_images import write_drawings, write_images

LONGEST = (
    "readme metrics shares train report faults methods recipes processes efficientnet terminals "
    "datasets data_flags evaluate door divide export studies folds released damage finetuning "
    "tracking ema kernels"
).split()
"""The test files that take longest come first, so that no core is left with one at the end."""

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"

# A network and a batch size that train in seconds on the embedded data.
SMALL = (
    "--model resnet18 --stem imagenet --width 0.125 --embedding-size 16 --batch-size 32 "
    "--workers 0 --wandb disabled --no-report"
).split()


def pytest_configure() -> None:
    """Refuses a folder for temporary files in whose paths command lines would be cut in two."""
    if " " in tempfile.gettempdir():
        pytest.exit("the tests split command lines at spaces, and TMPDIR has one: TMPDIR=/tmp", 2)


def pytest_collectstart() -> None:
    """Before a test loads Triton: without a GPU its interpreter runs the kernels.

    It waits until tests are collected, which the process that deals them out to others does not do.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def pytest_collection_finish() -> None:
    """Lets no collection of garbage look at what the imports made: it looked at little else."""
    gc.collect()
    gc.freeze()
    # Nor does that of a forked child look at what tests have left, which is the parent's: a store
    # among it has a thread that the child has not, and who collects such a store ends by SIGABRT.
    os.register_at_fork(after_in_child=gc.freeze)


def pytest_unconfigure() -> None:
    """At the end all may be freed; Triton complains of what is not."""
    gc.unfreeze()


def run_python(
    *arguments: object, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python ARGUMENTS` (`-m net …`, `-c CODE`) from the folder `cwd`; our modules are found.

    Args:
        variables: of the environment, over those of this process.
    """
    return programs.run(*_called(arguments, cwd, variables))


def run_code(
    code: str, *arguments: object, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `code` as a program that lies in the folder `cwd`; see `run_python`.

    Unlike with `python -c`, which tests of what a program loads want, torch is there already.
    """
    (cwd / "program.py").write_text(code)
    return run_python("program.py", *arguments, cwd=cwd, **variables)


def start_python(
    *arguments: object,
    cwd: Path = ROOT,
    streams: Mapping[str, int | IO] | None = None,
    **variables: str,
) -> programs.Program | subprocess.Popen[str]:
    """Starts what `run_python` runs; for signals and terminals.

    Args:
        streams: see `programs.start`.
    """
    return programs.start(*_called(arguments, cwd, variables), **(streams or {}))


def on_a_terminal(columns: int, *arguments: object, cwd: Path, status: int = 0) -> list[str]:
    """All that a command shows on a terminal of so many columns, bars that have passed left out."""
    leader, follower = pty.openpty()
    size = struct.pack("HHHH", 24, columns, 0, 0)
    fcntl.ioctl(follower, termios.TIOCSWINSZ, size)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    done = start_python(*arguments, cwd=cwd, streams=streams, COLUMNS="")
    os.close(follower)
    parts = []
    with contextlib.suppress(OSError):  # what a terminal says when its last writer is gone
        while part := os.read(leader, 4096):
            parts.append(part)
    os.close(leader)
    text = b"".join(parts).decode()
    assert done.wait() == status, text
    return [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]


def _called(
    arguments: Sequence[object], cwd: Path, variables: Mapping[str, str]
) -> tuple[list[str], Path, dict[str, str]]:
    """The words, the folder and the environment of a command."""
    ours = {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    return [str(a) for a in arguments], cwd, {**os.environ, **ours, **variables}


def run_cli(
    script: str, *arguments: object, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python SCRIPT ARGUMENTS` as a user would, from the folder `cwd`; see `run_python`."""
    return run_python(ROOT / script, *arguments, cwd=cwd, **variables)


def wait_for(condition: Callable[[], object], seconds: float = 250) -> None:
    """Until something is so, such as `file.is_file`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.02)


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work()` returned, and how many functions it called: work that no clock disturbs."""
    calls = 0

    def count(frame: object, event: str, what: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        returned = work()
    finally:
        sys.setprofile(None)
    return returned, calls


def refusal(
    capsys: pytest.CaptureFixture[str], parse: Callable[..., object], *arguments: object
) -> str:
    """The one sentence, with status 2, with which `parse(*arguments)` refuses a command line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        parse(*arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def files_in(folder: Path) -> list[str]:
    """Relative paths of all files under a folder, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads cost more than they give on layers and matrices as small as the tests'."""
    import torch  # not before a test wants it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def maps_here() -> Iterator[None]:
    """Lets t-SNE place maps here: its own process takes two seconds to load scikit-learn."""
    import page.tsne

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr("page.map._tsne", page.tsne.places)
        yield


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that knows no locks."""

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small generated images (see small_images.py), for all that only read them."""
    return write_images(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder that looks like the repository's, with a tenth of the embedded data."""
    link_repository_data(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def session_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `workdir`, one for all the tests that only read what one run left."""
    folder = tmp_path_factory.mktemp("run")
    link_repository_data(folder)
    return folder


def link_repository_data(folder: Path) -> None:
    """Puts a tenth of the embedded data, and the recipes, where commands look for them."""
    write_drawings(folder / "data")
    (folder / "recipes").symlink_to(ROOT / "recipes")
