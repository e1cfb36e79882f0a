"""Proves that a change of the code does not change its behaviour: compares it with a commit.

    python scripts/unchanged.py [COMMIT] [--only PATTERN] [--jobs 2] [--steps 20] [--strict]

help      the --help of every command. Differences are shown, and fail only with --strict.
recipe    the --dry-run of every recipe, line by line, on small copies of the published data sets.
steps     twenty steps of every method and option that trains: weights and criterion in last.pth
          and in the best checkpoint bit by bit, metrics.csv without the times, results.json.
continue  a run that COMMIT stopped half-way: the working tree continues it as COMMIT does.

All runs use real command lines, in float32 on one CPU thread. The working tree is copied first,
with its uncommitted files, so it may be edited meanwhile. Exit status: 0 if nothing changed, 1 if
something did, 2 if the comparison could not be made.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ALIKE = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "COLUMNS": "100"}
"""Environment variables of every command."""
if __name__ == "__main__":  # before programs.py looks at it
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ |= ALIKE

import official_layouts
import programs
import small_images
from run_folders import difference, run_contents
from unchanged_cases import COMMANDS, METHODS, NETWORK

DATA_SETS = ("cub", "cars", "sop", "inshop", "vid")

# --- two source trees -----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The exit status and the output of a command."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        """The last line of the output: the error, if there was one."""
        return next(reversed(self.output.strip().splitlines()), "it said nothing")


@dataclass(frozen=True)
class Tree:
    """One version of the source."""

    root: Path

    def run(self, argv: list[str], cwd: Path | None = None) -> Outcome:
        """Runs `python ARGV` in the folder `cwd`, by default the tree's own."""
        words = argv if argv[0] == "-m" else [str(self.root / argv[0]), *argv[1:]]
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            streams = {"stdout": output, "stderr": output}
            status = programs.start(words, cwd or self.root, environment, **streams).wait()
            output.seek(0)
            return Outcome(status, output.read())


class Trees(NamedTuple):
    """The commit and the working tree."""

    before: Tree
    now: Tree


def git(*arguments: str) -> str:
    """The output of git in this repository."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@contextlib.contextmanager
def source_trees(commit: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """The files of `commit`, and a copy of the working tree, each in a folder under `folder`."""
    before, now = folder / "before", folder / "now"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():  # not deleted, nor a link to a folder
            (now / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, now / name)
    git("worktree", "add", "--detach", str(before), commit)
    try:
        yield before, now
    finally:
        git("worktree", "remove", "--force", str(before))


# --- the checks -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The result of a check. `word`: equal, different, new or failed."""

    word: str
    details: str = ""


EQUAL = Verdict("equal")


@dataclass(frozen=True)
class Check:
    """A comparison, made by `look(trees, folder)` in an empty folder of its own."""

    name: str
    look: Callable[[Trees, Path], Verdict]
    fatal: bool = True


def compare_text(before: str, now: str) -> Verdict:
    """The verdict on two outputs: equal, or the lines that differ."""
    if before == now:
        return EQUAL
    lines = difflib.unified_diff(
        before.splitlines(), now.splitlines(), "commit", "working tree", n=0, lineterm=""
    )
    return Verdict("different", "\n".join(lines))


def both_ran(before: Outcome, now: Outcome) -> Verdict | None:
    """None if both commands succeeded; otherwise the verdict."""
    if before.status and now.status:
        return Verdict("failed", f"in the commit too, so nothing is proved: {before.last_line}")
    if before.status:
        return Verdict("new", f"the commit cannot do this: {before.last_line}")
    if now.status:
        return Verdict("different", f"it fails now: {now.last_line}")
    return None


def same_output(argv: list[str], trees: Trees, folder: Path) -> Verdict:
    """Whether a command prints the same, except for the free space on the disk."""
    before, now = (tree.run(argv) for tree in trees)
    said = [re.sub(r"[\d.]+ [kMGT]B free", "... free", each.output) for each in (before, now)]
    return both_ran(before, now) or compare_text(*said)


def same_recipe(name: str, data: Path, trees: Trees, folder: Path) -> Verdict:
    """Whether a recipe means the same training."""
    there = [(tree.root / "recipes" / name).is_file() for tree in trees]
    if there != [True, True]:
        return Verdict(*(("different", "it is gone") if there[0] else ("new", "a new recipe")))
    batch = {9: 18, 5: 10, 1: 6}.get(_per_class(trees.now.root / "recipes" / name), 12)
    flags = f"--dry-run --data-root {data} --pretrained none --workers 0 --batch-size {batch}"
    if name.startswith("divide_"):
        flags += " --nb-clusters 4"
    return same_output(["train.py", f"@recipes/{name}", *flags.split()], trees, folder)


def _per_class(recipe: Path) -> int:
    """Images per class in the batches of a recipe; 0 if it does not set them."""
    found = re.search(r"--(?:IPC|instances) (\d+)", recipe.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


class Training(NamedTuple):
    """A method's command line; `images` and `cache` are the folders in its flags."""

    flags: str
    steps: int
    images: Path
    cache: Path

    def start(self, tree: Tree, cwd: Path, steps: int) -> Outcome:
        """Trains up to a step, in the run folder `cwd`/logs/run."""
        cwd.mkdir(parents=True)
        flags = f"{NETWORK} {self.flags} --max-steps {steps} --LOG_DIR logs --name run".format(
            images=self.images, cache=self.cache, steps=self.steps, root=tree.root
        )
        return tree.run(["train.py", *flags.split()], cwd)


def compare_runs(before: Path, now: Path) -> Verdict:
    """Compares weights, criterion, rows and results of two run folders.

    Entries that results.json has gained do not count as a change; a missing part of it does.
    """
    contents = [run_contents(path) for path in (before, now)]
    known, results = (content["results.json"] for content in contents)
    contents[1]["results.json"] = {name: v for name, v in results.items() if name in known}
    if found := difference(*contents):
        return Verdict("different", found)
    return EQUAL


def same_training(training: Training, trees: Trees, folder: Path) -> Verdict:
    """Whether the first steps lead to the same run folder."""
    places = [folder / "before", folder / "now"]
    outcomes = [
        training.start(tree, place, training.steps)
        for tree, place in zip(trees, places, strict=True)
    ]
    return both_ran(*outcomes) or compare_runs(*(place / "logs" / "run" for place in places))


def same_continuation(training: Training, trees: Trees, folder: Path) -> Verdict:
    """Whether the working tree continues half a run of the commit as the commit does."""
    half = training.start(trees.before, folder / "half", training.steps // 2)
    if half.status:
        return Verdict("new", f"the commit cannot do this: {half.last_line}")
    outcomes, runs = [], []
    for tree, name in zip(trees, ("before", "now"), strict=True):
        shutil.copytree(folder / "half", folder / name)
        flags = f"--resume-run logs/run --max-steps {training.steps}"
        outcomes.append(tree.run(["train.py", *flags.split()], folder / name))
        runs.append(folder / name / "logs" / "run")
    return both_ran(*outcomes) or compare_runs(*runs)


# --- all checks -----------------------------------------------------------------------------------


def all_checks(roots: tuple[Path, Path], folder: Path, steps: int) -> list[Check]:
    """Every check, the quick ones first; writes the data they need."""
    images = small_images.write_images(folder / "images")
    data = folder / "data"
    for name in DATA_SETS:
        official_layouts.write(name, "official", data, classes=12, images=6)
    (data / "emoji").symlink_to(ROOT / "data" / "emoji")
    recipes = sorted({path.name for root in roots for path in root.glob("recipes/*.txt")})
    trainings = {
        name: Training(flags, steps, images, folder / "cache") for name, flags in METHODS.items()
    }
    return [
        *(
            Check(f"help {name}", partial(same_output, [*argv, "--help"]), fatal=False)
            for name, argv in COMMANDS.items()
        ),
        *(Check(f"recipe {Path(n).stem}", partial(same_recipe, n, data)) for n in recipes),
        *(Check(f"steps {name}", partial(same_training, t)) for name, t in trainings.items()),
        *(
            Check(f"continue {name}", partial(same_continuation, t))
            for name, t in trainings.items()
        ),
    ]


def run_checks(
    checks: list[Check], trees: Trees, folder: Path, jobs: int
) -> Iterator[tuple[Check, Verdict, float]]:
    """Runs the checks, `jobs` at a time; yields each with its verdict and seconds when it ends."""

    def carry_out(check: Check) -> tuple[Check, Verdict, float]:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as own:
            verdict = check.look(trees, Path(own))
        return check, verdict, time.perf_counter() - begun

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(carry_out, check) for check in checks]):
                yield done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def chosen(name: str, pattern: str) -> bool:
    """Whether a check's name contains the pattern, or fits it as a file name does."""
    return pattern in name or fnmatch(name, pattern)


def compare(args: argparse.Namespace, folder: Path) -> int:
    """Prints a line per check and a summary; returns the exit status."""
    count: Counter[str] = Counter()
    with source_trees(args.commit, folder) as roots:
        every = all_checks(roots, folder, args.steps)
        checks = [check for check in every if chosen(check.name, args.only)]
        trees = Trees(*map(Tree, roots))
        bad = not checks
        for check, verdict, seconds in run_checks(checks, trees, folder, args.jobs):
            count[verdict.word] += 1
            bad |= verdict.word in ("different", "failed") and (check.fatal or args.strict)
            print(f"{verdict.word:<10} {check.name:<45} {seconds:5.1f} s", flush=True)
            for line in verdict.details.splitlines():
                print(f"           {line}", flush=True)
    words = ", ".join(f"{number} {word}" for word, number in count.most_common())
    print(f"\n{len(checks)} checks against {args.commit}: {words or f'none fits {args.only}'}")
    return int(bad)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", default="HEAD", help="(default: HEAD)")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="only checks whose name contains or fits it"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="checks at a time")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of every method")
    parser.add_argument("--strict", action="store_true", help="--help must be the same too")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checkout is removed
    with tempfile.TemporaryDirectory(prefix="unchanged-") as folder:
        try:
            return compare(args, Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"error: {' '.join(error.cmd)}: {error.stderr.strip()}", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
