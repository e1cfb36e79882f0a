"""scripts/unchanged.py sees what differs, to the last bit, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python
from run_folders import difference
from unchanged import Outcome, both_ran, chosen, compare_text
from unchanged_cases import COMMANDS

NAN, ONE = float("nan"), torch.ones(3)


@pytest.mark.parametrize(
    "value",
    [
        ONE,
        torch.tensor([NAN, 0.0]),
        torch.tensor(2),
        torch.zeros(0),
        ONE.to(torch.bfloat16),
        {"a": [1, "b", None], "c": {"d": NAN}},
    ],
)
def test_what_is_equal(value: object) -> None:
    again = value.clone() if isinstance(value, torch.Tensor) else value
    assert difference({"x": value}, {"x": again}) == ""


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (ONE, ONE + 2**-23, "differs by up to 1.2e-07"),
        (torch.tensor([0.0]), torch.tensor([-0.0]), "differs by up to 0"),
        (ONE, ONE.double(), "float32"),
        (ONE, torch.ones(4), "(4,)"),
        (ONE, 1.0, "1.0"),
        (1, 1.0, "1, now 1.0"),
        ({"a": 1}, {"b": 1}, "gone ['a'], added ['b']"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "in another order"),
        ([1, 2], [1], "2 entries, now 1"),
        ([{"loss": "1"}], [{"loss": "2"}], "[0] loss: '1', now '2'"),
    ],
)
def test_what_is_different_and_where(before: object, now: object, words: str) -> None:
    found = difference({"file": before}, {"file": now})
    assert found.startswith("file") and words in found


def test_a_command_that_the_commit_refuses_proves_nothing() -> None:
    fine, refused = Outcome(0, "done\n"), Outcome(2, "error: no such flag\n")
    assert both_ran(fine, fine) is None
    assert both_ran(refused, fine).word == "new"
    assert both_ran(fine, refused).word == "different"
    assert both_ran(refused, refused).word == "failed"
    assert both_ran(fine, refused).details.endswith("error: no such flag")


def test_texts_are_compared_line_by_line() -> None:
    assert compare_text("a\nb\n", "a\nb\n").word == "equal"
    verdict = compare_text("a\nb\n", "a\nc\n")
    assert verdict.word == "different" and {"-b", "+c"} <= set(verdict.details.splitlines())


def test_checks_are_chosen_by_a_part_of_their_name_or_a_pattern() -> None:
    assert chosen("steps amloss", "") and chosen("steps amloss", "amloss")
    assert chosen("steps amloss", "steps *") and not chosen("continue amloss", "steps *")


def test_the_help_of_every_command_is_compared() -> None:
    import search

    scripts = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    doors = [name for name, text in scripts.items() if '\nif __name__ == "__main__":' in text]
    wanted = [["-m", "net", "export"], *([door] for door in doors)]
    wanted += [["search.py", command.name] for command in search.COMMANDS]
    assert [argv for argv in wanted if argv not in COMMANDS.values()] == []


@pytest.mark.slow
def test_a_changed_constant_is_noticed_and_the_checkout_removed(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the repository's history")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    check = [clone / "scripts" / "unchanged.py", "HEAD", "--only", "*proxy-anchor"]
    done = run_python(*check, cwd=clone, PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 checks against HEAD: 4 equal" in done.stdout
    recipe = clone / "recipes" / "proxy_anchor_cub_resnet50.txt"
    recipe.write_text(recipe.read_text() + "--lr 0.5\n")
    check[-1] = "recipe proxy_anchor_cub*"
    done = run_python(*check, cwd=clone, PYTHONPATH="")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 equal, 1 different" in done.stdout and "lr 0.5" in done.stdout
    trees = ["git", "worktree", "list"]
    listed = subprocess.run(trees, cwd=clone, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1
