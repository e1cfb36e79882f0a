"""Was the method worth it: the same training without it, found beside a run or as a command."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from typing import Any

import options
from metrics import comparison
from page import records
from page.document import percent
from page.records import ATTACHED, Record
from routines import PER_CLASS
from runs import INCIDENTAL, RunFolder
from utils import InputError

WITHOUT: dict[str, dict[str, Any]] = {
    "disentangled": {"disent": False},
    "introspective": {"introspective": None, "mixup": 0.0},
    "sec": {"sec_wei": 0.0},
    "l2": {"l2reg_wei": 0.0},
    "masks": {"nb_clusters": None},
}
RATES = ("lr", "lr_p")  # each method may have its own
BESIDES = {*comparison.INCIDENTAL, *INCIDENTAL, *RATES}
REPEATED = ("seed", "LOG_DIR", "data_root", *RATES)  # said in the command all the same


def without_method(record: Record) -> tuple[str, argparse.Namespace] | None:
    """What a run adds to a plain loss, and the options of the same training without it.

    All that is attached is taken away; of AMLoss alone remains Proxy-Anchor. None for a run that
    adds nothing.
    """
    args = record.options
    attached = record.attached
    if attached:
        changed = {key: value for name in attached for key, value in WITHOUT[name].items()}
        if "masks" in attached and not args.IPC:
            changed["IPC"] = PER_CLASS
        words = " and ".join(ATTACHED[name] for name in attached)
    elif args.loss == "AMLoss":
        changed, words = {"loss": "Proxy_Anchor"}, "learning the margins"
    else:
        return None
    plain = argparse.Namespace(**{**vars(args), **changed})
    for flag in options.train_flags():  # in order: some belong to others that come before them
        if not flag.is_read(plain):
            setattr(plain, flag.dest, flag.default)
    return words, plain


def sentence(record: Record) -> str:
    """Whether the method was worth it, by its counterpart's R@1; where none ran, how to run it."""
    made = without_method(record)
    own = _recall(record)
    if made is None or own is None:
        return ""
    words, plain = made
    found = _beside(record, plain)
    if found is not None:
        other = _recall(found) or 0.0
        return (
            f"Was it worth it? The same training without {words} ({_described(found, record)}) has "
            f"R@1 {percent(other)} %, {100 * abs(own - other):.1f} points "
            f"{'less' if other <= own else 'more'}. How sure that is, query by query, and in "
            f"pictures: `python report.py {found.path} {record.path}`."
        )
    command = _command(record, plain)
    if command is None:
        return ""
    folder = record.path.parent / _plain_name(record)
    return (
        f"Was it worth it? The same training without {words} tells: `{command}`, and then "
        f"`python report.py {folder} {record.path}`."
    )


def _recall(record: Record) -> float | None:
    return next(iter(record.results.values()), {}).get("R@1") if record.outcome else None


def _described(found: Record, record: Record) -> str:
    args, own = found.options, record.options
    differing = [f"seed {args.seed}"] if args.seed != own.seed else []
    differing += [f"learning rate {args.lr:g}"] if args.lr != own.lr else []
    return ", ".join([found.name, *differing])


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that make a training what it is, those that nobody listens to left out."""
    found = {}
    for flag in options.train_flags():
        if flag.dest not in BESIDES and flag.is_read(args):
            value = getattr(args, flag.dest)
            found[flag.dest] = tuple(value) if isinstance(value, list) else value
    return found


def _beside(record: Record, plain: argparse.Namespace) -> Record | None:
    """A finished run in the same folder with the options `plain`, preferably of the same seed."""
    wanted = _settings(plain)
    found = [other for other in _siblings(record, wanted) if _recall(other) is not None]
    own = record.options
    return min(found, key=lambda o: (o.options.seed != own.seed, o.options.seed), default=None)


def _siblings(record: Record, wanted: dict[str, Any]) -> Iterator[Record]:
    """The runs in the same folder that have results and the settings `wanted`."""
    for file in sorted(record.path.resolve().parent.glob("*/results.json")):
        path = record.path.parent / file.parent.name
        # A folder that something else has damaged is not this page's business.
        with contextlib.suppress(InputError, OSError):
            # The options alone tell most apart; the rest of a run is read for those that match.
            if _settings(records.with_defaults(RunFolder(path).read_args())) == wanted:
                yield records.read(path)


def _plain_name(record: Record) -> str:
    return f"{record.name}-plain"


def _command(record: Record, plain: argparse.Namespace) -> str | None:
    """A command that trains `plain`, from the run's recipe where that can be; None if none does."""
    for file in ([f"@{plain.recipe}"] if plain.recipe else []), []:
        words = _with_loss(file, plain.loss)
        # It knows what the loss brings along: its authors' optimiser, say.
        base = records.parsed(words)
        if base is None:
            continue
        wanted = _asked(plain, base)
        words += _flags(wanted, base)
        again = records.parsed(words)
        if again is not None and _settings(again) == _settings(wanted):
            words += ["--name", _plain_name(record)]
            return f"python train.py {shlex.join(words)}"
    return None


def _with_loss(file: list[str], loss: str) -> list[str]:
    base = records.parsed(file)
    named = base is not None and base.loss == loss
    return [*file, *([] if named else ["--loss", loss])]


def _asked(plain: argparse.Namespace, base: argparse.Namespace) -> argparse.Namespace:
    """The options as they were asked for: without what the data and the network filled in."""
    kept = {
        name: getattr(plain, name) if name in plain.given or value is not None else value
        for name, value in vars(base).items()
    }
    return argparse.Namespace(**kept)


def _flags(wanted: argparse.Namespace, base: argparse.Namespace) -> list[str]:
    """The flags that turn `base` into `wanted`."""
    settings = _settings(wanted) | {name: getattr(wanted, name) for name in REPEATED}
    words: list[str] = []
    for flag in options.train_flags():
        value = settings.get(flag.dest)
        if value is not None and value != getattr(base, flag.dest):
            words += [flag.spellings[0], *_spelled(flag, value)]
    return words


def _spelled(flag: options.Flag, value: Any) -> list[str]:
    if flag.kind is options.SWITCH:
        return []
    if isinstance(value, tuple | list):
        return ["=".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value]
    return [str(value)]
