"""How the repository becomes a package: `pip install .`, `python -m build`.

In the repository the modules are at the top (`train.py`, `utils.py`, `net/`), where readers find
them and `python train.py` works. Installed like that, they would occupy names such as `utils`,
which other packages may use. So in the wheel all of them are inside the package `anchorage`, and
imports and commands are rewritten, line by line:

    from utils import InputError   →  from anchorage.utils import InputError
    import dataset                 →  from anchorage import dataset
    `python train.py --dry-run`    →  `anchorage train --dry-run`, in what the commands print

Recipes and the embedded data set are beside the modules, as in the repository. An editable
installation (`pip install -e .`) uses the repository's own modules, unchanged.
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
"""Commands in the repository, and the same commands in an installation."""


# --- the files ------------------------------------------------------------------------------------


def modules(root: Path) -> list[str]:
    """The top-level modules and packages of the repository, except `anchorage` itself."""
    files = [path.stem for path in root.glob("*.py") if path.name not in NO_MODULES]
    rooms = [path.parent.name for path in root.glob("*/__init__.py")]
    return sorted({*files, *rooms} - NO_ROOMS - {PACKAGE})


def files(root: Path) -> Iterator[tuple[Path, str]]:
    """Each file of the package, and its path in the wheel."""
    for name in (*modules(root), PACKAGE, *DATA):
        place = root / f"{name}.py"
        found = [place] if place.is_file() else sorted((root / name).rglob("*"))
        for path in found:
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(root / PACKAGE if name == PACKAGE else root)
                yield path, f"{PACKAGE}/{inside.as_posix()}"


# --- rewriting ------------------------------------------------------------------------------------


def installed(source: str, names: Collection[str]) -> str:
    """A module's source for the wheel; line numbers are unchanged.

    Args:
        names: of the modules that move into the package.

    Raises:
        ValueError: an import cannot be rewritten; the message says how to write it instead.
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
    """Text in which commands are written as in an installation."""
    for pattern, by in COMMANDS:
        text = pattern.sub(by, text)
    return text


def write_package(root: Path, out: Path) -> dict[str, str]:
    """Writes the package's files under `out`; returns written file → path in the wheel.

    Raises:
        ValueError: a module has an import that cannot be rewritten.
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


# --- dependencies ---------------------------------------------------------------------------------

EXTRAS = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "search": ("faiss-cpu", "usearch"),
    "tensorboard": ("tensorboard",),
}
"""Packages that are used if they are installed, by the name of their extra."""


def requirements(file: Path) -> list[str]:
    """The packages, with versions, of a requirements file; not those of files that it includes."""
    lines = (line.partition("#")[0].strip() for line in file.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


def extras(file: Path) -> dict[str, list[str]]:
    """The packages of each of `EXTRAS` that a requirements file lists, and, as `dev`, all of it."""
    listed = {re.split(r"[<>=!~\[ ]", line)[0]: line for line in requirements(file)}
    found = {
        extra: [listed[name] for name in names if name in listed] for extra, names in EXTRAS.items()
    }
    return {**found, "dev": list(listed.values())}


# --- hatchling's hooks ----------------------------------------------------------------------------


class BuildHook(BuildHookInterface):
    """Puts the modules into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built."""
        if version == "editable":
            return
        self._made = tempfile.TemporaryDirectory()
        build_data["force_include"] |= write_package(Path(self.root), Path(self._made.name))

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        """Called after it is built."""
        if version != "editable":
            self._made.cleanup()


class MetadataHook(MetadataHookInterface):
    """Reads the dependencies from requirements*.txt."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called with the metadata of pyproject.toml."""
        root = Path(self.root)
        metadata["dependencies"] = requirements(root / "requirements.txt")
        metadata["optional-dependencies"] = extras(root / "requirements-dev.txt")
