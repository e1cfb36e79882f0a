"""The HTML file: a template, with style, script, content and data in one file.

Text is escaped when it becomes HTML, and the script's data are JSON without the signs of tags. The
page's content security policy forbids it to load anything or to run another script.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from terminal import printable_lines

HERE = Path(__file__).resolve().parent
ISOLATE, END = "\u2068", "\u2069"  # the direction of text between does not affect text around
PIECE = re.compile(f"{ISOLATE}([^{END}]*){END}|`([^`]+)`")
FLAG, FLAG_HTML = re.compile(r"(?<!\S)--?\w[\w-]*"), r'<span class="flag">\g<0></span>'


def as_text(value: object) -> str:
    """Any value as HTML text."""
    return html.escape(printable_lines(str(value)))


def document(title: str, body: str, data: Mapping[str, Any]) -> str:
    """A whole page.

    Args:
        title: plain text. body: HTML. data: plain values for page.js.
    """
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = ("default-src 'none'", "img-src data:", "style-src 'unsafe-inline'")
    policy = "; ".join([*allowed, f"script-src 'sha256-{digest}'"])
    parts = {
        "policy": policy,
        "title": as_text(title),
        "style": _part("page.css"),
        "script": script,
        "data": as_json(data),
        "body": body,
    }
    first, *rest = _part("page.html").split("[[")
    pieces = [first]
    for piece in rest:
        name, after = piece.split("]]", 1)
        pieces += [parts[name], after]
    return "".join(pieces)


def _part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def as_json(data: object) -> str:
    """JSON for a script element: tags and comments are escaped; numbers not finite become null."""
    words = json.dumps(_plain(data), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        words = words.replace(character, f"\\u{ord(character):04x}")
    return words


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return printable_lines(value)
    return value if isinstance(value, (int, bool)) or value is None else _plain(value.item())


# --- pieces ---------------------------------------------------------------------------------------


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values side by side."""
    found = [f"<div><dt>{as_text(k)}</dt><dd>{breakable(v)}</dd></div>" for k, v in pairs if v]
    return f'<dl class="facts">{"".join(found)}</dl>'


class Part(NamedTuple):
    """A part of the page.

    Attributes:
        content: HTML. about: a text about it.
        link: its name in the navigation; None: the title; "": it is not there.
    """

    anchor: str
    title: str
    content: str
    about: str = ""
    link: str | None = None

    def html(self) -> str:
        """The part with its title; without a title, its content alone."""
        if not self.title:
            return self.content
        about = f'<p class="about">{as_text(self.about)}</p>' if self.about else ""
        title = f"<h2>{as_text(self.title)}</h2>"
        return f'<section id="{as_text(self.anchor)}">{title}{about}{self.content}</section>'


def navigation(parts: Iterable[Part]) -> str:
    """Links to the parts of the page, and the switch of its colours."""
    links = ((part.anchor, part.title if part.link is None else part.link) for part in parts)
    anchors = "".join(f'<a href="#{anchor}">{words}</a>' for anchor, words in links if words)
    switch = "<button data-theme-switch>light / dark</button>"
    return f'<nav><div><span class="links">{anchors}</span>{switch}</div></nav>'


def table(head: str, lines: Iterable[str], kind: str = "") -> str:
    """A table on a card, of the HTML of the cells in its head and of its lines."""
    kind = f' class="{kind}"' if kind else ""
    return (
        f'<div class="card scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def column(name: str) -> str:
    """The name of a column as HTML, to be broken into at most two lines of about one length."""
    words = name.split(" ")
    half = (len(words) + 1) // 2
    lines = ("\N{NO-BREAK SPACE}".join(part) for part in (words[:half], words[half:]) if part)
    return as_text(" ".join(lines))


def named(name: str) -> str:
    """A name in a table's cell as HTML, of limited width."""
    return f'<span class="named">{breakable(name)}</span>'


def breakable(value: object) -> str:
    """HTML text that may be broken after a `/` or a `_`."""
    return re.sub(r"([/_])(?=\w\w)", r"\1<wbr>", as_text(value))


def isolated(name: str) -> str:
    """A name for a sentence of `bullets`: its backticks do not mean code, and if it is written from
    right to left, the rest of the sentence is not affected."""
    return f"{ISOLATE}{printable_lines(name)}{END}"


def bullets(sentences: Iterable[str]) -> str:
    """A list of sentences; text between backticks is set as code."""
    items = "".join(f"<li>{_sentence(sentence)}</li>" for sentence in sentences)
    return f'<ul class="short">{items}</ul>'


def _sentence(words: str) -> str:
    made, at = "", 0
    for found in PIECE.finditer(words):
        name, code = found.groups()
        piece = f"<code>{command(code)}</code>" if name is None else f"<bdi>{as_text(name)}</bdi>"
        made, at = f"{made}{as_text(words[at : found.start()])}{piece}", found.end()
    return made + as_text(words[at:])


def command(words: str) -> str:
    """A command as HTML text, without line breaks within flags."""
    return FLAG.sub(FLAG_HTML, as_text(words))


def warnings(sentences: Iterable[str]) -> str:
    """Warnings, one paragraph each."""
    return "".join(f'<p class="warning">{as_text(sentence)}</p>' for sentence in sentences)


def folded(title: str, content: str) -> str:
    """HTML that is shown when its title is clicked."""
    return f"<details><summary>{as_text(title)}</summary>{content}</details>"


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f}"


def of_100(share: float) -> str:
    """A share as `13 of 100`; one just above 0 or below 1 is not rounded to none or all."""
    count = round(100 * share)
    if count == 100 and share < 1:
        return "more than 99 of 100"
    return f"{count} of 100" if count or not share else "fewer than 1 of 100"


def against(own: float, other: float) -> str:
    """The difference of a share from another one in words: `0.3 points above`, or `level with`."""
    apart = f"{100 * abs(own - other):.1f}"
    if apart == "0.0":
        return "level with"
    return f"{apart} points {'above' if own > other else 'below'}"


def cell(value: float | None, between: Sequence[float] | None = None, best: bool = False) -> str:
    """A table's cell of a metric in percent, with its interval below; – if it is undefined."""
    if value is None or math.isnan(value):
        return f"<td>{'' if value is None else '–'}</td>"
    low_high = ""
    if between is not None:
        low_high = f'<span class="between">{percent(between[0])} to {percent(between[1])}</span>'
    return f"<td{' class=best' if best else ''}>{percent(value)}{low_high}</td>"
