"""study.py: what it is asked, what it tries, who does what, what it concludes, and the command."""

from __future__ import annotations

import csv
import errno
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, refusal, run_cli, run_python
from PIL import Image

import criteria
import dataset
import metrics
import options
import study
from metrics import comparison
from options import looking
from options.suited import Machine
from page import plots
from runs import RunFolder
from storage import HeldError, need_room, write_atomically, write_json
from studies import (
    asking,
    judging,
    markdown,
    pages,
    progress,
    rehearsal,
    results,
    tables,
    trainer,
)
from studies.ledger import Ledger, Work, claim_of
from studies.places import Place
from studies.plan import Entrant, of, read
from studies.space import asked, declared, words_of
from studies.threads import Workers
from training.data import HeldOut, load
from training.faults import memory_in_words
from utils import InputError, MachineError, our_command


def plan_of(**entries):
    content = {"methods": {"PA": "--loss Proxy_Anchor", "AM": "--loss AMLoss"}, **entries}
    return of(content, default_name="tried", source="s.toml")


# --- what is asked --------------------------------------------------------------------------------


def test_eight_lines_of_toml(tmp_path):
    (tmp_path / "shop.toml").write_text(
        'flags = "--model resnet18 --epochs 4"\nfolds = 4\ntrials = 6\nseeds = 3\n'
        "[methods]\n"
        '"Proxy-Anchor" = "--loss Proxy_Anchor"\n'
        'AMLoss = "--loss AMLoss --alphap 48"\n'
        '"MS + SEC" = ["--loss", "ms", "--sec_wei", "0.5"]\n'
    )
    plan = read(tmp_path / "shop.toml")
    assert (plan.name, plan.folds, plan.trials, plan.seeds) == ("shop", 4, 6, 3)
    first, second, third = plan.entrants
    assert {one.name for one in first.space} == {"lr", "alpha", "mrg"}
    assert {"lr", "alphap", "alphan", "mrg_lr"} <= {one.name for one in second.space}
    assert {one.name for one in third.space} == {"lr", "sec_wei", "loss_args.base"}
    command = second.command({one.name: one.first for one in second.space})
    assert command[:4] == ["--model", "resnet18", "--epochs", "4"]
    assert command[command.index("--alphap", 10) + 1] == "48", "the first trial is as it is given"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"fold": 3}, "unknown entry fold"),
        ({"folds": 1}, "folds = 1 is below 2"),
        ({"seeds": "5"}, "seeds = '5'"),
        ({"metric": "NMI"}, "metric is one of"),
        ({"methods": {}}, "names no methods"),
        ({"methods": {"PA": "--loss Proxy_Anchr"}}, "PA: there is no loss called"),
        ({"methods": {"PA": "--loss Proxy_Anchor --seed 3"}}, "--seed is the study's own"),
        (
            {"methods": {"a b": "--loss ms", "a_b": "--loss MS"}},
            "two methods would have the same folder",
        ),
        ({"methods": {"PA": "--loss 'ms"}}, "No closing quotation"),
        ({"flags": "--no-test --val-fold 1"}, "is the study's own"),
        ({"search": {"learning_rate": [1, 2]}}, "is not a flag of training"),
        ({"search": {"lr": 3}}, "lr = 3 is not a range"),
        ({"search": {"lr": [2, 1]}}, "is not a range"),
        ({"search": {"lr": {"low": 1}}}, "is of no method|is not a range"),
        ({"search": {"XX": {"lr": [1, 2]}}}, "is of no method"),
        ({"compare": [["PA", "XX"]]}, "XX is not a method here"),
        ({"compare": ["PA", "AM"]}, "give pairs of methods"),
        ({"compare": [["PA", "PA"]]}, "give pairs of methods"),
        ({"methods": [""]}, "'' is not a method"),
        ({"methods": [1]}, "1 is not a method"),
        ({"methods": {"PA": 3}}, "the method PA = 3 does not hold flags"),
        ({"fixed": [1]}, "fixed: 1 is searched by no method"),
        ({"fixed": ["mgr"]}, "did you mean mrg"),
        ({"search": {"optimizer": ["adamw", "sdg"]}}, "PA: search: .*sdg"),
        ({"search": {"lr": [-1.0, 1.0]}}, "PA: search: .*lr"),
        ({"search": {"lr": [1e-4, math.inf]}}, "lr = .* is not a range"),
        ({"search": {"seed": [1, 5]}}, "search: --seed is the study's own; use its entry seeds"),
        ({"search": {"PA": {"val-fold": [0, 1]}}}, "search: --val-fold is the study's own"),
        ({"search": {"eval-classes": [0.2, 0.5]}}, "eval-classes decides what methods are judged"),
        ({"search": {"dataset": ["cub", "cars"]}}, "dataset decides what methods are judged on"),
        ({"search": {"soft-loss": [True, False]}}, "no method here reads soft-loss"),
        ({"flags": "--wandb online"}, "do not use wandb"),
        ({"name": ""}, "name = '' is not a folder's name"),
        ({"name": "a/.."}, "is not a folder's name"),
        ({"methods": {"PA": "--loss ms", "trials": 12}}, "trials is below .methods.*above"),
        ({"methods": {"PA": "--loss ms", "fixed": ["lr"]}}, "fixed is below .methods"),
        ({"methods": {"claims": "--loss ms"}}, "cannot be called 'claims'"),
        ({"methods": {"..": "--loss ms"}}, "cannot be called '..'"),
        ({"methods": {"": "--loss ms"}}, "cannot be called ''"),
        ({"methods": ["AMLoss", "--loss AMLoss"]}, "the method AMLoss is listed twice"),
        ({"prune": "no"}, "prune = 'no' is not true or false"),
        (
            {"methods": {"PA": "--dataset cub", "AM": "--dataset cars"}},
            "PA has --dataset cub and AM has --dataset cars",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_a_sentence(entries, words):
    with pytest.raises(InputError, match=words) as error:
        plan_of(**entries)
    assert "\n" not in str(error.value) and str(error.value).startswith("s.toml: ")


def test_a_pair_that_is_compared_twice_counts_once():
    assert plan_of(compare=[["PA", "AM"], ["PA", "AM"]]).compare == (("PA", "AM"),)


def test_a_file_that_is_no_plan(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("folds = = 3")
    with pytest.raises(InputError, match="is not TOML"):
        read(tmp_path / "bad.toml")


def test_a_file_as_other_systems_write_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = 'logs = "~/studies"\nmethods = ["AMLoss"]\n'
    (tmp_path / "s.toml").write_text(text, encoding="utf-8-sig")
    assert read(tmp_path / "s.toml").folder == tmp_path / "studies" / "s"


def test_methods_on_a_command_line():
    args = asking.parse(["--methods", "AMLoss", "ms --sec_wei 1", "--flags", "--epochs 3"])
    plan = study.plan_of(args)
    assert [one.name for one in plan.entrants] == ["AMLoss", "ms --sec_wei 1"]
    assert plan.entrants[1].flags == ("--epochs", "3", "--loss", "ms", "--sec_wei", "1")


def test_flags_that_all_share_win_over_the_file_of_flags_of_a_method(tmp_path):
    (tmp_path / "x.txt").write_text("--loss MS --IPC 4 --epochs 30 --batch-size 60")
    (tmp_path / "all.txt").write_text("--loss AMLoss --epochs 20 --width 0.5")
    plan = plan_of(
        flags=f"@{tmp_path}/all.txt --model resnet10 --epochs 3",
        methods={"file": f"@{tmp_path}/x.txt --batch-size 40", "words": "--loss MS --IPC 4"},
    )
    chosen = options.parse_train(list(plan.entrants[0].flags))
    assert (chosen.loss, chosen.IPC, chosen.width) == ("MS", 4, 0.5)
    assert (chosen.epochs, chosen.batch_size) == (3, 40)
    own = ["--loss", "MS", "--IPC", "4"]
    assert plan.entrants[1].flags == (f"@{tmp_path}/all.txt", "--model", "resnet10", "--epochs",
                                      "3", *own)  # fmt: skip


# --- what is searched -----------------------------------------------------------------------------


def test_ranges_of_the_flags_and_of_the_user():
    plan = plan_of(
        search={"lr": [1e-4, 1e-2], "PA": {"alpha": [16, 32, 64]}, "alphan": [1.0, 5.0]},
        fixed=["mrg"],
    )
    pa, am = ({one.name: one for one in entrant.space} for entrant in plan.entrants)
    assert (pa["lr"].low, pa["lr"].high, pa["lr"].log) == (1e-4, 1e-2, True)
    assert pa["alpha"].choices == (16, 32, 64) and pa["alpha"].first == 32
    assert "alphan" not in pa and not am["alphan"].log and am["alphan"].first == 5.0
    assert "mrg" not in pa and "mrg" not in am


def test_an_argument_without_a_flag_is_searched_beside_those_that_are_given():
    (entrant,) = of(
        {
            "methods": {"circle": "--loss pml:CircleLoss --loss-args m=0.4 gamma=80"},
            "search": {"loss-args.m": [0.1, 0.5]},
        },
        default_name="x",
        source="x",
    ).entrants
    command = entrant.command({"lr": 0.001, "loss_args.m": 0.25})
    assert command[-3:] == ["--loss-args", "gamma=80", "m=0.25"]


@pytest.mark.parametrize(
    ("loss", "argument", "default"),
    [(loss, name, None) for loss, names in criteria.SEARCHED.items() for name in names]
    + [("Contrastive", "neg_margin", 0.5), ("CosFace", "scale", 64.0), ("MS", "base", 0.5)],
)
def test_what_a_loss_without_flags_searches_begins_at_its_default(loss, argument, default):
    plan = of({"methods": [loss]}, default_name="x", source="x")
    (entrant,) = plan.entrants
    (one,) = (one for one in entrant.space if one.name == f"loss_args.{argument}")
    assert one.low <= one.start <= one.high and one.first == one.rounded(one.start)
    assert default is None or one.first == default
    given = of({"methods": [f"{loss} --loss-args {argument}=1"]}, default_name="x", source="x")
    assert f"loss_args.{argument}" not in {one.name for one in given.entrants[0].space}
    asked_for = {f"loss-args.{argument}": [0.01, 2.0]}
    (entrant,) = of({"methods": [loss], "search": asked_for}, default_name="x", source="x").entrants
    (again,) = (one for one in entrant.space if one.name == f"loss_args.{argument}")
    assert (again.low, again.high, again.start) == (0.01, 2.0, one.start)


@pytest.mark.parametrize("name", ["lr", "epochs", "optimizer"])
def test_values_become_flags_that_train_takes(name):
    from studies.plan import parsed

    chosen = parsed([], "x")
    value = {"lr": [1e-5, 1e-3], "epochs": [2, 9], "optimizer": ["adam", "sgd", "rmsprop"]}[name]
    one = asked(name, value, chosen)
    again = parsed(words_of([one], {one.name: one.first}), "x")
    assert getattr(again, name) == one.first
    assert one.name in {r.name for r in declared(chosen)} or name != "lr"


def test_a_range_of_a_flag_that_takes_whole_numbers_has_only_those():
    from studies.plan import parsed

    chosen = parsed([], "x")
    for epochs in ([2, 9], [2.0, 9.0], [2, 8], {"low": 2.0, "high": 8}):
        one = asked("epochs", epochs, chosen)
        assert one.whole and one.words(one.rounded(5.4)) == ["--epochs", "5"]
    with pytest.raises(InputError, match="epochs takes whole numbers"):
        asked("epochs", [2.5, 9], chosen)
    assert not asked("weight-decay", [0, 1], chosen).whole


# --- who does what --------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(plan_of(folds=2, trials=3, seeds=2, logs=str(tmp_path)))
    made.begin()
    return made


def do_trial(ledger, work, reached=0.5, state=None):
    import optuna

    trial = ledger.optuna_trial(work)
    for fold in range(ledger.plan.folds):
        trial.set_user_attr(f"fold{fold}", {"MAP@R": reached, "R@1": reached, "seconds": 2.0})
    if state is None:
        ledger.study(work.entrant).tell(trial, reached)
    else:
        trial.set_user_attr("error", "no luck")
        ledger.study(work.entrant).tell(trial, state=getattr(optuna.trial.TrialState, state))
    ledger.release(claim_of(work))


def do_seed(ledger, work, offset=0.0, evaluations=2):
    """Writes what a run leaves: embeddings of 12 classes, and how they are judged."""
    generator = torch.Generator().manual_seed(work.number)
    labels = torch.arange(12).repeat_interleave(5)
    centres = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    noise = (1.2 - offset) * torch.randn(60, 8, generator=generator)
    embeddings = centres[labels] + noise
    per_query = metrics.retrieval_per_query(embeddings, labels)
    scores = comparison.query_scores(per_query, (1, 2), labels)
    out = ledger.result_file(work.entrant, work.name)
    out.parent.mkdir(exist_ok=True)
    judged = judging.Judged(embeddings, labels, None, None, (1, 2), judging.by_classes(scores))
    judging.save(out.with_suffix(".npz"), judged)
    numbers = metrics.summarise(per_query, (1, 2))
    content = {"results": {"test": numbers}, "values": {}, "seconds": 3.0}
    best = {"best R@1": numbers["R@1"] + 0.01 * (evaluations > 1), "last R@1": numbers["R@1"]}
    write_json(out, content | best | {"evaluations": evaluations})
    ledger.release(claim_of(work))
    return numbers


def do_everything(made, trial=do_trial, seed=do_seed):
    """Trials, runs, and seeds together, until nothing is open."""
    while (work := made.next()) is not None:
        if work.kind == "trial":
            trial(made, work)
        elif work.kind == "seed":
            seed(made, work)
        else:
            write_json(made.result_file(work.entrant, work.name), {"ensembles": {}})
            made.release(claim_of(work))


def test_methods_take_turns_and_runs_wait_for_all_trials_of_theirs(ledger):
    order = []
    while (work := ledger.next()) is not None and work.kind == "trial":
        order.append(work.entrant.name)
        do_trial(ledger, work)
    assert order == ["PA", "AM"] * 3
    assert (work.kind, work.entrant.name, work.number) == ("seed", "PA", 1)
    do_seed(ledger, work)
    names = []
    while (work := ledger.next()) is not None:
        names.append((work.kind, work.entrant.name))
        if work.kind == "seed":
            do_seed(ledger, work)
        else:
            write_json(ledger.result_file(work.entrant, work.name), {"ensembles": {}})
            ledger.release(claim_of(work))
    assert names == [("seed", "AM"), ("seed", "PA"), ("seed", "AM"), *[("together", n) for n in
                     ("PA", "AM")]]  # fmt: skip
    assert ledger.is_finished


def test_two_workers_are_never_at_the_same_work(ledger):
    """The second is another process."""
    first = ledger.next()
    code = (
        "import sys, json; sys.path[:0] = sys.argv[2:4]\n"
        "from test_studies import plan_of; from studies.ledger import Ledger, claim_of\n"
        "other = Ledger(plan_of(folds=2, trials=3, seeds=2, logs=sys.argv[1]))\n"
        "work = other.next(); print(json.dumps([work.name, work.entrant.name]))\n"
    )
    folder = ledger.folder.parent
    (folder / "other.py").write_text(code)
    done = run_python(folder / "other.py", folder, ROOT, ROOT / "tests")
    assert json.loads(done.stdout) == ["trial000", "AM"]
    # That one has ended without finishing: its trial is taken over, before anything new.
    second = ledger.next()
    assert (second.entrant.name, second.name) == ("AM", "trial000")
    assert ledger.next().name == "trial001" and first.entrant.name == "PA"


def test_weights_that_a_killed_worker_had_judged_are_removed_by_the_next_start(ledger):
    """All but those of the first seed, which is for pages and searches."""
    one = ledger.plan.entrants[0]
    do_trial(ledger, ledger.next())
    for seed in (1, 2):
        write_json(ledger.result_file(one, f"seed{seed}"), {"results": {}, "values": {}})
    names = ("trial000-fold0", "trial000-fold1", "trial001-fold0", "seed1", "seed2", "seed3")
    weights = [ledger.folder / one.folder / name / "last.pth" for name in names]
    for file in weights:
        file.parent.mkdir()
        file.touch()
    Ledger(ledger.plan).begin()
    assert [file.parent.name for file in weights if file.exists()] == [*names[2:4], *names[5:]]


def test_a_worker_that_is_killed_as_it_writes_keeps_nobody_waiting(tmp_path, monkeypatch):
    """In `logs/`, as by default: a lock that is a link, with a relative path, leads nowhere."""
    monkeypatch.chdir(tmp_path)
    made = Ledger(plan_of(folds=2, trials=3, seeds=2))
    made.begin()
    work = multiprocessing.get_context("fork").Process

    def die():
        monkeypatch.setattr("os.fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        Ledger(made.plan).next()

    ends = []
    for worker in (work(target=die), work(target=Ledger(made.plan).next)):
        worker.start()
        worker.join(20)
        ends.append(worker.exitcode)
        worker.kill()
    assert ends == [-signal.SIGKILL, 0]
    assert {file.name for file in made.folder.iterdir()} == {"claims", "plan.json", "trials.log"}
    assert "PA" in [one.name for one in made.plan.entrants if made.trials(one)]


def test_two_claims_that_two_processes_wait_for_are_no_deadlock(ledger, monkeypatch):
    """One holds `next` and wants `journal`; the other holds that, and its thread wants `next`."""
    context = multiprocessing.get_context("fork")
    held, wanted = context.Event(), context.Event()
    monkeypatch.setattr("storage.locks._warn_of_no_locks", lambda *_: os._exit(3))

    def draws():
        with ledger.claimed("next", wait=True):
            held.set()
            assert wanted.wait(20)
            time.sleep(0.2)
            with ledger.claimed("journal", wait=True):
                pass

    def waits():
        with ledger.claimed("next", wait=True):
            pass

    def writes():
        with ledger.claimed("journal", wait=True):
            assert held.wait(20)
            other = threading.Thread(target=waits)
            other.start()
            wanted.set()
            time.sleep(0.5)
        other.join()

    both = [context.Process(target=work) for work in (draws, writes)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]


def test_where_files_cannot_be_locked_a_study_works_and_says_so_once(ledger, no_locks, caplog):
    assert [ledger.next().name for _ in range(3)] == ["trial000", "trial000", "trial001"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith(f"nothing keeps other processes out of {ledger.folder} (")


def test_the_first_trial_has_the_values_that_were_given_and_a_failed_one_counts(ledger):
    work = ledger.next()
    values = ledger.trials(work.entrant)[0].values
    assert values["lr"] == 1e-4 and values["alpha"] == 32 and values["mrg"] == 0.1
    do_trial(ledger, work, state="FAIL")
    ledger.release(claim_of(ledger.next()))
    found = results.collect(ledger)
    assert "PA trial 0: no luck" in tables.text(found)
    assert "PA trial 0: no luck" in pages.page(found)
    assert [t.state for t in ledger.trials(work.entrant)] == ["failed"]


def test_the_numbers_of_a_fold_stand_under_its_name(tmp_path):
    """Also with more folds than there are digits."""
    made = Ledger(plan_of(folds=11, trials=1, seeds=2, logs=str(tmp_path)))
    made.begin()
    trial = made.optuna_trial(made.next())
    for fold in range(11):
        trial.set_user_attr(f"fold{fold}", {"MAP@R": fold / 100, "seconds": 2.0})
    head, (line, *_) = tables.trials_csv(results.collect(made))
    assert [line[head.index(f"fold {fold}")] for fold in (1, 2, 10)] == ["0.01", "0.02", "0.1"]


def test_a_trial_that_was_left_half_drawn_gets_the_rest_of_its_values(ledger):
    study = ledger.study(ledger.plan.entrants[0])
    study.enqueue_trial({"lr": 2e-4, "alpha": 20.0, "mrg": 0.2})
    study.ask().suggest_float("lr", 1e-5, 3e-3, log=True)  # and then its worker was killed
    assert results.collect(ledger).methods[0].trials[0].values == {"lr": 2e-4}
    assert tables.trials_csv(results.collect(ledger))[1][0][2] == "running"
    work = ledger.next()
    assert (work.entrant.name, work.number) == ("PA", 0)
    assert ledger.trials(work.entrant)[0].values == {"lr": 2e-4, "alpha": 20, "mrg": 0.2}


def test_a_first_trial_that_nobody_asked_for_yet_is_taken(ledger):
    study = ledger.study(ledger.plan.entrants[0])
    study.enqueue_trial({"lr": 2e-4, "alpha": 20.0, "mrg": 0.2})
    work = ledger.next()
    assert (work.entrant.name, work.number) == ("PA", 0)
    assert ledger.trials(work.entrant)[0].values["lr"] == 2e-4
    do_trial(ledger, work)
    assert [trial.state for trial in ledger.trials(work.entrant)] == ["complete"]


def test_what_a_study_may_not_change(ledger, tmp_path):
    for entries, words in (
        ({"folds": 3}, "a study with folds = 2"),
        ({"metric": "R@1"}, "a study with metric = MAP@R"),
        ({"flags": "--epochs 9"}, "in which PA has other flags"),
        ({"search": {"lr": [1e-3, 1e-2]}}, "other flags or another search"),
    ):
        asked_for = {"folds": 2, "trials": 3, "seeds": 2, "logs": str(tmp_path)} | entries
        with pytest.raises(InputError, match=words):
            Ledger(plan_of(**asked_for)).begin()
    more = Ledger(plan_of(folds=2, trials=5, seeds=4, logs=str(tmp_path)))
    more.begin()  # nothing was judged yet
    work = more.next()
    do_trial(more, work)
    write_json(more.result_file(work.entrant, "seed1"), {"error": "x", "values": {}})
    with pytest.raises(InputError, match="look at them again"):
        Ledger(plan_of(folds=2, trials=9, seeds=4, logs=str(tmp_path))).begin()


def test_fewer_trials_than_were_done_are_refused(ledger, tmp_path):
    for _ in range(4):
        do_trial(ledger, ledger.next())
    fewer = Ledger(plan_of(folds=2, trials=1, seeds=2, logs=str(tmp_path)))
    with pytest.raises(InputError, match="has 2 trials of PA already"):
        fewer.begin()


def test_a_method_that_was_taken_out_comes_back_as_it_was(ledger, tmp_path):
    usual = {"folds": 2, "trials": 3, "seeds": 2, "logs": str(tmp_path)}
    Ledger(plan_of(**usual, methods={"AM": "--loss AMLoss"})).begin()
    other = {"AM": "--loss AMLoss", "PA": "--loss Proxy_Anchor --epochs 9"}
    with pytest.raises(InputError, match="in which PA has other flags"):
        Ledger(plan_of(**usual, methods=other)).begin()
    Ledger(plan_of(**usual)).begin()


def test_trials_cannot_be_added_while_a_judged_method_is_left_out(ledger, tmp_path):
    write_json(ledger.folder / "PA" / "seed1.json", {"error": "x", "values": {}})
    usual = {"folds": 2, "seeds": 2, "logs": str(tmp_path)}
    with pytest.raises(InputError, match="look at them again"):
        Ledger(plan_of(**usual, trials=5, methods={"AM": "--loss AMLoss"})).begin()


def test_a_last_line_that_a_full_disk_has_cut_off_is_taken_away(ledger):
    do_trial(ledger, ledger.next())
    before = [ledger.trials(one) for one in ledger.plan.entrants]
    journal = ledger.folder / "trials.log"
    cut = journal.read_bytes() + journal.read_bytes().splitlines()[-1][:30]
    for worker in (Ledger(ledger.plan), ledger):  # one that comes later, one that was at work
        journal.write_bytes(cut)
        assert [worker.trials(one) for one in worker.plan.entrants] == before
        assert journal.read_bytes() == cut, "looking at a study changes nothing"
        do_trial(worker, worker.next())
        again = Ledger(ledger.plan)
        assert sum(len(again.trials(one)) for one in ledger.plan.entrants) == 2


@pytest.mark.parametrize(
    ("file", "content", "advice"),
    [
        ("plan.json", '{"folds": 2, "met', "give the study another name"),
        ("plan.json", "[]", "give the study another name"),
        ("plan.json", '{"folds": 2}', "give the study another name"),
        ("trials.log", "{}\n{}\n", "give the study another name"),
        ("PA/seed2.json", '{"results": ', "PA/seed2.json, and start the study again"),
        ("PA/seed2.json", '{"values": {}}', "PA/seed2.json, and start the study again"),
        ("PA/together3.json", "[]", "together3.json, and start the study again"),
    ],
)
def test_a_damaged_file_of_a_study_is_a_sentence(finished, tmp_path, file, content, advice):
    ledger, _ = finished
    (ledger.folder / file).write_text(content)
    (tmp_path / "s.toml").write_text(
        f'logs = "{tmp_path}"\nname = "tried"\nfolds = 2\ntrials = 6\nseeds = 3\n'
        'compare = [["AM", "PA"]]\n[methods]\nPA = "--loss Proxy_Anchor"\nAM = "--loss AMLoss"\n'
    )
    with pytest.raises(InputError, match=f"{file} is damaged") as error:
        study.main(asking.parse([str(tmp_path / "s.toml"), "--report"]))
    assert advice in str(error.value) or "delete it, and start" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--columns", "R@1", "Recall"], "--columns Recall: known names: AMI, F1, MAP@R"),
        (["--columns", "R@3"], "--columns R@3: did you mean"),
        (["--markdown", "own.md"], "own.md has no mark for a study"),
        (["--markdown", "own.svg"], "--markdown and the picture beside it both name own.svg"),
        (["--markdown", "."], "is a folder; name a file"),
    ],
)
def test_what_a_new_study_cannot_write_is_refused_before_it_trains(
    tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.md").write_text("My paper\n")
    with pytest.raises(InputError, match=words):
        study.main(asking.parse(["--methods", "AMLoss", *flags]))
    assert capsys.readouterr().out == "" and not (tmp_path / "logs").exists()


def test_one_trial_of_one_method_is_said_so():
    made = plan_of(methods={"AM": "--loss AMLoss"}, trials=1, folds=2)
    assert "search      1 trial of 1 method on 2 folds" in study.describe(made, [Place()])


def test_a_report_of_another_study_is_refused(finished, tmp_path, capsys):
    ledger, _ = finished
    toml = 'logs = "{}"\nname = "tried"\nfolds = 2\ntrials = 6\nseeds = 3\n{}\n[methods]\n'
    toml += 'PA = "--loss Proxy_Anchor"\nAM = "--loss AMLoss"\n{}'
    for entry, search, words in (
        ('metric = "R@1"', "", "a study with metric = MAP@R"),
        ("", "[search]\nwarm = [0, 1, 2]\n", "another search"),
    ):
        (tmp_path / "s.toml").write_text(toml.format(tmp_path, entry, search))
        with pytest.raises(InputError, match=words):
            study.main(asking.parse([str(tmp_path / "s.toml"), "--report"]))
    (tmp_path / "s.toml").write_text(toml.format(tmp_path, "", ""))
    for report in ([], ["--report"]):
        with pytest.raises(InputError, match="--columns Recall@1"):
            study.main(asking.parse([str(tmp_path / "s.toml"), "--columns", "Recall@1", *report]))
    assert not (ledger.folder / "study.html").exists() and not list(ledger.folder.glob("*.csv"))
    assert capsys.readouterr().out == "", "before anything is trained"
    study.main(asking.parse([str(tmp_path / "s.toml"), "--report"]))
    assert (ledger.folder / "study.html").is_file()


@pytest.fixture
def workers(ledger, monkeypatch):
    """Workers whose trainings leave at once what train.py leaves; `trained` lists their flags."""
    made = Workers(ledger, [Place()], lambda sentence: None)
    made.trained = []
    (made.worker,) = made.workers
    made.trainer = made.worker.trainer

    def watched(command, log, place, path, watch):
        made.trained.append(command[2:])
        while path.exists():
            path = path.with_name(f"{path.name}-2")
        path.mkdir(parents=True)
        RunFolder(path).write_args(options.plain(options.parse_train(command[2:])))
        (path / "last.pth").touch()
        write_json(path / "results.json", {"results": {}})
        return 0

    monkeypatch.setattr(made.trainer, "watched", watched)
    return made


def test_a_run_of_other_values_is_not_gone_on_with(workers):
    """Trials were added while a seed was trained; its run is finished or not, and not judged."""
    entrant = workers.ledger.plan.entrants[0]
    work, place = Work("seed", entrant, 1), Place()

    def rate(lr):
        words = ["--loss", "Proxy_Anchor", "--lr", lr, "--seed", "1"]
        return workers.trainer.train(work, "seed1", words, place).args["lr"]

    assert rate("0.001") == rate("0.001") == 0.001 and len(workers.trained) == 1
    assert rate("0.01") == 0.01 and len(workers.trained) == 2
    folder = workers.ledger.folder / "PA" / "seed1"
    (folder / "results.json").unlink()
    (folder / "checksums.json").unlink(missing_ok=True)
    assert rate("0.002") == 0.002
    for file in ("results.json", "last.pth"):  # ended at once, before there was a checkpoint
        (folder / file).unlink()
    assert rate("0.002") == 0.002 and len(workers.trained) == 4
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["seed1"]


def test_a_run_that_another_process_has_just_begun_is_left(workers, monkeypatch):
    """The worker was killed and its training was not, which has no checkpoint yet."""
    folder, place = workers.ledger.folder / "PA" / "seed1", Place()
    folder.mkdir(parents=True)
    RunFolder(folder).write_args({"lr": 0.5})
    context = multiprocessing.get_context("fork")
    held, waited = context.Event(), []

    def hold() -> None:
        run = RunFolder(folder)
        run.hold()
        held.set()
        time.sleep(60)

    other = context.Process(target=hold)
    other.start()
    assert held.wait(20)

    def ends_meanwhile(seconds: float) -> None:
        waited.append((folder / "args.json").is_file())
        other.kill()
        other.join()

    monkeypatch.setattr(workers.trainer.stopping, "wait", ends_meanwhile)
    words = ["--loss", "Proxy_Anchor", "--lr", "0.001", "--seed", "1"]
    work = Work("seed", workers.ledger.plan.entrants[0], 1)
    assert workers.trainer.train(work, "seed1", words, place).args["lr"] == 0.001
    assert waited == [True]


def test_a_training_that_is_killed_as_it_makes_its_folder_is_started_again(workers, monkeypatch):
    """An empty folder of its name would give it another, in which nobody looks for its results."""
    folder, trains = workers.ledger.folder / "PA", workers.trainer.watched

    def killed_at_first(command, log, place, path, watch):
        if not workers.trained:
            path.mkdir()
            workers.trained.append("nothing")
            return -signal.SIGKILL
        return trains(command, log, place, path, watch)

    monkeypatch.setattr(workers.trainer, "watched", killed_at_first)
    work = Work("seed", workers.ledger.plan.entrants[0], 1)
    found = workers.trainer.train(work, "seed1", ["--seed", "1"], Place())
    assert found.path == folder / "seed1" and len(workers.trained) == 2
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["seed1"]


def test_a_run_that_went_elsewhere_stops_the_study_and_is_no_failed_trial(workers, monkeypatch):
    """As it does where the disk of the study is read-only just then."""
    monkeypatch.setattr(workers.trainer, "watched", lambda *_: 0)
    work = Work("seed", workers.ledger.plan.entrants[0], 1)
    with pytest.raises(MachineError, match=r"PA/seed1 could not be made; .*PA/seed1\.log says"):
        workers.trainer.train(work, "seed1", ["--seed", "1"], Place())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_study_ends_by_the_signal_that_it_was_sent(tmp_path, monkeypatch, capsys, number):
    """So does its training, which has saved; its trial has not failed."""

    def watched(*_):
        os.kill(os.getpid(), number)
        return 128 + number

    monkeypatch.setattr(trainer.Trainer, "watched", watched)
    monkeypatch.setattr(study, "rehearse", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        study.main(asking.parse(["--methods", "AMLoss"]))
    assert ended.value.code == 128 + number
    assert "\nstopped; go on with:\n  python " in capsys.readouterr().out
    made = Ledger(study.plan_of(asking.parse(["--methods", "AMLoss"])))
    assert [trial.state for trial in made.trials(made.plan.entrants[0])] == ["running"]


def test_a_process_of_a_study_that_is_told_to_stop_stops_the_study(workers, monkeypatch):
    """Also the one that judges a run: the study has not come to its end."""
    ended = SimpleNamespace(returncode=-signal.SIGTERM, stderr="")
    monkeypatch.setattr("studies.worker.subprocess.run", lambda *_, **__: ended)
    seed = Work("seed", workers.ledger.plan.entrants[0], 1)
    monkeypatch.setattr(workers.ledger, "next", lambda: seed)
    first = SimpleNamespace(values={one.name: one.first for one in seed.entrant.space})
    monkeypatch.setattr(workers.ledger, "chosen", lambda _: first)
    monkeypatch.setattr(workers.ledger, "release", lambda _: None)
    with pytest.raises(trainer.Stopped):
        workers.run()


def test_what_a_training_said_earlier_is_not_what_it_says_now(workers, monkeypatch):
    monkeypatch.setattr(trainer, "WAIT", 0.0)
    said = [("no images here", HeldError.status), ("no images there", 2)]

    def watched(command, log, place, path, watch):
        words, status = said.pop(0) if said else ("Traceback\nKeyError: 1", 1)
        log.write(f"error: {words}\n".encode() if status > 1 else f"{words}\n".encode())
        return status

    monkeypatch.setattr(workers.trainer, "watched", watched)
    work, place = Work("seed", workers.ledger.plan.entrants[0], 1), Place()
    for words in ("no images there", "KeyError: 1"):
        with pytest.raises(trainer.Failed, match=words):
            workers.trainer.train(work, "seed1", ["--seed", "1"], place)


def test_a_study_checks_the_folds_that_leave_least_to_train_on(tmp_path, monkeypatch):
    pixels = Image.new("RGB", (8, 8))
    sizes = {"large": 8} | {f"small{number}": 2 for number in range(12)}
    for part, classes in (("train", sizes), ("eval", {"x": 2, "y": 2})):
        for name, count in classes.items():
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels.save(tmp_path / part / name / f"{number}.png")
    asked_for = [f"--dataset folder:{tmp_path} --loss {loss}" for loss in ("MS", "AMLoss")]
    plan = plan_of(folds=3, flags="", methods=dict(zip("AB", asked_for, strict=True)))
    tried = []

    def dry_run(command, **_):
        tried.append(int(command[command.index("--val-fold") + 1]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(rehearsal.subprocess, "run", dry_run)
    rehearsal.rehearse(plan, ["A"], Place())
    left = [parsed_data(asked_for[0], fold) for fold in range(3)]
    images, classes = ([len(train) for train in left], [train.num_classes for train in left])
    assert images.index(min(images)) in tried and classes.index(min(classes)) in tried
    assert len(tried) == 2
    for name in list(sizes)[2:]:  # two classes with two images
        (tmp_path / "train" / name / "1.png").unlink()
    with pytest.raises(InputError, match="of 3 folds only 2 would have two images of one class"):
        rehearsal.rehearse(plan, ["B"], Place())


def parsed_data(flags, fold):
    """The training images that are left without a fold of three."""
    choice = dataset.Choice.of(options.parse_train(flags.split()))
    return load(choice, HeldOut(fold=fold, folds=3), 1).train


def full_disk(folder):
    need_room(folder, 1e18, "what the run keeps", "choose another --LOG_DIR")


def torn_checkpoint(folder):
    def write(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(folder / "last.pth", write)


def full_gpu(folder):
    with memory_in_words(16, 64):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


def dead_reader(folder):
    with memory_in_words(16, 64):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


@pytest.mark.parametrize("trouble", [full_disk, torn_checkpoint, full_gpu, dead_reader, None])
@pytest.mark.parametrize("kind", ["trial", "seed"])
def test_what_a_machine_has_no_room_for_stops_the_study_and_counts_as_nothing(
    workers, monkeypatch, tmp_path, trouble, kind
):
    status = -signal.SIGKILL
    if trouble:
        with pytest.raises(InputError) as error:
            trouble(tmp_path)
        said, status = f"error: {error.value}\n", error.value.status
    trained = workers.trainer.watched

    def watched(command, log, place, path, watch):
        log.write(said.encode() if trouble else b"epoch 1\n")
        return status

    monkeypatch.setattr(workers.trainer, "watched", watched)
    entrant = workers.ledger.plan.entrants[0]
    if kind == "seed":
        while (work := workers.ledger.next()).kind == "trial":
            do_trial(workers.ledger, work)
        workers.ledger.release(claim_of(work))
    with pytest.raises(InputError, match=f"PA {kind}.* the study stops, and does not count that"):
        workers.run()
    assert not workers.ledger.result_file(entrant, "seed1").exists()
    trials = workers.ledger.trials(entrant)
    states = ["running"] if kind == "trial" else ["complete"] * workers.ledger.plan.trials
    assert [trial.state for trial in trials] == states
    monkeypatch.setattr(workers.trainer, "watched", trained)  # and the same trial is taken again
    assert workers.ledger.next() == Work(kind, entrant, 0 if kind == "trial" else 1)


def test_every_training_is_told_with_what_is_left(workers, monkeypatch, tmp_path):
    said, made = [], workers.ledger
    monkeypatch.setattr(progress, "say", lambda words, **_: said.append(words))
    monkeypatch.setattr(workers.worker, "done", progress.Progress(made).say)
    row = {"epoch": 1, "R@1": 0.5, "MAP@R": 0.4}
    record = SimpleNamespace(path=tmp_path, evaluated=[row], seconds=2.0)
    monkeypatch.setattr(workers.trainer, "train", lambda *_: record)
    workers.worker.do(made.next())
    assert len(said) == made.plan.folds == 2
    assert said[0].startswith("PA trial000, fold 1 of 2: MAP@R 0.4000; 15 trainings left, about ")
    assert said[1].startswith("PA trial000: MAP@R 0.4000 on the folds; 14 trainings left, about ")


def test_a_fold_whose_metric_is_undefined_fails_its_trial(workers, monkeypatch, tmp_path):
    record = SimpleNamespace(path=tmp_path, evaluated=[{"epoch": 1, "R@1": 0.0}], seconds=2.0)
    monkeypatch.setattr(workers.trainer, "train", lambda *_: record)
    work = workers.ledger.next()
    workers.worker.do(work)
    (trial,) = workers.ledger.trials(work.entrant)
    assert trial.state == "failed" and "MAP@R is undefined on a fold" in trial.error


def test_a_trial_below_the_median_of_its_fold_is_stopped_however_good_another_was(
    tmp_path, monkeypatch
):
    made = Ledger(plan_of(folds=2, trials=9, seeds=2, logs=str(tmp_path)))
    made.begin()
    entrant = made.plan.entrants[0]

    def watch(fold, *values):
        rows = [{"epoch": epoch, "MAP@R": value} for epoch, value in enumerate(values, 1)]
        record = SimpleNamespace(evaluated=rows, outcome={})
        monkeypatch.setattr(trainer, "read", lambda path: record)
        return trainer.Watch(trial, made, entrant, fold).look(tmp_path)

    for level in (0.4, 0.5, 0.6, 0.7):
        trial = made.study(entrant).ask()
        assert not watch(0, 0.0, 0.0) and not watch(1, level, level), "too few to compare with"
        made.study(entrant).tell(trial, level)
    trial = made.study(entrant).ask()
    assert not watch(0, 0.9, 0.9) and watch(1, 0.54)
    trial = made.study(entrant).ask()
    assert not watch(0, 0.0, 0.9) and not watch(1, 0.56) and watch(1, 0.56, 0.5)


def test_settings_that_suit_a_machine_are_those_of_all(tmp_path, monkeypatch):
    tiny.write_images(tmp_path / "photos")
    entries = {
        "flags": f"--dataset folder:{tmp_path / 'photos'}",
        "folds": 2,
        "logs": str(tmp_path),
    }
    commands, machines = [], [Machine(2, False, True, "", 10**12), Machine(8, True, False, "", 0)]
    for machine in machines:
        monkeypatch.setattr(looking, "this_machine", lambda args, machine=machine: machine)
        made = Ledger(plan_of(**entries))
        made.begin()
        commands.append([one.command({r.name: r.first for r in one.space})
                         for one in made.plan.entrants])  # fmt: skip
        assert made.look() == ["PA", "AM"], "this machine may lack what they want"
    assert commands[0] == commands[1]
    found = []
    for machine in machines:
        monkeypatch.setattr(looking, "this_machine", lambda args, machine=machine: machine)
        for fold in ([], ["--val-folds", "2", "--val-fold", "1"]):
            chosen = vars(options.parse_train([*commands[0][0], "--lr", "0.01", *fold]))
            found.append({k: v for k, v in chosen.items()
                          if k not in ("chosen", "given", "val_folds", "val_fold")})  # fmt: skip
    assert all(each == found[0] for each in found)
    assert found[0]["pretrained"] == "imagenet" and found[0]["lr_p"] == 0.005
    assert found[0]["eval_every"] < found[0]["epochs"], "so that there is something to stop by"


# --- what is concluded ----------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """Two methods of which the second is better, three seeds each, six trials."""
    pairs = [["AM", "PA"]]
    made = Ledger(plan_of(folds=2, trials=6, seeds=3, logs=str(tmp_path), compare=pairs))
    made.begin()
    numbers = {"PA": {}, "AM": {}}
    while (work := made.next()) is not None:
        name = work.entrant.name
        if work.kind == "trial":
            lr = made.trials(work.entrant)[work.number].values["lr"]
            do_trial(
                made, work, 0.5 + 0.05 * math.log10(lr), "PRUNED" if work.number == 5 else None
            )
        elif work.kind == "seed":
            numbers[name][work.number] = do_seed(made, work, 0.5 if name == "AM" else 0.0)
        else:
            files = [made.result_file(work.entrant, f"seed{s}") for s in (1, 2, 3)]
            runs = [judging.load(file.with_suffix(".npz")) for file in files]
            found = judging.ensembles(runs)
            write_json(made.result_file(work.entrant, work.name), {"ensembles": found})
            made.release(claim_of(work))
    return made, numbers


def test_means_tests_and_cost(finished):
    ledger, numbers = finished
    found = results.collect(ledger)
    pa, am = found.methods
    for method in (pa, am):
        values = [each["MAP@R"] for each in numbers[method.name].values()]
        assert method.mean["MAP@R"] == pytest.approx(np.mean(values))
        half = 4.303 * np.std(values, ddof=1) / 3**0.5  # Student's t of 2
        assert method.half("MAP@R") == pytest.approx(half, rel=1e-3)
        assert method.bonus[0] == pytest.approx(0.01)
        assert method.search_seconds == 6 * 2 * 2.0
        best = max((t for t in method.trials if t.reached), key=lambda t: t.values["lr"])
        assert method.chosen.number == best.number
        (lr,) = (one for one in method.sensitivity if one.title == "lr")
        assert math.isnan(lr.correlation) and lr.count == 5, "too few trials to speak of"
    seeds, classes = found.tests
    assert (seeds.over, seeds.count, classes.over, classes.count) == ("seeds", 3, "classes", 12)
    difference = am.mean["R@1"] - pa.mean["R@1"]
    assert seeds.differences["R@1"].difference == pytest.approx(difference)
    assert classes.differences["R@1"].difference == pytest.approx(difference)
    assert found.ranked[0].name == "AM"
    for name in ("concatenated", "aligned mean"):
        assert pa.ensembles[name]["R@1"] > pa.mean["R@1"], "noise of three seeds averages out"


def test_what_is_written(finished, tmp_path, capsys):
    ledger, _ = finished
    args = asking.parse(["--methods", "x", "--columns", "MAP@R", "R@1"])
    study.conclude(ledger, args.columns, args.markdown)
    printed = capsys.readouterr().out
    assert "Less PA, in points (paired t-test over 3 seeds" in printed
    folder = ledger.folder
    with (folder / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(r["method"], r["seed"]) for r in runs] == [(m, s) for m in ("PA", "AM") for s in "123"]
    with (folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [t["state"] for t in trials] == (["complete"] * 5 + ["pruned"]) * 2
    text = (folder / "study.tex").read_text()
    assert text.count("MAP@R") >= 1 and "NMI" not in text and r"\textbf" in text
    assert r"\pm$: half of the 95" in text
    page = (folder / "study.html").read_text()
    assert "Highest MAP@R: AM" in page and "<svg" in page
    assert "drawn at random, until there are two for each searched value (4 at least)" in page
    with pytest.raises(InputError, match="--columns Recall"):
        study.conclude(ledger, ["Recall"], None)
    found = results.collect(ledger)
    assert "MRR" not in tables.text(found), "four columns fit a screen"
    by_rank = replace(found, plan=replace(found.plan, metric="MRR"))
    assert "MRR" in tables.text(by_rank), "and what methods are judged by"


def test_a_document_is_begun_and_written_again_between_its_marks(finished, tmp_path, capsys):
    ledger, _ = finished
    found = results.collect(ledger)
    document = tmp_path / "own.md"
    study.conclude(ledger, (), document)
    assert f"document: {document} and {tmp_path / 'own.svg'}" in capsys.readouterr().out
    text = document.read_text()
    am = next(one for one in found.methods if one.name == "AM")
    cell = f"| AM | {100 * am.mean['R@1']:.1f} ± {100 * am.half('R@1'):.1f} |"
    assert cell in text and "## Failed" not in text and "- Highest MAP@R: AM" in text
    assert "![MAP@R less that of PA" in text and "(own.svg)" in text
    assert "prefers-color-scheme" in (tmp_path / "own.svg").read_text()

    document.write_text(
        "Before\n<!-- means -->\nold | row\n<!-- end of means -->\nAfter, R@1 1.0\n"
    )
    study.conclude(ledger, ["MAP@R"], document)
    text = document.read_text()
    assert text.startswith("Before\n<!-- means -->\n| method | MAP@R | seeds |\n| --- |")
    assert text.endswith("<!-- end of means -->\nAfter, R@1 1.0\n") and "old" not in text
    again = document.read_text()
    study.conclude(ledger, ["MAP@R"], document)
    assert document.read_text() == again


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("My paper\n", "has no mark for a study; put one of <!-- answer -->"),
        (
            "<!-- means -->\nand the rest of it\n",
            "has <!-- means --> without <!-- end of means -->",
        ),
    ],
)
def test_a_document_without_marks_is_left_as_it_is(finished, tmp_path, text, words):
    ledger, _ = finished
    document = tmp_path / "own.md"
    document.write_text(text)
    with pytest.raises(InputError, match=words):
        study.conclude(ledger, (), document)
    assert document.read_text() == text and not document.with_suffix(".svg").exists()


def test_pairs_are_compared_beside_the_first_method(finished):
    found = results.collect(finished[0])
    (other,) = (t for t in found.tests if t.over == "seeds")
    asked_for = [t for t in found.asked if t.over == "seeds"]
    assert [(t.a, t.b) for t in asked_for] == [("AM", "PA")]
    assert {t.over for t in found.asked} == {"seeds", "classes"}
    less = asked_for[0].differences["R@1"].difference
    assert less == pytest.approx(-other.differences["R@1"].difference)
    assert "Less AM, in points" in tables.text(found)
    assert ", less AM</h3>" in pages.page(found) and "Each method less PA" in pages.page(found)


def test_tests_over_few_classes_are_called_a_rough_guess(finished):
    found = results.collect(finished[0])
    tests = [test for test in found.tests if test.over == "classes"]
    assert tests and all(test.count < 20 for test in tests)
    said = (tables.text(found), pages.page(found))
    doubt = "With fewer than 20 classes that is a rough guess."
    assert all(doubt in " ".join(text.split()) for text in said)
    assert doubt not in tables.tests_about([replace(test, count=20) for test in tests])


def test_runs_that_were_evaluated_once_have_no_best_epoch(finished, tmp_path):
    ledger, _ = finished
    assert "picking the best epoch" in tables.text(results.collect(ledger))
    files = sorted(ledger.folder.glob("*/seed*.json"))
    for file in files:
        write_json(file, json.loads(file.read_text()) | {"evaluations": 1})
    found = results.collect(ledger)
    said = [tables.text(found), pages.page(found), " ".join(pages.conclusions(found))]
    assert not any("icking the best epoch" in text or "nan" in text for text in said)
    markdown.write(tmp_path / "s.md", found)
    said = [tables.text(found), pages.page(found), (tmp_path / "s.md").read_text()]
    assert not any("best epoch" in text for text in said), "nor a column without values"
    assert all("aligned mean" in text for text in said) and "<h2>Ensembles</h2>" in said[1]
    assert {row[-2] for row in tables.runs_csv(found)[1]} == {""}
    write_json(files[0], json.loads(files[0].read_text()) | {"evaluations": 2})
    heads, lines = tables.gains(results.collect(ledger))
    assert heads == [*tables.GAINS] and lines[1][1][1] == "+1.0", "one run has no ±"
    assert lines[0][1][1] == "–"
    for file in ledger.folder.glob("*/together*.json"):
        write_json(file, {"ensembles": {}})
    for file in files:
        write_json(file, json.loads(file.read_text()) | {"evaluations": 1})
    assert tables.gains(results.collect(ledger)) == ([], [])
    assert "What is not in these numbers" not in tables.text(results.collect(ledger))


def test_seeds_that_are_added_leave_what_the_earlier_ones_reached_together(finished, tmp_path):
    ledger, _ = finished
    before = results.collect(ledger).methods[0].ensembles
    pairs = [["AM", "PA"]]
    more = Ledger(plan_of(folds=2, trials=6, seeds=4, logs=str(tmp_path), compare=pairs))
    more.begin()
    while (work := more.next()) is not None and work.kind == "seed":
        do_seed(more, work)
    write_json(more.result_file(work.entrant, work.name), {"ensembles": {}, "seeds": 4})
    found = results.collect(more)
    assert found.methods[0].ensembles == before and found.methods[0].together == 3
    assert tables.gains(found)[1][0][1][2].endswith(" (3 seeds)")


def test_a_method_whose_trials_all_failed_leaves_nothing_open(tmp_path):
    made = Ledger(plan_of(folds=2, trials=1, seeds=2, logs=str(tmp_path)))
    made.begin()
    assert made.left(made.plan.entrants[0]) == (1, 2)
    do_everything(
        made, lambda *it: do_trial(*it, state="FAIL" if it[1].entrant.name == "PA" else None)
    )
    assert made.is_finished and progress.Progress(made).left() == 0
    assert "Not finished" not in " ".join(pages.conclusions(results.collect(made)))


def test_a_study_without_a_trial_of_a_method_says_what_to_do(tmp_path, capsys):
    words = f"--methods Proxy_Anchor AMLoss --folds 2 --trials 1 --seeds 2 --logs {tmp_path}"
    args = asking.parse(words.split())
    made = Ledger(study.plan_of(args))
    made.begin()
    lost = "Proxy_Anchor"
    do_everything(
        made, lambda *it: do_trial(*it, state="FAIL" if it[1].entrant.name == lost else None)
    )
    with pytest.raises(SystemExit) as stop:
        study.main(args)
    assert stop.value.code == 1
    assert f"\n{lost}: all trials failed" in capsys.readouterr().out


def of_seeds(*methods):
    """Results of methods whose MAP@R with each seed is given: seed → value."""
    found = [
        results.Found(
            Entrant(f"m{number}", (), ()), (), None,
            {seed: {"R@1": 0.5, "MAP@R": value} for seed, value in seeds.items()},
            {}, {}, {}, {}, 0, {},
        )
        for number, seeds in enumerate(methods)
    ]  # fmt: skip
    return results.Results(plan_of(), tuple(found))


def test_that_the_best_was_chosen_is_corrected_for():
    """Nine methods that are equal: the best must seldom be said to be better than any."""
    generator, wrong, repeats = np.random.default_rng(0), 0, 150
    for _ in range(repeats):
        values = generator.normal(0.5, 0.01, (9, 5)).tolist()
        found = of_seeds(*(dict(enumerate(row)) for row in values))
        assert len(found.best_against) == 8 and len(found.pairs) == 36
        wrong += any(test.corrected["MAP@R"] < 0.05 for test in found.best_against)
    # Corrected for the best against each alone it would be 0.08 of them.
    assert wrong / repeats < 0.05


def test_a_gain_that_is_none_is_given_to_nobody(finished):
    found = results.collect(finished[0])
    assert "would add 1.0 points of R@1 to each method" in " ".join(pages.conclusions(found))
    first, second = found.methods
    apart = replace(found, methods=[replace(first, gained={1: 0.03, 2: 0.03}), second])
    assert "add 1.0 to 3.0 points of R@1, most to PA" in " ".join(pages.conclusions(apart))
    last = replace(found, methods=[replace(m, gained={1: 0.0, 2: 0.0}) for m in found.methods])
    said = " ".join(pages.conclusions(last))
    assert "added less than 0.05 points" in said and "most to" not in said


def test_the_best_mean_is_not_better_where_it_is_behind_with_each_seed_that_both_have():
    seeds = {1: 0.40, 2: 0.41, 3: 0.42, 4: 0.30, 5: 0.30}
    found = of_seeds(seeds, {1: 0.394, 2: 0.405, 3: 0.415})  # two of its runs failed
    assert found.ranked[0].name == "m1"
    said = " ".join(pages.conclusions(found))
    assert "it is better than" not in said and "Not told apart from it by these seeds: m0" in said


def test_a_difference_that_is_the_same_with_every_seed_is_said_so(tmp_path):
    found = of_seeds({1: 28 / 30, 2: 27 / 30}, {1: 29 / 30, 2: 28 / 30})
    markdown.write(tmp_path / "s.md", found)
    for text in (tables.text(found), pages.page(found), (tmp_path / "s.md").read_text()):
        assert "nan" not in text and "0.500" in text
    said = " ".join(pages.conclusions(found))
    assert "Not told apart from it by these seeds: m0 (+3.3 with every seed)" in said


def test_a_metric_that_is_undefined_ranks_nobody(tmp_path):
    known, undefined = {1: 0.4, 2: 0.41, 3: 0.4}, {1: 0.5, 2: math.nan, 3: 0.5}
    found = of_seeds(undefined, known)
    assert [one.name for one in found.ranked] == ["m1"]
    for document, each in (("one.md", found), ("two.md", of_seeds(undefined, undefined))):
        assert markdown.write(tmp_path / document, each) == [tmp_path / document]
        said = (tmp_path / document).read_text()
        assert "nan" not in said and "nan" not in pages.page(each)
        assert ("MAP@R is undefined on the test classes" in said) == (each is not found)


def test_equal_methods_are_not_told_apart(tmp_path):
    plan = plan_of(folds=2, trials=1, seeds=3, logs=str(tmp_path))
    made = Ledger(plan)
    made.begin()
    do_everything(made)
    said = " ".join(pages.conclusions(results.collect(made)))
    assert "Not told apart" in said and "not prove that they are equal" in said
    assert "More than chance" not in said


def test_a_run_that_failed_is_tried_again_by_the_next_start(tmp_path):
    plan = plan_of(folds=2, trials=1, seeds=2, logs=str(tmp_path))
    made = Ledger(plan)
    made.begin()

    def fail_of_am(made, work):
        if work.entrant.name != "AM":
            return do_seed(made, work)
        write_json(made.result_file(work.entrant, work.name), {"values": {}, "error": "why"})
        return made.release(claim_of(work))

    do_everything(made, seed=fail_of_am)
    assert results.collect(made).methods[1].failures == {1: "why", 2: "why"} and made.is_finished
    made.begin()
    assert (made.next().entrant.name, made.is_finished) == ("AM", False)
    assert len(results.collect(made).methods[0].seeds) == 2, "what was done stays"


def test_a_study_does_not_begin_in_the_folder_of_a_run(tmp_path):
    folder = tmp_path / "tried"
    folder.mkdir()
    (folder / "args.json").write_text("{}")
    with pytest.raises(InputError, match="is a run; give the study another name"):
        Ledger(plan_of(logs=str(tmp_path))).look()
    assert [*folder.iterdir()] == [folder / "args.json"]


def test_a_module_of_ours_is_started_beside_files_of_the_same_name(tmp_path):
    for name in ("utils.py", "metrics.py", "flags.py", "judging.py"):
        (tmp_path / name).write_text("raise SystemExit('not ours')\n")
    command = [*our_command("studies.judging"), "none.pth", str(tmp_path / "out"), "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "none.pth" in done.stderr


@pytest.mark.parametrize("given", [["--logs", "elsewhere"], ["--trials", "3"]])
def test_what_stands_in_the_file_is_not_given_twice(given, tmp_path, capsys):
    said = refusal(capsys, asking.parse, [str(tmp_path / "s.toml"), *given])
    assert f"{given[0]} belongs in the file" in said


def test_a_loss_that_there_is_not_is_told_where_its_arguments_are_searched():
    with pytest.raises(InputError, match=r"CircelLoss.*did you mean CircleLoss"):
        plan_of(
            methods={"C": "--loss pml:CircelLoss --IPC 3"},
            search={"C": {"loss-args.gamma": [16, 256]}},
        )


def test_a_rotation_is_undone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert torch.allclose(x @ turn @ judging.rotation(x @ turn, x), x, atol=1e-5)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (37.2, 37.9), (-3, 8), (0, 0), (1e-5, 2e-5), (12, 1200)]
)
def test_ticks_are_round_and_few(low, high):
    marks = plots.ticks(low, high)
    assert 2 <= len(marks) <= 10 and marks[0] <= low and marks[-1] >= high
    steps = np.diff(marks)
    assert np.allclose(steps, steps[0])


# --- the command ----------------------------------------------------------------------------------


NETWORK = [word for word in tiny.NETWORK if word not in ("--wandb", "disabled", "--no-report")]


def test_the_marks_of_a_chart_stand_inside_it():
    drawn = plots.forest([plots.Bar("m", 0.0, 1.3)], "chart", zero=True)
    places = re.findall(
        r'<text class="soft" x="([\d.]+)" y="\d+" text-anchor="middle">(.*?)<', drawn
    )
    assert "+150" in [label for _, label in places]
    for place, label in places:
        assert 4 * len(label) <= float(place) <= plots.WIDTH - 4 * len(label)


def test_data_that_are_not_there_are_told_before_anything_begins(tmp_path):
    flags = " ".join([*NETWORK, "--dataset", "folder:none"])
    done = run_cli("study.py", "--methods", "ms", "--flags", flags, "--name", "s", cwd=tmp_path)
    assert done.returncode == 2 and "ms: " in done.stderr and "none" in done.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_a_study_that_is_killed_and_shared(tmp_path):
    """The first process is killed with all it has begun; two others bring it to its end."""
    tiny.write_images(tmp_path / "photos")
    flags = " ".join([*NETWORK, "--dataset folder:photos --epochs 2"])
    (tmp_path / "s.toml").write_text(
        f'flags = "{flags}"\nfolds = 2\ntrials = 2\nseeds = 2\n'
        '[methods]\nPA = "--loss Proxy_Anchor"\nMS = "--loss ms --IPC 4"\n'
    )
    command = [sys.executable, str(ROOT / "study.py"), "s.toml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **start)
    folder = tmp_path / "logs" / "s"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*/trial000-fold1/last.pth")) and time.monotonic() < deadline:
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    both = [subprocess.Popen(command, **start) for _ in range(2)]
    said = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    with (folder / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [t["state"] for t in trials].count("complete") == 4
    with (folder / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    shared = [sum(f"{m} " in line for line in text.splitlines()) for text in said for m in ("PA",)]
    assert all(shared), "both had something to do"
    assert not list(folder.glob("*/trial*/*.pth")) and list(folder.glob("*/seed1/*_best.pth"))
    page = (folder / "study.html").read_text()
    assert "Not finished" not in page
    again = run_cli("study.py", "s.toml", "--report", cwd=tmp_path)
    assert again.returncode == 0 and Path(folder / "study.tex").is_file()
