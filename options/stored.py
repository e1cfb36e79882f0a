"""The options that a run has stored: reading, comparing and continuing them."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import dataset
from dataset.own import OwnData
from flags import AS_TODAY, SWITCH, Change, Flag, Kind, Options, key_value, key_values
from options.declared import train_flags
from options.meaning import changed, check_metrics, resolved, unread, useless
from utils import InputError

PAIRS = ("loss_args", "model_args")
"""Options whose values are pairs of a name and a value."""
BESIDE = ("given", "recipe", "chosen", "at_first", "command")
"""What a run stores beside its options; only the first versions stored the last one."""


def plain(args: Options) -> dict[str, Any]:
    """The options as values that JSON and `weights_only` can hold."""
    return {
        name: [list(item) for item in value] if name in PAIRS else value
        for name, value in vars(args).items()
    }


def kept(stored: Mapping[str, Any]) -> Options:
    """The options of a run, as args.json or a checkpoint keeps them.

    An option that did not exist yet in the run's version of the code gets the value that describes
    what that version did (`Flag.before`).

    Raises:
        InputError: an option has a value that its flag cannot have, so the run's file is damaged.
    """
    _check_undamaged(stored)
    defaults_then = {
        **{
            entry.dest: entry.default if entry.before is AS_TODAY else entry.before
            for entry in train_flags()
        },
        "given": [],
        "recipe": None,
        "chosen": [],
    }
    args = Options(**{**defaults_then, **stored})
    for name in PAIRS:
        setattr(args, name, tuple(tuple(item) for item in getattr(args, name)))
    # A run of another version may name a data set or a model that does not exist in this one.
    with contextlib.suppress(InputError):
        args = resolved(args)
    return args


def unknown(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that this version has no flags for, as a newer one has kept them."""
    known = {*(entry.dest for entry in train_flags()), *BESIDE}
    return {name: value for name, value in stored.items() if name not in known}


def in_words(unknown: Mapping[str, Any]) -> str:
    """Names of `unknown` options, as flags: `--this and --that`."""
    names = sorted(f"--{name.replace('_', '-')}" for name in unknown)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_undamaged(stored: Mapping[str, Any]) -> None:
    """Raises InputError if there is a value that no run can have written."""
    for entry in train_flags():
        if entry.dest in stored and not _can_have(entry, stored[entry.dest]):
            raise InputError(
                f"the option {entry.dest} of the run is {str(stored[entry.dest])[:40]!r}, which "
                f"{entry.spellings[0]} cannot be; args.json or its checkpoint is damaged, so use "
                "another copy"
            )
    recipe, given = stored.get("recipe"), stored.get("given", [])
    words = [*given, recipe or ""] if isinstance(given, list | tuple) else [given]
    if not all(isinstance(word, str) for word in words):
        raise InputError(
            "the flags that the run was given are not words; args.json or its checkpoint is "
            "damaged, so use another copy"
        )
    if not isinstance(stored.get("at_first", {}), dict):
        raise InputError(
            "what the run began with is not a list of options; args.json or its checkpoint is "
            "damaged, so use another copy"
        )


def _can_have(entry: Flag, value: Any) -> bool:
    """Whether the value is of the flag's kind; allowed words may differ between versions."""
    kind = entry.kind
    if value is None or kind is SWITCH:
        return value is entry.default or isinstance(value, bool)
    if kind.nargs not in ("+", "*"):
        return _is_of(kind, value)
    if not isinstance(value, list | tuple):
        return False
    if kind.parse in (key_value, key_values):
        return all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
    return all(_is_of(kind, item) for item in value)


def _is_of(kind: Kind, value: Any) -> bool:
    text = "1" if value == math.inf else str(value)  # older versions accepted inf as a number
    try:
        parsed = kind.parse(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return isinstance(value, int | float if isinstance(parsed, float) else type(parsed))


# --- comparing runs -------------------------------------------------------------------------------


def settings(stored: Mapping[str, Any], *less: Change) -> dict[str, Any]:
    """Option → value, of the options of a run that have an effect.

    Args:
        stored: the options as the run keeps them. less: kinds of flags to leave out.

    Options that this version does not know count too: nobody can say what they change.
    """
    args = kept(stored)
    return {name: str(value) for name, value in unknown(stored).items()} | {
        entry.dest: _spelt(entry, getattr(args, entry.dest))
        for entry in train_flags()
        if entry.change not in less and entry.is_read(args)
    }


def _spelt(entry: Flag, value: Any) -> Any:
    """A value in the spelling in which it is compared."""
    if value is not None and entry.spelt is not None:
        with contextlib.suppress(InputError):  # a name of another version
            value = entry.spelt(value)
    return _hashable(value)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def configuration(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What runs have in common that differ only in their seed, and in where their images are."""
    found = settings(stored, Change.SEED, Change.LABEL, Change.NOTHING)
    with contextlib.suppress(InputError):  # a data set of another version
        found["dataset"] = dataset.find(found["dataset"]).name
    return found


def same_training(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What all starts of one run have in common, including those that continue it."""
    return settings(stored, Change.CONTINUED, Change.LABEL, Change.NOTHING)


def same_command(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What all starts of a run by the same command have in common, for `--resume auto`."""
    # Runs are looked for in --LOG_DIR, which may have been moved.
    return {k: v for k, v in settings(stored, Change.NOTHING).items() if k != "LOG_DIR"}


def same_words(stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """The flags that were given when the run began, for `--resume auto`; None if not stored.

    Unlike `same_command`, they do not depend on the defaults of a version of the code.
    """
    if "given" not in stored:
        return None
    known = {**kept(stored).__dict__, "LOG_DIR": None, "resume": None}
    said = (entry for entry in train_flags() if entry.change is not Change.NOTHING)
    return {e.dest: _spelt(e, known[e.dest]) for e in said if e.dest in stored["given"]}


def is_of(stored: Mapping[str, Any], args: Options) -> bool:
    """Whether a run was begun by this command: whether its options, or the given flags, are equal.

    The options differ, but the given flags do not, if the code has changed its defaults, or if the
    settings that suit the images and the machine are different today.
    """
    now = plain(args)
    return any(same(stored) == same(now) for same in (same_command, same_words))


def closeness(now: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], int]:
    """For `--resume auto`: how well a run fits the command with the options `now`.

    Returns:
        A function of a run's stored options: 2 if the options are equal, 1 if only the given flags
        are (see `is_of`), else 0. A run that was made longer since it began is also compared by the
        options that it began with.
    """
    asked = [(2, same_command, same_command(now)), (1, same_words, same_words(now))]

    def of(stored: Mapping[str, Any]) -> int:
        begun = [{**stored, **at_first(stored)}] if at_first(stored) else []
        versions = [stored, *begun]
        return next((n for n, same, one in asked if one in map(same, versions)), 0)

    return of


# --- continuing a run -----------------------------------------------------------------------------


def at_first(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The first values of options that a later start has changed for good, such as the length.

    The command that began the run, perhaps in a job script, still gives these values.
    """
    return stored.get("at_first", {})


def _check_known(stored: Mapping[str, Any]) -> None:
    """Raises InputError where a run has options of which this version would train without."""
    if names := unknown(stored):
        raise InputError(
            f"the run was begun with {in_words(names)}, which this version of the code does not "
            "know and would train without; update the code, or start a new run"
        )


def as_begun(args: Options, stored: Mapping[str, Any]) -> Options:
    """The options of a command, for continuing the run `stored` that it began.

    Options that the command does not give are taken from the run. So are those that were changed
    for good since the run began (see `lengthened`), even if the command gives them.

    Raises:
        InputError: the run has an option that this version does not know.
    """
    _check_known(stored)
    before, said = kept(stored), set(args.given) - at_first(stored).keys()
    unsaid = [entry.dest for entry in train_flags() if entry.change is not Change.NOTHING]
    unsaid = [name for name in unsaid if name != "LOG_DIR" and name not in said]
    return changed(args, {name: getattr(before, name) for name in unsaid})


def lengthened(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The options to store once a start with the options `now` has continued the run.

    Where they change its length for good, the first values are kept for `at_first`. --max-steps
    stays as it was, because it only says how far one start goes.
    """
    lasting = {entry.dest for entry in train_flags() if entry.change is Change.CONTINUED}
    new = {name: now[name] for name in lasting - {"max_steps"} if name in stored}
    begun = {name: stored[name] for name, value in new.items() if value != stored[name]}
    noted = {"at_first": {**begun, **at_first(stored)}} if begun else {}
    return {**stored, **new, **noted}


def continued(args: Options, stored: Mapping[str, Any]) -> Options:
    """The options of the run to continue, with the flags of this command in their place.

    Raises:
        InputError: a flag would make it another run, or the run has an option that this version
            does not know.
    """
    _check_known(stored)
    before = kept(stored)
    given = {name: getattr(args, name) for name in args.given}
    if "dataset" in given:
        one, other = dataset.find(before.dataset), dataset.find(given["dataset"])
        if isinstance(one, OwnData) and isinstance(other, OwnData):
            # They may have moved; that they are the same images is checked when they are read.
            before = changed(before, {"dataset": given["dataset"]})
    if "steps" in given and before.steps is None:
        raise InputError(
            "--steps: the length of this run is in epochs; --epochs MORE makes it longer"
        )
    for entry in train_flags():
        name = entry.dest
        if name not in given or entry.change in (Change.CONTINUED, Change.NOTHING):
            continue
        if _spelt(entry, given[name]) != _spelt(entry, getattr(before, name)):
            raise InputError(
                f"{entry.spellings[0]} cannot change in a continued run; leave it out, or start a "
                "new run"
            )
        given[name] = getattr(before, name)  # in the run's spelling
    # These concern a single start, not the run.
    own = ("dry_run", "shard_proxies")
    now = {
        "max_steps": None,
        "resume": None,
        **{name: getattr(args, name) for name in own},
        **given,
    }
    after = changed(before, now)
    asked = changed(after, {"given": args.given})
    for entry in unread(asked, train_flags()):
        raise InputError(useless(entry))
    check_metrics(asked, [dataset.find(after.dataset)])
    return after
