"""Was the method worth it? The same training without it: a run beside this one, or a command."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

import methods
import options
from flags import SWITCH, Flag
from page import records
from page.document import against, percent
from page.records import Record
from runs import RunFolder
from terminal import as_shell
from utils import InputError, program

RATES = ("lr", "lr_p")  # each method may have its own
REPEATED = ("seed", "LOG_DIR", "data_root", *RATES)  # not in `configuration`, but in the command


def sentence(record: Record) -> str:
    """A comparison of R@1 with the counterpart's, or the command that runs the counterpart."""
    words, plain = without_method(record)
    own = _recall(record)
    if plain is None or own is None:
        return ""
    found = _beside(record, plain)
    if found is not None:
        other = _recall(found) or 0.0
        return (
            f"Was it worth it? The same training without {words} ({_described(found, record)}) has "
            f"R@1 {percent(other)} %; this run is {against(own, other)} that. How sure that is, "
            f"query by query, and in pictures: `{_compare(found.path, record.path)}`."
        )
    command = _command(record, plain)
    if command is None:
        return ""
    folder = record.path.parent / _plain_name(record)
    return (
        f"Was it worth it? The same training without {words} tells: `{command}`, and then "
        f"`{_compare(folder, record.path)}`."
    )


def without_method(record: Record) -> tuple[str, argparse.Namespace | None]:
    """The methods that a run adds to a plain loss, and the options of the same training without.

    The options are None if it adds none.
    """
    removed, off = methods.without(record.options)
    if not removed:
        return "", None
    plain = argparse.Namespace(**{**vars(record.options), **off})
    for flag in options.train_flags():  # in order, because some depend on earlier ones
        if not flag.is_read(plain):
            setattr(plain, flag.dest, flag.default)
    return " and ".join(method.title for method in removed), plain


def _recall(record: Record) -> float | None:
    return next(iter(record.results.values()), {}).get("R@1") if record.outcome else None


def _described(found: Record, record: Record) -> str:
    args, own = found.options, record.options
    differing = [f"seed {args.seed}"] if args.seed != own.seed else []
    differing += [f"learning rate {args.lr:g}"] if args.lr != own.lr else []
    return ", ".join([found.name, *differing])


def _compare(*folders: object) -> str:
    return f"{program('report')} {as_shell(*folders)}"


# --- runs beside it -------------------------------------------------------------------------------


def _training(stored: dict[str, Any]) -> dict[str, Any]:
    """The options by which two trainings are the same, without learning rates."""
    return {k: v for k, v in options.configuration(stored).items() if k not in RATES}


def _beside(record: Record, plain: argparse.Namespace) -> Record | None:
    """A finished run in the same folder with the options `plain`, preferably of the same seed."""
    found = [other for other in _siblings(record, _training(vars(plain))) if _recall(other)]
    own = record.options
    return min(found, key=lambda o: (o.options.seed != own.seed, o.options.seed), default=None)


def _siblings(record: Record, wanted: dict[str, Any]) -> Iterator[Record]:
    """The runs in the same folder that have results and the options `wanted`."""
    for file in sorted(record.path.resolve().parent.glob("*/results.json")):
        path = record.path.parent / file.parent.name
        # Damage in another run's folder must not fail this page.
        with contextlib.suppress(InputError, OSError):
            # Most differ in their options already; only matching runs are read whole.
            if _training(RunFolder(path).read_args()) == wanted:
                yield records.read(path)


# --- the command ----------------------------------------------------------------------------------


def _plain_name(record: Record) -> str:
    return f"{record.name}-plain"


def _command(record: Record, plain: argparse.Namespace) -> str | None:
    """A command that trains `plain`, with the run's recipe if possible; None if there is none."""
    for file in ([f"@{plain.recipe}"] if plain.recipe else []), []:
        words = _first_words(file, plain)
        for _ in range(2):  # a flag may change defaults of others, which are then given, too
            base = options.parsed(words)
            if base is None:
                break
            words += _flags(plain, base)
        again = options.parsed(words)
        if again is not None and _training(vars(again)) == _training(vars(plain)):
            words += ["--name", _plain_name(record)]
            return f"{program('train')} {as_shell(*words)}"
    return None


def _first_words(file: list[str], plain: argparse.Namespace) -> list[str]:
    """The recipe, and the flags on which most defaults depend: loss, data set and network."""
    base = options.parsed(file)
    words = list(file)
    for flag in ("loss", "dataset", "model"):
        if base is None or getattr(base, flag) != getattr(plain, flag):
            words += [f"--{flag}", getattr(plain, flag)]
    return words


def _flags(plain: argparse.Namespace, base: argparse.Namespace) -> list[str]:
    """The flags that turn `base` into `plain`."""
    wanted, at_base = options.configuration(vars(plain)), options.configuration(vars(base))
    wanted |= {name: getattr(plain, name) for name in REPEATED}
    at_base |= {name: getattr(base, name) for name in REPEATED}
    words: list[str] = []
    for flag in options.train_flags():
        value = wanted.get(flag.dest)
        if value is not None and value != at_base.get(flag.dest, getattr(base, flag.dest)):
            words += [flag.spellings[0], *_spelled(flag, value)]
    return words


def _spelled(flag: Flag, value: Any) -> list[str]:
    if flag.kind is SWITCH:
        return []
    if isinstance(value, tuple | list):
        return ["=".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value]
    return [str(value)]
