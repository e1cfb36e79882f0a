"""What a flag of the command line is: its spellings, default, kind of value, and when it is read.

Every flag is declared once: a method's in its file in methods/, all others in options/.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from machine import expanded

Options = argparse.Namespace
"""The values of a command line's flags, as attributes named by `Flag.dest`."""

# --- what a flag is -------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The kind of a flag's value: how text is parsed, its name in --help, the choices."""

    parse: Callable[[str], Any] | None
    metavar: str | None = None
    choices: tuple[Any, ...] | None = None
    nargs: str | None = None
    const: Any = None


class Need(NamedTuple):
    """The condition under which a flag has an effect.

    Attributes:
        name: the condition in words, for messages: `--optimizer sgd`.
        met: whether these resolved options fulfil it.
    """

    name: str
    met: Callable[[Options], bool]


class Change(Enum):
    """What another value of a flag changes; needed to compare, find and continue runs."""

    MATTERS = "another training, with other numbers"
    CONTINUED = "other numbers, and a run that is continued may change it (its length, say)"
    SEED = "the random draws alone"
    LABEL = "what the run is called; its numbers stay"
    NOTHING = "where and how it runs and what is written; its numbers stay"


class Search(NamedTuple):
    """What a study tries for a flag: `low` to `high`, on a logarithmic scale if `log`."""

    low: float
    high: float
    log: bool = True


MATTERS, CONTINUED, SEED, LABEL, NOTHING = Change

AS_TODAY: Any = object()
"""`Flag.before` of a flag whose default is what the program did before the flag existed."""


@dataclass(frozen=True)
class Flag:
    """One flag of a command.

    Attributes:
        spellings: `--loss --use_loss`; the first one names the option.
        default: the option's value if the flag is not given.
        kind: what values it takes.
        help: the sentence in --help.
        need: the condition under which it has an effect; None means always.
        argument: the name of the loss's argument that it sets, if it sets one.
        shown: the default in words, for --help, if it depends on other options.
        change: what another value changes.
        dead: whether it is accepted but has no effect.
        before: the option's value in runs that began before this flag existed.
        local: whether processes that train together may have different values of it.
        search: what a study tries if the flag has an effect.
        spelt: value → the one spelling in which values are compared, if they have several.
    """

    spellings: tuple[str, ...]
    default: Any
    kind: Kind
    help: str
    need: Need | None = None
    argument: str | None = None
    shown: str | None = None
    change: Change = Change.MATTERS
    dead: bool = False
    before: Any = AS_TODAY
    local: bool = False
    search: Search | None = None
    spelt: Callable[[Any], Any] | None = None

    @cached_property  # reading the options of one run asks each flag several times
    def dest(self) -> str:
        """The name of its attribute: the first spelling."""
        return self.spellings[0].lstrip("-").replace("-", "_")

    def is_read(self, args: Options) -> bool:
        """Whether it has an effect with these options."""
        return self.need is None or self.need.met(args)


class Group(NamedTuple):
    """Flags under one heading of --help; `about` is a sentence about all of them."""

    title: str
    flags: tuple[Flag, ...]
    about: str | None = None


def flag(spellings: str, default: Any, kind: Kind, help: str, **more: Any) -> Flag:
    """A `Flag`; `spellings` are separated by spaces, the first names the option."""
    return Flag(tuple(spellings.split()), default, kind, help, **more)


# --- kinds of values ------------------------------------------------------------------------------

LARGEST = 2**63 - 1  # the largest integer that torch can hold


def whole(least: int) -> Callable[[str], int]:
    """A whole number not below `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below the smallest useful value, {least}")
        if value > LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is above the largest number, {LARGEST}")
        return value

    return parse


def number(
    least: float = -float("inf"), most: float = float("inf"), *, above: bool = False
) -> Callable[[str], float]:
    """A finite number from `least` (or `above` it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        inside = (least < value if above else least <= value) and value <= most
        if not (inside and math.isfinite(value)):
            low = f"above {least:g}" if above else f"from {least:g}"
            raise argparse.ArgumentTypeError(
                f"{text} is out of range ({low}{'' if most == float('inf') else f' to {most:g}'})"
            )
        return value

    return parse


def truth(text: str) -> bool:
    """`True`, `1`, `yes` → True; `False`, `0`, `no` → False."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return known[text.lower()]


def binary(text: str) -> int:
    """0 or 1, also written as `truth` reads it."""
    try:
        return int(truth(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1") from None


def key_value(text: str) -> tuple[str, Any]:
    """`gamma=80` → ("gamma", 80): numbers and true/false are converted, other values stay text."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    for convert in (int, float):
        try:
            return key, convert(value)
        except ValueError:
            continue
    return key, value


def key_values(text: str) -> tuple[str, Any]:
    """As `key_value`; `depths=1,1,2` → ("depths", (1, 1, 2))."""
    key, value = key_value(text)
    if not isinstance(value, str) or "," not in value:
        return key, value
    return key, tuple(key_value(f"{key}={part}")[1] for part in value.split(",") if part)


def one_of(*choices: Any) -> Kind:
    """One of a few words or numbers."""
    return Kind(type(choices[0]), choices=choices)


def any_text(metavar: str) -> Kind:
    """Any text."""
    return Kind(str, metavar)


def a_path(metavar: str) -> Kind:
    """A file or folder; `~` is the home folder even if no shell has expanded it (`--flag=~/x`)."""
    return Kind(expanded, metavar)


def a_place(path: str) -> str:
    """The shortest spelling of a path: `./photos/` → `photos`; other words stay unchanged."""
    return os.path.normpath(path)


def in_order(values: Sequence[Any]) -> tuple[Any, ...]:
    """Sorts values, or pairs of a name and a value; of several with one name the last counts."""
    named = {value[0] if isinstance(value, list | tuple) else value: value for value in values}
    return tuple(named[name] for name in sorted(named))


def a_data_set(text: str) -> str:
    """A name, or `folder:PATH` or `csv:PATH`, in which `~` is the home folder."""
    kind, colon, path = text.partition(":")
    return f"{kind}:{expanded(path)}" if colon else text


def positive(metavar: str) -> Kind:
    """A number above 0."""
    return Kind(number(0.0, above=True), metavar)


def not_negative(metavar: str) -> Kind:
    """A number from 0 on."""
    return Kind(number(0.0), metavar)


COUNT = Kind(whole(1), "N")
COUNT_OR_ZERO = Kind(whole(0), "N")
EPOCHS = Kind(whole(1), "EPOCHS")
SHARE = Kind(number(0.0, 1.0), "F")
BINARY = Kind(binary, choices=(0, 1))
SWITCH = Kind(truth, nargs="?", const=True)  # `--flag`, or as some commands have it `--flag=True`
TRUTH = Kind(truth, "True|False")
