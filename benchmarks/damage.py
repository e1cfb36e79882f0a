"""Damages the files of a run, one at a time: does every damage lead to a sentence?

    python benchmarks/damage.py                   # 600 damages, about 20 minutes
    python benchmarks/damage.py --damages 60 --seed 2

A small run is trained, its embeddings are exported and its pictures cached. Then one file in a copy
of it is damaged, and everything that reads this file is tried: continuing, evaluating, the page,
the table of runs, exporting, `load_run`. Each must either refuse with a sentence, or give the same
result as for the undamaged run. Another result counts as "ACCEPTED", another error as "TRACEBACK".

Half of the damages are done to files with a checksum: changed bits, cuts, exchanged members and
parts. The others are hostile contents in files without a checksum, as older versions wrote them.
Such a file may be believed if it makes sense ("read"), but must not cause a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from PIL import Image
from small_images import write_images
from spoiling import DAMAGES, HOSTILE, exchange_members, without_checksum

import evaluate
import options
import page.map
import train
from benchmarks.measuring import heads, line
from net import load_run
from net.__main__ import main as net_command
from page import overview
from page.making import make
from training.tracking import TIMES
from utils import InputError

SMALL = (
    "--model resnet10 --width 0.125 --stem small --embedding-size 8 --image-size 32 --seed 1 "
    "--pretrained none --batch-size 12 --workers 0 --wandb disabled --no-report --loss AMLoss "
    "--warm 0 --epochs 2 --keep 1"
).split()
PATIENCE = 120  # seconds that one damage may take
REFUSED, SAME, READ, CHANGED, TRACEBACK = "refused", "no effect", "read", "ACCEPTED", "TRACEBACK"
OUTCOMES = (REFUSED, SAME, READ, CHANGED, TRACEBACK)

# --- the readers of the files ---------------------------------------------------------------------
# Each gets the run and a folder to write into, and returns a value that can be compared.


def _continue(run: Path, out: Path, start: str = "") -> object:
    more = ["--epochs", "3", "--wandb", "disabled", "--no-report", "--workers", "0"]
    train.main(options.parse_train(["--resume-run", str(run / start), *more]))
    state = torch.load(run / "last.pth", weights_only=True)["model_state_dict"]
    rows = train.start.RunFolder(run).metrics.rows()
    untimed = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return {name: tensor.tolist() for name, tensor in state.items()}, untimed


def _continue_older(run: Path, out: Path) -> object:
    return _continue(run, out, next(run.glob("step_*.pth")).name)


def _evaluate(run: Path, out: Path, *more: str) -> object:
    words = ["--resume", str(run), "--json", str(out / "n.json"), "--metrics", "retrieval", *more]
    evaluate.run(options.parse_evaluate(words))
    content = json.loads((out / "n.json").read_bytes())
    for result in content["results"]:
        del result["checkpoint"]
    return content


def _evaluate_cached(run: Path, out: Path) -> object:
    return _evaluate(run, out, *_cached(run))


def _cached(run: Path) -> list[str]:
    return ["--decode", "cache", "--cache-dir", str(run / "cache"), "--eval-resize", "36"]


def _page(run: Path, out: Path, **asked: str) -> object:
    """The page's HTML, without the path of the run."""
    made = make([run], out / "page.html", **asked).read_text()
    return made.replace("<wbr>", "").replace(str(run), "")


def _page_of_embeddings(run: Path, out: Path) -> object:
    return _page(run, out, embeddings=str(run / "embeddings.npz"))


def _table(run: Path, out: Path) -> object:
    words = ["--compare", str(run.parent), "--csv", str(out / "runs.csv")]
    overview.compare(options.parse_report([*words, "--out", str(out / "runs.html")]))
    return (out / "runs.csv").read_text()


def _export(run: Path, out: Path) -> object:
    net_command(["export", str(run), "--torchscript", str(out / "net.pt")])
    pixels = torch.linspace(0, 255, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return torch.jit.load(out / "net.pt")(pixels).tolist()


def _load_run(run: Path, out: Path) -> object:
    picture = Image.fromarray(np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3))
    return load_run(run)([picture]).tolist()


READERS: dict[str, tuple[Callable[[Path, Path], object], ...]] = {
    "last.pth": (_continue, _page),
    "step_*.pth": (_continue_older,),
    "*_best.pth": (_evaluate, _page, _export, _load_run, _continue),
    "classes.npz": (_page, _continue),
    "embeddings.npz": (_page_of_embeddings,),
    "args.json": (_continue, _page, _table),
    "environment.json": (_continue, _page, _table),
    "results.json": (_page, _table),
    "metrics.csv": (_continue, _page, _table),
    "checksums.json": (_continue, _page, _table),
    "cache/*/*.pixels": (_evaluate_cached,),
    "cache/*/*.npz": (_evaluate_cached,),
}
"""The files of a run, and the readers of each; nothing reads margins.csv and the page."""

# --- one damage -----------------------------------------------------------------------------------


class Damage(NamedTuple):
    """A damaged file, and the kind of damage."""

    pattern: str
    kind: Callable[[bytes, random.Random], bytes]
    hostile: bool
    seed: int

    def do(self, run: Path) -> None:
        """Damages the file in the folder."""
        file, rng = next(run.glob(self.pattern)), random.Random(self.seed)
        content = file.read_bytes()
        if self.hostile:
            content = without_checksum(file, run, content)
        changed = content
        while changed == content:
            changed = self.kind(content, rng)
        file.write_bytes(changed)

    def __str__(self) -> str:
        series = ", without checksums" if self.hostile else ""
        return f"{self.pattern}: {self.kind.__name__} (seed {self.seed}){series}"


def damages(count: int, seed: int) -> Iterator[Damage]:
    """Yields `count` damages of the files in turn; every other one is hostile."""
    rng = random.Random(seed)
    patterns = rng.sample(list(READERS), len(READERS))
    for number in range(count):
        pattern = patterns[number // 2 % len(patterns)]
        suffix, hostile = Path(pattern).suffix, number % 2 == 1
        kinds = DAMAGES
        if suffix in (".pth", ".npz"):
            kinds = (*DAMAGES, exchange_members, exchange_members)
        kind = HOSTILE[suffix] if hostile else rng.choice(kinds)
        yield Damage(pattern, kind, hostile, rng.randrange(10**9))


def answers(run: Path, pattern: str) -> Iterator[tuple[str, object]]:
    """The result of each reader of a file: a refusal's sentence, an answer, or a traceback."""
    page.map.COMMAND = ["false"]  # t-SNE takes seconds, and reads no files
    for reader in READERS[pattern]:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "logs" / "run"
            shutil.copytree(run, copy)
            out = Path(scratch) / "out"
            out.mkdir()
            yield _said_by(reader, copy, out)


def _said_by(reader: Callable[[Path, Path], object], run: Path, out: Path) -> tuple[str, object]:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return "answer", json.dumps(reader(run, out))
    except InputError as error:
        return REFUSED, str(error)
    except SystemExit as stop:
        return (REFUSED if stop.code == 2 else TRACEBACK), said.getvalue()
    except Exception:
        return TRACEBACK, traceback.format_exc()


def judged(run: Path, damage: Damage, expected: list[object]) -> tuple[str, str]:
    """The outcome of a damage, tried in a process of its own, and its message."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "run"
        shutil.copytree(run, copy)
        damage.do(copy)
        context = multiprocessing.get_context("fork")
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_answer, args=(copy, damage.pattern, theirs))
        child.start()
        theirs.close()
        found = None
        with contextlib.suppress(EOFError):
            found = mine.recv() if mine.poll(PATIENCE) else None
        child.kill()
        child.join()
    if found is None:
        return TRACEBACK, f"the process died (status {child.exitcode}) or hung"
    words = [str(what) for kind, what in found if kind == TRACEBACK]
    if words:
        return TRACEBACK, words[0]
    refused = [str(what) for kind, what in found if kind == REFUSED]
    pairs = zip(found, expected, strict=True)
    if any(kind == "answer" and what != whole for (kind, what), whole in pairs):
        return (READ, "") if damage.hostile else (CHANGED, "")
    return (REFUSED, refused[0]) if refused else (SAME, "")


def _answer(run: Path, pattern: str, out: Any) -> None:
    logging.disable(logging.CRITICAL)
    out.send(list(answers(run, pattern)))


# --- all of them ----------------------------------------------------------------------------------


def whole_run(folder: Path) -> Path:
    """A finished run with exported embeddings and a cache."""
    images = write_images(folder / "images", images=6, eval_images=3)
    words = ["--dataset", f"folder:{images}", *SMALL, "--LOG_DIR", str(folder), "--name", "run"]
    train.main(options.parse_train(words))
    run = folder / "run"
    for more in (["--export", str(run / "embeddings.npz")], _cached(run)):
        evaluate.run(options.parse_evaluate(["--resume", str(run), *more]))
    return run


def table(counts: dict[tuple[str, bool], Counter[str]]) -> str:
    """A Markdown table with a row for each file, with and without checksums."""
    rows = {}
    for (pattern, hostile), found in sorted(counts.items(), key=lambda pair: pair[0][::-1]):
        rows[f"{pattern}, hostile, without checksum" if hostile else pattern] = found
    rows["all"] = sum(counts.values(), Counter())
    lines = [line((name, n.total(), *(n[each] for each in OUTCOMES))) for name, n in rows.items()]
    return "\n".join([heads(("file", "damages", *OUTCOMES)), *lines])


def main() -> int:
    """Prints the table, accepted changes and tracebacks; returns 1 if there were any of these."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--damages", type=int, default=600, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--sentences", action="store_true", help="print what was said to each")
    args = parser.parse_args()
    started = time.perf_counter()
    counts: dict[tuple[str, bool], Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            run = whole_run(Path(folder))
        expected: dict[str, list[object]] = {}
        for damage in damages(args.damages, args.seed):
            if damage.pattern not in expected:
                kinds, whole = zip(*answers(run, damage.pattern), strict=True)
                assert set(kinds) == {"answer"}, whole
                expected[damage.pattern] = whole
            outcome, words = judged(run, damage, expected[damage.pattern])
            counts.setdefault((damage.pattern, damage.hostile), Counter())[outcome] += 1
            if outcome in (CHANGED, TRACEBACK) or args.sentences:
                print(f"{outcome}: {damage}\n  {words.strip()}", flush=True)
    print(table(counts))
    print(f"\n{args.damages} damages in {time.perf_counter() - started:.0f} s")
    return int(any(found[CHANGED] + found[TRACEBACK] for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
