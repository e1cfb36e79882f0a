"""The results of a study as text, CSV and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import dataset
from evaluation import meanings, tables
from evaluation.measuring import OFFICIAL
from evaluation.tables import Row
from metrics.comparison import Difference, Test, few_classes
from studies.plan import Plan
from studies.results import Found, Results, Sensitivity
from terminal import paragraph, terminal_width
from utils import InputError, human_seconds, nearest_names

SHOWN = ("R@1", "RP", "MAP@R", "NMI")
GAINS = {
    "R@1": "R@1",
    "best epoch": "best epoch less last",
    "concatenated": "seeds side by side",
    "aligned mean": "aligned mean",
}
"""The columns that `gains` may have → what they are called where there is room."""
NONE = "–"


def rows(results: Results, columns: Sequence[str] = ()) -> list[Row]:
    """One row per method with runs: its means over the seeds."""
    known = _measured(results)
    wanted = columns or known
    return [
        Row(
            "test classes",
            found.name,
            {name: found.mean[name] for name in wanted if name in found.mean},
            {name: found.deviation[name] for name in wanted if name in found.deviation},
            repeats=len(found.seeds),
        )
        for found in results.with_runs
    ]


def _measured(results: Results) -> list[str]:
    """The metrics of the runs."""
    return list(dict.fromkeys(name for found in results.with_runs for name in found.mean))


def check_columns(results: Results, columns: Sequence[str]) -> None:
    """Checks that the columns are metrics of the runs, or will be if there are no runs yet.

    Raises:
        InputError: a column is not a metric of the study.
    """
    known = _measured(results) or _expected(results.plan)
    for name in columns:
        if name not in known:
            raise InputError(f"--columns {name}: {nearest_names(name, known)}")


def _expected(plan: Plan) -> list[str]:
    protocol = dataset.protocol(plan.dataset)
    names = [name for name in meanings.MEANINGS if meanings.METRIC.fullmatch(name)]
    names = [*(f"R@{k}" for k in protocol.ks), *names]
    return names + ([f"{OFFICIAL}{name}" for name in names] if protocol.sizes else [])


def text(results: Results, columns: Sequence[str] = ()) -> str:
    """All results, for the terminal."""
    parts = [_search(results)]
    if results.with_runs:
        made = rows(results, shown(results, columns))
        parts.append("On the test classes, after the last epoch, at the chosen settings:")
        parts.append(tables.aligned(*mean_lines(made), terminal_width()))
        parts.append(tables.footnote(made))
    parts += _tests(results.tests, results.plan.metric)
    parts += _tests(results.asked, results.plan.metric)
    parts += [*_gains(results), *_sensitivities(results), *failures(results)]
    return "\n".join(parts)


def shown(results: Results, columns: Sequence[str]) -> Sequence[str]:
    """The given columns, or those that fit on a screen; the study must have runs."""
    usual = dict.fromkeys([*SHOWN, results.plan.metric])
    return columns or [name for name in usual if name in results.with_runs[0].mean]


def mean_lines(made: Sequence[Row]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads and lines of a table of means over the seeds, in percent, with ±."""
    names = tables.columns(made)
    lines = []
    for row in made:
        spread = row.spread
        cells = [_around(row.numbers.get(n), spread.get(n, math.nan)) for n in names]
        lines.append((row.label, [*cells, str(row.repeats)]))
    return [*names, "seeds"], lines


def _around(value: float | None, half: float) -> str:
    return _share(value) + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def _share(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _search(results: Results) -> str:
    about = f"The search: mean of {results.plan.folds} folds of classes that a trial has not seen:"
    return (
        f"{about}\n{tables.aligned(search_heads(results), search_lines(results), terminal_width())}"
    )


def search_heads(results: Results) -> list[str]:
    """The heads of `search_lines`."""
    return ["trials", "early", "failed", "time", results.plan.metric, "chosen"]


def search_lines(results: Results) -> list[tuple[str, list[str]]]:
    """For each method: trials that ended, stopped early, failed; time; best metric and settings."""
    lines = []
    for found in results.methods:
        counts = [sum(t.state == s for t in found.trials) for s in ("pruned", "failed")]
        ended = sum(t.state != "running" for t in found.trials)
        reached = found.chosen.reached if found.chosen else None
        cells = [f"{ended} of {results.plan.trials}", *map(str, counts)]
        cells += [human_seconds(found.search_seconds), _share(reached), chosen(found)]
        lines.append((found.name, cells))
    return lines


def chosen(found: Found) -> str:
    """The chosen values: `lr 0.0003, alphap 24`."""
    if found.chosen is None:
        return "–"
    return ", ".join(f"{r.title} {found.chosen.values[r.name]}" for r in found.entrant.space)


def _tests(tests: Iterable[Test], metric: str) -> list[str]:
    parts = []
    for alike in grouped(tests).values():
        heads, lines = test_lines(alike, metric)
        parts.append(f"\n{paragraph(tests_about(alike))}")
        parts.append(tables.aligned(heads, lines, terminal_width()))
    return parts


def grouped(tests: Iterable[Test]) -> dict[str, list[Test]]:
    """The tests, grouped by whether they are over seeds or over classes."""
    found: dict[str, list[Test]] = {}
    for test in tests:
        found.setdefault(test.over, []).append(test)
    return found


def tests_about(tests: Sequence[Test]) -> str:
    """A heading for tests that are all over seeds, or all over classes."""
    counts = sorted({test.count for test in tests})
    number = " to ".join(f"{count:,}" for count in dict.fromkeys([counts[0], counts[-1]]))
    how = {
        "seeds": f"paired t-test over {number} seeds: would other seeds agree?",
        "classes": f"paired bootstrap over {number} classes: would other classes agree?",
    }[tests[0].over]
    corrected = f", p corrected for {len(tests)} comparisons (Holm)" if len(tests) > 1 else ""
    compared = f"Less {tests[0].a}" if of_one(tests) else "Differences"
    doubt = f" {few}" if (few := few_classes(tests)) else ""
    return f"{compared}, in points ({how}{doubt}){corrected}:"


def of_one(tests: Sequence[Test]) -> bool:
    """Whether all are compared with the same method."""
    return len({test.a for test in tests}) == 1


def test_lines(tests: Sequence[Test], metric: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads and lines of a table of tests, for R@1 and the study's metric."""
    names = [n for n in dict.fromkeys(["R@1", metric]) if n in tests[0].differences]
    heads = [head for name in names for head in (name, "95 % interval", "p")]
    alike, lines = of_one(tests), []
    for test in tests:
        cells = []
        for name in names:
            cells += difference_cells(test.differences[name], test.corrected[name])
        lines.append((test.b if alike else f"{test.b} less {test.a}", cells))
    return heads, lines


def difference_cells(found: Difference, p: float) -> list[str]:
    """Difference and interval in points, and p."""
    if math.isnan(found.difference):
        return ["–", "", ""]
    return [f"{100 * found.difference:+.1f}", interval_text(found) or "–", p_text(p)]


def interval_text(found: Difference) -> str:
    """`[+1.0, +2.0]`, in points; "" if there is none, because the difference never varies."""
    low, high = 100 * found.low, 100 * found.high
    return "" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"


def p_text(p: float) -> str:
    """`0.034`, `< .001`."""
    return "–" if math.isnan(p) else "< .001" if p < 0.001 else f"{p:.3f}"


def gains(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Those of `GAINS` that have a value, and a line for each method.

    Best epochs are not known where each run is evaluated once, nor ensembles of a single seed.
    Without either there are no lines.
    """
    lines = _gain_lines(results)
    kept = [i for i in range(len(GAINS)) if any(cells[i] != NONE for _, cells in lines)]
    if kept in ([], [0]):
        return [], []
    heads = [*GAINS]
    return [heads[i] for i in kept], [(name, [cells[i] for i in kept]) for name, cells in lines]


def _gain_lines(results: Results) -> list[tuple[str, list[str]]]:
    """For each method: R@1, best epoch less last, and R@1 of both ensembles of its seeds."""
    lines = []
    for found in results.with_runs:
        cells = [_bonus(*found.bonus)]
        fewer = f" ({found.together} seeds)" if found.together < len(found.seeds) else ""
        for name in ("concatenated", "aligned mean"):
            numbers = found.ensembles.get(name)
            cells.append(_share(numbers["R@1"]) + fewer if numbers else NONE)
        lines.append((found.name, [_share(found.mean.get("R@1")), *cells]))
    return lines


def _bonus(mean: float, half: float) -> str:
    if math.isnan(mean):
        return NONE
    return f"{100 * mean:+.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")


def gains_about(heads: Sequence[str]) -> str:
    """A description of the columns of `gains`."""
    said = {
        "best epoch": "what picking the best epoch on the test classes would add to R@1",
        "concatenated": "R@1 of the seeds taken together, side by side and as a mean of the same "
        "size",
    }
    found = ", and ".join(words for head, words in said.items() if head in heads)
    return f"What is not in these numbers: {found}"


def _gains(results: Results) -> list[str]:
    heads, lines = gains(results)
    if not lines:
        return []
    about = f"{gains_about(heads)}:"
    return [f"\n{paragraph(about)}", tables.aligned(heads, lines, terminal_width())]


def _sensitivities(results: Results) -> list[str]:
    said = [paragraph(line) for line in sensitivity_lines(results)]
    about = f"\nHow {results.plan.metric} of the trials goes with what was searched:"
    return [about, *said] if said else []


def sensitivity_lines(results: Results) -> list[str]:
    """A sentence for each method with enough trials."""
    said = []
    for found in results.methods:
        words = [sensitivity_words(one) for one in found.sensitivity if not math.isnan(one.p)]
        if words:
            said.append(f"{found.name} ({found.sensitivity[0].count} trials): {'; '.join(words)}")
    return said


def sensitivity_words(one: Sensitivity) -> str:
    """`lr +0.62 (p 0.030)`: a rank correlation, not corrected."""
    return f"{one.title} {one.correlation:+.2f} (p {p_text(one.p)})"


def failures(results: Results) -> list[str]:
    """A heading, then a line with the reason for each failed trial or run; [] if none failed."""
    said = []
    for found in results.methods:
        said += [
            f"{found.name} trial {trial.number}: {trial.error}"
            for trial in found.trials
            if trial.state == "failed"
        ]
        said += [f"{found.name} seed {seed}: {why}" for seed, why in found.failures.items()]
    return ["\nFailed:", *map(paragraph, said)] if said else []


# --- files ----------------------------------------------------------------------------------------


def latex(results: Results, columns: Sequence[str] = ()) -> str:
    """A table for a paper: means over seeds in percent, the best of each column bold."""
    made = rows(results, columns)
    plan = results.plan
    budget = f"{plan.trials} trials per method on {plan.folds} class-disjoint folds"
    caption = (
        f"Test classes, in percent, after the last epoch; settings from {budget}."
        f"{tables.about_spread(made)}"
    )
    return tables.latex(made, caption, f"{plan.name}.tex")


def runs_csv(results: Results) -> tuple[list[str], list[list]]:
    """One row per run with a seed."""
    names = list(dict.fromkeys(n for f in results.methods for s in f.seeds.values() for n in s))
    made = []
    for found in results.methods:
        for seed, numbers in found.seeds.items():
            values = [_cell(numbers.get(name)) for name in names]
            gained, seconds = _cell(found.gained.get(seed)), f"{found.seconds[seed]:.1f}"
            made.append([found.name, seed, chosen(found), *values, gained, seconds])
    return ["method", "seed", "settings", *names, "best epoch less last", "seconds"], made


def trials_csv(results: Results) -> tuple[list[str], list[list]]:
    """One row per trial."""
    options = list(dict.fromkeys(r.title for f in results.methods for r in f.entrant.space))
    folds = [f"fold {fold}" for fold in range(results.plan.folds)]
    made = []
    for found in results.methods:
        for trial in found.trials:
            values = {r.title: trial.values.get(r.name, "") for r in found.entrant.space}
            reached = [_cell(fold[results.plan.metric]) for fold in trial.folds]
            made.append(
                [
                    found.name,
                    trial.number,
                    trial.state,
                    *(values.get(name, "") for name in options),
                    *(reached + [""] * (len(folds) - len(reached))),
                    _cell(trial.reached),
                    f"{trial.seconds:.1f}",
                    trial.error,
                ]
            )
    head = ["method", "trial", "state", *options, *folds, f"mean {results.plan.metric}"]
    return [*head, "seconds", "error"], made


def _cell(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
