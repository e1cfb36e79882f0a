"""Proves that a change of the code changed no behaviour: the working tree against a commit.

    python scripts/unchanged.py [COMMIT] [--only PATTERN] [--jobs 2] [--steps 20] [--strict]

help      the --help of every command. Differences are shown, and fail only with --strict.
recipe    the --dry-run of every recipe, line by line, on small copies of the published data sets.
steps     twenty steps of every method and option that trains: weights and criterion in last.pth
          and in the best checkpoint bit by bit, metrics.csv without the times, results.json.
continue  a run that COMMIT stopped half-way: the working tree goes on with it as COMMIT does.

Everything goes through the real command lines, float32 on one CPU thread. The working tree is
copied first, with its uncommitted files, so it may be edited meanwhile. Exit status: 0 nothing
changed, 1 something did, 2 the comparison could not be made.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import difflib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import official_layouts
import small_images

# --- what is compared -----------------------------------------------------------------------------

COMMANDS = {
    "train": ["train.py"],
    "evaluate": ["evaluate.py"],
    "report": ["report.py"],
    "net export": ["-m", "net", "export"],
    "dataset": ["-m", "dataset"],
    "dataset check": ["-m", "dataset", "check"],
}
DATA_SETS = ("cub", "cars", "sop", "inshop", "vid")
NETWORK = (
    "--dataset folder:{images} --model resnet10 --width 0.125 --stem small --embedding-size 8 "
    "--image-size 32 --pretrained none --batch-size 12 --workers 0 --amp off --metrics retrieval "
    "--wandb disabled --no-report"
)
"""48 training images, so four steps per epoch."""

SEC = "--steps {steps} --milestones 8 15 --image-size 32 --lr 1e-3 --lr_p 1e-3"
DIVIDED = "--nb-clusters 4 --mod-epoch 1 --lr 1e-3"
SMALL_CLASSES = f"--loss MarginLoss {DIVIDED} --batch-sampler adaptbalanced --IPC 4"
MIXED = "--loss AMLoss --introspective"

METHODS = {
    # proxies
    "proxy-anchor": "--loss Proxy_Anchor",
    "proxy-anchor alpha": "--loss Proxy_Anchor --alpha 16 --mrg 0.2 --proxy-lr-scale 10",
    "amloss": "--loss AMLoss",
    "amloss options": "--loss AMLoss --alphap 48 --alphan 24 --delta 0 --lam 0.5 --mrg-lr 1e-2 "
    "--mrg-lr-decay-step 2 --mrg-lr-decay-gamma 0.3",
    "amloss raw": "--loss AMLoss --l2-norm 0",
    # IDML, DDML, mixup
    "introspective released": MIXED,
    "introspective paper": f"{MIXED} paper --mixup 0.5",
    "introspective unmixed": f"{MIXED} paper --mixup 0 --l2-norm 0",
    "introspective proxy-anchor": "--loss Proxy_Anchor --introspective paper",
    "mixup": "--loss MS --mixup 0.4",
    "disentangled": "--loss Proxy_Anchor --disent True --al 1 --be 0.1 --gam 1e-5",
    "disentangled amloss": "--loss AMLoss --disent True --al 0.5 --be 0.2 --gam 1e-3",
    # any loss on prefixes; pairs among earlier batches
    "matryoshka": "--loss AMLoss --matryoshka 2 8",
    "memory bank": f"--loss ms {SEC} --batch-size 10 --memory-bank 30 --memory-bank-start 3",
    # SEC
    "sec": "--loss AMLoss --sec_wei 0.5 --norm_momentum 0.1",
    "sec raw": "--loss MS --sec_wei 0.5 --l2-norm 0",
    "l2reg": "--loss Proxy_Anchor --l2reg_wei 1e-2",
    "sec and l2reg": "--loss AMLoss --sec_wei 0.5 --l2reg_wei 1e-2 --norm_momentum 0.5",
    **{f"spherical {loss}": f"--loss {loss} {SEC}" for loss in ("triplet", "semihtriplet")},
    "spherical n-npair": f"--loss n-npair {SEC}",
    "spherical ms": f"--loss ms {SEC} --batch-size 10",
    "spherical triplet sec": f"--loss triplet {SEC} --sec_wei 1 --norm_momentum 0.5",
    "spherical semihtriplet sec": f"--loss semihtriplet {SEC} --sec_wei 1 --eval-steps 7",
    "spherical n-npair sec": f"--loss n-npair {SEC} --sec_wei 0.5",
    "spherical ms sec": f"--loss ms {SEC} --batch-size 10 --sec_wei 1",
    "spherical n-npair l2": f"--loss n-npair {SEC} --l2reg_wei 1e-2",
    # the library's losses
    **{
        f"library {loss}": f"--loss {loss} --lr 1e-3"
        for loss in "Proxy_NCA MS Contrastive Triplet NPair SoftTriple Circle Margin".split()
    },
    "circle loss of amloss": "--loss CircleLoss --IPC 3",
    "pml": "--loss pml:NormalizedSoftmaxLoss --loss-args temperature=0.1",
    "pml pairs": "--loss pml:ContrastiveLoss --IPC 3",
    # divide and conquer's losses
    "margin": "--loss MarginLoss --IPC 3 --lr 1e-3 --margin 0.3",
    "margin learned": "--loss MarginLoss --IPC 3 --lr 1e-3 --lr-beta 5e-2",
    **{
        f"margin {miner}": f"--loss MarginLoss --IPC 3 --lr 1e-3 --sampler {miner}"
        for miner in "easypeasy distanceweighted HPHN EPHN EPSHN RPSHN RPHN".split()
    },
    "triplet": "--loss TripletLoss --IPC 3 --lr 1e-3",
    "triplet mined": "--loss TripletLoss --IPC 3 --lr 1e-3 --sampler EPSHN --soft-loss",
    "triplet earlier": "--loss TripletLoss --IPC 3 --lr 1e-3 --mining earlier",
    "triplet all": "--loss TripletAllLoss --IPC 3 --lr 1e-3 --margin 0.1",
    "triplet semihard": "--loss TripletSemihardLoss --IPC 3 --lr 1e-3 --soft-loss",
    "npairs": "--loss NPairsLoss --IPC 2 --lr 1e-3 --lr-alpha 0.1",
    # divide and conquer
    "divide learned": f"--loss MarginLoss {DIVIDED} --mask-lr-mult 100 --masking-lambda 0.01",
    "divide fixed": f"--loss MarginLoss {DIVIDED} --fixed-mask 1",
    "divide full": f"--loss MarginLoss {DIVIDED} --force-full-embedding-epoch 3",
    "divide rests": "--loss TripletLoss --lr 1e-3 --nb-clusters 2 --mod-epoch 2 "
    "--mod-epoch-freeze 1 --stop-recluster --masks-freeze-one-cluster 1",
    "divide at once": f"--loss Proxy_Anchor {DIVIDED} --hierarchy-method none --IPC 2",
    "divide adaptive": f"--loss MarginLoss {DIVIDED} -crs 3 "
    "--clustering-method kmeans_adaptive_centroids --penultimate-for-clusters 0",
    "divide legacy": f"--loss NPairsLoss {DIVIDED} --legacy-renumbering",
    "divide sum": f"--loss MarginLoss {DIVIDED} --masks-sum-for-full-emb 1 --mask-relu 0 "
    "--masking-init normal --masks-normalize-before-sum l1 --mask-wd-mult 0.5",
    "divide replicas": f"--loss MarginLoss {DIVIDED} --batch-sampler adaptbalanced "
    "--num-replicas 2",
    **{
        f"divide {kind}": f"--loss MarginLoss {DIVIDED} --batch-sampler {kind}"
        for kind in ("npairs", "randombatch")
    },
    **{
        f"divide {action}": f"{SMALL_CLASSES} --small-class-action {action}"
        for action in ("sample_other", "duplicate", "smaller_batch")
    },
    "divide experiment": "--experiment margin_loss_resnet50 --dataset folder:{images} --model "
    "resnet10 --batch-size 12 --nb-clusters 2 --mod-epoch 2 --lr 1e-3",
    "divide sec": f"--loss AMLoss {DIVIDED} --sec_wei 0.5",
    # what trains, and how
    "warm none": "--loss AMLoss --warm 0",
    "warm 3": "--loss AMLoss --warm 3 --bn-freeze 1",
    **{f"bn-freeze {kind}": f"--bn-freeze {kind}" for kind in ("1", "affine", "statistics")},
    "bn-momentum": "--bn-momentum 0.5",
    "cosine": "--loss AMLoss --schedule cosine --epochs 6",
    "cosine steps": "--loss AMLoss --schedule cosine --steps 18",
    "milestones": "--loss AMLoss --schedule milestones --milestones 6 14 --lr-decay-gamma 0.1",
    "step": "--loss AMLoss --lr-decay-step 2 --lr-decay-gamma 0.3",
    "constant": "--schedule constant",
    **{f"optimizer {name}": f"--optimizer {name} --lr 1e-3" for name in ("sgd", "rmsprop", "adam")},
    "decay": "--decay-vectors 0 --decay-biases 1 --weight-decay 1e-2 --lr_p 1e-5 --clip 0.01",
    # batches and selection
    "images per class": "--loss AMLoss --IPC 3",
    "images per class repeated": "--loss AMLoss --IPC 3 --IPC-repeat 1",
    "validation": "--loss AMLoss --val-classes 0.25",
    "no test": "--loss AMLoss --val-classes 0.25 --no-test",
    "evaluations": "--eval-steps 3 --save-every 4 --keep 2",
    "all metrics": "--eval-every 2 --metrics retrieval nmi f1 ami",
    **{f"augment {name}": f"--augment {name}" for name in ("sec", "emoji", "none", "ColorHeavy")},
    "geometry": "--augment GeomColor --ratio-classes 0.75 --eval-resize 48 --eval-zoom 0.8",
    "cached": "--decode cache --cache-dir {cache} --cache-size 36",
    # networks
    "heads": "--head-norm 1 --head-init xavier_uniform_1 --dropout 0.3 --pooling max",
    "pooling": "--pooling avg --stem tiny --head-init default",
    "grid": "--pooling grid --input-spec caffe --stem imagenet --image-size 64",
    "resnet18": "--model resnet18 --input-spec white",
    "resnet50": "--model resnet50 --head-norm 1 --bn-freeze statistics",
    "bn_inception": "--model bn_inception --width 1 --stem imagenet --image-size 64 --loss AMLoss "
    "--batch-size 4 --eval-every 2",
    "googlenet": "--model googlenet --width 1 --stem imagenet --image-size 64 --batch-size 4 "
    "--eval-every 2",
    # a run's life
    "skip": "--on-nan skip --seed 3",
    "emoji": "--dataset emoji --data-root {root}/data --loss AMLoss --ratio-classes 0.1",
}
"""Name → flags, over those of NETWORK: every method, its options, and what methods are made of."""

TIMES = ("seconds", "images_per_second", "data_wait", "evaluation_seconds")
"""Columns of metrics.csv that no two runs share."""

# --- two source trees -----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a command left: its exit status, and what it said."""

    status: int
    output: str

    @property
    def last_line(self) -> str:
        """The error, where there is one."""
        return next(reversed(self.output.strip().splitlines()), "it said nothing")


@dataclass(frozen=True)
class Tree:
    """One version of the source; commands run through the server on that socket."""

    root: Path
    server: Path

    def run(self, argv: list[str], cwd: Path | None = None) -> Outcome:
        """Runs `python ARGV` in the folder `cwd`, by default the tree's own."""
        with (
            tempfile.NamedTemporaryFile() as output,
            socket.socket(socket.AF_UNIX) as connection,
        ):
            request = {"root": str(self.root), "argv": argv, "output": output.name}
            connection.connect(str(self.server))
            connection.sendall(json.dumps({**request, "cwd": str(cwd or self.root)}).encode())
            connection.sendall(b"\n")
            status = int(connection.recv(16) or -1)
            return Outcome(status, Path(output.name).read_text(errors="replace"))


class Trees(NamedTuple):
    """The commit and the working tree."""

    before: Tree
    now: Tree


def git(*arguments: str) -> str:
    """What git says in this repository."""
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@contextlib.contextmanager
def command_server(path: Path) -> Iterator[None]:
    """A command server that listens on the socket `path`."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    variables |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "COLUMNS": "100"}
    script = str(ROOT / "scripts" / "command_server.py")
    with subprocess.Popen(
        [sys.executable, script, str(path)], stdout=subprocess.PIPE, env=variables, text=True
    ) as server:
        try:
            if not server.stdout.readline():
                raise RuntimeError("the command server did not start")
            yield
        finally:
            server.terminate()


@contextlib.contextmanager
def source_trees(commit: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """The files of `commit`, and a copy of the working tree, each in a folder under `folder`."""
    before, now = folder / "before", folder / "now"
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():  # not what was deleted, nor a link to a folder
            (now / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, now / name)
    git("worktree", "add", "--detach", str(before), commit)
    try:
        yield before, now
    finally:
        git("worktree", "remove", "--force", str(before))


# --- the checks -----------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What a check found. `word`: equal, different, new or failed."""

    word: str
    details: str = ""


EQUAL = Verdict("equal")


@dataclass(frozen=True)
class Check:
    """One comparison; `look(trees, folder)` makes it, in an empty folder of its own."""

    name: str
    look: Callable[[Trees, Path], Verdict]
    fatal: bool = True


def compare_text(before: str, now: str) -> Verdict:
    """Equal, or the lines that differ."""
    if before == now:
        return EQUAL
    lines = difflib.unified_diff(
        before.splitlines(), now.splitlines(), "commit", "working tree", n=0, lineterm=""
    )
    return Verdict("different", "\n".join(lines))


def both_ran(before: Outcome, now: Outcome) -> Verdict | None:
    """None when both commands ended well; otherwise the verdict."""
    if before.status and now.status:
        return Verdict("failed", f"in the commit too, so nothing is proved: {before.last_line}")
    if before.status:
        return Verdict("new", f"the commit cannot do this: {before.last_line}")
    if now.status:
        return Verdict("different", f"it fails now: {now.last_line}")
    return None


def same_output(argv: list[str], trees: Trees, folder: Path) -> Verdict:
    """Whether a command says the same."""
    before, now = (tree.run(argv) for tree in trees)
    return both_ran(before, now) or compare_text(before.output, now.output)


def same_recipe(name: str, data: Path, trees: Trees, folder: Path) -> Verdict:
    """Whether a recipe asks for the same."""
    there = [(tree.root / "recipes" / name).is_file() for tree in trees]
    if there != [True, True]:
        return Verdict(*(("different", "it is gone") if there[0] else ("new", "a new recipe")))
    batch = {9: 18, 5: 10, 1: 6}.get(_per_class(trees.now.root / "recipes" / name), 12)
    flags = f"--dry-run --data-root {data} --pretrained none --workers 0 --batch-size {batch}"
    if name.startswith("divide_"):
        flags += " --nb-clusters 4"
    return same_output(["train.py", f"@recipes/{name}", *flags.split()], trees, folder)


def _per_class(recipe: Path) -> int:
    """Images per class in the batches of a recipe; 0 where it does not say."""
    found = re.search(r"--(?:IPC|instances) (\d+)", recipe.read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


class Training(NamedTuple):
    """A method's command line; `images` and `cache` are the folders that its flags speak of."""

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


def same_training(training: Training, trees: Trees, folder: Path) -> Verdict:
    """Whether the first steps lead to the same run folder."""
    places = [folder / "before", folder / "now"]
    outcomes = [
        training.start(tree, place, training.steps)
        for tree, place in zip(trees, places, strict=True)
    ]
    return both_ran(*outcomes) or compare_runs(*(place / "logs" / "run" for place in places))


def same_continuation(training: Training, trees: Trees, folder: Path) -> Verdict:
    """Whether the working tree goes on with the commit's half a run as the commit does."""
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


# --- two run folders ------------------------------------------------------------------------------


def compare_runs(before: Path, now: Path) -> Verdict:
    """Weights, criterion, rows and results of two run folders.

    Entries that results.json has gained are no change; a chapter of it that is gone is one.
    """
    contents = [run_contents(path) for path in (before, now)]
    known, results = (content["results.json"] for content in contents)
    contents[1]["results.json"] = {name: v for name, v in results.items() if name in known}
    if found := difference(*contents):
        return Verdict("different", found)
    return EQUAL


def run_contents(run: Path) -> dict[str, Any]:
    """What a run folder says, without times and paths, by file."""
    (best,) = run.glob("*_best.pth")
    return {
        "last.pth": _learned(run / "last.pth", "clock"),
        best.name: _learned(best, "epoch", "step", "metrics"),
        "metrics.csv": _rows(run / "metrics.csv"),
        "results.json": json.loads((run / "results.json").read_text()),
    }


def _learned(path: Path, *others: str) -> dict[str, Any]:
    stored = torch.load(path, weights_only=True)
    content = {key: stored[key] for key in ("model_state_dict", "criterion_state_dict", *others)}
    if "clock" in content:
        content["clock"] = {k: v for k, v in content["clock"].items() if k != "seconds"}
    return content


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def difference(before: Any, now: Any, where: str = "") -> str:
    """The first difference between two nested values, in words; empty when they are the same."""
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        return _tensor_difference(before, now, where)
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if list(before) != list(now):
            gone, added = [k for k in before if k not in now], [k for k in now if k not in before]
            words = f"gone {gone}, added {added}" if gone or added else "in another order"
            return f"{where}: {words}"
        pairs = [(f"{where} {key}".strip(), before[key], now[key]) for key in before]
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            return f"{where}: {len(before)} entries, now {len(now)}"
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(before, now, strict=True))]
    else:
        return "" if repr(before) == repr(now) else f"{where}: {before!r}, now {now!r}"
    found = (difference(first, second, place) for place, first, second in pairs)
    return next(filter(None, found), "")


def _tensor_difference(before: torch.Tensor, now: torch.Tensor, where: str) -> str:
    kinds = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in (before, now)]
    if kinds[0] != kinds[1]:
        return f"{where}: {kinds[0]}, now {kinds[1]}"
    as_bytes = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (before, now))
    if torch.equal(*as_bytes):
        return ""
    largest = (before.double() - now.double()).abs().max()
    return f"{where}: differs by up to {float(largest):.2g}"


# --- all of it ------------------------------------------------------------------------------------


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
    socket_path = folder / "socket"
    with source_trees(args.commit, folder) as roots, command_server(socket_path):
        every = all_checks(roots, folder, args.steps)
        checks = [check for check in every if chosen(check.name, args.only)]
        trees = Trees(*(Tree(root, socket_path) for root in roots))
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
            said = f"{' '.join(error.cmd)}: {error.stderr.strip()}"
        except RuntimeError as error:
            said = str(error)
    print(f"error: {said}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
