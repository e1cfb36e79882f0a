"""The command line of study.py; it imports nothing slow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flags import whole
from options.parser import Parser, file
from studies.plan import LEAST, METRICS, Plan
from utils import program


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of study.py.

    Raises:
        SystemExit: with status 2 for an unknown flag, 0 for --help.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if bool(args.file) == ("methods" in args):
        parser.error("give a study's TOML file, or --methods")
    if args.file and (
        both := {"name", "flags", "folds", "trials", "seeds", "metric", "logs"} & {*vars(args)}
    ):
        parser.error(f"--{min(both)} belongs in the file")
    return args


def _parser() -> Parser:
    parser = Parser(
        prog=program("study"),
        usage="%(prog)s FILE.toml [--jobs N] ...\n"
        '       %(prog)s --flags "..." --methods NAME ... [--trials N] ...',
        description="Each method gets the same number of trials on class-disjoint folds of the "
        "training classes, then runs with several seeds at its best settings, which are judged on "
        "the test classes. Started again it goes on; started several times it shares the work.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE.toml", type=file, default=None, help="what to study"
    )
    _declare_study(parser)
    _declare_running(parser)
    return parser


def _declare_study(parser: Parser) -> None:
    group = parser.add_argument_group("what to study, if there is no file")
    group.add_argument("--name", help="name of the study's folder in --logs")
    group.add_argument("--flags", help="flags of training that all methods share")
    group.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help='losses by name, or flags of training: AMLoss "AMLoss --sec_wei 1" @recipes/FILE.txt',
    )  # fmt: skip
    for name, metavar, what in (
        ("folds", "K", "folds that the training classes are divided into"),
        ("trials", "N", "trials per method"),
        ("seeds", "N", "runs per method"),
    ):
        group.add_argument(
            f"--{name}",
            type=whole(LEAST[name]),
            metavar=metavar,
            help=f"{what} (default: {getattr(Plan, name)})",
        )
    group.add_argument(
        "--metric",
        help=f"metric that trials are judged by: {', '.join(METRICS)} (default: {Plan.metric})",
    )
    group.add_argument(
        "--logs", metavar="DIR", help=f"where its folder goes (default: {Plan.logs})"
    )


def _declare_running(parser: Parser) -> None:
    how = parser.add_argument_group("how it runs, and what it writes")
    how.add_argument("--jobs", type=whole(1), default=1, metavar="N",
                     help="trainings at once; they share the cores (default: 1)")  # fmt: skip
    how.add_argument("--gpus", type=whole(0), nargs="+", default=(), metavar="N",
                     help="GPUs that trainings run on, one each")  # fmt: skip
    how.add_argument("--report", action="store_true", default=False,
                     help="train nothing; say and write what there is")  # fmt: skip
    how.add_argument("--columns", nargs="+", default=(), metavar="METRIC",
                     help="metrics of the table, for the screen, LaTeX and Markdown")  # fmt: skip
    how.add_argument("--markdown", type=file, default=None, metavar="FILE.md",
                     help="write the tables into this document as well: a new one, or between "
                     "the marks of one that has them, such as <!-- means -->")  # fmt: skip
