"""The results of a study in a Markdown document: tables between marks, and a picture beside it.

A mark is a line such as `<!-- means -->`. The text between it and `<!-- end of means -->` is
replaced whenever results are written; the text around is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation import tables as evaluation_tables
from metrics.comparison import Test
from page import plots
from storage import check_outputs, write_content
from studies import pages, tables
from studies.results import Results
from utils import InputError

BLOCKS = {
    "answer": "What came out",
    "means": "Test classes",
    "tests": "Differences",
    "pairs": "Pairs",
    "search": "The search",
    "trials": "What the search depended on",
    "beside": "Best epochs and ensembles",
    "failed": "What failed",
}
"""Mark → the heading of a new document."""


def write(path: Path, results: Results, columns: Sequence[str] = ()) -> list[Path]:
    """Fills the marks of a document, or makes a new one, draws its picture, and returns both paths.

    Raises:
        InputError: it has no marks, cannot be read, or lacks the end of a mark.
    """
    blocks = made(results, columns)
    picture, title, drawn = _picture_of(path), "", ""
    if tests := tables.grouped(results.tests).get("seeds"):
        metric = results.plan.metric
        title = f"{metric} less that of {tests[0].a}, points: mean, 95 % interval"
        drawn = plots.forest_picture(pages.difference_bars(tests, metric), title, zero=True)
    blocks["picture"] = f"![{title}]({picture.name})" if drawn else ""
    text = _text(path) if path.exists() else _begun(results, blocks)
    write_content(path, filled(text, blocks, str(path)))
    if not drawn:
        return [path]
    write_content(picture, drawn)
    return [path, picture]


def check(path: Path) -> None:
    """Checks, before the trainings, that results can be written into this document.

    Raises:
        InputError: it has no marks, lacks the end of one, or cannot be read or written.
    """
    check_outputs({"--markdown": path, "the picture beside it": _picture_of(path)})
    if path.exists():
        filled(_text(path), dict.fromkeys([*BLOCKS, "picture"], ""), str(path))


def _picture_of(path: Path) -> Path:
    return path.parent / f"{path.stem}.svg"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text; give another file") from error


def filled(text: str, blocks: Mapping[str, str], name: str) -> str:
    """The text of a document with the blocks between its marks replaced.

    Raises:
        InputError: it has no mark, or a mark without an end.
    """
    known = {mark: block for mark, block in blocks.items() if _begin(mark) in text}
    if not known:
        marks = ", ".join(f"<!-- {mark} -->" for mark in blocks)
        raise InputError(
            f"{name} has no mark for a study; put one of {marks} and its end, such as "
            f"<!-- end of {next(iter(blocks))} -->, where the table goes, or give a new file"
        )
    for mark, block in known.items():
        before, _, rest = text.partition(_begin(mark))
        _, end, after = rest.partition(_end(mark))
        if not end:
            raise InputError(f"{name} has {_begin(mark)} without {_end(mark)}; add it")
        text = f"{before}{_begin(mark)}\n{block}\n{end}{after}"
    return text


def _begin(mark: str) -> str:
    return f"<!-- {mark} -->"


def _end(mark: str) -> str:
    return f"<!-- end of {mark} -->"


def _begun(results: Results, blocks: Mapping[str, str]) -> str:
    """A new document with marks for all blocks that have content."""
    parts = [f"# {results.plan.name}\n"]
    for mark, heading in BLOCKS.items():
        if blocks[mark]:
            parts.append(f"## {heading}\n\n{_begin(mark)}\n{_end(mark)}\n")
        if mark == "answer" and blocks["picture"]:
            parts.append(f"{_begin('picture')}\n{_end('picture')}\n")
    return "\n".join(parts)


def made(results: Results, columns: Sequence[str] = ()) -> dict[str, str]:
    """The content of all `BLOCKS`; "" if there is none yet."""
    metric = results.plan.metric
    return {
        "answer": _bullets(pages.conclusions(results)),
        "means": _means(results, columns),
        "tests": _tests(results.tests, metric),
        "pairs": _tests(results.asked, metric),
        "search": _table("method", tables.search_heads(results), tables.search_lines(results)),
        "trials": _bullets(tables.sensitivity_lines(results)),
        "beside": _gains(results),
        "failed": _bullets(tables.failures(results)[1:]),
    }


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {_escaped(' '.join(sentence.split()))}" for sentence in sentences)


def _means(results: Results, columns: Sequence[str]) -> str:
    if not results.with_runs:
        return ""
    heads, lines = tables.mean_lines(tables.rows(results, tables.shown(results, columns)))
    about = evaluation_tables.about_spread(tables.rows(results)).strip()
    return f"{_table('method', heads, lines)}\n\nIn percent. {about}".strip()


def _tests(tests: Sequence[Test], metric: str) -> str:
    parts = []
    for alike in tables.grouped(tests).values():
        table = _table("method", *tables.test_lines(alike, metric))
        parts.append(f"{tables.tests_about(alike)}\n\n{table}")
    return "\n\n".join(parts)


def _gains(results: Results) -> str:
    heads, lines = tables.gains(results)
    return _table("method", heads, lines) if lines else ""


def _table(first: str, heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A Markdown table: a column `first` of names, and a column for each of the heads."""
    rows = [[first, *heads], ["---"] * (1 + len(heads)), *([name, *cells] for name, cells in lines)]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows)


def _escaped(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")
