"""The values that a search may try: ranges that flags declare, or that the user gives."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import criteria
import methods
import options
from flags import Flag, Options
from utils import InputError, nearest_names

if TYPE_CHECKING:
    import optuna

LOSS_ARGUMENT = "loss_args."
"""Prefix of a loss's argument that has no flag: `loss-args.temperature`."""
DIGITS = 3
"""Significant digits of a drawn number, in training and in tables."""


@dataclass(frozen=True)
class Range:
    """The values of one option: from `low` to `high` (whole numbers, or by factors), or `choices`.

    Attributes:
        name: the option, or `loss_args.NAME`.
        start: the value in the method's flags, for the first trial.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()
    start: Any = None

    @property
    def title(self) -> str:
        """The flag's name without dashes in front."""
        return self.name.replace("_", "-")

    @property
    def first(self) -> Any:
        """The value of the first trial: the given one, or the nearest one inside the range."""
        if self.choices:
            return self.start if self.start in self.choices else self.choices[0]
        if not isinstance(self.start, int | float):
            low, high = self.low, self.high
            return self.rounded(math.sqrt(low * high) if self.log else (low + high) / 2)
        return self.rounded(min(max(self.start, self.low), self.high))

    def rounded(self, value: Any) -> Any:
        """A drawn value as it is used for training."""
        if self.choices:
            return value
        return round(value) if self.whole else float(f"{value:.{DIGITS}g}")

    def draw(self, trial: optuna.Trial) -> None:
        """Draws a value for a trial that has none yet."""
        if self.choices:
            trial.suggest_categorical(self.name, self.choices)
        elif self.whole:
            trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        else:
            trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def words(self, value: Any) -> list[str]:
        """The flag with this value, as words of a command line."""
        text = str(value) if self.choices or self.whole else f"{value:g}"
        if self.name.startswith(LOSS_ARGUMENT):
            return [f"{self.name.removeprefix(LOSS_ARGUMENT)}={text}"]
        return [flag_named(self.name).spellings[0], text]

    def describe(self) -> str:
        """`lr 1e-05 to 0.003, by factors`."""
        if self.choices:
            return f"{self.title} {', '.join(map(str, self.choices))}"
        return f"{self.title} {self.low:g} to {self.high:g}{', by factors' if self.log else ''}"


def words_of(
    space: Sequence[Range], values: Mapping[str, Any], loss_args: Sequence[tuple[str, Any]] = ()
) -> list[str]:
    """The flags that train with these values.

    Args:
        loss_args: arguments of the loss in the method's flags, which keep their values.
    """
    words: list[str] = []
    arguments: list[str] = []
    for one in space:
        kind = arguments if one.name.startswith(LOSS_ARGUMENT) else words
        kind += one.words(values[one.name])
    if not arguments:
        return words
    searched = {argument.partition("=")[0] for argument in arguments}
    kept = [f"{name}={value}" for name, value in loss_args if name not in searched]
    return [*words, "--loss-args", *kept, *arguments]


def flag_named(name: str) -> Flag:
    """The flag of train.py that an option belongs to.

    Raises:
        InputError: there is none.
    """
    wanted = name.lstrip("-").replace("-", "_")
    known = {
        spelling.lstrip("-").replace("-", "_"): flag
        for flag in options.train_flags()
        for spelling in flag.spellings
    }
    if wanted not in known:
        raise InputError(
            f"search: {name} is not a flag of training; {nearest_names(wanted, known)}"
        )
    return known[wanted]


def declared(chosen: Options) -> list[Range]:
    """The declared ranges of the flags that these options read, and of the loss's arguments."""
    return [*_of_flags(chosen), *_of_loss(chosen)]


def _of_loss(chosen: Options) -> list[Range]:
    searched = criteria.SEARCHED.get(criteria.name_of(chosen.loss), {})
    given = dict(chosen.loss_args)
    return [
        Range(LOSS_ARGUMENT + name, *search, start=_default(chosen, name))
        for name, search in searched.items()
        if name not in given
    ]


def _default(chosen: Options, argument: str) -> Any:
    from losses import default_of  # imports torch, which a study needs later anyway

    try:
        return default_of(chosen.loss, argument)
    except ValueError as error:
        raise InputError(f"{chosen.loss}: {error}") from error


def _of_flags(chosen: Options) -> list[Range]:
    owner = {
        flag.dest: method
        for method in methods.METHODS
        for group in method.flags
        for flag in group.flags
    }
    found = []
    for flag in options.train_flags():
        if flag.search is None or not flag.is_read(chosen):
            continue
        if flag.dest in owner and not owner[flag.dest].wanted(chosen):
            continue
        if flag.argument and flag.argument in dict(chosen.loss_args):
            continue
        low, high, log = flag.search
        found.append(Range(flag.dest, low, high, log, start=getattr(chosen, flag.dest)))
    return found


def asked(name: str, value: Any, chosen: Options) -> Range:
    """A range from an entry of a study's file.

    - `[1e-5, 1e-3]`: numbers from the first to the second, by factors if both are above 0 and the
      second is at least ten times the first;
    - `[2, 4, 8]` or `["step", "cosine"]`: one of these;
    - `{low = 0.1, high = 2.0, log = false}`: numbers, by factors if `log` is true.

    Raises:
        InputError: the entry has another form, or the flag does not exist.
    """
    argument = name.lower().replace("-", "_")
    if argument.startswith(LOSS_ARGUMENT):
        key = name.split(".", 1)[1]
        dest, given = LOSS_ARGUMENT + key, dict(chosen.loss_args)
        start = given[key] if key in given else _default(chosen, key)
    else:
        dest = flag_named(name).dest
        start = getattr(chosen, dest)
    if isinstance(value, Mapping):
        if not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
            raise _unclear(name, dict(value))
        log = bool(value.get("log"))
        return _checked(name, dest, value["low"], value["high"], log, start)
    if not isinstance(value, list) or len(value) < 2:
        raise _unclear(name, value)
    numbers = all(_is_number(one) for one in value)
    if not numbers or len(value) > 2:
        return Range(dest, choices=tuple(value), start=start)
    low, high = value
    return _checked(name, dest, low, high, low > 0 and high >= 10 * low, start)


def _checked(name: str, dest: str, low: Any, high: Any, log: bool, start: Any) -> Range:
    numbers = _is_number(low) and _is_number(high) and math.isfinite(high - low)
    if not (numbers and low < high and (low > 0 or not log)):
        raise _unclear(name, [low, high])
    if _takes_fractions(dest, low, high, start):
        return Range(dest, low, high, log, start=start)
    if not (float(low).is_integer() and float(high).is_integer()):
        raise InputError(f"search: {name} takes whole numbers, which [{low}, {high}] are not")
    return Range(dest, int(low), int(high), log, whole=True, start=start)


def _takes_fractions(dest: str, low: float, high: float, start: Any) -> bool:
    """Whether a flag accepts the middle of two values, or an argument's values are fractions."""
    if dest.startswith(LOSS_ARGUMENT):
        return any(isinstance(one, float) for one in (low, high, start))
    try:
        (flag_named(dest).kind.parse or str)(str((low + high) / 2))
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unclear(name: str, value: Any) -> InputError:
    return InputError(
        f"search: {name} = {value} is not a range; give [LOW, HIGH], a list of three values or "
        "more, or {low = LOW, high = HIGH, log = true}"
    )
