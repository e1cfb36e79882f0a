"""The command line: published spellings, defaults, argument files, and errors of one sentence."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest
from conftest import refusal, run_python

import options
from machine import cores
from utils import InputError, as_clause


def test_published_amloss_command_is_read_as_printed():
    args = options.parse_train(
        "--gpu-id 0 --loss AMLoss --model bn_inception --embedding-size 512 --batch-size 180 "
        "--lr 1e-4 --dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 10 --alphap 48 --alphan 48 "
        "--mrg_lr 1e-4 --mrg-lr-decay-step 10 --mrg-lr-decay-gamma 0.5 --delta 0.1 --lam 1 "
        "--LOG_DIR out --IPC 0 --l2-norm 1".split()
    )
    assert (args.loss, args.alphap, args.mrg_lr, args.LOG_DIR) == ("AMLoss", 48.0, 1e-4, "out")


def test_family_defaults_are_the_published_ones():
    args = options.parse_train([])
    published = {
        "lr": 1e-4, "epochs": 60, "batch_size": 150, "embedding_size": 512, "seed": 1,
        "alpha": 32.0, "mrg": 0.1, "weight_decay": 1e-4, "clip": 10.0, "proxy_lr_scale": 100.0,
        "warm": 1, "lr_decay_step": 10, "lr_decay_gamma": 0.5, "optimizer": "adamw",
    }  # fmt: skip
    assert {name: getattr(args, name) for name in published} == published


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("--gpu -1", "gpu_id", -1),
        ("--epoch 3", "epochs", 3),
        ("--log-dir x", "LOG_DIR", "x"),
        ("--sz-embedding 64", "embedding_size", 64),
        ("--loss AMLoss --mrg-lr 0.5", "mrg_lr", 0.5),
    ],
)
def test_aliases(alias, name, value):
    assert getattr(options.parse_train(alias.split()), name) == value


def test_argument_file_with_comments_and_later_flags_winning(tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("# a comment\n--lr 0.5  # another\n--name 'two words'\n\n--epochs 7\n")
    args = options.parse_train([f"@{file}", "--epochs", "9"])
    assert (args.lr, args.name, args.epochs) == (0.5, "two words", 9)
    assert {"lr", "name", "epochs"} <= set(args.given)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("--lr nought", ["--lr", "not a number"]),
        ("--lr 0", ["--lr", "out of range"]),
        ("--clip inf", ["--clip", "inf is out of range"]),  # args.json could not keep it
        ("--seed 9223372036854775808", ["--seed", "above the largest number, 92233720"]),
        ("--epochs 0", ["--epochs", "smallest"]),
        ("--batch-size 1.5", ["--batch-size", "whole number"]),
        ("--lrr 1", ["--lrr", "did you mean --lr"]),
        ("--alphap 48", ["--alphap", "--loss AMLoss"]),
        ("--loss AMLoss --alpha 48", ["--alpha", "--loss Proxy_Anchor"]),
        ("--loss MS --mrg 0.2", ["--mrg", "Proxy_Anchor or AMLoss"]),
        ("--schedule cosine --lr-decay-step 4", ["--lr-decay-step", "--schedule step"]),
        ("--alpha 48 --loss-args alpha=40", ["--alpha", "--loss-args alpha=40", "leave one"]),
        ("--loss pml:CircleLoss --loss-args gamma", ["gamma", "key=value"]),
        ("--model", ["--model", "expected one argument"]),
        ("--pooling sum", ["--pooling", "avg+max"]),
        ("--dataset cub --bn-momentum 0.5", ["--bn-momentum", "--bn-freeze 0"]),
        ("--bn-freeze 1 --bn-momentum 0.5", ["--bn-momentum", "--bn-freeze 0"]),
        ("--bn-momentum 0", ["--bn-momentum", "above 0"]),
        ("--IPC-repeat 1", ["--IPC-repeat", "--IPC"]),
        ("--loss TripletLoss --nb-clusters 2 --IPC-repeat 1", ["--IPC-repeat", "--IPC"]),
        ("--loss MS --mining earlier", ["--mining", "MarginLoss"]),
        ("--loss MarginLoss --sampler RPHN --mining earlier", ["--mining", "--sampler easypeasy"]),
        (
            "--head none --embedding-size 1024 --head-init orthogonal",
            ["--head-init", "--head linear"],
        ),
        ("--checkpoint x.pth --head-init orthogonal", ["--head-init", "without --checkpoint"]),
        ("--nb-clusters 2 --batch-sampler randombatch --IPC 4", ["--IPC", "randombatch"]),
        ("--name ..", ["--name .. is no name of a folder"]),  # it made logs/..-2
        ("--name . --folds 2", ["--name . is no name of a folder"]),  # and this one logs-2
        ("--name mine/..", ["--name mine/.."]),
        ("@no_such_file", ["no_such_file"]),
    ],
)
def test_bad_flag_gets_one_sentence_and_status_2(command, words, capsys):
    said = refusal(capsys, options.parse_train, command.split())
    for word in words:
        assert word in said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to type commands in, with a run, a recipe, photographs and a table of them."""
    for made in ("logs/one run", "photos/mug", "recipes"):
        (tmp_path / made).mkdir(parents=True)
    for made in ("logs/one run/args.json", "recipes/mine.txt", "photos.csv"):
        (tmp_path / made).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("parse", "words", "hint"),
    [
        ("train", ["logs/one run"], "did you mean --resume-run 'logs/one run'?"),
        ("evaluate", ["logs/one run"], "did you mean --resume 'logs/one run'?"),
        ("evaluate", ["some/best.pth"], "did you mean --resume some/best.pth?"),
        ("train", ["recipes/mine.txt"], "did you mean @recipes/mine.txt?"),
        ("train", ["recipes/emoji_scratch.txt"], "did you mean @recipes/emoji_scratch.txt?"),
        ("train", ["--seed", "1", "2"], "no flag takes the word 2; leave it out"),
        ("train", ["x" * 300], "leave it out"),
        ("train", ["--resume", "logs/one run"], "--resume-run 'logs/one run' continues a run"),
        ("train", ["--dataset", "photos"], "did you mean folder:photos?"),
        ("train", ["--dataset", "photos.csv"], "did you mean csv:photos.csv?"),
        ("train", ["@"], "@ names no file of flags"),
        ("train", ["@" + "x" * 300], "check its name"),
        ("train", ["--learning-rate", "1e-3"], "did you mean --lr or --lr_p?"),
        ("train", ["--bootstrap", "100"], "--bootstrap is for evaluation, and"),
        ("train", ["--lr-rate", "1e-3"], "did you mean --lr-p or --lr-decay-step?"),
        ("train", ["--batchsize", "4"], "did you mean --batch_size or --cache-size?"),
        ("train", ["--loss", "Proxy-Anchor"], "Proxy_Anchor, Proxy_NCA or ProxyNCA_pp?"),
    ],
)
def test_what_was_probably_meant_is_said(parse, words, hint, folder, capsys):
    parse = {"train": options.parse_train, "evaluate": options.parse_evaluate}[parse]
    assert hint in refusal(capsys, parse, words)


@pytest.mark.parametrize(
    ("module", "command", "words"),
    [
        ("anchorage.completion", "tcsh", "shell: invalid choice"),
        ("dataset.__main__", "", "missing after `python -m dataset`: check or download"),
        ("dataset.__main__", "check emoji --ex-if ignore", "--ex-if; did you mean --exif?"),
        ("dataset.__main__", "check folder:x --eval-classes half", "--eval-classes"),
        ("net.__main__", "", "a command is missing after `python -m net`: export"),
        ("net.__main__", "export run --weights mean", "--weights"),
        ("search", "", "missing after `python search.py`: build, add, "),
        ("search", "query shop.index", "required: IMAGE"),
    ],
)
def test_every_command_refuses_a_typing_error_in_one_sentence(module, command, words, capsys):
    main = importlib.import_module(module).main
    said = refusal(capsys, main, command.split())
    assert words in said and said.endswith(" (see --help)\n")


@pytest.mark.parametrize(
    ("sentence", "clause"),
    [
        ("There is no loss 'X'; did you mean Y?", "there is no loss 'X'; did you mean Y?"),
        ("A batch has no pairs: choose more.", "a batch has no pairs: choose more"),
        ("AMLoss needs two classes.", "AMLoss needs two classes"),
        ("Proxy_Anchor, CUDA", "Proxy_Anchor, CUDA"),
        ("CUDA is not there", "CUDA is not there"),
        ("--lr 0: it must be above 0", "--lr 0: it must be above 0"),
        ("", ""),
    ],
)
def test_all_errors_begin_and_end_alike(sentence, clause):
    assert as_clause(sentence) == clause


def test_evaluate_without_anything_to_evaluate_says_what_it_needs(capsys):
    said = refusal(capsys, options.parse_evaluate, [])
    assert said.startswith("error: --resume FILE is needed") and "--model NAME" in said


def test_help_names_every_value_that_a_flag_can_have(capsys):
    with pytest.raises(SystemExit):
        options.parse_train(["--help"])
    shown = capsys.readouterr().out
    of_flags = {part.split()[0].rstrip(","): part for part in re.split(r"\n  (?=-)", shown)}
    for entry in options.train_flags():
        said = re.split(r"[^\w+-]+", of_flags[entry.spellings[0]])
        assert {str(choice) for choice in entry.kind.choices or ()} <= {*said}, entry.spellings


def test_a_recipe_with_another_loss_goes_on_and_says_what_has_no_effect(tmp_path, capsys):
    file = tmp_path / "recipe.txt"
    file.write_text("--loss AMLoss --mrg-lr 0.5")
    args = options.parse_train([f"@{file}", "--loss", "Proxy_Anchor"])
    (note,) = options.notices(args)
    assert "--mrg-lr" in note and "--loss AMLoss" in note
    assert options.notices(options.parse_train([f"@{file}"])) == []
    with pytest.raises(SystemExit):  # what is typed is meant
        options.parse_train([f"@{file}", "--loss", "Proxy_Anchor", "--mrg-lr", "0.1"])
    assert "--mrg-lr has no effect" in capsys.readouterr().err


def test_an_argument_by_its_own_name_wins_over_the_flags_default():
    by_name = options.parse_train("--loss AMLoss --loss-args alphap=48 lam=2".split())
    by_flag = options.parse_train("--loss AMLoss --alphap 48 --lam 2".split())
    assert options.criterion_arguments(by_name) == options.criterion_arguments(by_flag)


def test_a_flag_of_another_loss_in_a_file_leaves_the_argument_alone(tmp_path):
    file = tmp_path / "recipe.txt"
    file.write_text("--loss Proxy_Anchor --alpha 48")
    words = [f"@{file}", "--loss", "NPair", "--loss-args", "alpha=2"]
    assert options.criterion_arguments(options.parse_train(words)) == {"alpha": 2}


def test_loss_arguments_become_values():
    args = options.parse_train(
        ["--loss", "pml:X", "--loss-args", "gamma=80", "m=0.4", "a=word", "b=true"]
    )
    assert dict(args.loss_args) == {"gamma": 80, "m": 0.4, "a": "word", "b": True}


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_help_shows_groups_and_defaults_without_loading_torch(script):
    code = (
        "import sys, options\n"
        "try:\n"
        f"    options.parse_{script}(['--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert not {'torch', 'wandb'} & set(sys.modules), 'a heavy import'\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "network:" in shown and "(default: 512)" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_help_of_evaluate_says_what_the_checkpoint_decides(capsys):
    with pytest.raises(SystemExit):
        options.parse_evaluate(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "data: With --resume, the run decides what is not given" in said
    assert "network: With --resume, the checkpoint decides what is not given" in said
    assert "--resume-run" not in said and "fresh optimisers" not in said


def test_every_option_has_help_and_a_unique_name():
    for groups in (options.TRAIN_GROUPS, options.EVALUATE_GROUPS):
        entries = [entry for group in groups for entry in group.flags]
        names = [entry.dest for entry in entries]
        assert len(names) == len(set(names))
        assert all(entry.help for entry in entries)


# --- what a change of a flag means ----------------------------------------------------------------


def kept(flags: str) -> dict:
    return options.plain(options.parse_train(flags.split()))


@pytest.mark.parametrize(
    "flags",
    ["--seed 2", "--tensorboard", "--save-every 5 --keep 2", "--wandb offline --wandb-images 3",
     "--workers 0 --gpu-id 1", "--name b --remark c --LOG_DIR d", "--no-report",
     "--dataset Emoji", "--model BN-Inception"],
)  # fmt: skip
def test_runs_that_differ_in_this_are_seeds_of_one_configuration(flags):
    assert options.configuration(kept(flags)) == options.configuration(kept("--seed 1"))


@pytest.mark.parametrize("flags", ["--lr 1e-3", "--epochs 5", "--loss AMLoss", "--warm 0"])
def test_runs_that_differ_in_this_are_not(flags):
    assert options.configuration(kept(flags)) != options.configuration(kept("--seed 1"))


def test_a_flag_that_nobody_reads_makes_no_other_configuration():
    stored = kept("--loss MS")
    assert options.configuration({**stored, "alphap": 7.0}) == options.configuration(stored)


def test_resume_auto_tells_runs_apart_by_all_that_they_compute_and_by_name():
    first = options.same_command(kept("--LOG_DIR a"))
    for same in ("--LOG_DIR b", "--resume auto", "--workers 1", "--keep 3", "--wandb disabled"):
        assert options.same_command(kept(same)) == first, same
    for other in ("--seed 2", "--name x", "--remark y", "--lr 1e-3", "--epochs 3"):
        assert options.same_command(kept(other)) != first, other


def test_every_flag_of_a_run_is_what_it_was_unless_it_may_change():
    stored = kept("--epochs 9 --lr 0.5 --loss AMLoss --mrg 0.3")
    given = options.parse_train("--resume-run x --epochs 12 --lr 0.5 --workers 1".split())
    now = options.continued(given, stored)
    assert (now.epochs, now.lr, now.workers, now.loss, now.mrg) == (12, 0.5, 1, "AMLoss", 0.3)
    given = options.parse_train("--resume-run x --lr 0.25".split())
    with pytest.raises(InputError, match="--lr cannot change in a continued run"):
        options.continued(given, stored)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("--model resnet50", "--model ResNet-50"),
        ("--dataset CUB", "--dataset cub-200"),
        ("--dataset folder:own", "--dataset folder:./own/"),
        ("--checkpoint runs/old", "--checkpoint ./runs/old/"),
        ("--pretrained weights.pth", "--pretrained ./weights.pth"),
        ("--LOG_DIR runs", "--LOG_DIR runs/"),
        ("--loss-args margin=1 alpha=2", "--loss-args alpha=2 margin=1"),
        ("--loss-args margin=1", "--loss-args margin=2 margin=1"),
        ("--peft bitfit,lora:8", "--peft lora:8:8,bitfit"),
        ("--schedule milestones --milestones 5 9", "--milestones 9 5"),
    ],
)
def test_another_spelling_is_no_other_run(before, now):
    begun = f"--model resnet18 --dataset cub {before}"
    stored, again = kept(begun), kept(f"{begun} {now}")
    assert options.same_command(again) == options.same_command(stored)
    assert options.configuration(again) == options.configuration(stored)
    given = options.parse_train(f"--resume-run x {now}".split())
    assert options.same_training(options.plain(options.continued(given, stored))) == (
        options.same_training(stored)
    )


def test_a_continued_run_listens_to_what_the_run_listens_to():
    stored = kept("--dataset folder:own --decode cache --tensorboard")
    flags = (
        "--resume-run x --cache-dir caches --wandb-images 3 --image-size 224 --dataset folder:own"
    )
    now = options.continued(options.parse_train(flags.split()), stored)
    assert (now.cache_dir, now.wandb_images, now.decode) == ("caches", 3, "cache")
    given = options.parse_train("--resume-run x --milestones 3".split())
    with pytest.raises(InputError, match="--milestones has no effect here"):
        options.continued(given, {**stored, "milestones": [3]})


@pytest.mark.parametrize(
    ("before", "now", "kept_as"),
    [
        ("folder:own", "folder:/moved/own", "folder:/moved/own"),
        ("csv:a.csv", "csv:/moved/a.csv", "csv:/moved/a.csv"),
        ("cub", "CUB-200", "cub"),
    ],
)
def test_data_may_have_moved(before, now, kept_as):
    root = [] if ":" in now else ["--data-root", "else"]
    given = options.parse_train(["--resume-run", "x", "--dataset", now, *root])
    found = options.continued(given, kept(f"--dataset {before}"))
    assert (found.dataset, found.data_root) == (kept_as, "else" if root else "data")


def test_another_data_set_is_another_run():
    given = options.parse_train("--resume-run x --dataset cars".split())
    with pytest.raises(InputError, match="--dataset cannot change"):
        options.continued(given, kept("--dataset cub"))


def test_every_path_may_begin_with_the_home_folder(monkeypatch, tmp_path):
    """No shell expands `~` in `--flag=~/x`, nor behind `folder:` or `@`."""
    monkeypatch.setenv("HOME", "/home/me")
    kinds = ("DIR", "FILE", "WHAT", "IMAGE")
    found = set()
    for groups in (options.TRAIN_GROUPS, options.EVALUATE_GROUPS, options.REPORT_GROUPS):
        for entry in (entry for group in groups for entry in group.flags):
            if (entry.kind.metavar or "").split(".")[0] in kinds:
                assert entry.kind.parse("~/x") == "/home/me/x", entry.spellings
                found.add(entry.dest)
    assert {"LOG_DIR", "data_root", "cache_dir", "checkpoint", "resume", "query", "out"} <= found
    assert options.parse_train(["--LOG_DIR=~/runs"]).LOG_DIR == "/home/me/runs"
    assert options.parse_train(["--dataset=folder:~/own"]).dataset == "folder:/home/me/own"
    assert options.parse_report(["~/runs/a"]).runs == ["/home/me/runs/a"]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.txt").write_text("--lr 0.25\n")
    assert options.parse_train(["@~/recipe.txt"]).lr == 0.25


def test_options_are_shown_by_names_that_set_them():
    shown = options.by_flag(kept("--loss AMLoss --lr 0.25 --embedding-size 64"))
    assert (shown["loss"], shown["lr"], shown["embedding-size"]) == ("AMLoss", 0.25, 64)
    spellings = {spelling for entry in options.train_flags() for spelling in entry.spellings}
    assert {f"--{name}" for name in shown} <= spellings
    args = options.parse_train([f"--{name}={shown[name]}" for name in ("loss", "lr", "batch-size")])
    assert (args.loss, args.lr) == ("AMLoss", 0.25)


LATER = ("bn_momentum", "mining", "IPC_repeat")
"""Flags that the first versions did not have."""


def of_an_older_version(flags: str, **defaults_then: object) -> dict:
    """What a run of then has kept."""
    stored = kept(flags) | defaults_then
    return {name: value for name, value in stored.items() if name not in LATER}


@pytest.mark.parametrize(
    ("flags", "then", "now"),
    [
        ("--dataset cub --bn-freeze 0", {"bn_momentum": 0.1}, {"bn_momentum": 0.9}),
        ("--loss MarginLoss --IPC 3", {"mining": "earlier"}, {"mining": "released"}),
        ("--loss Proxy_NCA", {"proxy_lr_scale": 100.0}, {"proxy_lr_scale": 1.0}),
        ("--loss AMLoss", {"epochs": 60, "batch_size": 150}, {"epochs": 40, "batch_size": 90}),
        ("--introspective", {"model": "bn_inception"}, {"model": "resnet50"}),
    ],
)
def test_runs_of_older_versions_go_on_as_they_were(flags, then, now):
    stored = of_an_older_version(flags, **{k: v for k, v in then.items() if k not in LATER})
    asked = options.parse_train(flags.split())
    for args in (
        options.continued(options.parse_train(["--resume-run", "x"]), stored),
        options.as_begun(options.parse_train([*flags.split(), "--resume", "auto"]), stored),
        options.kept(stored),
    ):
        assert {name: getattr(args, name) for name in then} == then
    assert {name: getattr(asked, name) for name in now} == now
    # --resume auto finds a run by its words, whatever they meant then.
    assert options.same_words(stored) == options.same_words(kept(f"{flags} --resume auto"))
    assert options.same_words(stored) != options.same_words(kept(f"{flags} --seed 2"))


def test_a_run_of_a_newer_version_is_not_continued_without_its_options():
    newer = kept("--loss AMLoss") | {"sharper_edges": 2.0}
    asked = options.parse_train(["--resume-run", "x"])
    again = options.parse_train(["--loss", "AMLoss", "--resume", "auto"])
    for go_on, args in ((options.continued, asked), (options.as_begun, again)):
        with pytest.raises(InputError, match="begun with --sharper-edges, which this version"):
            go_on(args, newer)


def test_runs_that_differ_in_an_option_of_a_newer_version_are_no_seeds_of_each_other():
    asked = ((1, 2), (2, 2), (3, 4))
    one, same, other = (kept(f"--seed {seed}") | {"sharper_edges": new} for seed, new in asked)
    assert options.configuration(one) == options.configuration(same)
    assert options.configuration(one) != options.configuration(other)
    assert options.configuration(one) != options.configuration(kept("--seed 2"))


def test_a_run_that_an_older_version_clipped_at_infinity_can_be_read():
    stored = {**kept("--clip 1"), "clip": float("inf")}
    assert options.kept(stored).clip == float("inf")
    with pytest.raises(InputError, match="epochs"):
        options.kept({**stored, "epochs": float("inf")})


def test_a_run_that_kept_no_words_is_not_found_by_them():
    stored = {name: value for name, value in kept("--lr 1").items() if name != "given"}
    assert options.same_words(stored) is None


@pytest.mark.parametrize(
    ("flags", "momentum"),
    [
        ("--dataset cub --bn-freeze 0", 0.9),
        ("--dataset SOP --loss AMLoss --bn-freeze 0", 0.9),
        ("--dataset cub --loss AMLoss --disent True --bn-freeze 0", 0.9),
        ("--dataset cub --introspective --model BN-Inception --bn-freeze 0", 0.9),
        ("--experiment margin_loss_resnet50 --arch bn_inception", 0.9),
        ("--dataset SOP --loss triplet --bn-freeze 0", 0.1),
        ("--dataset cub --loss ms --sec_wei 1 --bn-freeze 0", 0.1),
        ("--dataset cub --introspective --bn-freeze 0", 0.1),
        ("--dataset cub --model googlenet --bn-freeze 0", 0.1),
        ("--dataset cub --loss n-npair --bn-freeze 0 --bn-momentum 0.5", 0.5),
    ],
)
def test_the_momentum_of_batch_norm_is_that_of_each_profile(flags, momentum):
    assert options.parse_train(flags.split()).bn_momentum == momentum


def test_divide_and_conquer_trains_the_statistics_of_bn_inception_alone():
    flags = "--experiment margin_loss_resnet50".split()
    found = {
        model: options.parse_train([*flags, "--arch", model]).bn_freeze
        for model in ("bn_inception", "BN-Inception", "resnet18", "resnet50")
    }
    assert found == {
        "bn_inception": "0", "BN-Inception": "0", "resnet18": "statistics",
        "resnet50": "statistics",
    }  # fmt: skip
    assert options.parse_train(flags).bn_freeze == "statistics"


def test_the_defaults_of_amloss_are_its_authors():
    args = options.parse_train(["--loss", "AMLoss"])
    assert (args.epochs, args.batch_size, args.workers) == (40, 90, min(2, cores()))
    given = "--loss AMLoss --epoch 3 --batch_size 30 --num-workers 1".split()
    args = options.parse_train(given)
    assert (args.epochs, args.batch_size, args.workers) == (3, 30, 1)
    args = options.parse_train([])
    assert (args.epochs, args.batch_size, args.workers) == (60, 150, min(4, cores()))


def test_clusters_of_sop_are_looked_at_once_with_sec():
    sop = options.parse_train("--use_dataset SOP --use_loss ms --instances 5".split())
    assert sop.metrics == ("retrieval",)
    for flags in ("--use_dataset Inshop --use_loss ms", "--dataset SOP"):
        assert "nmi" in options.parse_train(flags.split()).metrics
    args = options.parse_train("--use_dataset SOP --use_loss triplet --metrics nmi".split())
    assert args.metrics == ["nmi"]


def test_the_network_of_idml_is_its_authors():
    assert options.parse_train(["--introspective"]).model == "resnet50"
    assert options.parse_train("--introspective --model resnet18".split()).model == "resnet18"
    assert options.parse_train([]).model == "bn_inception"


IDML_PRINTED = (
    "--gpu -1 --loss Proxy_Anchor --model resnet50 --embedding-size 512 --batch-size 120 "
    "--lr {lr} --dataset {data} --warm 5 --bn-freeze 1 --lr-decay-step 5"
)


@pytest.mark.parametrize(("lr", "data"), [("6e-4", "cub"), ("2.5e-4", "cars"), ("6e-4", "SOP")])
def test_the_printed_commands_of_idml_are_told_what_they_lack(lr, data):
    import methods

    command = IDML_PRINTED.format(lr=lr, data=data).split()
    (note,) = methods.notes(options.parse_train(command))
    assert "--introspective adds it" in note
    (note,) = methods.notes(options.parse_train([*command, "--introspective"]))
    assert "adds it" not in note
    # Proxy-Anchor's own ResNet-50 has another rate.
    assert methods.notes(options.parse_train([*command, "--lr", "1e-4"])) == []


# --- the registries -------------------------------------------------------------------------------


def choices(flag: str) -> tuple:
    (entry,) = (entry for entry in options.train_flags() if flag in entry.spellings)
    return entry.kind.choices


def test_the_choices_of_a_flag_are_those_of_the_library():
    import losses
    import net
    from criteria.miners import MINING
    from dataset.augment import AUGMENTATIONS
    from dataset.cluster_sampler import SMALL_CLASS_ACTIONS

    assert set(choices("--sampler")) == set(losses.MINERS)
    assert set(choices("--augment")) == set(AUGMENTATIONS)
    assert set(choices("--small-class-action")) == set(SMALL_CLASS_ACTIONS)
    assert set(choices("--pooling")) == set(net.POOLINGS)
    assert set(choices("--bn-freeze")) == set(net.BN_FREEZE)
    assert choices("--mining") == MINING


def test_no_two_flags_share_a_spelling_or_a_place():
    flags = options.train_flags()
    spellings = [spelling for entry in flags for spelling in entry.spellings]
    assert len(spellings) == len(set(spellings))
    assert len(flags) == len({entry.dest for entry in flags})


def test_every_method_says_what_leaves_it_out():
    import methods

    for method in methods.METHODS:
        known = {entry.dest for entry in options.train_flags()}
        assert set(method.off) <= known and set((method.attach or {}).values()) <= known
        if method.attach is not None:
            assert method.off, f"{method.name} adds a term and nothing leaves it out"
            on = options.parse_train([])
            assert not method.wanted(on), f"{method.name} is on by default"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--weight_decay 0.5", "weight_decay", 0.5),
        ("--batch-size 8", "batch_size", 8),
        ("--max_steps 3", "max_steps", 3),
        ("--eval_every=2", "eval_every", 2),
        ("--experiment_id run", "name", "run"),
        ("--lr_gamma 0.25", "lr_decay_gamma", 0.25),  # of two flags spelled alike each is itself
        ("--compile", "compile", True),
        ("--compile=True", "compile", True),
        ("--compile true", "compile", True),
        ("--compile --compile=False", "compile", False),
    ],
)
def test_separators_and_switches_are_written_as_people_write_them(words, name, value):
    assert getattr(options.parse_train(words.split()), name) == value


def test_a_switch_takes_no_other_word(capsys):
    said = refusal(capsys, options.parse_train, ["--compile=perhaps"])
    assert "neither True nor False" in said


def test_training_needs_two_images_a_batch_and_evaluation_one(capsys):
    assert options.parse_evaluate(["--resume", "x", "--batch-size", "1"]).batch_size == 1
    said = refusal(capsys, options.parse_train, ["--batch-size", "1"])
    assert "smallest useful value, 2" in said


def test_vehicleids_protocol_is_asked_for_where_it_exists(capsys):
    assert "official" in options.parse_train("--dataset vid --metrics official".split()).metrics
    assert "official" in options.parse_train("--dataset cub".split()).metrics  # all, by default
    command = "--dataset cub --metrics retrieval official"
    assert "VehicleID" in refusal(capsys, options.parse_train, command.split())


def test_a_file_that_would_fill_the_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, beginning in (("f", ""), ("t", ""), ("u", "path,label\na.png,x\n")):
        Path(name).write_text(beginning)
        os.truncate(name, 300_000_000_000)  # which takes no room
    long = "cannot be read (it has a line of 1,000,000 characters or more)"
    for words, sentence in (
        ("@f", "the file of flags f cannot be read (it has more than 1.0 MB)"),
        ("--dataset csv:t", f"csv:t {long}"),
        ("--dataset csv:u", f"csv:u {long}"),
    ):
        assert sentence in refusal(capsys, options.parse_train, words.split())
