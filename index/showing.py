"""What the commands say of an index, in lines of 80 columns, in JSON and as a picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dataset.wording import WIDTH, columns
from index.asking import Answer
from index.gallery import Entry, Index
from index.making import Outcome
from storage import write_json
from terminal import as_shell, printable, say
from utils import human_seconds

NAMED = 3  # images that a line names


def counted(count: int, what: str = "image") -> str:
    """3 → '3 images', 1 → '1 image'."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def shortened(text: str, width: int) -> str:
    """Text in so many columns; of a longer one its end, which is what tells paths apart."""
    text = printable(text)
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[1:]
    return f"…{text}"


# --- build, add, remove ---------------------------------------------------------------------------


def tell_outcome(outcome: Outcome, path: Path) -> None:
    """Says what became of the images that were given, and what to do next."""
    rate = f" ({outcome.embedded / max(outcome.seconds, 1e-9):.0f} images/s)"
    took = f" in {human_seconds(outcome.seconds)}{rate if outcome.embedded else ''}"
    say(f"{counted(outcome.added)} added{took}")
    if outcome.there:
        say(f"{counted(outcome.there)} there already, unchanged")
    if outcome.replaced:
        say(f"{counted(outcome.replaced)} whose files have changed, looked at again")
    if outcome.moved:
        say(f"{counted(outcome.moved)} there under another path, id or label, brought up to date")
    if outcome.copies:
        say(
            f"{counted(len(outcome.copies))} left out, the same as one that is there "
            "(--keep-copies takes them in):"
        )
        for copy, known in outcome.copies[:NAMED]:
            say(shortened(f"  {copy} is {known}", WIDTH))
        if len(outcome.copies) > NAMED:
            say(f"  and {len(outcome.copies) - NAMED:,} more")
    if outcome.bad:
        say(f"{counted(len(outcome.bad))} left out, because they cannot be read (named above)")
    index = Index.open(path)
    say(f"{path} holds {counted(len(index))}; search it with")
    say(f"  python search.py query {as_shell(path)} IMAGE")


def tell_removed(entries: Sequence[Entry], path: Path) -> None:
    """Says what was taken out."""
    for entry in entries[:NAMED]:
        say(shortened(f"  {entry.id}", WIDTH))
    if len(entries) > NAMED:
        say(f"  and {len(entries) - NAMED:,} more")
    say(f"{counted(len(entries))} removed; {path} holds {counted(len(Index.open(path)))}")


# --- answers --------------------------------------------------------------------------------------


def tell_answers(answers: Sequence[Answer], index: Index) -> None:
    """A table for each query: place, cosine, verdict where there is one, label, id."""
    for answer in answers:
        say(f"nearest to {answer.query} of {counted(len(index))}:")
        labels = [printable(hit.entry.label or "") for hit in answer.hits]
        room = min(max(map(columns, labels), default=0), 24)
        for place, hit in enumerate(answer.hits, 1):
            line = f"{place:>4}  {hit.score:.4f}  "
            if hit.verdict:
                line += f"{hit.verdict:<9}  "
            if room:
                label = shortened(hit.entry.label or "", room)
                line += label + " " * (room - columns(label) + 2)
            note = "  the same file" if hit.same_file else ""
            if not os.path.lexists(hit.entry.path):
                note += "  (file gone)"
            say(line + shortened(hit.entry.id, WIDTH - columns(line) - columns(note)) + note)


def write_answers(path: Path, answers: Sequence[Answer], index: Index) -> None:
    """The same as JSON, whole and with full paths."""
    content = [
        {
            "query": answer.query,
            "hits": [
                {
                    **hit.entry._asdict(),
                    "score": hit.score,
                    "verdict": hit.verdict or None,
                    "same_file": hit.same_file,
                    "file_is_there": os.path.lexists(hit.entry.path),
                }
                for hit in answer.hits
            ],
        }
        for answer in answers
    ]
    write_json(path, {"index": str(index.path), "images": len(index), "answers": content})
    say(f"answers written to {path}")
