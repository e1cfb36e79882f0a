"""Files of a run that are damaged or hostile: a sentence, and never another number."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, run_python

import runs
from page import records
from runs import checkpoints, tables
from storage import (
    digest,
    load_arrays,
    load_tensors,
    save_arrays,
    save_tensors,
    write_atomically,
    write_content,
)
from utils import DamagedError, InputError, MachineError

CHANGED = r"is not as (it was|the run) wr"


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests copy it."""
    flags = "--loss AMLoss --warm 0 --epochs 2 --seed 3"
    return tiny.run(images, tmp_path_factory.mktemp("logs"), "run", flags)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


# --- archives -------------------------------------------------------------------------------------


def save_small(path: Path) -> None:
    if path.suffix == ".pth":
        save_tensors(path, {"a": torch.arange(6.0), "args": {"seed": 1}})
    else:
        save_arrays(path, {"a": np.arange(6.0), "names": np.array(["x", "yz"])}, small=True)


@pytest.mark.parametrize("name", ["small.pth", "small.npz"])
def test_a_disk_that_fails_does_not_make_a_file_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    save_small(path)

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(torch, "load", failing)
    monkeypatch.setattr(np, "load", failing)
    with pytest.raises(MachineError, match=r"could not be read or written \(Stale file handle\)"):
        (load_tensors if name.endswith("pth") else load_arrays)(path, "it")


def test_a_file_stays_as_it_was_on_a_disk_that_takes_nothing_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the system has made it read-only: a run goes on without its files."""
    write_content(tmp_path / "file", "before")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", read_only)
        patch.setattr(Path, "unlink", read_only)
        with pytest.raises(MachineError, match=r"cannot write .*: Read-only file system"):
            write_content(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("name", ["small.pth", "small.npz"])
def test_every_byte_and_every_length_of_an_archive_counts(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    load = load_tensors if name.endswith("pth") else load_arrays
    save_small(path)
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedError):
            load(path, "file")
    for length in (*range(0, len(content), 37), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedError):
            load(path, "file")
    for more in (b"\0", content, b"x" * 70_000):
        path.write_bytes(content + more)
        with pytest.raises(DamagedError):
            load(path, "file")
    path.write_bytes(content)
    assert load(path, "file").keys() >= {"a"}


def test_others_read_our_archives_and_we_read_theirs(tmp_path: Path) -> None:
    save_small(tmp_path / "ours.pth")
    save_small(tmp_path / "ours.npz")
    assert torch.load(tmp_path / "ours.pth", weights_only=True)["args"] == {"seed": 1}
    mapped = torch.load(tmp_path / "ours.pth", weights_only=True, mmap=True)
    assert mapped["a"].tolist() == list(range(6))
    with np.load(tmp_path / "ours.npz") as arrays:
        assert arrays["names"].tolist() == ["x", "yz"]
    for name in ("ours.pth", "ours.npz"):
        assert zipfile.ZipFile(tmp_path / name).testzip() is None
        shutil.copy(tmp_path / name, tmp_path / f"copy_of_{name}")
    changed = load_tensors(tmp_path / "copy_of_ours.pth")
    torch.save({**changed, "b": torch.ones(2)}, tmp_path / "theirs.pth")  # averaged, say
    torch.save(changed, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "theirs.npz", a=np.arange(3))
    assert load_tensors(tmp_path / "theirs.pth")["b"].sum() == 2
    assert load_tensors(tmp_path / "old.pth")["a"].sum() == 15
    assert load_arrays(tmp_path / "theirs.npz", "file")["a"].tolist() == [0, 1, 2]


def test_an_array_larger_than_its_file_gets_no_memory(tmp_path: Path) -> None:
    for name, kind in (("plain", np.savez), ("packed", np.savez_compressed)):
        path = tmp_path / f"{name}.npz"
        kind(path, a=np.zeros(4000))
        archive = zipfile.ZipFile(path)
        header = archive.read("a.npy").replace(b"'shape': (4000,), ", b"'shape': (10**12,),")
        header = header.replace(b"10**12", b"999999999999"[:6])
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("a.npy", header)
        with pytest.raises(DamagedError, match=r"claims to be of shape \(999999,\)"):
            load_arrays(path, "file")


@pytest.mark.parametrize("shape", ["(8000000000000,)", "(-1,)", "(2,) + (3,)"])
def test_a_hostile_header_is_refused(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (118 - len(header) - 1) + b"\n"
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as out:
        out.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(DamagedError):
        load_arrays(tmp_path / "x.npz", "file")


# --- text files -----------------------------------------------------------------------------------


def test_the_text_files_of_a_run_have_checksums(run: Path) -> None:
    noted = json.loads((run / "checksums.json").read_text())
    names = {"args.json", "environment.json", "results.json", "metrics.csv", "margins.csv"}
    assert noted.keys() == names
    for name in names:
        assert noted[name][-1] == digest((run / name).read_bytes())
    for name in names - {"margins.csv"}:
        content = (run / name).read_bytes()
        digit = next(i for i, byte in enumerate(content) if chr(byte) in "12345678")
        (run / name).write_bytes(content[:digit] + b"9" + content[digit + 1 :])
        with pytest.raises(DamagedError, match=CHANGED):
            records.read(run)
        (run / name).write_bytes(content)
    records.read(run)


@pytest.mark.parametrize("moment", [0, 1])
def test_a_kill_between_a_file_and_its_checksum_is_no_damage(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, write = runs.MetricsTable(tmp_path / "metrics.csv"), tables.write_content
    table.append({"epoch": 1, "step": 8, "loss": 1.5})
    left = [moment]

    def dying(path, content):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(path, content)

    monkeypatch.setattr(tables, "write_content", dying)
    with pytest.raises(KeyboardInterrupt):
        table.append({"epoch": 2, "step": 16, "loss": 1.0})
    monkeypatch.setattr(tables, "write_content", write)
    again = runs.MetricsTable(tmp_path / "metrics.csv")
    assert [row["epoch"] for row in again.rows()] == ["1"]
    again.append({"epoch": 2, "step": 16, "loss": 1.0})
    assert [row["epoch"] for row in again.rows()] == ["1", "2"]


def test_who_reads_a_run_that_goes_on_takes_nothing_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.csv"
    runs.MetricsTable(path).append({"epoch": 1, "step": 8})
    read, overtaken = Path.read_bytes, []

    def slowly(file: Path) -> bytes:
        content = read(file)
        if file == path and not overtaken:
            overtaken.append(file)
            for epoch in (2, 3):  # so that nothing is known any more of what was read
                runs.MetricsTable(path).append({"epoch": epoch, "step": 8 * epoch})
        return content

    monkeypatch.setattr(Path, "read_bytes", slowly)
    assert [row["epoch"] for row in runs.MetricsTable(path).rows()] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format": checkpoints.FORMAT + 1}, "newer than"),
        ({"format": "1"}, "its format is a str"),
        ({"skipped": None}, "its skipped is a NoneType"),
        ({"metrics": {"emoji": {"R@1": "x"}}}, "its metrics of emoji are not numbers"),
        ({"row": {"epoch": 1}}, "damaged"),
        ({"row": {"epoch": 1, "step": 0.5}}, "its row has no epoch, or no step"),
        ({"row": {"epoch": 1, "step": 8, "loss": [2.5]}}, "its row has other things than numbers"),
        ({"criterion_state_dict": {"proxies": 3}}, "its criterion has other things than tensors"),
        ({"ema_state_dict": {"weight": "x"}}, "its running mean has other things than tensors"),
        ({"base_state_dict": {}}, "the weights that a run left as they were"),
    ],
)
def test_a_checkpoint_that_no_run_of_ours_wrote_is_refused(
    content: dict, said: str, tmp_path: Path
) -> None:
    path, ours = tmp_path / "last.pth", {"clock": {}}  # by which a run's are known
    save_tensors(path, ours | content)
    with pytest.raises(InputError, match=said):
        checkpoints.load_checkpoint(path)
    fine = ours | {"format": checkpoints.FORMAT, "row": None, "model_state_dict": {}}
    save_tensors(path, fine)
    assert checkpoints.load_checkpoint(path) == fine


class Clock:
    """What a method of one's own may keep."""


@pytest.mark.parametrize("state", [Clock(), lambda: None, sys.stdout])
def test_what_could_not_be_read_again_is_not_written(state: object, tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    save_tensors(path, {"routines": [{"seen": np.int64(3)}]})
    with pytest.raises(InputError, match=r"last\.pth cannot be written.* plain values$"):
        save_tensors(path, {"routines": [{"seen": state}]})
    assert [path] == list(tmp_path.iterdir())
    assert load_tensors(path) == {"routines": [{"seen": 3}]}


def test_a_file_is_for_whom_the_umask_admits(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_small(tmp_path / "small.npz")
        assert (tmp_path / "small.npz").stat().st_mode & 0o777 == 0o640
    finally:
        assert os.umask(before) == 0o027  # and is as it was


@pytest.mark.parametrize(("mode", "then"), [(0o600, 0o600), (0o664, 0o664), (0o440, 0o640)])
def test_a_file_that_is_replaced_stays_for_whom_it_was(
    tmp_path: Path, mode: int, then: int
) -> None:
    """While it is written, too; the owner may always write."""
    path, seen = tmp_path / "table.csv", []
    path.write_text("secret")
    path.chmod(mode)

    def write(file: BinaryIO) -> None:
        file.write(b"another secret")
        seen.extend(each.stat().st_mode & 0o777 for each in tmp_path.glob(".*.tmp"))

    write_atomically(path, write)
    assert [*seen, path.stat().st_mode & 0o777] == [then, then]
    assert path.read_text() == "another secret" and len([*tmp_path.iterdir()]) == 1


def test_files_of_an_older_version_are_read_as_before(run: Path) -> None:
    (run / "checksums.json").unlink()
    for name in ("last.pth", tiny.best_checkpoint(run).name, "classes.npz"):
        content = (run / name).read_bytes()
        end = content.rindex(b"PK\x05\x06")
        (run / name).write_bytes(content[: end + 20] + b"\0\0")  # the archive without a comment
    tiny.resume(run, "--epochs 3")
    assert [row["epoch"] for row in tiny.metrics_rows(run)] == ["1", "2", "3"]
    assert len(runs.ClassHistory(run / "classes.npz").load()["epoch"]) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"epoch,step\n1,8\n\xff\xfe,9\n"),
        ("metrics.csv", b"epoch,step,loss\n1,8\n"),
        ("metrics.csv", b"epoch,loss\n1,8\n"),
        ("metrics.csv", b"epoch,step,loss,loss\n1,8,2,3\n"),
        ("metrics.csv", b"epoch,step\n1,nan\n"),
        ("metrics.csv", b"epoch,step\n1," + b"9" * 400 + b"\n"),
        ("metrics.csv", b'epoch,step\n1,"8\n'),
        ("metrics.csv", b""),
        ("args.json", b'{"batch_size": "many"}'),
        ("args.json", b'{"dataset": 3}'),
        ("args.json", b'{"lr": NaN}'),
        ("args.json", b'{"loss_args": 3}'),
        ("args.json", b'{"recipe": ["x"]}'),
        ("args.json", b"[" * 100_000),
        ("args.json", b"\xff\xfe"),
        ("results.json", b'{"best_epoch": "x", "results": {}}'),
        ("results.json", b'{"best_epoch": 1}'),
        ("results.json", b'{"best_epoch": 1, "results": {"a": {"R@1": "1"}}}'),
        ("results.json", b'{"results": {}, "thresholds": 3}'),
        ("results.json", b'{"results": {}, "thresholds": {"a": {"same": "x"}}}'),
        ("results.json", b'{"results": {}, "verification": {"a": {"EER": "x"}}}'),
        ("environment.json", b'{"packages": 3}'),
        ("environment.json", b"3"),
        ("checksums.json", b'{"args.json": 3}'),
    ],
)
def test_contents_that_make_no_sense_are_refused(name: str, content: bytes, run: Path) -> None:
    (run / "checksums.json").unlink()
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        records.read(run)


def test_classes_that_do_not_go_together_are_refused(run: Path) -> None:
    known = runs.ClassHistory(run / "classes.npz").load()
    for changes in (
        {"names": known["names"][:-1]},
        {"images": known["images"].astype(str)},
        {"epoch": known["epoch"][:1]},
        {"margin": known["margin"][:, :2]},
    ):
        np.savez(run / "classes.npz", **{**known, **changes})
        with pytest.raises(InputError, match="do not go together"):
            runs.ClassHistory(run / "classes.npz").load()
    np.savez(run / "classes.npz", names=known["names"])
    with pytest.raises(InputError, match="damaged"):
        runs.ClassHistory(run / "classes.npz").load()


@pytest.mark.parametrize("spoil", ["clock", "past", "flag", "lap", "optimiser", "group", "random"])
def test_a_state_that_no_training_can_have_is_refused(spoil: str, run: Path) -> None:
    state = tiny.saved(run)
    first = state["optimisers"]["optimisers"][0]
    match spoil:
        case "clock":
            state["clock"]["step"] = "many"
        case "past":
            state["clock"]["step"] = -5
        case "flag":
            state["clock"]["step"] = True
        case "lap":
            state["lap"]["counts"] = None
        case "optimiser":
            first["state"][0]["exp_avg"] = torch.zeros(1, 2, 3)
        case "group":
            first["param_groups"][0]["lr"] = None
        case "random":
            state["random"]["torch"] = torch.zeros(3)
    torch.save(state, run / "last.pth")
    with pytest.raises(InputError, match="damaged"):
        tiny.resume(run, "--epochs 3")


# --- a sample of all ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sample_of_damages_is_refused_in_sentences() -> None:
    done = run_python("benchmarks/damage.py", "--damages", 4, "--seed", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, total = (line for line in done.stdout.splitlines() if line.startswith("| all |"))
    cells = total.strip("| ").split(" | ")
    assert cells[1] == "4" and cells[-2:] == ["0", "0"] and int(cells[2]) >= 2


@pytest.mark.slow
def test_five_hundred_damages_are_refused_in_sentences() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "damage.py"), "--damages", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
