"""Which method suits these images? A study trains several with the same budget and compares them.

    python study.py which.toml
    python study.py --flags "--dataset folder:photos" --methods Proxy_Anchor AMLoss "MS --IPC 5"

The same command, started once more, here or on another machine that shares the folder, shares the
work. It may be stopped at any time and started again.
"""

from __future__ import annotations

import door

if __name__ == "__main__":
    door.enter()

from studies import asking

ARGS = asking.parse() if __name__ == "__main__" else None

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from storage import write_content, write_table
from studies import markdown, pages, results, tables
from studies.ledger import Ledger
from studies.places import Place, places
from studies.plan import Plan, of, read
from studies.progress import Progress
from studies.rehearsal import rehearse
from studies.threads import Workers
from studies.trainer import Stopped
from terminal import as_shell, fitted, paragraph, say
from utils import InputError, counted, program, sentence_errors


def plan_of(args: argparse.Namespace) -> Plan:
    """The study that a file or the flags describe.

    Raises:
        InputError: the description is wrong.
    """
    if args.file:
        return read(args.file)
    entries = ("name", "flags", "methods", "folds", "trials", "seeds", "metric", "logs")
    content = {name: getattr(args, name) for name in entries if name in args}
    return of(content, default_name="study", source="study.py")


def describe(plan: Plan, where: Sequence[Place]) -> str:
    """The work to be done, in lines."""
    folds = len(plan.entrants) * plan.trials * plan.folds
    runs = len(plan.entrants) * plan.seeds
    lines = [
        f"study       {plan.folder}",
        f"search      {counted(plan.trials, 'trial')} of {counted(len(plan.entrants), 'method')} "
        f"on {plan.folds} folds: {folds} trainings, judged by {plan.metric}",
        f"runs        {plan.seeds} seeds of each at its best settings: {runs} trainings",
    ]
    for number, one in enumerate(plan.entrants):
        space = "; ".join(r.describe() for r in one.space) or "nothing"
        head = "searched    " if number == 0 else " " * 12
        lines.append(paragraph(f"{one.name}: {space}", head, " " * 14))
    lines.append(f"at once     {len(where)}, {counted(where[0].threads, 'thread')} each")
    lines.append(f"logs        {plan.folder}/METHOD/*.log")
    return "\n".join(lines)


def conclude(ledger: Ledger, columns: Sequence[str], document: Path | None) -> results.Results:
    """Prints the results so far, and writes the study's page, its tables and the document.

    Raises:
        InputError: a column does not exist, or the document has no place for the results.
    """
    found = results.collect(ledger)
    tables.check_columns(found, columns)
    folder = ledger.folder
    write_table(folder / "trials.csv", *tables.trials_csv(found))
    write_content(folder / "study.html", pages.page(found))
    written = ["trials.csv"]
    if found.with_runs:
        write_table(folder / "runs.csv", *tables.runs_csv(found))
    say(f"\n{tables.text(found, columns)}")
    if found.with_runs:
        write_content(folder / "study.tex", tables.latex(found, columns))
        written += ["runs.csv", "study.tex"]
    say(f"\npage: {folder / 'study.html'} (beside it {', '.join(written)})")
    if document:
        say(f"document: {' and '.join(map(str, markdown.write(document, found, columns)))}")
    return found


def main(args: argparse.Namespace) -> None:
    """Runs study.py with parsed options.

    Raises:
        InputError: the description of the study, or a flag, is wrong.
    """
    plan = plan_of(args)
    ledger = Ledger(plan)
    jobs = max(args.jobs, len(args.gpus))
    where = places(jobs, args.gpus)
    begun = ledger.kept_plan() is not None
    if args.report and not begun:
        raise InputError(f"{plan.folder} holds no study yet; leave --report out to begin it")
    unsure = ledger.look()
    if args.markdown:
        markdown.check(args.markdown)
    if args.report:
        conclude(ledger, args.columns, args.markdown)
        return
    if args.columns:  # wrong columns are reported before the trainings, not after
        so_far = results.collect(ledger) if begun else results.Results(plan, ())
        tables.check_columns(so_far, args.columns)
    say(describe(plan, where), flush=True)
    if unsure:
        say(f"checking    {', '.join(unsure)}", flush=True)
        rehearse(ledger.plan, unsure, where[0])
    ledger.begin()
    workers = Workers(ledger, where, Progress(ledger).say)
    try:
        workers.run()
    except Stopped:
        say(f"\nstopped; go on with:\n  {program('study')} {as_shell(*sys.argv[1:])}", flush=True)
        raise SystemExit(128 + workers.signal) from None
    found = conclude(ledger, args.columns, args.markdown)
    if told := failures(found):
        say("\n".join(map(fitted, told)), flush=True)
        raise SystemExit(1)


def failures(found: results.Results) -> list[str]:
    """What failed, and what to do about it, in sentences; [] if nothing did."""
    told = []
    if failed := sum(len(one.failures) for one in found.methods):
        told.append(f"{counted(failed, 'run')} failed; the same command tries again")
    if never := [one.name for one in found.methods if one.all_trials_failed]:
        told.append(
            f"{' and '.join(never)}: all trials failed, and stay counted; remove the cause, and "
            "give the study another name"
        )
    return told


if __name__ == "__main__":
    with sentence_errors(), door.answering():
        main(ARGS)
