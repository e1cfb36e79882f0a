"""The command line: published spellings, defaults, argument files, and errors of one sentence."""

from __future__ import annotations

import pytest
from conftest import run_python

import options


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
        "lr": 1e-4, "epochs": 60, "batch_size": 150, "workers": 4, "embedding_size": 512, "seed": 1,
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
        ("--epochs 0", ["--epochs", "smallest"]),
        ("--batch-size 1.5", ["--batch-size", "whole number"]),
        ("--lrr 1", ["--lrr", "did you mean --lr"]),
        ("--alphap 48", ["--alphap", "--loss AMLoss"]),
        ("--loss AMLoss --alpha 48", ["--alpha", "--loss Proxy_Anchor"]),
        ("--loss MS --mrg 0.2", ["--mrg", "Proxy_Anchor or AMLoss"]),
        ("--schedule cosine --lr-decay-step 4", ["--lr-decay-step", "--schedule step"]),
        ("--loss-args a=1", ["--loss-args", "pml:NAME"]),
        ("--loss pml:CircleLoss --loss-args gamma", ["gamma", "key=value"]),
        ("--model", ["--model", "expected one argument"]),
        ("--pooling sum", ["--pooling", "avg+max"]),
        ("@no_such_file", ["no_such_file"]),
    ],
)
def test_bad_flag_gets_one_sentence_and_status_2(command, words, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse_train(command.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1
    for word in words:
        assert word in said


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


def test_evaluate_asks_for_a_checkpoint(capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse_evaluate([])
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err


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
        "assert not {'torch', 'numpy', 'wandb'} & set(sys.modules), 'a heavy import'\n"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    assert "network:" in shown and "(default: 512)" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_every_option_has_help_and_a_unique_name():
    for groups in (options.TRAIN_GROUPS, options.EVALUATE_GROUPS):
        entries = [entry for group in groups for entry in group.flags]
        names = [entry.dest for entry in entries]
        assert len(names) == len(set(names))
        assert all(entry.help for entry in entries)
