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
    """Options that a run has kept; those that its version did not have are as they were then.

    Raises:
        InputError: an option has a value that its flag cannot have: the run's file is damaged.
    """
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
    unknown_then = {
        **{
            entry.dest: entry.default if entry.before is AS_TODAY else entry.before
            for entry in train_flags()
        },
        "given": [],
        "recipe": None,
        "chosen": [],
    }
    if not isinstance(stored.get("at_first", {}), dict):
        raise InputError(
            "what the run began with is not a list of options; args.json or its checkpoint is "
            "damaged, so use another copy"
        )
    args = Options(**{**unknown_then, **stored})
    for name in PAIRS:
        setattr(args, name, tuple(tuple(item) for item in getattr(args, name)))
    # A run of another version may name a data set or a model that there is not here.
    with contextlib.suppress(InputError):
        args = resolved(args)
    return args


def _can_have(entry: Flag, value: Any) -> bool:
    """Whether a flag can come out with this value; which words it takes may differ by version."""
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
    """The options that make a training what it is, without those that nobody listens to.

    Args:
        stored: as a run keeps them. less: the kinds of flags that are left out as well.
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
    """What runs share that differ in the seed alone, wherever their images were."""
    found = settings(stored, Change.SEED, Change.LABEL, Change.NOTHING)
    with contextlib.suppress(InputError):  # a data set of another version
        found["dataset"] = dataset.find(found["dataset"]).name
    return found


def same_training(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What all starts of one run share, the continued ones too."""
    return settings(stored, Change.CONTINUED, Change.LABEL, Change.NOTHING)


def same_command(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What two starts of one run share, for `--resume auto`."""
    # It is looked for in --LOG_DIR, which may itself have been moved.
    return {k: v for k, v in settings(stored, Change.NOTHING).items() if k != "LOG_DIR"}


def same_words(stored: Mapping[str, Any]) -> dict[str, Any] | None:
    """What stood on the command line of a start, for `--resume auto`; None where that is not kept.

    Two versions may differ in what they do where nothing is said.
    """
    if "given" not in stored:
        return None
    known = {**kept(stored).__dict__, "LOG_DIR": None, "resume": None}
    said = (entry for entry in train_flags() if entry.change is not Change.NOTHING)
    return {e.dest: _spelt(e, known[e.dest]) for e in said if e.dest in stored["given"]}


def is_of(stored: Mapping[str, Any], args: Options) -> bool:
    """Whether a run was begun by this command: by its options, or by its words in another version.

    Its words also tell where settings that suit images and machine come out otherwise today.
    """
    now = plain(args)
    return any(same(stored) == same(now) for same in (same_command, same_words))


def closeness(now: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], int]:
    """For `--resume auto`: tells of what a run has kept whether this command began it.

    Returns:
        A function: 2 by its options, 1 by its words alone, 0 where it did not. A run that was made
        longer since then is still the command's.
    """
    asked = [(2, same_command, same_command(now)), (1, same_words, same_words(now))]

    def of(stored: Mapping[str, Any]) -> int:
        begun = [{**stored, **at_first(stored)}] if at_first(stored) else []
        versions = [stored, *begun]
        return next((n for n, same, one in asked if one in map(same, versions)), 0)

    return of


# --- going on -------------------------------------------------------------------------------------


def at_first(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a run began with of that which later starts have changed for good, such as its length.

    The command that began it, in a job script for instance, says this for ever.
    """
    return stored.get("at_first", {})


def as_begun(args: Options, stored: Mapping[str, Any]) -> Options:
    """The options of a command, and of the run that it began where it says nothing.

    What was changed for good since then (see `lengthened`) stays so, whatever the command says.
    """
    before, said = kept(stored), set(args.given) - at_first(stored).keys()
    unsaid = [entry.dest for entry in train_flags() if entry.change is not Change.NOTHING]
    unsaid = [name for name in unsaid if name != "LOG_DIR" and name not in said]
    return changed(args, {name: getattr(before, name) for name in unsaid})


def lengthened(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a run has kept, with what a start of it that goes on has changed for good.

    What it began with is kept beside them, for `at_first`. How far this start goes (--max-steps) is
    not part of it.
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
