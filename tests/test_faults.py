"""Signals, numbers that are not finite, full disks: what a run does when something goes wrong."""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import multiprocessing
import os
import pty
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import tiny
import torch
from conftest import ROOT, run_cli, run_python, start_python, wait_for
from programs import Program
from tiny import same, untimed_rows

import devices
import evaluate
import machine
import options
import processes
import train
from dataset.kept import default_folder
from devices import pick_device
from runs import RunFolder, tables
from storage import HeldError, save_tensors, write_atomically
from training import faults, tracking
from training.collapse import CollapseWarning, chance, class_mean_cosine
from training.signals import Interrupted, Signals
from training.tracking import wandb_mode
from utils import InputError, sentence_errors

SECRET = "a1b2c3d4" * 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_images(tmp_path_factory.mktemp("data") / "tiny", images=12)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return tiny.saved(folder)["model_state_dict"]


# --- signals --------------------------------------------------------------------------------------


def start(images: Path, logs: Path, *flags: str, **how: Any) -> Program | subprocess.Popen[str]:
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", logs, *flags]
    return start_python(ROOT / "train.py", *command, **how)


LONG = "--epochs 12 --eval-every 7 --deterministic"


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    return tiny.run(images, tmp_path_factory.mktemp("logs"), "whole", LONG)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_a_run_after_a_checkpoint(number, status, whole, images, tmp_path) -> None:
    run = start(images, tmp_path, *LONG.split(), "--name", "run")
    wait_for((tmp_path / "run" / "metrics.csv").is_file)
    run.send_signal(number)
    printed, errors = run.communicate(timeout=250)
    assert run.returncode == status, errors
    assert f"python train.py --resume-run {tmp_path / 'run'}" in printed
    assert "Traceback" not in errors
    stopped = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["clock"]["step"]
    assert f"at step {stopped}" in printed and 0 < stopped < 12 * 8
    tiny.resume(tmp_path / "run", "")
    assert same(weights(tmp_path / "run"), weights(whole))
    assert untimed_rows(tmp_path / "run") == untimed_rows(whole)


def test_a_terminal_that_is_closed_ends_a_run_after_a_checkpoint(images, tmp_path) -> None:
    flags = ["--epochs", "4000", "--eval-every", "4000", "--workers", "1", "--name", "run"]
    terminal, inside = pty.openpty()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    run = start(images, tmp_path, *flags, streams=streams)
    os.close(inside)
    wait_for((tmp_path / "run" / "metrics.csv").is_file)
    os.close(terminal)  # which the system tells the run by SIGHUP
    assert run.wait(250) == 129
    clock = tiny.saved(tmp_path / "run")["clock"]
    assert 0 < clock["step"] < 4000 * 8


def test_under_nohup_a_terminal_may_be_closed() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested is None
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Signals() as signals:
            for _ in range(2):  # the shell and the system both say so
                os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_requests_and_the_second_one_is_obeyed_at_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
        with pytest.raises(Interrupted) as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert signals.next_of(iter("ab")) is None

        def torn() -> Iterator[str]:  # what reads the data has got the signal too
            raise InputError("a process that reads images died")
            yield

        assert signals.next_of(torn()) is None
        signals.requested = None
        assert signals.next_of(iter("ab")) == "a"
        with pytest.raises(InputError, match="died"):
            signals.next_of(torn())
    assert stop.value.status == 143 and signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_comes_while_the_processes_agree_counts_the_next_time(monkeypatch) -> None:
    """Most of a short step is waiting for the others, so many signals come just then."""

    def interrupted(own: int) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return own

    with Signals() as signals:
        with monkeypatch.context() as during:
            during.setattr(processes, "largest", interrupted)
            assert signals.agreed() is None
        assert signals.agreed() == signals.requested == signal.SIGTERM


def test_a_signal_does_not_wait_for_an_evaluation() -> None:
    with Signals() as signals, pytest.raises(Interrupted), signals.at_once():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    with Signals() as signals:
        with signals.at_once():
            pass
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested == signal.SIGINT  # waits for the step that is being done
        with pytest.raises(Interrupted), signals.at_once():
            raise AssertionError("an evaluation is begun all the same")


def test_one_closed_terminal_may_be_told_of_twice() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, here as well
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_evaluation_is_repeated_and_training_is_not(
    images, tmp_path, monkeypatch
) -> None:
    flags = "--epochs 3 --warm 0"
    whole = tiny.run(images, tmp_path, "whole", flags)
    evaluate, asked = train.Training.evaluate, []

    def interrupted(self, *more):
        asked.append(self.clock.step)
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *more)

    monkeypatch.setattr(train.Training, "evaluate", interrupted)
    with pytest.raises(SystemExit) as stop:
        tiny.run(images, tmp_path, "run", flags)
    assert stop.value.code == 143
    steps, step = [], train.step
    monkeypatch.setattr(train, "step", lambda *a: steps.append(1) or step(*a))
    tiny.resume(tmp_path / "run", "")
    # The last one compares the pairs of images, with the best weights.
    assert asked == [8, 16, 16, 24, 24] and len(steps) == 8
    assert same(weights(tmp_path / "run"), weights(whole))
    assert untimed_rows(tmp_path / "run") == untimed_rows(whole)


@pytest.mark.parametrize(
    ("during", "said"),
    [
        ("_say_results", "at step 8; continue with:\n  python train.py --resume-run"),
        ("_write_page", "when the run had ended; its page is made by:\n  python report.py"),
    ],
)
def test_a_signal_does_not_wait_for_the_last_words_of_a_run(
    during, said, images, tmp_path, monkeypatch, capsys
) -> None:
    """They look at all test classes, and draw a map of them: minutes with many images."""

    def interrupted(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # where Python looks for signals
        raise AssertionError("it went on")

    monkeypatch.setattr(train.Keeper, during, interrupted)
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", str(tmp_path)]
    command = [word for word in command if word != "--no-report"]
    with pytest.raises(SystemExit) as stop:
        train.main(options.parse_train([*command, "--epochs", "1", "--name", "run"]))
    assert stop.value.code == 130
    assert f"stopped by SIGINT {said} {tmp_path / 'run'}\n" in capsys.readouterr().out
    monkeypatch.undo()
    tiny.resume(tmp_path / "run", "--no-report")
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize("moment", ["results.json", "last.pth"])
def test_a_signal_to_all_processes_of_a_run_is_told_like_any_other(
    moment, images, tmp_path
) -> None:
    """While its page is made, or as it begins; those that read images are ended by it too."""
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", str(tmp_path)]
    command = [word for word in command if word != "--no-report"]
    more = "--workers 2 --epochs 1 --name run".split()
    run = start_python(ROOT / "train.py", *command, *more)
    wait_for((tmp_path / "run" / moment).is_file)
    os.killpg(run.pid, signal.SIGTERM)
    said, errors = run.communicate()
    assert run.returncode == 143 and "stopped by SIGTERM" in said, errors
    assert "Traceback" not in errors and "died" not in errors


# --- saving and continuing ------------------------------------------------------------------------


def test_saves_between_epochs_and_older_checkpoints(images, tmp_path, monkeypatch) -> None:
    saved: list[int] = []
    save = RunFolder.save_last

    def watched(self, state, keep=0):
        saved.append(state["clock"]["step"])
        save(self, state, keep)

    monkeypatch.setattr(RunFolder, "save_last", watched)
    folder = tiny.run(images, tmp_path, "run", "--epochs 2 --save-every 3 --keep 2")
    assert saved == [0, 3, 6, 8, 9, 12, 15, 16, 16], "the last with what was measured then"
    assert sorted(p.name for p in folder.glob("step_*")) == [
        "step_00000015.pth",
        "step_00000016.pth",
    ]
    plain = tiny.run(images, tmp_path, "plain", "--epochs 2")
    assert same(weights(folder), weights(plain)) and untimed_rows(folder) == untimed_rows(plain)
    middle = torch.load(folder / "step_00000015.pth", weights_only=True)
    assert middle["clock"]["step_in_epoch"] == 7 and middle["lap"]["images"] == 7 * 12
    for kept in ("environment", "args", "random", "optimisers", "criterion_state_dict", "format"):
        assert kept in middle
    assert middle["environment"]["packages"]["torch"]


def test_the_versions_of_packages_are_read_once(monkeypatch) -> None:
    """Each checkpoint keeps them, and reading them takes longer than saving a small network."""
    from importlib import metadata

    version, asked = metadata.version, []
    monkeypatch.setattr(metadata, "version", lambda name: asked.append(name) or version(name))
    devices.versions.cache_clear()
    kept = [devices.environment(torch.device("cpu"))["packages"] for _ in range(3)]
    assert kept[0] == kept[1] == kept[2] and kept[0]["torch"] == version("torch")
    assert len(asked) == len({*asked}) >= 7


def test_resume_auto_continues_finds_the_end_and_tells_other_runs_apart(
    images, tmp_path, monkeypatch, capsys
) -> None:
    flags = "--epochs 3 --resume auto --seed 4"
    advance, stops = train.advance, []

    def dying(training, signals):
        stops.append(training.clock.epoch)
        if len(stops) == 3:
            raise KeyboardInterrupt
        return advance(training, signals)

    monkeypatch.setattr(train, "advance", dying)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(images, tmp_path, "run", flags)
    tiny.run(images, tmp_path, "run", flags)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert "continuing after epoch 2" in capsys.readouterr().out
    whole = tiny.run(images, tmp_path, "whole", "--epochs 3 --seed 4")
    assert same(weights(tmp_path / "run"), weights(whole))
    tiny.run(images, tmp_path, "run", flags)
    assert f"this run is finished: {tmp_path / 'run'}" in capsys.readouterr().out
    tiny.run(images, tmp_path, "run", flags.replace("--seed 4", "--seed 5"))
    assert (tmp_path / "run-2").is_dir()


def test_a_command_killed_before_its_first_checkpoint_begins_anew_in_its_folder(
    images, tmp_path, monkeypatch
) -> None:
    """Another folder beside it would be called run-2, which nobody asked for."""

    def killed(*_):
        raise KeyboardInterrupt

    for name, flags in (("run", "--seed 4 --resume auto"), ("run", "--seed 5 --resume auto")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(train.Keeper, "save", killed)
            tiny.run(images, tmp_path, name, f"--epochs 1 {flags}")
    (tmp_path / "run" / "job.log").write_text("a file of the user's own")
    for _ in range(2):
        tiny.run(images, tmp_path, "run", "--epochs 1 --resume auto --seed 4")
    tiny.run(images, tmp_path, "run", "--epochs 1 --resume auto --seed 5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-2"]
    assert (tmp_path / "run" / "job.log").is_file()
    for folder, seed in ((tmp_path / "run", 4), (tmp_path / "run-2", 5)):
        whole = tiny.run(images, tmp_path / "whole", f"of-{seed}", f"--epochs 1 --seed {seed}")
        assert same(weights(folder), weights(whole)) and (folder / "results.json").is_file()
        assert RunFolder(folder).read_args()["seed"] == seed


def test_a_run_whose_folder_is_moved_away_and_back_ends_like_any_other(
    images, tmp_path, monkeypatch, caplog
) -> None:
    """A folder made anew would lack the options, and nothing in it could be used."""
    flags, advance, away = "--epochs 4 --seed 4", train.advance, tmp_path / "away"
    run = tmp_path / "logs" / "run"

    def moving(training, signals):
        if training.clock.epoch == 1:
            run.rename(away)
        elif training.clock.epoch == 3:
            assert not run.exists()
            away.rename(run)
        return advance(training, signals)

    monkeypatch.setattr(train, "advance", moving)
    tiny.run(images, tmp_path / "logs", "run", flags)
    assert f"the run folder {run} is not there any more" in caplog.text
    monkeypatch.undo()
    whole = tiny.run(images, tmp_path, "whole", flags)
    assert same(weights(run), weights(whole)) and untimed_rows(run) == untimed_rows(whole)
    assert (run / "results.json").is_file()


def test_a_run_without_its_best_checkpoint_makes_another(images, tmp_path) -> None:
    """One that went back to an older checkpoint may have been killed after it was removed."""
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    tiny.best_checkpoint(folder).unlink()
    state = tiny.saved(folder)
    state["clock"]["best"] = 1.0
    save_tensors(folder / "last.pth", state)
    tiny.resume(folder, "--epochs 2")
    assert tiny.saved(folder, "best")["epoch"] == 2


def test_a_longer_run_that_is_killed_as_it_begins_is_not_finished(
    images, tmp_path, monkeypatch
) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 1 --resume auto")
    change = RunFolder.change_args

    def killed(self, *how):
        change(self, *how)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "change_args", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny.resume(folder, "--epochs 2")
    monkeypatch.undo()
    tiny.run(images, tmp_path, "run", "--epochs 2 --resume auto")
    assert tiny.saved(folder)["clock"]["epoch"] == 2 and len(untimed_rows(folder)) == 2


def test_a_run_of_an_older_version_is_found_and_goes_on_as_it_was(images, tmp_path, capsys):
    """Without the flags that came later, and with the defaults of then."""
    words = "--loss TripletLoss --IPC 3 --epochs 2 --lr 1e-2 --resume auto"
    of_then = f"{words} --mining earlier --weight-decay 0.1"
    then = tiny.run(images, tmp_path / "then", "run", of_then)
    older = tiny.run(images, tmp_path / "older", "run", f"{of_then} --max-steps 4")
    state, args = tiny.saved(older), json.loads((older / "args.json").read_text())
    for kept in (args, state["args"]):
        for name in ("mining", "bn_momentum", "IPC_repeat"):
            del kept[name]
        kept["max_steps"] = None
        said = set(kept["given"]) - {"mining", "weight_decay", "max_steps"}
        kept["given"] = sorted(said)
    torch.save(state, older / "last.pth")
    (older / "args.json").write_text(json.dumps(args))
    for name in ("results.json", "checksums.json"):
        (older / name).unlink()
    capsys.readouterr()
    tiny.run(images, tmp_path / "older", "run", words)
    assert [path.name for path in (tmp_path / "older").iterdir()] == ["run"]
    assert "continuing after epoch 0, step 4" in capsys.readouterr().out
    assert same(weights(older), weights(then))
    new = tiny.run(images, tmp_path / "new", "run", f"{words} --weight-decay 0.1")
    assert not same(weights(new), weights(then))


def test_a_signal_before_the_first_step_of_a_division_divides_once(
    images, tmp_path, monkeypatch
) -> None:
    flags = "--epochs 4 --warm 0 --nb-clusters 2 --mod-epoch 2 --IPC 2 -crs 3 --ema 0.9"
    whole = tiny.run(images, tmp_path, "whole", flags)
    following = Signals.next_of

    def interrupted(signals, batches):
        if following.__dict__.setdefault("asked", 0) == 8 * 2:  # the first batch of epoch 3
            os.kill(os.getpid(), signal.SIGTERM)
        following.__dict__["asked"] += 1
        return following(signals, batches)

    monkeypatch.setattr(Signals, "next_of", interrupted)
    with pytest.raises(SystemExit):
        tiny.run(images, tmp_path, "run", flags)
    state = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert state["clock"]["epoch"] == 2 and state["clock"]["step_in_epoch"] == 0
    tiny.resume(tmp_path / "run", "")
    assert same(weights(tmp_path / "run"), weights(whole))
    assert untimed_rows(tmp_path / "run") == untimed_rows(whole)


def test_a_run_goes_on_in_the_precision_that_it_began_in(images, tmp_path, capsys) -> None:
    """--amp auto is what suits the machine, and the next one may be another."""
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    here = json.loads((folder / "environment.json").read_text())["precision"]
    assert f"precision {here}" in capsys.readouterr().out
    other = "off" if here == "bf16" else "bf16"
    tiny.edit(folder / "environment.json", precision=other)
    tiny.resume(folder, "--epochs 2")
    assert f"precision {other}" in capsys.readouterr().out


def test_an_older_checkpoint_can_be_continued_from(images, tmp_path) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 3 --keep 9")
    before, rows = weights(folder), untimed_rows(folder)
    assert len(list(folder.glob("step_*.pth"))) == 4
    tiny.resume(folder / "step_00000008.pth", "")
    assert same(weights(folder), before) and untimed_rows(folder) == rows


def test_checkpoints_later_than_the_one_that_is_gone_on_from_are_no_older_ones(
    images, tmp_path
) -> None:
    """--keep would keep them in place of the new ones, and they belong to rows that are gone."""
    folder = tiny.run(images, tmp_path, "run", "--epochs 3 --keep 9")
    (folder / "step_mine.pth").touch()  # what has another name is somebody's own
    tiny.resume(folder / "step_00000008.pth", "--keep 1 --max-steps 12")
    assert {p.name for p in folder.glob("step_*")} == {"step_00000012.pth", "step_mine.pth"}


def test_where_files_cannot_be_locked_a_run_begins_and_says_so_once(
    tmp_path, no_locks, caplog
) -> None:
    run = RunFolder.create(tmp_path, "run")
    run.begin({"seed": 1}, {})
    assert run.read_args() == {"seed": 1}
    (said,) = (record.getMessage() for record in caplog.records)
    assert said == f"nothing keeps other processes out of {run.path} (No locks available)"


def test_half_written_files_of_a_killed_run_are_removed(images, tmp_path) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    (folder / ".last.pth.abc.tmp").write_bytes(b"half")
    tiny.resume(folder, "--epochs 2")
    assert not list(folder.glob(".*.tmp"))


def test_a_run_is_not_continued_on_other_images(images, tmp_path) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    (folder / "checksums.json").unlink()  # as of an older version: its files may be changed
    kept = (folder / "environment.json").read_text()
    for side, words in (("train", "training images"), ("eval", "evaluation images")):
        content = json.loads(kept)
        content["images"][side] = "0" * 16
        (folder / "environment.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"the {words} are not those"):
            tiny.resume(folder, "--epochs 2")
    older = {k: v for k, v in json.loads(kept).items() if k != "images"}
    (folder / "environment.json").write_text(json.dumps({**older, "data": "0" * 16}))
    with pytest.raises(InputError, match="the training images are not those"):
        tiny.resume(folder, "--epochs 2")
    (folder / "environment.json").write_text(json.dumps(older))
    tiny.resume(folder, "--epochs 2")


def test_a_run_in_progress_is_not_continued_by_another_process(images, tmp_path) -> None:
    run = start(images, tmp_path, "--epochs", "4000", "--eval-every", "4000", "--name", "run")
    wait_for((tmp_path / "run" / "last.pth").is_file)
    try:
        with pytest.raises(HeldError, match="is going on in another process") as refused:
            tiny.resume(tmp_path / "run", "")
        assert refused.value.status == 75
    finally:
        run.kill()
        run.communicate()
    done = tiny.saved(tmp_path / "run")["clock"]["step"]  # however far it came before it was killed
    tiny.resume(tmp_path / "run", f"--max-steps {done + 1}")


def held_run(folder: Path) -> RunFolder:
    """A run with options alone, which this process holds."""
    folder.mkdir()
    run = RunFolder(folder)
    run.write_args({"epochs": 1})
    run.hold()
    return run


def try_to_hold(folder: Path) -> None:
    """Ends this process with status 3 where another one holds the run."""
    try:
        RunFolder(folder).hold()
    except InputError:
        os._exit(3)


FORK = multiprocessing.get_context("fork")


def test_a_folder_in_which_a_run_just_begins_is_left_to_it(images, tmp_path, monkeypatch) -> None:
    def killed(*_):
        raise KeyboardInterrupt

    flags = "--epochs 1 --resume auto"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(train.Keeper, "save", killed)
        tiny.run(images, tmp_path, "run", flags)
    begun = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def begin_too() -> None:
        try:
            RunFolder(tmp_path / "run").begin({"epochs": 1}, {})
        except HeldError:
            os._exit(3)

    held = RunFolder(tmp_path / "run")
    held.hold()
    other = FORK.Process(target=begin_too)
    other.start()
    other.join()
    assert other.exitcode == 3
    assert begun == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_run_stays_held_while_its_options_are_written_anew(tmp_path, monkeypatch) -> None:
    """A run that is made longer; the lock is on the very file."""
    run, write, found = held_run(tmp_path / "run"), tables.write_content, []

    def written_late(path: Path, content: Any) -> None:
        other = FORK.Process(target=try_to_hold, args=(run.path,))
        other.start()
        other.join()
        found.append((path.name, other.exitcode))
        write(path, content)

    monkeypatch.setattr(tables, "write_content", written_late)
    run.change_args(lambda args: {**args, "epochs": 2})
    assert found == [("checksums.json", 3), ("args.json", 3)]
    assert RunFolder(run.path).read_args() == {"epochs": 2}


def test_a_run_is_held_before_all_that_it_begins_with_is_written(tmp_path, monkeypatch) -> None:
    """It has no checkpoint yet, and is no remains of a start that was killed."""
    run, write, found = RunFolder.create(tmp_path, "run"), RunFolder.write_environment, []

    def written_late(self: RunFolder, content: dict[str, Any]) -> None:
        other = FORK.Process(target=try_to_hold, args=(self.path,))
        other.start()
        other.join()
        found.append(other.exitcode)
        write(self, content)

    monkeypatch.setattr(RunFolder, "write_environment", written_late)
    run.begin({"epochs": 1}, {})
    assert found == [3]


def test_who_locks_options_that_have_been_replaced_does_not_have_the_run(tmp_path) -> None:
    run, opened, replaced = held_run(tmp_path / "run"), FORK.Event(), FORK.Event()

    def hold_late() -> None:
        lock = fcntl.lockf

        def lock_late(*given: Any) -> None:
            opened.set()
            assert replaced.wait(20)
            lock(*given)

        fcntl.lockf = lock_late  # of this process
        try_to_hold(run.path)

    other = FORK.Process(target=hold_late)
    other.start()
    assert opened.wait(20)
    run.change_args(lambda args: {**args, "epochs": 2})
    replaced.set()
    other.join()
    assert other.exitcode == 3


def test_who_holds_a_run_removes_left_over_files_and_none_that_is_just_being_written(
    tmp_path,
) -> None:
    """As the page, which report.py may write into the folder of a run that begins to go on."""
    folder = tmp_path / "run"
    folder.mkdir()
    RunFolder(folder).write_args({"epochs": 1})
    (folder / ".last.pth.killed.tmp").touch()

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        other = FORK.Process(target=try_to_hold, args=(folder,))
        other.start()
        other.join()
        assert other.exitcode == 0
        assert not (folder / ".last.pth.killed.tmp").exists()
        file.write(b" and half")

    write_atomically(folder / "report.html", write)
    assert (folder / "report.html").read_bytes() == b"half and half"
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set()


def test_a_row_kept_back_by_a_full_disk_is_written_with_the_next(tmp_path, monkeypatch) -> None:
    table, write = tables.MetricsTable(tmp_path / "metrics.csv"), tables.write_content
    table.append({"epoch": 1, "step": 8, "loss": 1.5})
    full = InputError("cannot write metrics.csv: No space left on device")

    def refuse(*_):
        raise full

    monkeypatch.setattr(tables, "write_content", refuse)
    with pytest.raises(InputError):
        table.append({"epoch": 2, "step": 16, "loss": 1.25})
    monkeypatch.setattr(tables, "write_content", write)
    table.append({"epoch": 3, "step": 24, "loss": 1.0, "R@1": 0.5})
    assert [(row["epoch"], row["loss"], row["R@1"]) for row in table.rows()] == [
        ("1", "1.5", ""),
        ("2", "1.25", ""),
        ("3", "1", "0.5"),
    ]


# --- numbers that are not finite ------------------------------------------------------------------


def spoil(training: train.Training, at: set[int], gradient: bool = False) -> None:
    """Makes the loss, or the gradient of the network, NaN at some steps."""
    objective, count = training.objective, iter(range(1, 10**6))
    forward = objective.forward

    def spoilt(outputs, labels, **context):
        loss = forward(outputs, labels, **context)
        if next(count) not in at:
            return loss
        if gradient:
            outputs.embedding.register_hook(lambda grad: grad * float("nan"))
            return loss
        return loss * float("nan")

    objective.forward = spoilt


@pytest.mark.parametrize("gradient", [False, True])
def test_a_run_stops_before_a_bad_update_and_names_its_images(
    gradient, images, tmp_path, monkeypatch
) -> None:
    prepare = train.prepare
    kept: list[train.Training] = []

    def spoilt(args, **more):
        kept.append(prepare(args, **more))
        spoil(kept[-1], {3}, gradient)
        return kept[-1]

    monkeypatch.setattr(train, "prepare", spoilt)
    what = "gradient" if gradient else "loss"
    with pytest.raises(InputError, match=rf"the {what} is not finite at epoch 1, step 3 .*non_fin"):
        tiny.run(images, tmp_path, "run", "--epochs 2")
    record = json.loads((tmp_path / "run" / "non_finite.json").read_text())
    assert (record["epoch"], record["step"]) == (1, 3) and len(record["images"]) == 12
    assert all(Path(path).is_file() for path in record["images"])
    assert record["learning_rates"]["proxies"] > 0 and "positive" in record["terms"]
    assert all(p.isfinite().all() for p in kept[0].network.parameters())
    assert weights(tmp_path / "run")  # the checkpoint from before


def test_bad_steps_are_skipped_up_to_a_bound(images, tmp_path, monkeypatch, caplog) -> None:
    prepare = train.prepare

    def spoilt(args, **more):
        training = prepare(args, **more)
        spoil(training, {2, 5})
        return training

    step = train.step

    def recorded(training, batch):
        values = step(training, batch)
        losses.append(None if values is None else float(values["loss"]))
        return values

    monkeypatch.setattr(train, "step", recorded)
    losses: list[float | None] = []
    monkeypatch.setattr(train, "prepare", spoilt)
    folder = tiny.run(images, tmp_path, "run", "--epochs 1 --on-nan skip")
    assert [r.getMessage()[:14] for r in caplog.records if "skipped" in r.message] == [
        "step 2 is skip",
        "step 5 is skip",
    ]
    assert [number for number, loss in enumerate(losses, 1) if loss is None] == [2, 5]
    taken = [loss for loss in losses if loss is not None]
    (row,) = tiny.metrics_rows(folder)
    assert float(row["loss"]) == pytest.approx(sum(taken) / len(taken), rel=1e-5)
    monkeypatch.setattr(faults, "MAX_SKIPPED", 1)
    with pytest.raises(InputError, match="1 steps were skipped before it"):
        tiny.run(images, tmp_path, "more", "--epochs 1 --on-nan skip")
    begun = tiny.run(images, tmp_path, "begun", "--epochs 1 --on-nan skip --max-steps 3")
    with pytest.raises(InputError, match="1 steps were skipped before it"):  # also of a first part
        tiny.resume(begun, "--max-steps 6")


def test_an_epoch_without_a_step_that_counts_ends_like_others(
    images, tmp_path, monkeypatch, capsys
) -> None:
    prepare = train.prepare

    def spoilt(args, **more):
        training = prepare(args, **more)
        spoil(training, set(range(9, 17)))  # those of the second epoch
        return training

    monkeypatch.setattr(train, "prepare", spoilt)
    folder = tiny.run(images, tmp_path, "run", "--epochs 3 --on-nan skip")
    losses = [row["loss"] for row in tiny.metrics_rows(folder)]
    assert losses[1] == "" and losses[0] and losses[2]
    assert "epoch   2/3  loss nan" in capsys.readouterr().out


def test_a_skipped_step_leaves_the_running_statistics_alone(images) -> None:
    training = tiny.prepare(images, "--on-nan skip --bn-freeze 0 --sec_wei 1")
    batches = iter(training.loader)
    training.network.train()
    assert train.step(training, next(batches)) is not None
    before = [buffer.clone() for buffer in training.running_statistics()]
    bad = next(batches)
    assert train.step(training, bad._replace(images=bad.images * float("nan"))) is None
    assert all(
        torch.equal(a, b) for a, b in zip(before, training.running_statistics(), strict=True)
    )
    assert len(before) > 10 and train.step(training, next(batches)) is not None


def test_a_gpu_is_asked_every_so_often(monkeypatch) -> None:
    watch = faults.Watch("stop", torch.device("cuda"))
    assert not watch.careful and faults.Watch("skip", torch.device("cuda")).careful

    def step(number: int, finite: bool) -> faults.Step:
        loss = torch.tensor(1.0 if finite else float("nan"))
        return faults.Step(0, number, torch.arange(2), {"loss": loss}, {}, loss.isfinite())

    for number in range(1, faults.CHECK_EVERY_ON_GPU):
        assert watch.saw(step(number, number != 7))
    with pytest.raises(faults.NonFinite, match="step 7"):
        watch.saw(step(faults.CHECK_EVERY_ON_GPU, True))


# --- collapse, memory, disks ----------------------------------------------------------------------


def test_collapse_is_reported_once(caplog) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) // 3
    spread = torch.randn(60, 16, generator=generator)
    same_for_all = torch.ones(60, 16) + 0.01 * spread
    warning = CollapseWarning()
    for recall in (0.02, 0.03, 0.5):  # at the beginning, while it rises, and while they are found
        warning.look(same_for_all, labels, recall)
    assert not caplog.records
    for embeddings in (spread, same_for_all, same_for_all):
        warning.look(embeddings, labels, recall=0.03)
    assert chance(labels) == pytest.approx(2 / 59)
    (record,) = caplog.records
    assert "collapsed: the mean cosine between classes is 1.000, so it gives all" in record.message
    means = torch.stack(
        [torch.nn.functional.normalize(spread)[labels == c].mean(0) for c in range(20)]
    )
    cosines = torch.nn.functional.normalize(means) @ torch.nn.functional.normalize(means).T
    expected = (cosines.sum() - 20) / (20 * 19)
    assert class_mean_cosine(spread, labels) == pytest.approx(float(expected), abs=1e-5)
    assert class_mean_cosine(spread, torch.zeros(60, dtype=torch.int64)) == 0


@pytest.mark.parametrize("scale", [0.0, 1e-20, 0.3])
@pytest.mark.parametrize("size", [1, 16])
def test_embeddings_without_a_difference_have_collapsed_whatever_recall_is(
    size, scale, caplog
) -> None:
    embeddings, labels = torch.full((60, size), scale), torch.arange(60) // 3
    warning = CollapseWarning()
    warning.look(embeddings, labels, recall=1.0)
    warning.look(embeddings, labels, recall=1.0)
    reason = "all embeddings point the same way" if scale else "all embeddings are zero"
    assert [record.message for record in caplog.records] == [
        f"the network has collapsed: {reason}; lower --lr, or give a pair loss more classes per "
        "batch (--IPC)"
    ]


def test_embeddings_of_which_most_are_zero_have_collapsed(caplog) -> None:
    embeddings, labels = torch.zeros(60, 16), torch.arange(60) // 3
    embeddings[:1] = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    assert class_mean_cosine(embeddings, labels) > 0.98
    warning = CollapseWarning()
    warning.look(embeddings, labels, recall=0.9)  # says nothing while they are found
    warning.look(embeddings, labels, recall=0.9)
    assert not caplog.records
    warning.look(embeddings, labels, recall=0.03)
    assert len(caplog.records) == 1


def test_a_short_embedding_is_no_zero(caplog) -> None:
    spread = 1e-25 * torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    CollapseWarning().look(spread, torch.arange(60) // 3, recall=0.03)
    assert not caplog.records


def test_the_death_of_a_worker_is_a_sentence_wherever_the_run_stands(images, tmp_path) -> None:
    # In a process of its own: torch tells of the death by an error out of nowhere, from a signal.
    code = (
        "import multiprocessing, sys, time, train, options\n"
        "from utils import sentence_errors\n"
        "def killing(training, batch):\n"
        "    for worker in multiprocessing.active_children(): worker.kill()\n"
        "    time.sleep(60)\n"
        "train.step = killing\n"
        "with sentence_errors(): train.main(options.parse_train(sys.argv[1:]))\n"
    )
    flags = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--epochs", "2", "--workers", "1"]
    (tmp_path / "killing.py").write_text(code)
    done = run_python(tmp_path / "killing.py", *flags, "--LOG_DIR", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "a process that reads images died" in done.stderr


def test_a_full_gpu_is_explained_in_terms_of_the_command_line(images, monkeypatch) -> None:
    def full(args, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train, "prepare", full)
    with pytest.raises(InputError, match=r"--batch-size 12 at 32 pixels; give a --micro"):
        train.main(tiny.parse(images))


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_full_gpu_is_a_sentence_whatever_says_so(said, monkeypatch, capsys) -> None:
    def full(args) -> None:
        raise RuntimeError(said)

    with pytest.raises(SystemExit) as ended, sentence_errors():
        full(None)
    told = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert told.startswith("error: the GPU's memory is full; end what else uses it (nvidia-smi")
    monkeypatch.setattr(evaluate, "run", full)
    with pytest.raises(InputError, match="is full; lower --batch-size, end what else"):
        evaluate.main(argparse.Namespace(gpu_id=0))


@pytest.fixture
def two_gpus(monkeypatch) -> None:
    """A machine that says it has two, as one does whose second is divided by MIG."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: invalid device ordinal\nGPU device may be out of range",
        "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
        "CUDA error: no kernel image is available for execution on the device",
    ],
)
def test_a_gpu_that_cannot_be_used_is_a_sentence(said, two_gpus, monkeypatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    first, *_ = said.splitlines()
    with pytest.raises(InputError) as raised:
        pick_device(1)
    assert str(raised.value).startswith(f"GPU 1 cannot be used: {first}; choose another (--gpu-id")
    assert "\n" not in str(raised.value)


def test_a_gpu_that_is_full_already_is_told_as_a_full_one(two_gpus, monkeypatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with pytest.raises(SystemExit), sentence_errors():
        pick_device(1)


@pytest.mark.parametrize("visible", [None, "GPU-5f2a,GPU-77c1"])
def test_a_gpu_that_is_not_there_is_a_sentence(visible, two_gpus, monkeypatch) -> None:
    has = "this machine has"
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        has = f"CUDA_VISIBLE_DEVICES={visible} leaves"
    with pytest.raises(InputError) as raised:
        pick_device(2)
    said = f"--gpu-id 2: {has} 2 GPUs, numbered from 0; choose one of them"
    assert str(raised.value) == said


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path) -> None:
    code = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from storage import save_tensors\nfrom utils import InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "try: save_tensors(Path(sys.argv[1]), {'a': torch.zeros(10**6)})\n"
        "except InputError as error: sys.exit(str(error))\n"
    )
    (tmp_path / "saving.py").write_text(code)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "last.pth"
    save_tensors(path, {"a": torch.ones(3)})
    done = run_python(tmp_path / "saving.py", path)
    assert done.returncode == 1 and "cannot write" in done.stderr and "unchanged" in done.stderr
    assert torch.load(path, weights_only=True)["a"].sum() == 3
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"]


LIMITED = """
import resource, runpy, signal, sys
name, most = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(getattr(resource, name), (most, most))
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train_limited(
    name: str, most: int, tmp_path: Path, *flags: object
) -> subprocess.CompletedProcess[str]:
    """`train.py` where the system's limit of that name is so low."""
    (tmp_path / "limited.py").write_text(LIMITED)
    return run_python(tmp_path / "limited.py", name, most, ROOT / "train.py", *flags)


def test_a_run_outlives_a_disk_that_fills_up_and_says_so_at_the_end(images, tmp_path) -> None:
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", tmp_path]
    command += ["--epochs", "2", "--name", "run"]
    done = train_limited("RLIMIT_FSIZE", 150_000, tmp_path, *command)
    assert done.returncode == 2
    assert done.stdout.count("\nepoch ") == 2 and "training goes on" in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: cannot write")
    assert len(untimed_rows(tmp_path / "run")) == 2


def full_for(monkeypatch: pytest.MonkeyPatch, refused: Callable[[str], bool]) -> None:
    """A disk without room for the new files whose names are `refused`."""
    opened = Path.open

    def full(path: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        if "x" in mode and refused(path.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *given, **more)

    monkeypatch.setattr(Path, "open", full)


@pytest.mark.parametrize("room", range(4))  # for checksums.json and args.json, and that again
def test_a_disk_without_room_for_files_leaves_no_run(room, images, tmp_path, monkeypatch) -> None:
    made: list[str] = []
    full_for(monkeypatch, lambda name: made.append(name) or len(made) > room)
    with pytest.raises(InputError, match=r"cannot write .*No space left"):
        tiny.run(images, tmp_path, "run", "--epochs 1")
    assert len(made) == room + 1 and not list(tmp_path.iterdir())


def test_a_run_goes_on_where_no_checkpoint_can_be_made(images, tmp_path, monkeypatch) -> None:
    full_for(monkeypatch, lambda name: ".pth" in name)
    with pytest.raises(InputError, match=r"cannot write .*pth"):
        tiny.run(images, tmp_path, "run", "--epochs 2")
    assert len(untimed_rows(tmp_path / "run")) == 2


@pytest.mark.parametrize("file", ["data_resnet10_best.pth", "metrics.csv", "margins.csv"])
def test_what_the_last_evaluation_could_not_write_is_made_by_continuing(
    file, images, tmp_path, monkeypatch, capsys
) -> None:
    flags = "--loss AMLoss --warm 0 --epochs 1 --resume auto"
    whole = tiny.run(images, tmp_path, "whole", flags)
    full_for(monkeypatch, lambda name: name.startswith(f".{file.replace('data', images.name)}."))
    with pytest.raises(InputError, match=f"cannot write .*{file.removeprefix('data')}"):
        tiny.run(images, tmp_path, "run", flags)
    run = tmp_path / "run"
    assert f"made by:\n  python train.py --resume-run {run}\n" in capsys.readouterr().out
    monkeypatch.undo()
    tiny.run(images, tmp_path, "run", flags)
    assert same(tiny.saved(run, "best")["model_state_dict"], weights(whole))
    assert same(weights(run), weights(whole)) and untimed_rows(run) == untimed_rows(whole)
    for name in ("results.json", "margins.csv"):
        assert (run / name).read_text() == (whole / name).read_text()


def test_an_older_checkpoint_that_cannot_be_kept_ends_no_run(
    images, tmp_path, monkeypatch, caplog
) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"cannot write .*step_00000016"):
        tiny.run(images, tmp_path, "run", "--epochs 2 --keep 1")
    assert "training goes on" in caplog.text and len(untimed_rows(tmp_path / "run")) == 2


def test_the_fault_is_told_where_its_record_cannot_be_written(
    images, tmp_path, monkeypatch
) -> None:
    prepare = train.prepare

    def spoilt(args, **more):
        training = prepare(args, **more)
        spoil(training, {3})
        return training

    def full(*_):
        raise InputError("cannot write non_finite.json: No space left on device")

    monkeypatch.setattr(train, "prepare", spoilt)
    monkeypatch.setattr(RunFolder, "write_fault", full)
    with pytest.raises(InputError, match="the loss is not finite at epoch 1, step 3"):
        tiny.run(images, tmp_path, "run", "--epochs 1")


def test_a_run_folder_that_cannot_be_written_is_not_continued(
    images, tmp_path, monkeypatch
) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    opened = Path.open

    def locked(self, mode="r", *args, **more):
        if self.parent == folder and mode not in ("r", "rb"):
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(self, mode, *args, **more)

    monkeypatch.setattr(Path, "open", locked)
    with pytest.raises(InputError, match=r"run cannot be written \(Read-only file system\)"):
        tiny.resume(folder, "--epochs 2")


def test_few_open_files_are_a_sentence(images, tmp_path) -> None:
    words = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", tmp_path]
    words[words.index("--workers") + 1] = "2"
    done = train_limited("RLIMIT_NOFILE", 10, tmp_path, *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "ulimit -n" in done.stderr.strip().splitlines()[-1]


def test_tensorboard_on_a_full_disk_ends_alone_and_without_a_traceback(
    images, tmp_path, monkeypatch, caplog, capfd
) -> None:
    record_writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    args = tiny.parse(images, f"--epochs 3 --LOG_DIR {tmp_path} --name run --tensorboard")
    monkeypatch.setattr(record_writer.RecordWriter, "write", full)
    train.main(args)
    assert len(untimed_rows(tmp_path / "run")) == 3
    assert "tensorboard stopped ([Errno 28] No space left on device)" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_a_read_only_log_folder_sends_the_run_home(images, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    locked, mkdir = tmp_path / "locked", Path.mkdir

    def refusing(self, *args, **more):
        if locked in [self, *self.parents]:
            raise PermissionError(13, "Permission denied")
        return mkdir(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", refusing)
    tiny.run(images, locked, "run", "--epochs 1")
    assert (tmp_path / "home" / "anchorage-logs" / "run" / "results.json").is_file()
    assert "is read-only; the run goes to" in caplog.text


def test_without_a_home_folder_a_read_only_log_folder_is_a_sentence(tmp_path, monkeypatch) -> None:
    def nobody(_: object) -> None:
        raise KeyError("no such uid")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    assert machine.home() is None and wandb_mode(None) == "offline"
    with pytest.raises(InputError, match="no home folder to keep the cache in"):
        default_folder()
    mkdir = Path.mkdir

    def refusing(self, *args, **more):
        if self.name == "run":
            raise PermissionError(13, "Permission denied")
        return mkdir(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(InputError, match="cannot be written, and there is no home folder"):
        RunFolder.create(tmp_path / "logs", "run")


def test_resume_auto_finds_runs_in_folders_of_their_name_and_at_home(
    images, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tiny.run(images, tmp_path / "logs", "a/b", "--epochs 1 --resume auto")
    again = "--epochs 1 --resume auto"
    tiny.run(images, tmp_path / "logs", "a/b", again)
    assert [path.name for path in folder.parent.iterdir()] == ["b"]
    assert f"this run is finished: {folder}" in capsys.readouterr().out
    (tmp_path / "home").mkdir()
    (tmp_path / "logs").rename(tmp_path / "home" / "anchorage-logs")
    tiny.run(images, tmp_path / "logs", "a/b", again)
    assert "this run is finished" in capsys.readouterr().out


def test_a_run_begun_with_max_steps_says_at_once_that_it_goes_on_to_the_end(
    images, tmp_path, capsys
) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 2 --max-steps 2")
    capsys.readouterr()
    tiny.resume(folder, "--max-steps 3")
    assert "begun with" not in capsys.readouterr().out
    tiny.resume(folder, "")
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("begun with --max-steps 2, continued to the end of the run")


def test_the_best_checkpoint_is_the_best_that_could_be_written(
    images, tmp_path, monkeypatch, capsys
) -> None:
    save, tries = RunFolder.save_best, []

    def full_at_first(self, state):
        tries.append(state["epoch"])
        if len(tries) == 1:
            raise InputError("no space left")
        save(self, state)

    monkeypatch.setattr(RunFolder, "save_best", full_at_first)
    # The same R@1 in every epoch.
    folder = tiny.run(images, tmp_path, "run", "--epochs 3 --lr 1e-30 --bn-freeze 1")
    assert tries == [1, 2]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["best" in row for row in rows] == [False, True, True] and "(epoch 2)" in rows[2]
    assert tiny.saved(folder, "best")["epoch"] == 2
    assert json.loads((folder / "results.json").read_text())["best_epoch"] == 2


def test_a_run_folder_may_be_called_like_a_checkpoint(images, tmp_path, capsys) -> None:
    folder = tiny.run(images, tmp_path, "net.pth", "--epochs 1")
    tiny.resume(folder, "--epochs 2")
    assert "continuing after epoch 1" in capsys.readouterr().out


def test_ctrl_c_while_a_run_folder_is_made_leaves_none(images, tmp_path, monkeypatch) -> None:
    def interrupted(self, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "write_environment", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(images, tmp_path, "run", "--epochs 1")
    assert not [*tmp_path.iterdir()]


def test_a_file_where_run_folders_are_to_be_made_is_named(tmp_path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(InputError, match="logs is not a folder; choose another --LOG_DIR"):
        RunFolder.create(tmp_path / "logs", "run")


@pytest.mark.parametrize(
    ("first", "longer"),
    [("--epochs 3 --max-steps 3", "--max-steps 8"), ("--epochs 2 --eval-every 3", "--epochs 4")],
)
def test_what_the_end_of_a_shorter_run_measured_is_kept_when_it_goes_on(
    first, longer, images, tmp_path
) -> None:
    folder = tiny.run(images, tmp_path, "run", f"{first} --lr 1e-2 --warm 0")
    measured = tiny.untimed_rows(folder)
    assert measured[-1]["R@1"]
    tiny.resume(folder, longer)
    rows = tiny.untimed_rows(folder)
    assert len(rows) > len(measured) and rows[: len(measured)] == measured
    best = max((row for row in rows if row["R@1"]), key=lambda row: float(row["R@1"]))
    results = json.loads((folder / "results.json").read_text())
    assert results["best_epoch"] == int(best["epoch"])
    assert tiny.saved(folder, "best")["step"] == int(best["step"])


def test_a_run_that_was_made_longer_and_stopped_goes_on_to_its_new_length(
    images, tmp_path, monkeypatch, capsys
) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    step = train.step

    def stopped(training, batch):
        if training.clock.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(training, batch)

    monkeypatch.setattr(train, "step", stopped)
    with pytest.raises(SystemExit):
        tiny.resume(folder, "--epochs 3 --eval-every 2 --on-nan skip")
    monkeypatch.undo()
    assert not (folder / "results.json").is_file()  # which was of the shorter run
    with pytest.raises(InputError, match="give at least --epochs 3"):
        tiny.resume(folder, "--epochs 2")
    capsys.readouterr()
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", str(tmp_path)]
    longer = "--name run --resume auto --epochs 3 --eval-every 2 --on-nan skip".split()
    train.main(options.parse_train([*command, *longer, "--dry-run"]))
    tiny.resume(folder, "")
    assert "continuing after epoch 2, step 18" in capsys.readouterr().out
    tiny.resume(folder, "")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "after epoch 3" in line]
    assert said.startswith("finished after epoch 3, step ") and "larger --epochs" in said
    rows = tiny.metrics_rows(folder)
    assert [bool(row["R@1"]) for row in rows] == [True, True, True] and len(rows) == 3
    kept = json.loads((folder / "args.json").read_text())
    assert (kept["epochs"], kept["eval_every"], kept["on_nan"]) == (3, 2, "skip")
    assert (folder / "results.json").is_file() and kept["max_steps"] is None


def test_the_command_that_began_a_run_goes_on_with_it_after_it_was_made_longer(
    images, tmp_path, monkeypatch, capsys
) -> None:
    """As it stands in a job script, say; so does the command with the new length."""
    begun = "--epochs 1 --on-nan stop --resume auto"
    folder = tiny.run(images, tmp_path, "run", begun)
    advance = train.advance

    def stopped(training, signals):
        os.kill(os.getpid(), signal.SIGTERM)
        return advance(training, signals)

    monkeypatch.setattr(train, "advance", stopped)
    for longer in ("--epochs 3 --on-nan skip", "--epochs 2"):  # the second time it is another
        with pytest.raises(SystemExit):
            tiny.resume(folder, longer)
    monkeypatch.undo()
    capsys.readouterr()
    tiny.run(images, tmp_path, "run", begun)
    said = capsys.readouterr().out
    assert "the run was continued with --epochs 2, which holds from then on" in said
    assert "continuing after epoch 1, step 8" in said
    assert tiny.metrics_rows(folder)[-1]["epoch"] == "2"
    for command in (begun, "--epochs 2 --on-nan skip --resume auto"):
        tiny.run(images, tmp_path, "run", command)
        assert f"this run is finished: {folder}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    tiny.run(images, tmp_path, "run", "--epochs 3 --resume auto")
    assert (tmp_path / "run-2").is_dir(), "a length neither of its beginning nor of today"


def test_resume_auto_passes_over_what_it_cannot_read_and_is_not_called_like_it(
    images, tmp_path, capsys, caplog
) -> None:
    for name, content in (("other", '{"epochs": "many"}'), ("list", "[]"), ("cut", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text(content)
        (tmp_path / name / "last.pth").touch()
    flags = "--epochs 1 --resume auto"
    folder = tiny.run(images, tmp_path, "run", flags)
    told = [record.getMessage() for record in caplog.records if "passed over" in record.msg]
    assert len(told) == 3 and any(f"{tmp_path / 'other'} is passed over: " in t for t in told)
    tiny.run(images, tmp_path, "run", flags)
    assert f"this run is finished: {folder}" in capsys.readouterr().out
    (folder / "args.json").write_text("{}")
    with pytest.raises(InputError, match=r"args\.json is not as the run wrote it"):
        tiny.run(images, tmp_path, "run", flags)


@pytest.mark.parametrize(
    ("first", "more"), [("--epochs 1", "--epochs 2"), ("--epochs 2 --max-steps 8", "")]
)
def test_a_continued_run_keeps_its_folder(first, more, images, tmp_path, monkeypatch) -> None:
    folder, held = tiny.run(images, tmp_path, "run", first), []
    advance = train.advance
    other = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def advanced(*more):
        held.append(run_python("-c", other, folder / "args.json").stderr)
        return advance(*more)

    monkeypatch.setattr(train, "advance", advanced)
    tiny.resume(folder, more)
    assert len(held) == 1 and "BlockingIOError" in held[0]


def test_a_run_goes_on_where_its_images_have_moved_and_on_no_others(images, tmp_path) -> None:
    whole = tiny.run(images, tmp_path, "whole", "--epochs 2")
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    (tmp_path / "link").symlink_to(images)
    moved = tmp_path / "moved" / "pictures"
    shutil.copytree(images, moved)
    for place in (images, f"{images}/", tmp_path / "link"):
        tiny.resume(folder, f"--epochs 1 --dataset folder:{place}")
    tiny.resume(folder, f"--epochs 2 --dataset folder:{moved}")
    assert same(weights(folder), weights(whole))
    (moved / "train" / "train0" / "0.png").unlink()
    with pytest.raises(InputError, match=r"training images are not those .*--dataset"):
        tiny.resume(folder, f"--epochs 3 --dataset folder:{moved}")


def test_a_checkpoint_of_the_same_command_on_other_images_is_refused(images, tmp_path) -> None:
    folder = tiny.run(images, tmp_path, "run", "--epochs 1")
    other = tiny.write_images(tmp_path / "other" / images.name, images=11)
    foreign = tiny.run(other, tmp_path / "more", "run", "--epochs 1")
    shutil.copyfile(foreign / "last.pth", folder / "last.pth")
    with pytest.raises(InputError, match="checkpoint of another run, on other images"):
        tiny.resume(folder, "--epochs 2")


def test_wandb_that_fails_in_the_middle_does_not_stop_a_run(
    images, tmp_path, monkeypatch, caplog
) -> None:
    wandb = pytest.importorskip("wandb")

    class Failing:
        id, rows = "abc", 0

        def define_metric(self, name, summary):
            pass

        def log(self, row, step):
            Failing.rows += 1
            if Failing.rows > 1:
                raise ConnectionError("the network is gone")

    monkeypatch.setattr(tracking, "answers", lambda *_: True)
    monkeypatch.setattr(wandb, "init", lambda **_: Failing())
    args = tiny.parse(images, f"--epochs 3 --LOG_DIR {tmp_path} --name run")
    args.wandb = "online"
    train.main(args)
    assert len(untimed_rows(tmp_path / "run")) == 3 and Failing.rows == 2
    assert [r.message[:13] for r in caplog.records if "wandb" in r.message] == ["wandb stopped"]


# --- the same numbers, and no secrets -------------------------------------------------------------


def test_one_command_gives_the_same_numbers_twice(images, tmp_path) -> None:
    first, second = (tiny.run(images, tmp_path, name, "--epochs 2 --loss AMLoss") for name in "ab")
    assert same(weights(first), weights(second)) and untimed_rows(first) == untimed_rows(second)


def test_no_key_of_wandb_is_written_anywhere(images, tmp_path) -> None:
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--LOG_DIR", str(tmp_path)]
    command[command.index("disabled")] = "offline"
    more = ["--epochs", "1", "--name", "run"]
    environment = {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}
    done = run_cli("train.py", *command, *more, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_if_nothing_had_happened(tmp_path) -> None:
    command = ["benchmarks/kills.py", "--methods", "AMLoss", "--kills", "3"]
    done = subprocess.run(
        [sys.executable, *command, "--folder", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "equal bit for bit" in done.stdout and "12, the same" in done.stdout
    assert "0 kills in all" not in done.stdout
