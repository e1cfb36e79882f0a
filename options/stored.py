"""Options that a run has kept: read back, compared with others, continued."""

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
"""The options that are pairs of a name and a value."""


def plain(args: Options) -> dict[str, Any]:
    """The options as JSON and `weights_only` know them."""
    return {
        name: [list(item) for item in value] if name in PAIRS else value
        for name, value in vars(args).items()
    }


def kept(stored: Mapping[str, Any]) -> Options:
    """The options of a run, as args.json or a checkpoint keeps them.

    An option that the run's version of the code did not have gets the value by which that version
    worked (`Flag.before`).

    Raises:
        InputError: an option has a value that its flag cannot have: the run's file is damaged.
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
    # A run of another version may name a data set or a model that there is not here.
    with contextlib.suppress(InputError):
        args = resolved(args)
    return args


def _check_undamaged(stored: Mapping[str, Any]) -> None:
    """Raises InputError where something is kept that no run can have written."""
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
    """Whether the value is of the flag's kind; which words are allowed may differ by version."""
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
    text = "1" if value == math.inf else str(value)  # older versions took inf for a number
    try:
        parsed = kind.parse(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return isinstance(value, int | float if isinstance(parsed, float) else type(parsed))


# --- comparing runs -------------------------------------------------------------------------------


def settings(stored: Mapping[str, Any], *less: Change) -> dict[str, Any]:
    """Option → value, of the options of a run that something reads.

    Args:
        stored: as a run keeps them. less: the kinds of flags that are left out.
    """
    args = kept(stored)
    return {
        entry.dest: _spelt(entry, getattr(args, entry.dest))
        for entry in train_flags()
        if entry.change not in less and entry.is_read(args)
    }


def _spelt(entry: Flag, value: Any) -> Any:
    """A value in the one spelling that it is compared in."""
    if value is not None and entry.spelt is not None:
        with contextlib.suppress(InputError):  # a name of another version
            value = entry.spelt(value)
    return _hashable(value)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def configuration(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What runs that differ in the seed alone have in common, wherever their images lay."""
    found = settings(stored, Change.SEED, Change.LABEL, Change.NOTHING)
    with contextlib.suppress(InputError):  # a data set of another version
        found["dataset"] = dataset.find(found["dataset"]).name
    return found


def same_training(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What all starts of one run have in common, those that continue it too."""
    return settings(stored, Change.CONTINUED, Change.LABEL, Change.NOTHING)


def same_command(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What two starts of a run by the same command have in common, for `--resume auto`."""
    # It is looked for in --LOG_DIR, which may itself have been moved.
    return {k: v for k, v in settings(stored, Change.NOTHING).items() if k != "LOG_DIR"}


def same_words(stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """The flags that were given when the run was begun, for `--resume auto`; None: not kept.

    Unlike `same_command`, it is the same in versions of the code that have other defaults.
    """
    if "given" not in stored:
        return None
    known = {**kept(stored).__dict__, "LOG_DIR": None, "resume": None}
    said = (entry for entry in train_flags() if entry.change is not Change.NOTHING)
    return {e.dest: _spelt(e, known[e.dest]) for e in said if e.dest in stored["given"]}


def is_of(stored: Mapping[str, Any], args: Options) -> bool:
    """Whether a run was begun by this command: by the same options, or the same flags as given.

    The flags tell where the options do not: in another version of the code, and where the settings
    that suit images and machine are others today.
    """
    now = plain(args)
    return any(same(stored) == same(now) for same in (same_command, same_words))


def closeness(now: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], int]:
    """For `--resume auto`: whether a run was begun by the command with the options `now`.

    Returns:
        A function of what a run has kept: 2 where its options are the same, 1 where only the flags
        that were given are (see `is_of`), else 0. A run that was made longer since it began is
        compared by what it began with.
    """
    asked = [(2, same_command, same_command(now)), (1, same_words, same_words(now))]

    def of(stored: Mapping[str, Any]) -> int:
        begun = [{**stored, **at_first(stored)}] if at_first(stored) else []
        versions = [stored, *begun]
        return next((n for n, same, one in asked if one in map(same, versions)), 0)

    return of


# --- going on -------------------------------------------------------------------------------------


def at_first(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a later start has changed for good (the length, say), as they were at first.

    The command that began the run, in a job script for instance, still gives these values.
    """
    return stored.get("at_first", {})


def as_begun(args: Options, stored: Mapping[str, Any]) -> Options:
    """The options of a command, for going on with the run `stored` that it began.

    What the command does not give is as in the run. So is what was changed for good since the run
    began (see `lengthened`), whatever the command gives.
    """
    before, said = kept(stored), set(args.given) - at_first(stored).keys()
    unsaid = [entry.dest for entry in train_flags() if entry.change is not Change.NOTHING]
    unsaid = [name for name in unsaid if name != "LOG_DIR" and name not in said]
    return changed(args, {name: getattr(before, name) for name in unsaid})


def lengthened(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a run keeps once a start with the options `now` has continued it, and made it longer.

    The values that it began with are kept beside the new ones, for `at_first`. --max-steps stays as
    it was: it says how far one start goes.
    """
    lasting = {entry.dest for entry in train_flags() if entry.change is Change.CONTINUED}
    new = {name: now[name] for name in lasting - {"max_steps"} if name in stored}
    begun = {name: stored[name] for name, value in new.items() if value != stored[name]}
    noted = {"at_first": {**begun, **at_first(stored)}} if begun else {}
    return {**stored, **new, **noted}


def continued(args: Options, stored: Mapping[str, Any]) -> Options:
    """The options `stored` of the run that is continued, under those that are given now.

    Raises:
        InputError: a flag would change what the run is.
    """
    before = kept(stored)
    given = {name: getattr(args, name) for name in args.given}
    if "dataset" in given:
        one, other = dataset.find(before.dataset), dataset.find(given["dataset"])
        if isinstance(one, OwnData) and isinstance(other, OwnData):
            # They may have moved; whether they are the same images is seen when they are read.
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
        given[name] = getattr(before, name)  # as the run spells it
    # How far a start goes is its own business.
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
