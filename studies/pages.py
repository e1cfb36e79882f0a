"""The results of a study as an HTML page: conclusions, tables, and charts without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evaluation import tables as evaluation_tables
from metrics.comparison import Difference, Test, few_classes
from page import plots
from page.document import Part, as_text, bullets, cell, document, facts, folded, navigation, table
from page.plots import Bar, Point
from studies import tables
from studies.ledger import STARTUP
from studies.results import Found, Results
from utils import counted, human_seconds, join_words

SURE = 0.05


def page(results: Results) -> str:
    """The page's HTML."""
    plan = results.plan
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
    head = f"<header><h1>Study: {as_text(plan.name)}</h1>{about}</header>"
    parts = _parts(results)
    content = "".join(part.html() for part in parts)
    body = f"{head}{navigation(parts)}<main>{plots.STYLE}{content}</main>"
    return document(f"Study {plan.name}", body, {})


def _parts(results: Results) -> list[Part]:
    """The parts that have content."""
    parts = [Part("answer", "What came out", bullets(conclusions(results)))]
    if results.with_runs:
        parts.append(Part("methods", "Test classes", _means(results), _means_about(results)))
    if results.tests:
        parts.append(Part("tests", "Differences", _tests(results), _tests_about(results)))
    parts.append(Part("search", "The search", _search(results), _search_about(results)))
    heads, lines = tables.gains(results)
    if lines:
        shown = _plain_table(["method", *(tables.GAINS[head] for head in heads)], lines)
        words = {"best epoch": "best epochs", "concatenated": "ensembles"}
        title = join_words([words[head] for head in heads if head in words], "and").capitalize()
        parts.append(Part("beside", title, shown, f"{tables.gains_about(heads)}.", link=""))
    if failed := tables.failures(results):
        parts.append(Part("failed", "Failed", bullets(failed[1:]), link=""))
    return parts


# --- sentences ------------------------------------------------------------------------------------


def conclusions(results: Results) -> list[str]:
    """Sentences that say what follows from the results, and what does not."""
    said = _state(results)
    ranked = results.ranked
    metric = results.plan.metric
    if not results.with_runs:
        return [*said, "No method has been judged on the test classes yet."]
    if not ranked:
        return [*said, f"{metric} is undefined on the test classes: no order of the methods."]
    best = ranked[0]
    seeds = counted(len(best.seeds), "seed")
    said.append(
        f"Highest {metric}: {best.name}, {_mean(best, metric)} over {seeds}, at "
        f"{tables.chosen(best)}."
    )
    if len(ranked) > 1:
        said += _against(results)
        said += _classes_say(results)
    said.append(_bonus(results))
    return [sentence for sentence in said if sentence]


def _state(results: Results) -> list[str]:
    open_trials = sum(found.left[0] for found in results.methods)
    open_runs = sum(found.left[1] for found in results.methods)
    if not open_trials and not open_runs:
        return []
    trials, runs = counted(open_trials, "trial"), counted(open_runs, "run")
    return [f"Not finished: {trials} and {runs} with seeds are open; all below may change."]


def _mean(found: Found, metric: str) -> str:
    half = found.half(metric)
    words = f"{100 * found.mean[metric]:.1f}"
    return words if math.isnan(half) else f"{words} ± {100 * half:.1f}"


def _against(results: Results) -> list[str]:
    """Sentences about the best method against each other one, over the seeds."""
    metric, tests = results.plan.metric, results.best_against
    if not tests:
        return ["With fewer than two seeds nothing can be said about chance."]
    # Compared on the seeds that both have: if one failed, the best mean may be lower on the others.
    surely = [
        test
        for test in tests
        if test.corrected.get(metric, 1.0) < SURE and test.differences[metric].difference > 0
    ]
    maybe = [test for test in tests if test not in surely]
    said = []
    if surely:
        listed = ", ".join(
            f"{test.a} by {100 * test.differences[metric].difference:.1f} points "
            f"(p {tables.p_text(test.corrected[metric])})"
            for test in surely
        )
        count = len(results.pairs)
        corrected = f", corrected for all {count} pairs" if count > 1 else ""
        said.append(f"More than chance over the seeds{corrected}: it is better than {listed}.")
    if maybe:
        listed = ", ".join(f"{test.a} ({_difference(test.differences[metric])})" for test in maybe)
        said.append(
            f"Not told apart from it by these seeds: {listed}; difference and 95 % interval in "
            f"points of {metric}. That does not prove that they are equal."
        )
    return said


def _difference(found: Difference) -> str:
    words = f"{100 * found.difference:+.1f}"
    return f"{words} {tables.interval_text(found) or 'with every seed'}"


def _classes_say(results: Results) -> list[str]:
    tests = tables.grouped(results.tests).get("classes", [])
    metric = results.plan.metric
    known = [test for test in tests if metric in test.differences]
    if not known:
        return []
    sure = [test for test in known if test.corrected[metric] < SURE]
    count = known[0].count
    few = f" {words}" if (words := few_classes(known)) else ""
    if not sure:
        return [
            f"With other test classes than these {count:,}, no method would surely differ from "
            f"{known[0].a}.{few}"
        ]
    listed = ", ".join(
        f"{test.b} ({100 * test.differences[metric].difference:+.1f})" for test in sure
    )
    return [
        f"With other test classes than these {count:,}, the following would still differ from "
        f"{known[0].a}: {listed}.{few}"
    ]


def _bonus(results: Results) -> str:
    gains = [(found.bonus[0], found.name) for found in results.with_runs]
    gains = [gain for gain in gains if not math.isnan(gain[0])]
    if not gains:
        return ""
    (low, _), (high, name) = (pick(gains, key=lambda gain: gain[0]) for pick in (min, max))
    if 100 * high < 0.05:
        return (
            "Picking the best of the evaluated epochs on the test classes would have added less "
            "than 0.05 points of R@1 to any method."
        )
    least, most = f"{100 * low:.1f}", f"{100 * high:.1f}"
    points = f"{least} to {most} points of R@1, most to {name}"
    if least == most:
        points = f"{most} points of R@1" + (" to each method" if len(gains) > 1 else "")
    return (
        f"Picking the best epoch on the test classes would add {points}; a table of best epochs "
        "compares that as well."
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
        name: max(
            (row.numbers[name] for row in made if evaluation_tables.is_known(row, name)),
            default=None,
        )
        for name in names
    }
    head = "".join(f'<th scope="col">{as_text(n)}</th>' for n in ("method", *names, "seeds"))
    lines = []
    for row in made:
        spread = row.spread
        cells = [
            cell(
                row.numbers.get(name),
                (row.numbers[name] - spread[name], row.numbers[name] + spread[name])
                if name in spread
                else None,
                best=len(made) > 1 and row.numbers.get(name) == best[name],
            )
            for name in names
        ]
        lines.append(
            f"<tr><td>{as_text(row.label)}</td>{''.join(cells)}<td>{row.repeats}</td></tr>"
        )
    metric = results.plan.metric
    bars = [
        Bar(f.name, f.mean[metric], f.half(metric), [n[metric] for n in f.seeds.values()])
        for f in results.ranked
    ]
    words = f"{metric}, percent: each seed, their mean and its 95 % interval"
    return table(head, lines) + plots.forest(bars, words)


def _plain_table(heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """An HTML table of these heads, with a name and cells in each line."""
    head = "".join(f'<th scope="col">{as_text(h)}</th>' for h in heads)
    rows = [
        f"<tr>{''.join(f'<td>{as_text(c)}</td>' for c in (name, *cells))}</tr>"
        for name, cells in lines
    ]
    return table(head, rows)


def _tests_about(results: Results) -> str:
    return (
        f"Each method less {results.with_runs[0].name}, in points. Over seeds: would other seeds "
        "agree (paired t-test)? Over classes: would other classes agree (paired bootstrap, the "
        "networks as they are)? p is two-sided and corrected for the number of comparisons (Holm)."
    )


def _tests(results: Results) -> str:
    metric, parts = results.plan.metric, [_tables(results.tests, results.plan.metric)]
    tests = tables.grouped(results.tests).get("seeds", [])
    if tests and metric in tests[0].differences:
        words = f"{metric} less that of {tests[0].a}, points: mean and 95 % interval over seeds"
        parts.append(plots.forest(difference_bars(tests, metric), words, zero=True))
    if results.asked:
        parts.append(_tables(results.asked, metric))
    return "".join(parts)


def difference_bars(tests: Sequence[Test], metric: str) -> list[Bar]:
    """A bar per test: the difference in a metric, and half of its 95 % interval."""
    found = [(test.b, test.differences[metric]) for test in tests]
    return [Bar(name, d.difference, d.high - d.difference) for name, d in found]


def _tables(tests: Sequence[Test], metric: str) -> str:
    """Tables of tests: one of those over seeds, one of those over classes."""
    parts = []
    for over, alike in tables.grouped(tests).items():
        heads, lines = tables.test_lines(alike, metric)
        less = f", less {alike[0].a}" if tables.of_one(alike) else ""
        parts.append(f"<h3>Over {alike[0].count:,} {over}{as_text(less)}</h3>")
        parts.append(_plain_table(("method", *heads), lines))
    return "".join(parts)


def _search_about(results: Results) -> str:
    plan = results.plan
    return (
        f"Each trial trains {plan.folds} times, each time without one fold of the training "
        f"classes, and is judged by {plan.metric} on the folds. The first trial of each method "
        "has the values it was given; the next are drawn at random, until there are two for each "
        f"searched value ({STARTUP} at least), and the others by TPE."
        + (
            " A trial is stopped early where it is below the median of the method's finished "
            f"trials at the same epoch of the same fold, once {STARTUP} have finished."
            if plan.prune
            else ""
        )
    )


def _search(results: Results) -> str:
    metric = results.plan.metric
    heads = ("method", "trials", "early", "failed", "time", f"{metric} on the folds", "chosen")
    charts = "".join(_plots(found, metric) for found in results.methods)
    about = f"Every trial: {metric} against each searched value"
    return _plain_table(heads, tables.search_lines(results)) + folded(about, charts)


def _plots(found: Found, metric: str) -> str:
    done = [trial for trial in found.trials if trial.reached is not None]
    if not done:
        return ""
    figures = "".join(
        plots.scatter(_points(found, one.name, metric), one.title, log=one.log)
        for one in found.entrant.space
        if not one.choices
    )
    words = "; ".join(
        tables.sensitivity_words(one) for one in found.sensitivity if not math.isnan(one.p)
    )
    about = f"Rank correlation with {metric}, not corrected: {words}." if words else ""
    note = f'<p class="note">{as_text(about)}</p>' if about else ""
    return f'<h3>{as_text(found.name)}</h3>{note}<div class="charts">{figures}</div>'


def _points(found: Found, name: str, metric: str) -> list[Point]:
    """Points of the trials: the chosen one is marked, those stopped early are hollow."""
    points = []
    for trial in found.trials:
        reached = trial.reached
        if reached is None and trial.folds:
            reached = trial.folds[-1].get(metric)
        if reached is None:
            continue
        chosen = found.chosen is not None and trial.number == found.chosen.number
        kind = "on" if chosen else "off" if trial.reached is None else "dot"
        about = f"trial {trial.number}: {trial.values[name]}, {100 * reached:.1f}"
        points.append(Point(float(trial.values[name]), reached, kind, about))
    return points
