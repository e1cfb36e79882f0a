"""The running mean of the weights: what it is, that it lasts, and who gets it of a run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import together
import torch
from conftest import ROOT, SMALL, on_a_terminal, refusal, run_cli

import evaluate
import net
import net.__main__ as export
import options
import report
import train
from evaluation.networks import open_checkpoint
from net import load_run
from page import records
from training.average import Average
from utils import InputError

pytestmark = pytest.mark.usefixtures("maps_here")

RUN = "--ema 0.9 --epochs 3 --amp off"


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps with a running mean of its weights."""
    return tiny.run(images, tmp_path_factory.mktemp("logs"), "mean", RUN)


# --- the mean -------------------------------------------------------------------------------------


def network_of_numbers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()


def test_the_mean_is_its_closed_form():
    """After T steps the weights of step t count (1 - dₜ) times all later d."""
    network, decay, count = network_of_numbers(), 0.6, 40
    mean = Average(network.state_dict, decay)
    history = [{k: v.clone() for k, v in network.state_dict().items()}]
    draws = torch.Generator().manual_seed(0)
    for _ in range(count):
        with torch.no_grad():
            for value in network.state_dict().values():
                step = torch.randn(value.shape, generator=draws, dtype=torch.float64)
                value.add_(step if value.is_floating_point() else 1)
        mean.update()
        history.append({k: v.clone() for k, v in network.state_dict().items()})
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(count)]
    shares = [np.prod(decays), *((1 - d) * np.prod(decays[t + 1 :]) for t, d in enumerate(decays))]
    assert sum(shares) == pytest.approx(1) and shares[0] < 1e-8
    assert decays[0] == 0.1 and decays[-1] == decay  # both ends of the growth are tried
    for name, value in mean.tensors.items():
        expected = sum(
            share * known[name].double() for share, known in zip(shares, history, strict=True)
        )
        if value.is_floating_point():
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        else:
            assert int(value) == count  # BatchNorm's counter is no mean
    assert any("running_var" in name for name in mean.tensors)


def test_the_weights_come_back_bit_by_bit_after_an_evaluation():
    network = network_of_numbers().float()
    mean = Average(network.state_dict, 0.9)
    with torch.no_grad():
        network[0].weight.normal_()
    mean.update()
    raw, held = ({k: v.clone() for k, v in s.items()} for s in (network.state_dict(), mean.tensors))
    assert not tiny.same(raw, held)
    with pytest.raises(InputError), mean.in_place():
        assert tiny.same(dict(network.state_dict()), held) and tiny.same(mean.tensors, raw)
        raise InputError("an evaluation that fails")
    assert tiny.same(dict(network.state_dict()), raw) and tiny.same(mean.tensors, held)


def test_weights_that_rest_are_left_exactly_as_they_are():
    network = network_of_numbers().float()
    mean = Average(network.state_dict, 0.99)
    for _ in range(5):
        mean.update()
    assert tiny.same(mean.tensors, dict(network.state_dict()))


def test_a_skipped_step_leaves_the_mean_alone(images, monkeypatch):
    training = tiny.prepare(images, "--ema 0.5 --on-nan skip --warm 0 --amp off")
    batch = next(train.rest_of_epoch(training))
    before = {name: value.clone() for name, value in training.average.tensors.items()}
    poisoned = batch._replace(images=torch.full_like(batch.images, torch.nan))
    assert train.step(training, poisoned) is None and training.average.updates == 0
    assert tiny.same(training.average.tensors, before)
    assert train.step(training, batch) is not None and training.average.updates == 1
    assert not tiny.same(training.average.tensors, before)


def test_a_mean_does_not_change_what_is_trained(run, images, tmp_path):
    plain = tiny.run(images, tmp_path, "plain", RUN.replace("--ema 0.9", ""))
    mean, none = tiny.saved(run), tiny.saved(plain)
    for part in ("model_state_dict", "criterion_state_dict", "optimisers"):
        assert tiny.same(mean[part], none[part])
    assert "ema_state_dict" not in none and mean["ema_updates"] == 12
    assert not tiny.same(mean["ema_state_dict"], mean["model_state_dict"])
    assert all("raw" not in column for row in tiny.metrics_rows(plain) for column in row)


# --- evaluations ----------------------------------------------------------------------------------


def test_every_evaluation_is_of_both_and_the_mean_picks_the_best(run, capsys):
    rows = tiny.metrics_rows(run)
    for row in rows:
        for name in ("R@1", "R@8", "MAP@R", "NMI"):
            assert 0 <= float(row[name]) <= 1 and 0 <= float(row[f"raw {name}"]) <= 1
    best = max(rows, key=lambda row: float(row["R@1"]))
    outcome = json.loads((run / "results.json").read_text())
    mean, raw = outcome["results"].values()
    assert list(outcome["results"])[1].endswith(", raw weights")
    assert outcome["best_epoch"] == int(best["epoch"])
    for name in ("R@1", "MAP@R"):
        assert mean[name] == pytest.approx(float(best[name]), abs=2e-6)
        assert raw[name] == pytest.approx(float(best[f"raw {name}"]), abs=2e-6)


def test_the_line_of_an_epoch_has_both(images, tmp_path, capsys):
    tiny.run(images, tmp_path, "run", "--ema 0.9 --epochs 1")
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("epoch ")]
    (row,) = tiny.metrics_rows(tmp_path / "run")
    assert f"R@1 {float(row['R@1']):.4f}" in line
    assert f"raw R@1 {float(row['raw R@1']):.4f}" in line
    assert "ema         0.9: a mean of the weights" in said and "raw weights" in said


def test_the_line_of_an_epoch_fits_the_terminal(images, tmp_path):
    words = [*tiny.NETWORK, "--dataset", f"folder:{images}", "--LOG_DIR", tmp_path, "--ema", 0.9]
    said = on_a_terminal(80, ROOT / "train.py", *words, "--epochs", 1, cwd=tmp_path)
    (line,) = [line for line in said if line.startswith("epoch ")]
    assert "MAP@R" in line and "best 0." in line and line.endswith(" s") and len(line) <= 80


def test_the_mean_is_what_whoever_reads_a_run_gets(run, tmp_path, capsys):
    best = tiny.saved(run, "best")
    mean, raw = tiny.saved(run, "best")["metrics"].values()
    assert best["model_state_dict"].keys() == best["ema_state_dict"].keys()
    for flags, numbers, weights in (
        ([], mean, best["ema_state_dict"]),
        (["--weights", "ema"], mean, best["ema_state_dict"]),
        (["--weights", "raw"], raw, best["model_state_dict"]),
    ):
        command = ["--resume", str(run), "--json", str(tmp_path / "n.json"), "--amp", "off", *flags]
        evaluate.run(options.parse_evaluate([*command, "--workers", "0"]))
        (found,) = json.loads((tmp_path / "n.json").read_text())["results"]
        assert found["weights"] == (flags or ["ema"])[-1]
        assert found["R@1"] == numbers["R@1"] and found["MAP@R"] == pytest.approx(numbers["MAP@R"])
        said = "raw weights" if "raw" in flags else "running mean of the weights"
        assert said in capsys.readouterr().out
        chosen = flags[-1] if flags else None
        network = open_checkpoint(run, weights=chosen).network
        assert tiny.same(dict(network.state_dict()), weights)
        network = load_run(run, weights=chosen).model.network
        assert torch.equal(network.state_dict()["model.embedding.weight"].cpu(),
                           weights["model.embedding.weight"])  # fmt: skip
    last = tiny.saved(run)
    network = open_checkpoint(run / "last.pth").network
    assert tiny.same(dict(network.state_dict()), last["ema_state_dict"])


def test_a_run_starts_from_the_mean_of_another_and_the_export_says_which(run, images, tmp_path):
    training = tiny.prepare(images, f"--checkpoint {run}")
    assert tiny.same(dict(training.network.state_dict()), tiny.saved(run, "best")["ema_state_dict"])
    files = {}
    for weights in ("ema", "raw"):
        files[weights] = tmp_path / f"{weights}.pt"
        words = ["export", str(run), "--weights", weights, "--torchscript", str(files[weights])]
        export.main(words)
    best = tiny.saved(run, "best")
    for weights, part in (("ema", "ema_state_dict"), ("raw", "model_state_dict")):
        held = torch.jit.load(files[weights]).state_dict()
        (head,) = (value for key, value in held.items() if key.endswith("embedding.weight"))
        assert torch.equal(head.cpu(), best[part]["model.embedding.weight"])


def test_a_file_without_a_mean_has_raw_weights_and_no_other(images, tmp_path):
    plain = tiny.run(images, tmp_path, "plain", "--epochs 1")
    assert open_checkpoint(plain).weights == open_checkpoint(plain, weights="raw").weights == ""
    with pytest.raises(InputError, match="holds no running mean"):
        open_checkpoint(plain, weights="ema")
    with pytest.raises(InputError, match="use ema, raw"):
        net.with_weights(tiny.saved(plain), "mean")


def test_the_page_and_the_comparison_show_both(run, capsys):
    made = report.make([run]).read_text()
    assert "running mean of the weights (--ema 0.9)" in made and "raw weights" in made
    assert '"raw R@1":"R@1, raw weights, %"' in made
    capsys.readouterr()
    report.main(options.parse_report(["--compare", str(run.parent)]))
    said = capsys.readouterr().out
    assert "EMA" in said
    page = (run.parent / "runs.html").read_text()
    assert "raw R@1" in page and "raw …: of the weights themselves" in page
    record = records.read(run)
    assert record.raw["R@1"] == list(tiny.saved(run, "best")["metrics"].values())[1]["R@1"]


def test_a_mean_beside_a_base_that_rests_holds_what_trains(run, images, tmp_path):
    """The base is the mean of another run, in the folder or built anew from that run."""
    flags = f"--checkpoint {run} --peft bitfit {RUN} --warm 0"
    tuned = tiny.run(images, tmp_path, "tuned", flags)
    half = tiny.run(images, tmp_path, "half", f"{flags} --max-steps 4")
    tiny.resume(half, "--max-steps 100 --no-report")
    best, last = tiny.saved(tuned, "best"), tiny.saved(tuned)
    assert last["ema_state_dict"].keys() == last["model_state_dict"].keys()
    assert tiny.same(last["ema_state_dict"], tiny.saved(half)["ema_state_dict"])
    start = tiny.saved(run, "best")["ema_state_dict"]
    assert 0 < len(best["ema_state_dict"]) < len(start)
    for weights, part in (("ema", "ema_state_dict"), ("raw", "model_state_dict")):
        network = open_checkpoint(tuned, weights=weights).network
        assert tiny.same(dict(network.state_dict()), start | best[part])
    (tuned / "base.pth").unlink()
    assert tiny.same(
        dict(open_checkpoint(tuned).network.state_dict()), start | best["ema_state_dict"]
    )


# --- continuing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", " --nb-clusters 4 --mod-epoch 1 --IPC 2"])
def test_a_continued_run_ends_with_the_same_mean(flags, images, tmp_path):
    """Masks double in the second epoch: their mean begins anew, also in a continued run."""
    whole = tiny.run(images, tmp_path, "whole", RUN + flags)
    half = tiny.run(images, tmp_path, "half", f"{RUN}{flags} --max-steps 4")
    tiny.resume(half, "--max-steps 100 --no-report")
    first, second = tiny.saved(whole), tiny.saved(half)
    for part in ("model_state_dict", "ema_state_dict", "ema_updates", "optimisers"):
        assert tiny.same(first[part], second[part])
    assert tiny.untimed_rows(whole) == tiny.untimed_rows(half)
    best, other = tiny.saved(whole, "best"), tiny.saved(half, "best")
    assert tiny.same(best["ema_state_dict"], other["ema_state_dict"])
    if flags:
        assert first["ema_state_dict"]["masks.weight"].shape[0] == 4


def killed(work: Callable[[], object], moment: str, count: int) -> None:
    """Does the work in a process that is killed in the middle of a call of `Average.moment`."""
    child = os.fork()  # spares the long import of torch
    if child == 0:
        left, plain = [count], getattr(Average, moment)

        def deadly(self: Average, *given: object) -> object:
            left[0] -= 1
            if not left[0]:
                if moment != "state":  # half of it is done
                    self.tensors = {name: value.zero_() for name, value in self.tensors.items()}
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, *given)

        setattr(Average, moment, deadly)
        try:
            work()
        finally:
            os._exit(1)  # it lived too long
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(
    ("moment", "count"), [("update", 5), ("_exchange", 4), ("state", 3), ("update", 11)]
)
def test_a_killed_run_goes_on_to_the_same_mean(moment, count, run, images, tmp_path):
    """Killed while the mean takes in a step, while it stands in the network, while it is saved."""
    train_on = partial(tiny.run, images, tmp_path, "run", f"{RUN} --save-every 3")
    killed(train_on, moment, count)
    tiny.resume(tmp_path / "run", "--no-report")
    one, other = tiny.saved(run), tiny.saved(tmp_path / "run")
    for part in ("model_state_dict", "ema_state_dict", "ema_updates"):
        assert tiny.same(one[part], other[part])
    assert tiny.untimed_rows(run) == tiny.untimed_rows(tmp_path / "run")


def test_a_damaged_mean_is_a_sentence(run, images, tmp_path):
    state = tiny.saved(run)
    for change, words in (
        ({"ema_state_dict": {"a": 1}}, "running mean has other things"),
        ({"ema_updates": "x"}, "ema_updates is a str"),
        ({"ema_state_dict": {"a": torch.zeros(1)}}, "running mean is of another network"),
    ):
        folder = tiny.run(images, tmp_path, "run", f"{RUN} --max-steps 1")
        torch.save({**state, **change}, folder / "last.pth")
        with pytest.raises(InputError, match=words):
            tiny.resume(folder, "--max-steps 2")


# --- several processes ----------------------------------------------------------------------------


def means_after_three_steps(images: Path) -> dict[str, torch.Tensor]:
    training = tiny.prepare(images, "--ema 0.8 --amp off --warm 0 --loss AMLoss")
    batches = train.rest_of_epoch(training)
    training.network.train()
    for _ in range(3):
        train.step(training, next(batches))
    return training.average.tensors


def test_processes_have_the_mean_of_one(images, tmp_path):
    alone = means_after_three_steps(images)
    results = together.run(2, partial(means_after_three_steps, images), tmp_path)
    for result in results:
        for name, value in alone.items():
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-5)
            assert torch.equal(result[name], results[0][name])


# --- the real command line ------------------------------------------------------------------------


def test_the_command_line_keeps_a_mean_on_the_embedded_data(workdir):
    flags = "--loss AMLoss --ema 0.99 --layer-decay 0.8 --clip-norm 3 --lr-warmup 2 --max-steps 3"
    flags += " --schedule cosine --lr-floor 0.1 --adam-eps 1e-4 --name run --metrics retrieval"
    small = [word.replace("resnet18", "resnet10") for word in SMALL]
    done = run_cli("train.py", *small, *flags.split(), "--no-test", "--val-fold", "0", cwd=workdir)
    assert done.returncode == 0, done.stderr
    (row,) = tiny.metrics_rows(workdir / "logs" / "run")
    assert float(row["raw R@1"]) >= 0 and float(row["lr head"]) == pytest.approx(1e-4, rel=1e-3)
    assert "rates, the lowest lr" in done.stdout
    assert tiny.saved(workdir / "logs" / "run")["ema_updates"] == 3


def test_a_mean_that_would_never_move_is_refused(capsys):
    assert "--ema" in refusal(capsys, options.parse_train, ["--ema", "1"])
