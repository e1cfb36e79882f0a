"""The plan of a study, from a TOML file or the flags of study.py; checked before anything runs.

flags = "--dataset folder:photos"
folds = 3
trials = 12
seeds = 5
[methods]
"Proxy-Anchor" = "--loss Proxy_Anchor"
AMLoss = "--loss AMLoss"
"""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import options
from flags import Options
from machine import expanded
from options.files import MOST_BYTES
from storage import read_text
from studies.space import LOSS_ARGUMENT, Range, asked, declared, flag_named, words_of
from utils import InputError, nearest_names

OWN_FLAGS = {
    "LOG_DIR": "logs",
    "name": "name",
    "seed": "seeds",
    "val_fold": "folds",
    "val_folds": "folds",
    "val_classes": "folds",
    "folds": "folds",
    "resume": "",
    "resume_run": "",
    "no_test": "",
    "dry_run": "",
}
"""Flags that a study sets itself, and the entry of its file to be used instead."""
KINDS = {
    "name": str, "flags": (str, list), "folds": int, "trials": int, "seeds": int, "metric": str,
    "prune": bool, "logs": str, "methods": (dict, list), "search": dict, "fixed": list,
    "compare": list,
}  # fmt: skip
IN_WORDS = {
    str: "text", (str, list): "text or a list", int: "a whole number", bool: "true or false",
    (dict, list): "a table or a list", dict: "a table", list: "a list",
}  # fmt: skip
"""Descriptions of the kinds, for messages."""
TAKEN = ("claims", "plan.json", "trials.log", "trials.csv", "runs.csv", "study.html", "study.tex")
"""Names in the folder of a study, which the folder of a method cannot have."""
METRICS = ("R@1", "RP", "MAP@R", "MRR")
LEAST = {"folds": 2, "trials": 1, "seeds": 2}
TEST_CLASSES = ("dataset", "eval_classes", "split_seed")
"""The options that determine the classes on which methods are judged."""


@dataclass(frozen=True)
class Entrant:
    """One method of a study.

    Attributes:
        name: in tables. flags: of train.py; those that all methods share come first.
        space: the searched options. loss_args: arguments of the loss in the flags.
        settings: flags of all its trainings that suit the images and the machine on which the study
            was begun; see `settings_of`.
    """

    name: str
    flags: tuple[str, ...]
    space: tuple[Range, ...]
    loss_args: tuple[tuple[str, Any], ...] = ()
    settings: tuple[str, ...] = ()

    def command(self, values: Mapping[str, Any]) -> list[str]:
        """The flags of train.py that train it with these values of the searched options."""
        searched = words_of(self.space, values, self.loss_args)
        return [*self.flags, *self.settings, *searched]

    def settled(self, settings: Sequence[str]) -> Entrant:
        """The method with these settings, at which its search starts, too."""
        if not settings:
            return replace(self, settings=())
        chosen = parsed([*self.flags, *settings], self.name)
        space = [replace(one, start=getattr(chosen, one.name, one.start)) for one in self.space]
        return replace(self, space=tuple(space), settings=tuple(settings))

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return "".join(c if c.isalnum() or c in "-+." else "_" for c in self.name)


@dataclass(frozen=True)
class Plan:
    """A study.

    Attributes:
        name: of its folder in `logs`. folds: number of parts of the training classes, each of which
            a trial leaves out in turn. trials: per method. seeds: runs per method.
        metric: by which trials are judged.
        prune: whether a trial that falls behind the others of its method is stopped early.
        compare: pairs of methods, the second to be tested against the first, in addition to tests
            of all against the study's first. dataset: on which all are trained and judged.
    """

    name: str
    entrants: tuple[Entrant, ...]
    folds: int = 3
    trials: int = 8
    seeds: int = 5
    metric: str = "MAP@R"
    prune: bool = True
    logs: str = "logs"
    compare: tuple[tuple[str, str], ...] = ()
    dataset: str = ""

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.logs) / self.name

    def flags_of_fold(self, fold: int) -> list[str]:
        """The flags of train.py that leave out a fold of the training classes."""
        flags = f"--val-folds {self.folds} --val-fold {fold} --no-test --metrics retrieval --seed 0"
        return flags.split()

    @property
    def identity(self) -> dict[str, Any]:
        """Entries that must not change within a study; trials, seeds and methods may be added."""
        return {
            "folds": self.folds,
            "metric": self.metric,
            "methods": {
                one.name: {"flags": list(one.flags), "space": [r.describe() for r in one.space]}
                | ({"settings": list(one.settings)} if one.settings else {})
                for one in self.entrants
            },
        }


def read(path: Path) -> Plan:
    """The plan in a TOML file.

    Raises:
        InputError: it cannot be read, or an entry is wrong.
    """
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        content = tomllib.loads(read_text(path, MOST_BYTES))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"{path} cannot be read ({why}); give a study's TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    return of(content, default_name=path.stem, source=str(path))


def of(content: Mapping[str, Any], *, default_name: str, source: str) -> Plan:
    """The plan that the entries of a file, or of a command line, describe.

    Raises:
        InputError: an entry is unknown, of the wrong kind, or impossible; its sentence begins with
            `source`.
    """
    try:
        return _plan(content, default_name)
    except InputError as error:
        raise type(error)(f"{source}: {error}") from error


def _plan(content: Mapping[str, Any], default_name: str) -> Plan:
    _check_entries(content)
    name = content.get("name", default_name)
    if Path(name).name in ("", ".."):
        raise InputError(f"name = {name!r} is not a folder's name; give another")
    shared = words(content.get("flags", ""))
    flags = {
        name: _joined(shared, words(own)) for name, own in _methods(content["methods"]).items()
    }
    chosen = {name: parsed(own, name) for name, own in flags.items()}
    _check_alike(chosen)
    found = {n: _entrant(n, own, chosen[n], content) for n, own in flags.items()}
    _check_read(content, found.values())
    entrants = _without_fixed(found, content)
    _check_folders(entrants)
    given = ("folds", "trials", "seeds", "metric", "prune")
    return Plan(
        name,
        tuple(entrants),
        logs=expanded(content.get("logs", "logs")),
        compare=_pairs(content, [one.name for one in entrants]),
        dataset=next(iter(chosen.values())).dataset,
        **{entry: content[entry] for entry in given if entry in content},
    )


def _check_entries(content: Mapping[str, Any]) -> None:
    """Raises InputError for an entry that is unknown, of the wrong kind or out of range."""
    for entry, value in content.items():
        if entry not in KINDS:
            raise InputError(f"unknown entry {entry}; {nearest_names(entry, KINDS)}")
        if not isinstance(value, KINDS[entry]) or (KINDS[entry] is int and value is True):
            raise InputError(f"{entry} = {value!r} is not {IN_WORDS[KINDS[entry]]}; give that")
    for entry, least in LEAST.items():
        if content.get(entry, least) < least:
            raise InputError(f"{entry} = {content[entry]} is below {least}")
    if content.get("metric", METRICS[0]) not in METRICS:
        raise InputError(f"metric is one of {', '.join(METRICS)}")
    if not content.get("methods"):
        raise InputError(
            "it names no methods; add [methods] with a line such as "
            'AMLoss = "--loss AMLoss", one per method'
        )


def _check_folders(entrants: Iterable[Entrant]) -> None:
    """Raises InputError if methods do not have distinct, possible names of folders."""
    taken = set()
    for one in entrants:
        folder = one.folder.lower()
        if not folder.strip(".") or folder in TAKEN:
            raise InputError(f"a method cannot be called {one.name!r}; rename it")
        if folder in taken:
            raise InputError(f"two methods would have the same folder ({one.folder}); rename one")
        taken.add(folder)


def _pairs(content: Mapping[str, Any], names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The pairs of methods in the entry `compare`."""
    pairs = content.get("compare", [])
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and pair[0] != pair[1]):
            raise InputError(
                f'compare holds {pair!r}; give pairs of methods: compare = [["MS", "MS + SEC"]]'
            )
        for name in pair:
            if name not in names:
                raise InputError(
                    f"compare: {name} is not a method here; {nearest_names(str(name), names)}"
                )
    return tuple(dict.fromkeys((a, b) for a, b in pairs))


def _methods(given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Name → flags, from the entry `methods`; in a list, a bare word is a loss, or `@RECIPE`.

    Raises:
        InputError: a method is neither text nor a list.
    """
    if isinstance(given, Mapping):
        for name, flags in given.items():
            if name in KINDS:  # TOML ends a table at the next one, and nowhere else
                raise InputError(f"{name} is below [methods], among the methods; move it above")
            if not isinstance(flags, str | list):
                raise InputError(
                    f"the method {name} = {flags!r} does not hold flags; write "
                    f'{name} = "--loss AMLoss"'
                )
        return dict(given)
    found = {}
    for line in given:
        if not isinstance(line, str) or not line.strip():
            raise InputError(f"{line!r} is not a method; give losses by name, or flags of training")
        bare = not line.split()[0].startswith(("-", "@"))
        name = line if bare else line.removeprefix("--loss ")
        if name in found:
            raise InputError(f"the method {name} is listed twice; leave one out")
        found[name] = f"--loss {line}" if bare else line
    return found


def words(flags: str | Sequence[str]) -> list[str]:
    """Flags as words; text is split as by a shell.

    Raises:
        InputError: a quotation mark is not closed.
    """
    if not isinstance(flags, str):
        return [str(word) for word in flags]
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise InputError(f"{flags}: {error}") from error


def _joined(shared: Sequence[str], own: Sequence[str]) -> list[str]:
    """The flags of a method: files of flags first, because flags that are written out override."""
    first = list(takewhile(_is_file, shared))
    files = [word for word in own if _is_file(word)]
    written = [word for word in own if not _is_file(word)]
    return [*first, *files, *shared[len(first) :], *written]


def _is_file(word: str) -> bool:
    return word.startswith("@")


def _check_alike(chosen: Mapping[str, Options]) -> None:
    """Raises InputError if methods would be judged on different classes."""
    (first, usual), *others = chosen.items()
    for name, other in others:
        for option in TEST_CLASSES:
            one, two = getattr(usual, option), getattr(other, option)
            if one != two:
                flag = flag_named(option).spellings[0]
                raise InputError(
                    f"{first} has {flag} {one} and {name} has {flag} {two}; methods can "
                    "be compared on the same test classes only: give it once, in flags"
                )


def _entrant(name: str, flags: list[str], chosen: Options, content: Mapping[str, Any]) -> Entrant:
    for given in chosen.given:
        _check_own(given, name)
    if "wandb" in chosen.given and chosen.wandb != "disabled":
        raise InputError(f"{name}: a study's trainings do not use wandb; leave it out")
    own = {one.name: one for one in declared(chosen)}
    search = content.get("search", {})
    for key, value in search.items():
        if _is_of_method(value):
            known = _methods(content["methods"])
            if key not in known:
                raise InputError(f"[search.{key}] is of no method; {nearest_names(key, known)}")
            if key == name:
                own |= {r.name: r for r in (_asked(k, v, chosen) for k, v in value.items())}
            continue
        one = _asked(key, value, chosen)
        if one.name in own or _is_read(one, chosen):
            own[one.name] = one
    made = Entrant(name, tuple(flags), tuple(own.values()), tuple(chosen.loss_args))
    if search:
        _try(made)
    return made


def _asked(key: str, value: Any, chosen: Options) -> Range:
    """The range of an entry of `search`.

    Raises:
        InputError: it is not a range, or is that of an option that must not differ.
    """
    one = asked(key, value, chosen)
    _check_own(one.name, "search")
    if one.name in TEST_CLASSES:
        raise InputError(
            f"search: {key} decides what methods are judged on; give it once, in flags"
        )
    return one


def _check_own(option: str, what: str) -> None:
    """Raises InputError for an option that a study sets itself."""
    if option in OWN_FLAGS:
        entry = OWN_FLAGS[option]
        instead = f"; use its entry {entry}" if entry else "; leave it out"
        raise InputError(f"{what}: --{option.replace('_', '-')} is the study's own{instead}")


def _check_read(content: Mapping[str, Any], entrants: Iterable[Entrant]) -> None:
    """Raises InputError if an option that is searched for all methods is read by none."""
    read = {one.name for entrant in entrants for one in entrant.space}
    for key, value in content.get("search", {}).items():
        if _is_of_method(value):
            continue
        argument = key.lower().replace("-", "_").startswith(LOSS_ARGUMENT)
        if not argument and flag_named(key).dest not in read:
            raise InputError(f"search: no method here reads {key}; leave it out")


def _is_of_method(value: Any) -> bool:
    """Whether an entry of `search` is the table of one method, rather than a range."""
    return isinstance(value, Mapping) and not {"low", "high"} & value.keys()


def _try(entrant: Entrant) -> None:
    """Raises InputError if train.py refuses a value that may be tried: a choice, or an end.

    All options are given together, as in trials.
    """
    tried = {one.name: one.choices or (one.rounded(one.low), one.rounded(one.high))
             for one in entrant.space}  # fmt: skip
    for turn in range(max(map(len, tried.values()), default=0)):
        values = {name: some[min(turn, len(some) - 1)] for name, some in tried.items()}
        parsed(entrant.command(values), f"{entrant.name}: search")


def _without_fixed(found: Mapping[str, Entrant], content: Mapping[str, Any]) -> list[Entrant]:
    """The methods without the searched options in the entry `fixed`.

    Raises:
        InputError: such an option does not exist.
    """
    searched = {one.name for entrant in found.values() for one in entrant.space}
    flags = {flag.dest for flag in options.train_flags()}
    fixed = set()
    for given in content.get("fixed", []):
        name = str(given).lstrip("-").replace("-", "_")
        if name not in searched | flags:
            known = sorted(one.replace("_", "-") for one in searched)
            near = nearest_names(str(given), known)
            raise InputError(f"fixed: {given!r} is searched by no method; {near}")
        fixed.add(name)
    return [
        replace(one, space=tuple(r for r in one.space if r.name not in fixed))
        for one in found.values()
    ]


def _is_read(one: Range, chosen: Options) -> bool:
    """Whether a method reads an option that is searched for all methods."""
    if "." in one.name:
        return True
    (flag,) = (flag for flag in options.train_flags() if flag.dest == one.name)
    return flag.is_read(chosen)


def settings_of(entrant: Entrant, folds: int) -> list[str]:
    """Flags, beyond those that are given, that suit the images and this machine.

    All trainings of a method have the same ones, on whatever machine: those that `--val-fold 0`
    would choose here, with which each is evaluated several times. The network's learning rate is
    left out, because it follows that of the head, which is searched.
    """
    words = [*entrant.flags, "--val-folds", str(folds), "--val-fold", "0"]
    chosen = parsed(words, entrant.name)
    if chosen.defaults != "suited":
        return []
    flags_and_values = [word for line, _ in chosen.chosen for word in line.split()]
    settings = dict(zip(flags_and_values[::2], flags_and_values[1::2], strict=True))
    if "decode" not in chosen.given:
        settings["--decode"] = chosen.decode  # not among `chosen` if the disk is full
    for searched in ("--lr", "--lr_p"):
        settings.pop(searched, None)
    kept = [(flag, value) for flag, value in settings.items() if flag_named(flag).is_read(chosen)]
    return ["--defaults", "suited", *(word for pair in kept for word in pair)]


def parsed(flags: Sequence[str], what: str) -> Options:
    """The options that train.py parses from flags.

    Raises:
        InputError: train.py refuses them; the sentence begins with `what`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return options.parse_train(list(flags))
    except SystemExit as stop:
        reason = said.getvalue().strip().removeprefix("error: ").removesuffix(" (see --help)")
        raise InputError(f"{what}: {reason or 'its flags are refused'}") from stop
