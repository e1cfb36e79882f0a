"""The floors of the house: imports go down only, in no circle, and --help loads no torch.

Imports are read from the source, those inside functions and under TYPE_CHECKING included: what a
name is needed for makes no difference to who has to know whom.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, run_python

FRONT_DOORS = "train evaluate report search study"
FLOORS = (
    "utils terminal bars storage flags devices machine door kernels",
    "processes runs criteria metrics",
    "losses dataset",
    "net",
    "methods",
    "options",
    "evaluation",
    "index",
    "page training serving",
    "sharing studies",
    f"{FRONT_DOORS} anchorage",
)
"""The rooms (top-level modules and packages) by floor, from the ground up. Rooms of one floor may
know each other, as long as they form no circle. `ROOM/__main__.py` is a front door as well."""

REACHES_UP = ("net", "load_run", "evaluation.inference")
"""`from net import load_run` is a promise of the README: a name looked up on demand, which none of
our own modules may use."""

BUILDS_THE_PACKAGE = "hatch_build.py"
NOT_OF_THE_HOUSE = {"tests", "benchmarks", "scripts", "docs", "data", "logs", "recipes", "wandb"}


class Import(NamedTuple):
    """`module` needs `target`, another module of ours."""

    module: str
    target: str
    place: str


# --- reading the source ---------------------------------------------------------------------------


def modules_of(root: Path) -> dict[str, Path]:
    """Dotted name → file, of every module of ours."""
    files = [
        *(path for path in root.glob("*.py") if path.name != BUILDS_THE_PACKAGE),
        *(
            path
            for folder in root.iterdir()
            if folder.is_dir() and folder.name.isidentifier()
            if folder.name not in NOT_OF_THE_HOUSE
            for path in folder.rglob("*.py")
        ),
    ]
    names = [file.relative_to(root).with_suffix("").parts for file in files]
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): file
        for parts, file in zip(names, files, strict=True)
    }


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """The modules of ours that a module imports, wherever in its file it does."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(above if node.level else []), *([node.module] if node.module else [])]
            )
            names = [alias.name for alias in node.names]
            submodules = {name: f"{base}.{name}" for name in names}
            wanted = [full if full in modules else base for full in submodules.values()]
        else:
            continue
        for target in dict.fromkeys(wanted):
            if target in modules and target != module:
                yield Import(module, target, f"line {node.lineno}")


def all_imports(root: Path) -> list[Import]:
    modules = modules_of(root)
    return [found for name, path in modules.items() for found in imports_of(name, path, modules)]


# --- the rules ------------------------------------------------------------------------------------


def floors() -> dict[str, int]:
    """Room → floor, 0 is the ground."""
    return {room: level for level, rooms in enumerate(FLOORS) for room in rooms.split()}


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    if module.endswith(".__main__"):
        return len(FLOORS) - 1
    return floors()[room(module)]


def climbing(imports: list[Import]) -> list[str]:
    """The imports that go up, in words."""
    return [
        f"{found.module} imports {found.target}, which stands above it ({found.place})"
        for found in imports
        if {room(found.module), room(found.target)} <= set(floors())
        and floor(found.target) > floor(found.module)
    ]


def circles(imports: list[Import]) -> list[str]:
    """The groups of modules that need each other, in words."""
    needs: dict[str, set[str]] = {}
    for found in imports:
        needs.setdefault(found.module, set()).add(found.target)

    def reach(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            for target in needs.get(left.pop(), set()) - seen:
                seen.add(target)
                left.append(target)
        return seen

    reached = {module: reach(module) for module in needs}
    groups = {
        tuple(sorted(m for m in reached[module] if module in reached.get(m, ())))
        for module in needs
        if module in reached[module]
    }
    return [f"{' and '.join(group)} need each other" for group in sorted(groups)]


def between_rooms(imports: list[Import]) -> list[Import]:
    """The same imports, with rooms for modules; a room's __main__ is a room of its own."""

    def place(module: str) -> str:
        return module if module.endswith(".__main__") else room(module)

    pairs = [(place(found.module), place(found.target), found.place) for found in imports]
    return [Import(*pair) for pair in pairs if pair[0] != pair[1]]


def complain(findings: list[str]) -> None:
    assert not findings, "\n".join(["", *findings])


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in modules_of(ROOT)}
    complain(
        [
            f"{name} has no floor: add it to FLOORS in tests/test_layers.py"
            for name in sorted(rooms - set(floors()))
        ]
    )


def test_imports_go_down_only() -> None:
    complain(climbing(all_imports(ROOT)))


def test_no_modules_import_each_other_in_a_circle() -> None:
    complain(circles(all_imports(ROOT)))


def test_no_rooms_import_each_other_in_a_circle() -> None:
    complain(circles(between_rooms(all_imports(ROOT))))


def test_nothing_imports_train() -> None:
    complain(
        [
            f"{found.module} imports train ({found.place})"
            for found in all_imports(ROOT)
            if found.target == "train"
        ]
    )


def test_what_reaches_up_does_so_on_demand_and_for_others_only() -> None:
    module, name, home = REACHES_UP
    import net

    assert (module, net._HOMES[name]) == ("net", home)
    complain(
        [
            f"{user} takes {name} from {module}, not from {home}"
            for user, path in modules_of(ROOT).items()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module == module
            if name in [alias.name for alias in node.names]
        ]
    )


MOST_LINES = 300


def test_the_front_doors_are_read_in_one_sitting() -> None:
    lengths = {
        door: len((ROOT / f"{door}.py").read_text(encoding="utf-8").splitlines())
        for door in FRONT_DOORS.split()
    }
    complain([f"{door}.py has {n} lines" for door, n in lengths.items() if n > MOST_LINES])


MOST_ROOMS = 10


def test_the_options_end_in_the_hall(tmp_path: Path) -> None:
    """`args` of train.py's main enters few rooms; below them values travel as typed parts."""
    import argparse

    import tiny

    import train

    images, seen = tiny.write_images(tmp_path / "images"), set()

    def watch(frame, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(f"{ROOT}/"):
            return
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        if any(isinstance(frame.f_locals.get(name), argparse.Namespace) for name in names):
            seen.add(Path(frame.f_code.co_filename).relative_to(ROOT).parts[0])

    args = tiny.parse(images, f"--epochs 1 --warm 0 --LOG_DIR {tmp_path} --nb-clusters 2 --IPC 2")
    sys.setprofile(watch)
    try:
        train.main(args)
    finally:
        sys.setprofile(None)
    assert "train.py" in seen and len(seen) <= MOST_ROOMS, sorted(seen)


# --- what is loaded at once -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "import utils, flags",
        "import options",
        *(
            f"sys.argv = ['{door}.py', '--help']; runpy.run_path('{door}.py', run_name='__main__')"
            for door in FRONT_DOORS.split()
        ),
    ],
)
def test_no_torch_is_loaded_for(code: str) -> None:
    told = "atexit.register(lambda: print('torch' in sys.modules))"
    result = run_python("-c", f"import atexit, runpy, sys; {told}; {code}")
    assert (result.returncode, result.stdout.split()[-1:]) == (0, ["False"]), result.stderr


# --- that the reading sees what it is for ---------------------------------------------------------

HOUSE = {
    "utils.py": "",
    "flags.py": "def later():\n    import net.heads\n",
    "net/__init__.py": "from net import heads\nfrom net.heads import pool\n",
    "net/heads.py": "import typing\nif typing.TYPE_CHECKING:\n    from . import layers\n",
    "net/layers.py": "from .heads import pool\nfrom utils import InputError\n",
    "net/__main__.py": "import report\n",
    "options.py": "import json, net as networks\n",
    "report.py": "from options import parse\n",
    "cellar.py": "import utils\n",
    "tests/test_nothing.py": "import train\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name, text in HOUSE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_imports_are_found_wherever_they_stand(house: Path) -> None:
    assert {(found.module, found.target) for found in all_imports(house)} == {
        *{("flags", "net.heads"), ("net", "net.heads"), ("net.heads", "net.layers")},
        *{("net.layers", "net.heads"), ("net.layers", "utils"), ("net.__main__", "report")},
        *{("options", "net"), ("report", "options"), ("cellar", "utils")},
    }


def test_climbing_and_circles_are_seen(house: Path) -> None:
    imports = all_imports(house)
    assert climbing(imports) == ["flags imports net.heads, which stands above it (line 2)"]
    assert circles(imports) == ["net.heads and net.layers need each other"]
    (house / "utils.py").write_text("from options import parse\n")
    assert circles(between_rooms(all_imports(house))) == [
        "net and options and utils need each other"
    ]
