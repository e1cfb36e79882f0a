"""The study: every method from one start, with one budget, at its own learning rate, five seeds.

    python scripts/study.py train [--jobs 2]   trains what docs/study.csv lacks
    python scripts/study.py time               seconds an epoch, on a machine that does nothing else
    python scripts/study.py tables             writes the tables into docs/study.md, and its picture

Stages. The start is one network trained from scratch for a while by plain classification, at a
constant rate, without fold 0 of the training classes; every training goes on from its backbone.
Trials: each method trains at four learning rates without fold 0 and is judged on it; the test
classes stay unseen (--no-test). Runs: each method trains on all training classes at its best rate,
with each seed, and the test classes are looked at once, after the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import html
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "study.csv"
TIMES = ROOT / "docs" / "study_times.csv"
PAGE = ROOT / "docs" / "study.md"
PICTURE = ROOT / "docs" / "study.svg"
LOGS = ROOT / "logs" / "study"

SEEDS = (1, 2, 3, 4, 5)
TRIALS = 4
FIRST_RATES = (-6, -5)  # exponents of the square root of ten: 1e-3 and 3.2e-3
METRICS = ("R@1", "R@8", "RP", "MAP@R", "NMI")

EPOCHS = 5
NETWORK = "--dataset emoji --model bn_inception --image-size 32 --stem imagenet"
# What was measured; it was torch's before the flag was there, and the released network has 0.9.
MOMENTUM = "--bn-momentum 0.1"
START = (
    f"{NETWORK} --loss pml:NormalizedSoftmaxLoss --batch-size 120 --lr 2e-3 --weight-decay 0.05 "
    "--decay-vectors 0 --schedule constant --warm 0 --epochs 40 --eval-every 40 --val-fold 0 "
    f"--no-test --metrics retrieval {MOMENTUM}"
)
SHARED = (
    f"{NETWORK} --pretrained {{start}} --embedding-size 512 --pooling avg+max --head-init kaiming "
    f"--head-norm 0 --bn-freeze 0 {MOMENTUM} --batch-size 60 "
    f"--epochs {EPOCHS} --eval-every {EPOCHS} --warm 1 "
    "--optimizer adamw --weight-decay 1e-4 --decay-vectors 0 --decay-biases 0 --schedule cosine "
    "--clip 10"
)
QUIET = "--wandb disabled --no-report --workers 0"


@dataclass(frozen=True)
class Method:
    """A row of the study.

    Attributes:
        title: its name in the table. flags: what makes it this method, besides `SHARED`.
        script: what trains it. rate_of: the method whose learning rate it takes, without trials.
    """

    title: str
    flags: str
    script: str = "train.py"
    rate_of: str | None = None


AMLOSS = "--loss AMLoss --mrg-lr 3e-4"
# Without its BatchNorm the norms of this network are so uneven that their variance, which SEC
# lowers, is a thousand times the loss.
SPHERE_HEAD = "--pooling avg --head-norm 1 --head-init default"
DIVISION = (
    "--loss MarginLoss --sampler distanceweighted --IPC 2 --nb-clusters 4 --mod-epoch 1 "
    "--batch-sampler adaptbalanced --force-full-embedding-epoch 4"
)


def sphere(title: str, loss: str, instances: int) -> dict[str, Method]:
    """A loss of the SEC authors without and with the constraint, both on their head."""
    flags = f"--loss {loss} --IPC {instances} {SPHERE_HEAD}"
    name = loss.replace("-", "_")
    return {
        name: Method(title, flags),
        f"{name}_sec": Method(f"{title} + SEC", f"{flags} --sec_wei 1"),
    }


METHODS = {
    "pa": Method("Proxy-Anchor", "--loss Proxy_Anchor"),
    "amloss": Method("AMLoss", AMLOSS),
    "ddml": Method(
        "DDML (Proxy-Anchor)", "--loss Proxy_Anchor --disent True --al 1 --be 0.1 --gam 1e-5"
    ),
    **sphere("triplet", "triplet", 3),
    **sphere("semi-hard triplet", "semihtriplet", 3),
    **sphere("normalised N-pair", "n-npair", 2),
    **sphere("multi-similarity (SEC's)", "ms", 5),
    "ms_pa": Method("MS (Proxy-Anchor's)", "--loss MS --IPC 5"),
    "idml": Method("IDML as released", "--loss Proxy_Anchor --introspective released"),
    "idml_paper": Method("IDML as in the paper", "--loss Proxy_Anchor --introspective paper"),
    "margin": Method(
        "margin loss, undivided", "--loss MarginLoss --sampler distanceweighted --IPC 2"
    ),
    "dc_learned": Method(
        "divide and conquer, learned masks",
        f"{DIVISION} --mask-lr-mult 100 --masking-lambda 0.01 --mask-wd-mult 1",
    ),
    "dc_fixed": Method("divide and conquer, fixed masks", f"{DIVISION} --fixed-mask 1"),
    "amloss_head": Method("AMLoss on SEC's head", f"{AMLOSS} {SPHERE_HEAD}"),
    "amloss_sec": Method("AMLoss + SEC", f"{AMLOSS} {SPHERE_HEAD} --sec_wei 1"),
    "amloss_idml": Method("AMLoss + introspective", f"{AMLOSS} --introspective paper"),
    "reference": Method(
        "Proxy-Anchor, plain float32", "--loss Proxy_Anchor", "scripts/reference.py", rate_of="pa"
    ),
}
BASELINE = "pa"
BASES = {  # what each addition is added to
    **dict.fromkeys(("amloss", "ddml", "idml", "idml_paper", "reference"), "pa"),
    **{f"{name}_sec": name for name in ("triplet", "semihtriplet", "n_npair", "ms")},
    **{"dc_learned": "margin", "dc_fixed": "margin"},
    **{"amloss_head": "amloss", "amloss_sec": "amloss_head", "amloss_idml": "amloss"},
}


def rate(exponent: int) -> float:
    """10^(exponent / 2), to two digits: 1e-3, 3.2e-3, 1e-2."""
    return float(f"{10 ** (exponent / 2):.1e}")


# --- what there is to do --------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One training: a trial (`stage` trial) or a run (`stage` run) of a method."""

    stage: str
    method: str
    exponent: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder in `LOGS`."""
        return f"{self.stage}_{self.method}_{rate(self.exponent):g}_{self.seed}"

    def command(self, start: Path) -> list[str]:
        """train.py's arguments."""
        method, lr = METHODS[self.method], f"{rate(self.exponent):g}"
        words = f"{method.script} {SHARED.format(start=start)} {method.flags} --lr {lr} --lr_p {lr}"
        words += f" --seed {self.seed} --name {self.name}"
        if self.stage == "trial":
            words += " --val-fold 0 --no-test --metrics retrieval"
        return words.split()


@dataclass(frozen=True)
class Outcome:
    """A row of study.csv."""

    stage: str
    method: str
    exponent: int
    seed: int
    numbers: dict[str, float]

    @property
    def task(self) -> Task:
        """What it is the outcome of."""
        return Task(self.stage, self.method, self.exponent, self.seed)


HEADER = ("stage", "method", "lr", "seed", *METRICS)


def read_outcomes() -> list[Outcome]:
    """All rows of study.csv."""
    if not RESULTS.is_file():
        return []
    with RESULTS.open(newline="") as file:
        return [
            Outcome(
                row["stage"],
                row["method"],
                round(2 * math.log10(float(row["lr"]))),
                int(row["seed"]),
                {name: float(row[name]) for name in METRICS if row[name]},
            )
            for row in csv.DictReader(file)
        ]


def append(outcome: Outcome) -> None:
    """Adds a row to study.csv."""
    new = not RESULTS.is_file()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(HEADER)
        numbers = [f"{outcome.numbers[m]:.5f}" if m in outcome.numbers else "" for m in METRICS]
        lr = f"{rate(outcome.exponent):g}"
        writer.writerow([outcome.stage, outcome.method, lr, outcome.seed, *numbers])


def trials(outcomes: Sequence[Outcome], method: str) -> dict[int, float]:
    """Exponent of the rate → R@1 on fold 0, for the trials of a method so far."""
    return {
        o.exponent: o.numbers["R@1"] for o in outcomes if o.stage == "trial" and o.method == method
    }


def next_rate(tried: dict[int, float]) -> int | None:
    """The rate to try next: the first two, then the untried neighbour of the better; None: done."""
    if len(tried) >= TRIALS:
        return None
    for exponent in FIRST_RATES:
        if exponent not in tried:
            return exponent
    best = max(tried, key=tried.__getitem__)
    return next(e for step in (1, 2) for e in (best - step, best + step) if e not in tried)


def chosen_rate(outcomes: Sequence[Outcome], method: str) -> int | None:
    """The exponent of the best rate; None while trials are missing."""
    tried = trials(outcomes, METHODS[method].rate_of or method)
    return None if next_rate(tried) is not None else max(tried, key=tried.__getitem__)


def open_tasks(outcomes: Sequence[Outcome]) -> Iterator[Task]:
    """What can be trained now, most urgent first: trials, then all methods seed by seed."""
    done = {outcome.task for outcome in outcomes}
    for name, method in METHODS.items():
        exponent = next_rate(trials(outcomes, name)) if method.rate_of is None else None
        if exponent is not None:
            yield Task("trial", name, exponent, seed=0)
    for seed in SEEDS:
        for name in METHODS:
            exponent = chosen_rate(outcomes, name)
            if exponent is not None:
                task = Task("run", name, exponent, seed)
                if task not in done:
                    yield task


# --- training -------------------------------------------------------------------------------------


def train(jobs: int) -> None:
    """Trains what is missing, `jobs` at a time."""
    start = train_start()
    lock, taken, failed = threading.Lock(), set(), []

    def take() -> Task | None:
        with lock:
            task = next((t for t in open_tasks(read_outcomes()) if t not in taken), None)
            taken.add(task)
            return task

    def work() -> None:
        while (task := take()) is not None:
            try:
                outcome = run_task(task, start)
            except subprocess.CalledProcessError:
                failed.append(task.name)
                print(f"{task.name} failed: see {LOGS / task.name}.log", flush=True)
                continue
            with lock:
                append(outcome)
            print(f"{task.name}  R@1 {outcome.numbers['R@1']:.4f}", flush=True)

    workers = [threading.Thread(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed:
        sys.exit(f"error: {len(failed)} trainings failed ({failed[0]}, …); the next call goes on")


def train_start() -> Path:
    """The network that all methods begin with; with all cores, once."""
    best = LOGS / "start" / "emoji_bn_inception_best.pth"
    if not (LOGS / "start" / "results.json").is_file():
        print("training the start", flush=True)
        call(["train.py", *START.split(), "--name", "start"], threads=os.cpu_count() or 1)
    return best


def run_task(task: Task, start: Path) -> Outcome:
    """Trains one task and reads what it reached; a trial that is not finite has reached nothing."""
    folder = LOGS / task.name
    try:
        call(task.command(start), threads=1)
    except subprocess.CalledProcessError:
        if task.stage == "trial" and (folder / "non_finite.json").is_file():
            return Outcome(task.stage, task.method, task.exponent, task.seed, {"R@1": 0.0})
        raise
    (numbers,) = json.loads((folder / "results.json").read_text())["results"].values()
    if (task.stage, task.seed) != ("run", 1):  # the pages of the first seed stay possible
        for file in folder.glob("*.pth"):
            file.unlink()
    kept = {name: numbers[name] for name in METRICS if name in numbers}
    return Outcome(task.stage, task.method, task.exponent, task.seed, kept)


def call(arguments: Sequence[str], threads: int) -> None:
    """Runs a command of the repository; what it prints goes to a file beside its run folder."""
    LOGS.mkdir(parents=True, exist_ok=True)
    name = arguments[list(arguments).index("--name") + 1]
    shutil.rmtree(LOGS / name, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    quiet = [*QUIET.split(), "--LOG_DIR", str(LOGS)]
    with (LOGS / f"{name}.log").open("w") as log:
        command = [sys.executable, *arguments, *quiet]
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=True)


def measure_times() -> None:
    """Seconds an epoch of each method, two epochs each, all cores, one after the other."""
    start = train_start()
    known = read_times()
    for name, method in METHODS.items():
        if name in known:
            continue
        words = f"{method.script} {SHARED.format(start=start)} {method.flags} --lr 1e-3 --lr_p 1e-3"
        run = f"time_{name}"
        command = [*words.split(), *"--warm 0 --epochs 3 --eval-every 3 --val-fold 0".split()]
        call([*command, "--no-test", "--metrics", "retrieval", "--name", run], os.cpu_count() or 1)
        with (LOGS / run / "metrics.csv").open(newline="") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        known[name] = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
        print(f"{method.title}: {known[name]:.2f} s an epoch", flush=True)
        rows = [f"{key},{value:.3f}" for key, value in known.items()]
        TIMES.write_text("\n".join(["method,seconds", *rows]) + "\n")


def read_times() -> dict[str, float]:
    """Method → seconds an epoch, as far as measured."""
    if not TIMES.is_file():
        return {}
    with TIMES.open(newline="") as file:
        return {row["method"]: float(row["seconds"]) for row in csv.DictReader(file)}


# --- tables ---------------------------------------------------------------------------------------


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean, by Student's t over the seeds."""
    from scipy.stats import t

    factor = float(t.ppf(0.975, len(values) - 1))
    return factor * statistics.stdev(values) / math.sqrt(len(values))


def p_value(differences: Sequence[float]) -> float:
    """Of a two-sided paired t-test."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p values corrected for their number (Holm, 1979)."""
    corrected, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, p_values[name] * (len(p_values) - rank)))
        corrected[name] = highest
    return corrected


# The picture follows the reader's light or dark, as the page around it does; the attributes beside
# the classes are for readers of SVG that know no style sheets.
SVG_LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "soft": "#59636e", "grid": "#e2e2e2"}
SVG_LIGHT |= {"zero": "#444444", "mean": "#2f62d0"}
SVG_DARK = {"paper": "#0d1117", "ink": "#e6edf3", "soft": "#9198a1", "grid": "#2a3038"}
SVG_DARK |= {"zero": "#aab1ba", "mean": "#79a6ff"}


def svg_style(colours: dict[str, str]) -> str:
    """The rules of one scheme."""
    c = colours
    return (
        f".paper{{fill:{c['paper']}}}text{{fill:{c['ink']}}}text.soft{{fill:{c['soft']}}}"
        f".grid{{stroke:{c['grid']}}}.zero{{stroke:{c['zero']}}}"
        f"line.mean{{stroke:{c['mean']};stroke-width:2}}circle.mean{{fill:{c['mean']}}}"
    )


SVG_STYLE = f"{svg_style(SVG_LIGHT)}@media (prefers-color-scheme:dark){{{svg_style(SVG_DARK)}}}"
SVG_TITLE = "R@1 on unseen classes against Proxy-Anchor, points: mean and 95 % interval"
Runs = dict[str, dict[int, dict[str, float]]]
"""Method → seed → metrics."""


def read_runs() -> Runs:
    """The runs of study.csv, of methods with three seeds or more: fewer have no useful interval."""
    found: Runs = {name: {} for name in METHODS}
    for outcome in read_outcomes():
        if outcome.stage == "run":
            found[outcome.method][outcome.seed] = outcome.numbers
    return {name: runs for name, runs in found.items() if len(runs) > 2}


def differences(runs: Runs, a: str, b: str, metric: str) -> list[float]:
    """b - a, seed by seed, in points."""
    seeds = sorted(runs[a].keys() & runs[b].keys())
    return [100 * (runs[b][seed][metric] - runs[a][seed][metric]) for seed in seeds]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results_table(runs: Runs) -> str:
    """Mean ± half of the 95 % interval of each metric, in percent."""
    outcomes, times = read_outcomes(), read_times()
    rows = []
    for name, of_seeds in runs.items():
        cells = []
        for metric in METRICS:
            values = [100 * numbers[metric] for numbers in of_seeds.values()]
            cells.append(f"{statistics.mean(values):.1f} ± {half_width(values):.1f}")
        lr = rate(chosen_rate(outcomes, name))
        second = f"{times[name]:.1f}" if name in times else ""
        rows.append([METHODS[name].title, f"{lr:g}", *cells, second, str(len(of_seeds))])
    return table(["method", "lr", *METRICS, "s / epoch", "seeds"], rows)


def difference_table(runs: Runs, pairs: Sequence[tuple[str, str]]) -> str:
    """Paired differences b - a in points, with intervals and corrected p."""
    pairs = [(a, b) for a, b in pairs if a in runs and b in runs]
    columns = ("R@1", "MAP@R")
    corrected = {}
    for metric in columns:
        p_values = {b: p_value(differences(runs, a, b, metric)) for a, b in pairs}
        corrected[metric] = holm(p_values)
    rows = []
    for a, b in pairs:
        cells = []
        for metric in columns:
            apart = differences(runs, a, b, metric)
            mean, half = statistics.mean(apart), half_width(apart)
            cells += [f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"]
            p = corrected[metric][b]
            cells += [f"{p:.3f}" if p >= 0.001 else "< .001"]
        rows.append([METHODS[b].title, METHODS[a].title, *cells])
    head = ["method", "against", *(c for m in columns for c in (f"{m}, points", "p, corrected"))]
    return table(head, rows)


def trial_table() -> str:
    """R@1 on fold 0 at each rate that was tried; the chosen one in bold."""
    outcomes = read_outcomes()
    exponents = sorted({o.exponent for o in outcomes if o.stage == "trial"})
    rows = []
    for name, method in METHODS.items():
        tried = trials(outcomes, name)
        if not tried:
            continue
        cells = [f"{100 * tried[e]:.1f}" if e in tried else "" for e in exponents]
        chosen = chosen_rate(outcomes, name)
        cells = [f"**{c}**" if e == chosen else c for e, c in zip(exponents, cells, strict=True)]
        rows.append([method.title, *cells])
    return table(["method", *(f"{rate(e):g}" for e in exponents)], rows)


def picture(runs: Runs) -> str:
    """An SVG: R@1 of each method less that of Proxy-Anchor, best first, mean and 95 % interval."""
    apart = {b: differences(runs, BASELINE, b, "R@1") for b in runs if b != BASELINE}
    order = sorted(apart, key=lambda name: -statistics.mean(apart[name]))
    middles = {name: statistics.mean(apart[name]) for name in order}
    halves = {name: half_width(apart[name]) for name in order}
    low = math.floor(min(middles[name] - halves[name] for name in order))
    high = math.ceil(max(middles[name] + halves[name] for name in order))
    left, right, step, top = 250, 780, 24, 44
    bottom = top + step * len(order)

    def x(points: float) -> float:
        return round(left + (points - low) / (high - low) * (right - left), 1)

    parts = [f'<text x="14" y="24" font-weight="600">{SVG_TITLE}</text>']
    for points in range(low, high + 1):
        kind = "zero" if points == 0 else "grid"
        line = f'<line x1="{x(points)}" x2="{x(points)}" y1="{top - 6}" y2="{bottom}"'
        parts.append(f'{line} class="{kind}" stroke="{SVG_LIGHT[kind]}"/>')
        label = f"{points:+d}" if points else "0"
        at = f'x="{x(points)}" y="{bottom + 16}"'
        parts.append(f'<text {at} class="soft" text-anchor="middle">{label}</text>')
    for row, name in enumerate(order):
        y = top + step * row + step // 2
        ends = [x(middles[name] - halves[name]), x(middles[name] + halves[name])]
        title = html.escape(METHODS[name].title)
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{title}</text>')
        line = f'<line x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"'
        mean = SVG_LIGHT["mean"]
        parts.append(f'{line} class="mean" stroke="{mean}"/>')
        dot = f'<circle cx="{x(middles[name])}" cy="{y}" r="4" class="mean"'
        parts.append(f'{dot} fill="{mean}"/>')
    size = f'width="{right + 30}" height="{bottom + 28}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13">'
        f"<style>{SVG_STYLE}</style>"
        f'<rect width="100%" height="100%" class="paper" fill="#fff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def write_tables() -> None:
    """Puts the tables between their marks in docs/study.md, and draws docs/study.svg."""
    runs = read_runs()
    PICTURE.write_text(picture(runs))
    made = {
        "results": results_table(runs),
        "baseline": difference_table(runs, [(BASELINE, b) for b in METHODS if b != BASELINE]),
        "additions": difference_table(runs, [(a, b) for b, a in BASES.items() if a != BASELINE]),
        "trials": trial_table(),
    }
    page = PAGE.read_text()
    for name, content in made.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    PAGE.write_text(page)
    print(f"tables written to {PAGE.name}, the picture to {PICTURE.name}")


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("train", "time", "tables"))
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once")
    given = parser.parse_args()
    if given.command == "train":
        train(given.jobs)
    elif given.command == "time":
        measure_times()
    else:
        write_tables()


if __name__ == "__main__":
    main()
