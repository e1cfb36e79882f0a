"""Shared pieces of the tests: the real command line in a folder of its own."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small networks want one thread

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"

# A network and a batch size that train in seconds on the embedded data.
SMALL = (
    "--model resnet18 --stem imagenet --width 0.125 --embedding-size 16 --batch-size 32 "
    "--workers 0 --wandb disabled --no-report"
).split()


def run_cli(
    script: str, *arguments: str, cwd: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python SCRIPT ARGUMENTS` as a user would, from the folder `cwd`."""
    environment = {**os.environ, "WANDB_MODE": "disabled", **variables}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def files_in(folder: Path) -> list[str]:
    """Relative paths of all files under a folder, sorted."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder that looks like the repository's: the embedded data are in reach as data/emoji."""
    link_repository_data(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def session_workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `workdir`, one for all tests that only read what one run left."""
    folder = tmp_path_factory.mktemp("run")
    link_repository_data(folder)
    return folder


def link_repository_data(folder: Path) -> None:
    """Makes the embedded data and the recipes reachable from a folder, without copying them."""
    (folder / "data").mkdir()
    (folder / "data" / "emoji").symlink_to(ROOT / "data" / "emoji")
    (folder / "recipes").symlink_to(ROOT / "recipes")
