"""A study as one HTML page: what can be concluded, tables, and charts that need no script."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from evaluation import tables as evaluation_tables
from page.document import as_text, bullets, cell, document, facts, folded, section
from studies import tables
from studies.results import Found, Results, Test
from utils import human_seconds

SURE = 0.05
WIDTH, LEFT, RIGHT, STEP = 460, 14, 446, 40
"""Of the chart with a line per method: narrow, so that it can be read on a phone."""


def page(results: Results) -> str:
    """The HTML."""
    plan = results.plan
    parts = [section("answer", "What came out", bullets(conclusions(results)))]
    if results.with_runs:
        parts.append(section("methods", "Test classes", _means(results), _means_about(results)))
    if results.tests:
        parts.append(section("tests", "Differences", _tests(results), _tests_about(results)))
    parts.append(section("search", "The search", _search(results), _search_about(results)))
    if results.with_runs:
        about = (
            "What picking the best epoch on the test classes would add to R@1 (it is in no other "
            "number here), and R@1 of the seeds taken together."
        )
        parts.append(section("beside", "Beside it", _beside(results), about))
    if failed := tables.failures(results):
        parts.append(section("failed", "Failed", bullets(failed[1:])))
    seconds = sum(f.search_seconds + sum(f.seconds.values()) for f in results.methods)
    about = facts(
        [
            ("methods", len(plan.entrants)),
            ("trials per method", plan.trials),
            ("folds", plan.folds),
            ("seeds", plan.seeds),
            ("judged by", plan.metric),
            ("training time", human_seconds(seconds)),
        ]
    )
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in _links(results))
    head = (
        f"<header><h1>Study: {as_text(plan.name)}</h1>{about}</header>"
        f'<nav><div>{links}<span class="end">'
        "<button data-theme-switch>light / dark</button></span></div></nav>"
    )
    return document(f"Study {plan.name}", f"{head}<main>{STYLE}{''.join(parts)}</main>", {})


STYLE = """<style>
.plot { margin: 12px 0 0; } .plot svg { max-width: 660px; }
.plot text { font-size: 13px; fill: var(--ink); } .plot .soft { fill: var(--soft); }
.plot line { stroke: var(--line); } .plot .zero { stroke: var(--soft); }
.plot .bar { stroke: var(--accent); stroke-width: 2.5; } .plot .dot { fill: var(--accent); }
.plot .off { fill: none; stroke: var(--soft); } .plot .on { fill: var(--right); }
</style>"""


def _links(results: Results) -> list[tuple[str, str]]:
    found = [("answer", "What came out")]
    found += [("methods", "Test classes")] if results.with_runs else []
    found += [("tests", "Differences")] if results.tests else []
    return [*found, ("search", "The search")]


# --- sentences ------------------------------------------------------------------------------------


def conclusions(results: Results) -> list[str]:
    """What can be said, and what cannot; each sentence from the numbers."""
    said = _state(results)
    ranked = results.ranked
    metric = results.plan.metric
    if not ranked:
        return [*said, "No method has been judged on the test classes yet."]
    best = ranked[0]
    said.append(
        f"Highest {metric}: {best.name}, {_points(best, metric)} over {len(best.seeds)} seeds, at "
        f"{tables.chosen(best)}."
    )
    if len(ranked) > 1:
        said += _against(results)
        said += _classes_say(results)
    said.append(_bonus(results))
    return [sentence for sentence in said if sentence]


def _state(results: Results) -> list[str]:
    plan = results.plan
    open_trials = sum(
        plan.trials - sum(t.state != "running" for t in f.trials) for f in results.methods
    )
    open_runs = sum(plan.seeds - len(f.seeds) - len(f.failures) for f in results.methods)
    if not open_trials and not open_runs:
        return []
    return [
        f"Not finished: {open_trials} trials and {open_runs} runs with seeds are open; all below "
        "may change."
    ]


def _points(found: Found, metric: str) -> str:
    half = found.half(metric)
    words = f"{100 * found.mean[metric]:.1f}"
    return words if math.isnan(half) else f"{words} ± {100 * half:.1f}"


def _against(results: Results) -> list[str]:
    """The best method against each other one over the seeds."""
    metric, tests = results.plan.metric, results.best_against
    if not tests:
        return ["With fewer than two seeds nothing can be said about chance."]
    surely = [test for test in tests if test.corrected.get(metric, 1.0) < SURE]
    maybe = [test for test in tests if test not in surely]
    said = []
    if surely:
        listed = ", ".join(
            f"{test.a} by {100 * test.differences[metric].difference:.1f} points "
            f"(p {tables.p_text(test.corrected[metric])})"
            for test in surely
        )
        said.append(f"More than chance over the seeds, corrected: it is better than {listed}.")
    if maybe:
        listed = ", ".join(
            f"{test.a} ({100 * test.differences[metric].difference:+.1f} "
            f"[{100 * test.differences[metric].low:+.1f}, "
            f"{100 * test.differences[metric].high:+.1f}])"
            for test in maybe
        )
        said.append(
            f"Not told apart from it by these seeds: {listed}; difference and 95 % interval in "
            f"points of {metric}. That is no proof that they are equal."
        )
    return said


def _classes_say(results: Results) -> list[str]:
    tests = tables.grouped(results.tests).get("classes", [])
    metric = results.plan.metric
    known = [test for test in tests if metric in test.differences]
    if not known:
        return []
    sure = [test for test in known if test.corrected[metric] < SURE]
    count = known[0].count
    few = " Few classes make that a rough guess." if count < 20 else ""
    if not sure:
        return [
            f"Had other classes been the test ({count:,} of them were), no method would surely "
            f"differ from {known[0].a}.{few}"
        ]
    listed = ", ".join(
        f"{test.b} ({100 * test.differences[metric].difference:+.1f})" for test in sure
    )
    return [
        f"Drawing other test classes ({count:,} of them were) would leave these different from "
        f"{known[0].a}: {listed}.{few}"
    ]


def _bonus(results: Results) -> str:
    gains = [(found.bonus[0], found.name) for found in results.with_runs]
    gains = [gain for gain in gains if not math.isnan(gain[0])]
    if not gains:
        return ""
    (low, _), (high, name) = min(gains), max(gains)
    return (
        f"Picking the best epoch on the test classes would add {100 * low:.1f} to {100 * high:.1f} "
        f"points of R@1, most to {name}; a table of best epochs compares that as well."
    )


# --- tables ---------------------------------------------------------------------------------------


def _means_about(results: Results) -> str:
    made = tables.rows(results)
    return (
        "After the last epoch, in percent; the best of each column is marked."
        + evaluation_tables.about_spread(made)
    )


def _means(results: Results) -> str:
    made = tables.rows(results)
    names = evaluation_tables.columns(made)
    best = {
        name: max((row.numbers[name] for row in made if name in row.numbers), default=None)
        for name in names
    }
    head = "".join(f'<th scope="col">{as_text(n)}</th>' for n in ("method", *names, "seeds"))
    lines = []
    for row in made:
        spread = row.spread
        cells = [
            cell(
                row.numbers.get(name),
                _around(row.numbers[name], spread[name]) if name in spread else None,
                best=len(made) > 1 and row.numbers.get(name) == best[name],
            )
            for name in names
        ]
        lines.append(
            f"<tr><td>{as_text(row.label)}</td>{''.join(cells)}<td>{row.repeats}</td></tr>"
        )
    return _table(head, lines) + _forest(
        [(f.name, f.mean[m], f.half(m)) for f in results.ranked if (m := results.plan.metric)],
        f"{results.plan.metric}, percent: mean over the seeds and its 95 % interval",
    )


def _around(mean: float, half: float) -> tuple[float, float]:
    return mean - half, mean + half


def _table(head: str, lines: Sequence[str]) -> str:
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _tests_about(results: Results) -> str:
    return (
        f"Each method less {results.with_runs[0].name}, in points. Over seeds: would other seeds "
        "agree (paired t-test)? Over classes: would other classes agree (paired bootstrap, the "
        "networks as they are)? p is two-sided and corrected for the number of comparisons (Holm)."
    )


def _tests(results: Results) -> str:
    metric, parts = results.plan.metric, []
    for over, tests in tables.grouped(results.tests).items():
        names = [n for n in dict.fromkeys(["R@1", metric]) if n in tests[0].differences]
        heads = [h for name in names for h in (name, "95 % interval", "p")]
        head = "".join(f'<th scope="col">{as_text(h)}</th>' for h in ("method", *heads))
        lines = [_test_row(test, names) for test in tests]
        parts.append(f"<h3>Over {tests[0].count:,} {over}</h3>{_table(head, lines)}")
        if over == "seeds" and metric in tests[0].differences:
            bars = [
                (t.b, t.differences[metric].difference, t.differences[metric].high) for t in tests
            ]
            words = f"{metric} less that of {tests[0].a}, points: mean and 95 % interval over seeds"
            parts.append(_forest([(b, d, high - d) for b, d, high in bars], words, zero=True))
    return "".join(parts)


def _test_row(test: Test, names: Sequence[str]) -> str:
    cells = []
    for name in names:
        cells += tables.difference_cells(test.differences[name], test.corrected[name])
    return f"<tr><td>{as_text(test.b)}</td>{''.join(f'<td>{as_text(c)}</td>' for c in cells)}</tr>"


def _search_about(results: Results) -> str:
    plan = results.plan
    return (
        f"Each trial trains {plan.folds} times, each time without one fold of the training "
        f"classes, and is judged by {plan.metric} on the folds. The first trial of each method "
        "has the values it was given; the others are drawn by TPE."
        + (
            " A trial that is behind the median of the others is stopped early."
            if plan.prune
            else ""
        )
    )


def _search(results: Results) -> str:
    metric = results.plan.metric
    heads = ("method", "trials", "early", "failed", "time", f"{metric} on the folds", "chosen")
    head = "".join(f'<th scope="col">{as_text(h)}</th>' for h in heads)
    lines = []
    for found in results.methods:
        counts = [sum(t.state == s for t in found.trials) for s in ("pruned", "failed")]
        ended = sum(t.state != "running" for t in found.trials)
        reached = f"{100 * found.chosen.reached:.1f}" if found.chosen else "–"
        cells = [f"{ended} of {results.plan.trials}", *counts]
        cells += [human_seconds(found.search_seconds), reached, tables.chosen(found)]
        lines.append(
            f"<tr><td>{as_text(found.name)}</td>"
            f"{''.join(f'<td>{as_text(c)}</td>' for c in cells)}</tr>"
        )
    plots = "".join(_plots(found, metric) for found in results.methods)
    return _table(head, lines) + folded("Every trial: what it reached against what it tried", plots)


def _plots(found: Found, metric: str) -> str:
    done = [trial for trial in found.trials if trial.reached is not None]
    if not done:
        return ""
    figures = "".join(
        _scatter(found, one.name, one.title, one.log, metric)
        for one in found.entrant.space
        if not one.choices
    )
    words = "; ".join(
        tables.sensitivity_words(one) for one in found.sensitivity if not math.isnan(one.p)
    )
    about = f"Rank correlation with {metric}, not corrected: {words}." if words else ""
    note = f'<p class="note">{as_text(about)}</p>' if about else ""
    return f'<h3>{as_text(found.name)}</h3>{note}<div class="charts">{figures}</div>'


def _beside(results: Results) -> str:
    heads = ("method", "R@1", "best epoch less last", "seeds side by side", "aligned mean")
    head = "".join(f'<th scope="col">{as_text(h)}</th>' for h in heads)
    lines = []
    for found in results.with_runs:
        mean, half = found.bonus
        cells = [f"{100 * found.mean['R@1']:.1f}", f"{100 * mean:+.1f} ± {100 * half:.1f}"]
        for name in ("concatenated", "aligned mean"):
            numbers = found.ensembles.get(name)
            cells.append(f"{100 * numbers['R@1']:.1f}" if numbers else "–")
        lines.append(
            f"<tr><td>{as_text(found.name)}</td>"
            f"{''.join(f'<td>{as_text(c)}</td>' for c in cells)}</tr>"
        )
    return _table(head, lines)


# --- charts ---------------------------------------------------------------------------------------


def _forest(bars: Sequence[tuple[str, float, float]], title: str, *, zero: bool = False) -> str:
    """Names, means and half widths, in shares, as dots with whiskers in percent."""
    shown = [
        (n, 100 * v, 0.0 if math.isnan(h) else 100 * h) for n, v, h in bars if not math.isnan(v)
    ]
    if not shown:
        return ""
    low, high = min(v - h for _, v, h in shown), max(v + h for _, v, h in shown)
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])

    def x(value: float) -> float:
        return round(LEFT + (value - low) / ((high - low) or 1) * (RIGHT - LEFT), 1)

    bottom = STEP * len(shown) + 4
    parts = []
    for mark in marks:
        kind = ' class="zero"' if zero and mark == 0 else ""
        parts.append(f'<line{kind} x1="{x(mark)}" x2="{x(mark)}" y1="4" y2="{bottom}"/>')
        label = f"{mark:+g}" if zero and mark else f"{mark:g}"
        parts.append(
            f'<text class="soft" x="{x(mark)}" y="{bottom + 17}" '
            f'text-anchor="middle">{label}</text>'
        )
    for row, (name, value, half) in enumerate(shown):
        y = STEP * row + STEP - 11
        short = name if len(name) <= 56 else f"{name[:55]}…"
        parts.append(
            f'<text x="{LEFT}" y="{y - 11}">{html.escape(short)}</text>'
            f'<line class="bar" x1="{x(value - half)}" x2="{x(value + half)}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot" cx="{x(value)}" cy="{y}" r="4.5"/>'
        )
    return _figure(title, "".join(parts), WIDTH, bottom + 26)


def _scatter(found: Found, name: str, title: str, log: bool, metric: str) -> str:
    """What the trials reached against one option; the chosen one green, those stopped hollow."""
    points = []
    for trial in found.trials:
        value = trial.reached
        if value is None and trial.folds:
            value = trial.folds[-1].get(metric)
        if value is not None:
            points.append((float(trial.values[name]), 100 * value, trial))
    if not points:
        return ""
    place = math.log10 if log else float
    xs = [place(x) for x, _, _ in points]
    ys = [y for _, y, _ in points]
    (x0, x1), (y0, y1) = _wider(xs), _wider(ys)
    left, right, top, bottom = 46, 330, 10, 150

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (place(x) - x0) / (x1 - x0) * (right - left)
        return round(across, 1), round(bottom - (y - y0) / (y1 - y0) * (bottom - top), 1)

    parts = []
    for mark in ticks(y0, y1, 4):
        if not y0 <= mark <= y1:
            continue
        _, y = at(points[0][0], mark)
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="soft" x="{left - 6}" y="{y + 4}" text-anchor="end">{mark:g}</text>'
        )
    for x in dict.fromkeys((min(points)[0], max(points)[0])):
        across, _ = at(x, y0)
        anchor = "start" if x == min(points)[0] else "end"
        parts.append(
            f'<text class="soft" x="{across}" y="{bottom + 20}" text-anchor="{anchor}">{x:g}</text>'
        )
    for x, y, trial in points:
        across, up = at(x, y)
        kind = "dot" if trial.reached is not None else "off"
        if found.chosen is not None and trial.number == found.chosen.number:
            kind = "on"
        parts.append(f'<circle class="{kind}" cx="{across}" cy="{up}" r="4.5"/>')
    return _figure(title, "".join(parts), 340, bottom + 28)


def _wider(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from about `low` to about `high`, at most so many between."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _figure(title: str, content: str, width: int, height: int) -> str:
    return (
        f'<figure class="chart plot"><figcaption><b>{as_text(title)}</b></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{as_text(title)}">'
        f"{content}</svg></figure>"
    )
