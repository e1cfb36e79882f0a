"""How the repository becomes a package: `pip install .`, `python -m build`.

In the repository the modules stand at the top (`train.py`, `utils.py`, `net/`), where a reader
finds them and `python train.py` works. Installed like that, they would take names such as `utils`
from everybody else. So in the wheel all of them stand inside the package `anchorage`, and what
names them is written accordingly, line for line:

    from utils import InputError   →  from anchorage.utils import InputError
    import dataset                 →  from anchorage import dataset
    `python train.py --dry-run`    →  `anchorage train --dry-run`, in what the commands print

Recipes and the embedded data set lie beside the modules, where they are looked for. An editable
installation (`pip install -e .`) is the repository itself: its modules are imported as they stand.
"""

from __future__ import annotations

import ast
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

PACKAGE = "anchorage"
DATA = ("recipes", "data/emoji")
NO_MODULES = {"hatch_build.py"}
NO_ROOMS = {"tests", "benchmarks", "scripts", "docs", "data", "logs", "recipes", "wandb"}
TEXT = {".py", ".html", ".js", ".css", ".txt", ".md"}

COMMANDS = (
    (re.compile(r"\bpython (\w+)\.py\b"), rf"{PACKAGE} \1"),
    (re.compile(r"\bpython -m dataset\b"), f"{PACKAGE} dataset"),
    (re.compile(r"\bpython -m net\b"), PACKAGE),  # `python -m net export` → `anchorage export`
    (re.compile(r"\bpython -m anchorage\b"), PACKAGE),
)
"""How the commands are called in the repository, and how where they are installed."""


# --- what goes in ---------------------------------------------------------------------------------


def modules(root: Path) -> list[str]:
    """The top-level modules and packages of the repository, `anchorage` itself left out."""
    files = [path.stem for path in root.glob("*.py") if path.name not in NO_MODULES]
    rooms = [path.parent.name for path in root.glob("*/__init__.py")]
    return sorted({*files, *rooms} - NO_ROOMS - {PACKAGE})


def files(root: Path) -> Iterator[tuple[Path, str]]:
    """Each file of the package, and where it stands in the wheel."""
    for name in (*modules(root), PACKAGE, *DATA):
        place = root / f"{name}.py"
        found = [place] if place.is_file() else sorted((root / name).rglob("*"))
        for path in found:
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(root / PACKAGE if name == PACKAGE else root)
                yield path, f"{PACKAGE}/{inside.as_posix()}"


# --- how it is written ----------------------------------------------------------------------------


def installed(source: str, names: Collection[str]) -> str:
    """A module's source as it stands in the wheel; every line stays on its line.

    Args:
        names: of the modules that move into the package.

    Raises:
        ValueError: an import that has no such form; the message says what to write instead.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if not node.level and (node.module or "").partition(".")[0] in names:
                _replace(lines, node, f"from {node.module}", f"from {PACKAGE}.{node.module}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in names:
                    _move(lines, node, alias)
    return commands("".join(lines))


def _move(lines: list[str], node: ast.Import, alias: ast.alias) -> None:
    if len(node.names) > 1:
        raise ValueError(f"line {node.lineno}: import {alias.name} on a line of its own")
    inside, dot, name = alias.name.rpartition(".")
    if dot and alias.asname is None:
        raise ValueError(f"line {node.lineno}: write `from {inside} import {name}`")
    home = f"{PACKAGE}.{inside}" if dot else PACKAGE
    _replace(lines, node, f"import {alias.name}", f"from {home} import {name}")


def _replace(lines: list[str], node: ast.stmt, words: str, by: str) -> None:
    row, column = node.lineno - 1, len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
    line = lines[row]
    if not line.startswith(words, column):
        raise ValueError(f"line {node.lineno}: write `{words}`, with single blanks")
    lines[row] = line[:column] + by + line[column + len(words) :]


def commands(text: str) -> str:
    """Text in which the commands are called as they are where they are installed."""
    for pattern, by in COMMANDS:
        text = pattern.sub(by, text)
    return text


def write_package(root: Path, out: Path) -> dict[str, str]:
    """Writes the package's files under `out`; returns path → place in the wheel.

    Raises:
        ValueError: a module has an import that cannot be moved.
    """
    names, placed = set(modules(root)), {}
    for path, place in files(root):
        made = out / place
        made.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".py" and "data" not in path.relative_to(root).parts:
            try:
                made.write_text(installed(path.read_text("utf-8"), names), "utf-8")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"{path.relative_to(root)} cannot be packaged: {error}") from error
        elif path.suffix in TEXT and "data" not in path.relative_to(root).parts:
            made.write_text(commands(path.read_text("utf-8")), "utf-8")
        else:
            made.write_bytes(path.read_bytes())
        placed[str(made)] = place
    return placed


# --- what it needs --------------------------------------------------------------------------------

EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "search": ("faiss-cpu", "usearch"),
    "tensorboard": ("tensorboard",),
}
"""What is used where it is installed: the name of the extra, and its packages."""


def requirements(file: Path) -> list[str]:
    """The packages that a file lists itself, with their versions."""
    lines = (line.partition("#")[0].strip() for line in file.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def extras(file: Path) -> dict[str, list[str]]:
    """The extras of `EXTRAS`, as far as the file lists their packages, and `dev`: all of it."""
    listed = {re.split(r"[<>=!~\[ ]", line)[0]: line for line in requirements(file)}
    found = {
        extra: [listed[name] for name in names if name in listed] for extra, names in EXTRAS.items()
    }
    return {**found, "dev": list(listed.values())}


# --- what the builder calls -----------------------------------------------------------------------


class BuildHook(BuildHookInterface):
    """Puts the modules into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built."""
        if version == "editable":
            return
        self._made = tempfile.TemporaryDirectory()
        build_data["force_include"] |= write_package(Path(self.root), Path(self._made.name))

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        """Called when it is built."""
        if version != "editable":
            self._made.cleanup()


class MetadataHook(MetadataHookInterface):
    """Reads the dependencies from requirements*.txt, which is where they are listed."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called with the metadata of pyproject.toml."""
        root = Path(self.root)
        metadata["dependencies"] = requirements(root / "requirements.txt")
        metadata["optional-dependencies"] = extras(root / "requirements-dev.txt")
