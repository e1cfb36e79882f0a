"""The output of the commands about an index: lines of 80 columns, JSON, and pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.pictures import save_picture
from evaluation.thresholds import Rate, Thresholds
from index import graph, making, network, pictures
from index.adding import Outcome
from index.asking import Answer
from index.duplicates import Pairs
from index.entries import Entry
from index.gallery import Index
from options import searching
from storage import in_bytes, write_json
from terminal import WIDTH, as_shell, columns, fitted, printable, say, wrapped
from utils import counted, first_names, human_seconds, installing, program

NAMED = 3  # the most images that are named


def shortened(text: str, width: int) -> str:
    """Text of at most `width` columns; of a longer one the end, in which paths differ."""
    text = printable(text)
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[1:]
    return f"…{text}"


# --- build, add, remove ---------------------------------------------------------------------------


def print_outcome(outcome: Outcome, path: Path) -> None:
    """Prints what happened to the images that were given."""
    rate = f" ({outcome.embedded / max(outcome.seconds, 1e-9):.0f} images/s)"
    took = f" in {human_seconds(outcome.seconds)}{rate if outcome.added else ''}"
    say(f"{counted(outcome.added)} added{took}")
    index = Index.open(path)
    if outcome.unlabelled and index.has_labels:
        verb = "has" if outcome.unlabelled == 1 else "have"
        which = "it" if outcome.added == 1 else f"{outcome.unlabelled:,} of them"
        words = (
            f"{which} {verb} no label: labels are the names of the folders inside the folder that "
            "is given, so give the folder above, or a table with labels"
        )
        say(fitted(words, "  "))
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
        say(f"{counted(len(outcome.bad))} left out, not readable (named above)")
    say(f"{path} holds {counted(len(index))}")


def print_next(path: Path) -> None:
    """Prints a command that searches an index."""
    index = Index.open(path)
    own = index.entry(0).path
    say("search it with any image, such as one of its own:")
    picture = Path(min(own, os.path.relpath(own), key=len))
    say(f"  {program('search')} query {as_shell(path, picture)}")


def print_removed(entries: Sequence[Entry], path: Path) -> None:
    """Prints which images were removed."""
    for entry in entries[:NAMED]:
        say(shortened(f"  {entry.id}", WIDTH))
    if len(entries) > NAMED:
        say(f"  and {len(entries) - NAMED:,} more")
    say(f"{counted(len(entries))} removed; {path} holds {counted(len(Index.open(path)))}")
    if entries:
        whose = "its embedding stays" if len(entries) == 1 else "their embeddings stay"
        say(f"{whose} in the file, unused, until it is rewritten:")
        say(f"  {program('search')} compact {as_shell(path)}")


def speed_up(path: Path, wanted: str) -> None:
    """Makes the graph of an index, or extends it, if it is wanted or worth it.

    Args:
        wanted: "yes", "no", or "auto": if comparing with all images takes over `graph.PATIENCE`.

    Raises:
        InputError: `wanted` is "yes", and usearch is not installed or there are no images.
    """
    if wanted == "no":
        return
    index = Index.open(path)
    least = graph.worth_from(_seconds_per_image(index))
    if wanted == "auto" and len(index) < least:
        return
    if wanted == "auto" and not graph.is_installed():
        words = (
            f"comparing with all {counted(len(index))} takes longer than {graph.PATIENCE:g} s per "
            f"query here, as from about {least:,} on; to avoid that, "
            f"`{installing('usearch')}`, and then"
        )
        say(fitted(words, "  "))
        say(f"  {program('search')} approximate {as_shell(path)}")
        return
    if wanted == "auto" and index.graph and index.added - index.graph.covers < index.added // 10:
        return
    say(f"making a graph, so that a search need not look at all {counted(len(index))}")
    seconds = making.approximate(path)
    say(f"{searching.graph_of(path)} made in {human_seconds(seconds)}")


def _seconds_per_image(index: Index) -> float:
    return graph.seconds_per_image(index.rows(slice(0, graph.SAMPLE)))


# --- answers --------------------------------------------------------------------------------------


def print_answers(answers: Sequence[Answer], index: Index) -> None:
    """Prints a table for each query: place, cosine, verdict, label, id; then the error rates."""
    for answer in answers:
        say(f"nearest to {printable(answer.query)} of {counted(len(index))}:")
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
        if not answer.readable:
            say("      nothing: it cannot be read")
        elif not answer.hits:
            say("      nothing: the index holds no other image")
    if any(hit.verdict for answer in answers for hit in answer.hits):
        say(wrapped(_threshold_words(index.thresholds.as_dict()), "verdicts  ", " " * 10))


def write_answers(path: Path, answers: Sequence[Answer], index: Index) -> None:
    """Writes answers as JSON, with full paths."""
    content = [
        {
            "query": answer.query,
            "readable": answer.readable,
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


def draw_answers(path: Path, answers: Sequence[Answer], upright: bool) -> None:
    """Writes answers as a picture."""
    save_picture(pictures.sheet(answers, upright), path)
    say(f"answers drawn to {path}")


# --- duplicates -----------------------------------------------------------------------------------


def print_pairs(pairs: Pairs, index: Index, least: float, most: int) -> None:
    """Prints the number of pairs, and the nearest ones."""
    count, groups = len(pairs.cosines), pairs.groups(len(index))
    verb = "has" if count == 1 else "have"
    of = (
        f"{counted(count, 'pair')} among {counted(len(index))} {verb} a cosine of {least:g} or more"
    )
    say(f"{of}, in {counted(len(groups), 'group')}" if count else of)
    for first, second, cosine in zip(*(array[:most].tolist() for array in pairs), strict=True):
        for start, row in ((f"  {cosine:.4f}  ", first), (" " * 10, second)):
            say(start + shortened(index.id(row), WIDTH - len(start)))
    if count > most:
        say(f"  and {count - most:,} more (--top, or --json FILE for all)")


def write_pairs(path: Path, pairs: Pairs, index: Index, least: float) -> None:
    """Writes all pairs, and the groups that they connect, as JSON."""
    rows = zip(*(array.tolist() for array in pairs), strict=True)
    content = {
        "index": str(index.path),
        "images": len(index),
        "above": least,
        "pairs": [
            {"first": index.id(first), "second": index.id(second), "score": cosine}
            for first, second, cosine in rows
        ],
        "groups": [[index.id(row) for row in group] for group in pairs.groups(len(index))],
    }
    write_json(path, content)
    say(f"pairs written to {path}")


# --- info -----------------------------------------------------------------------------------------


def facts(index: Index) -> dict[str, Any]:
    """All facts about an index, after its checksums are compared and its files looked for."""
    index.check()
    entries = list(index.entries())
    labels = {entry.label for entry in entries} - {None}
    missing = [entry.path for entry in entries if not os.path.lexists(entry.path)]
    run = next((p for p in network.places_of(index.path, index.about) if p.exists()), None)
    seconds = _seconds_per_image(index)
    known = index.graph
    return {
        "index": str(index.path),
        "images": len(index),
        "removed": index.added - len(index),
        "labels": len(labels),
        "numbers": index.size,
        "bytes": index.path.stat().st_size,
        "network": index.about["model"],
        "fingerprint": index.about["fingerprint"],
        "run": str(run or network.places_of(index.path, index.about)[-1]),
        "run_is_there": run is not None,
        "thresholds": index.thresholds and index.thresholds.as_dict(),
        "codes": index.about["codes"],
        "exact_milliseconds": seconds * len(index) * 1e3,
        "approximate_from": graph.worth_from(seconds) if len(index) else None,
        "graph_covers": known.covers if known else None,
        "missing": missing,
    }


def print_facts(found: dict[str, Any]) -> None:
    """Prints facts as lines."""
    gone = "" if found["run_is_there"] else ", which is not there any more (--run says where it is)"
    removed = f", {found['removed']:,} removed" if found["removed"] else ""
    lines = {
        "images": f"{found['images']:,}{removed}; {counted(found['labels'], 'label')}",
        "file": f"{found['index']}, {in_bytes(found['bytes'])}; all checksums agree",
        "network": f"{found['network']}, {found['numbers']} numbers per image; "
        f"fingerprint {found['fingerprint'][:12]}",
        "run": f"{found['run']}{gone}",
        "thresholds": _threshold_words(found["thresholds"]),
        "search": _search_words(found),
    }
    if found["missing"]:
        lines["files gone"] = f"{len(found['missing']):,}: {first_names(found['missing'])}"
    for name, text in lines.items():
        say(wrapped(text, f"{name:<12}", " " * 12))


def _threshold_words(known: dict[str, Any] | None) -> str:
    if known is None:
        return "none: the run has measured none; once it has, the next `add` takes them over"
    searched = known["index_size"] is not None
    strangers = "queries with nothing of their kind here" if searched else "pairs that differ"
    kin = "queries with something of their kind here" if searched else "pairs that match"
    errors = f"wrong for {Rate.of_dict(known['false_different']).percent()} of the {kin}"
    doubt = f". {said}" if (said := Thresholds.of_dict(known).doubt) else ""
    below = f"different below {known['different']:.3f}"
    if math.isinf(known["same"]):
        return (
            "nothing but the same file is called the same, because too few images were "
            f"measured for an index of {known['index_size']:,}: more than 1 in 5 of the "
            f"{strangers} would be told so; {below}, {errors}{doubt}"
        )
    wrong = f"wrong for {Rate.of_dict(known['false_same']).percent()} of the {strangers}"
    both = f"same from {known['same']:.3f}, {below}"
    return f"{both}; the first is {wrong}, the second {errors}{doubt}"


def _search_words(found: dict[str, Any]) -> str:
    kind = "exact" if found["codes"] == "none" else f"by {found['codes']} codes, scored exactly"
    if found["graph_covers"] is not None:
        kind = f"by a graph of {counted(found['graph_covers'])}, scored exactly"
    if found["approximate_from"] is None:
        return kind
    return (
        f"{kind}; to compare with all takes {found['exact_milliseconds']:.1f} ms per query here, "
        f"and a graph is worth it from about {found['approximate_from']:,} images on"
    )
