"""Names and definitions of the numbers of an evaluation, and sentences about their limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from metrics import about_ties

HIDDEN = "queries"  # prefix of counts among the metrics: `queries`, `queries_without_match`, …
RAW = ", raw weights"  # suffix of a title for raw weights; the running mean has the plain title
BESIDE = "raw "  # prefix of a metric of the raw weights; that of the running mean has no prefix
VALIDATION = "validation"  # the title of training classes that a run holds out
OTHER = "R@1 other"  # followed by the kind of group: a query does not find images of its own group
LEFT_OUT = "queries_left_out"  # number of queries and gallery images that could not be read

METRIC = re.compile(r"R@\d+|RP|MAP@R|mARP|MRR|NMI|F1|AMI")


def is_metric(column: str) -> bool:
    """Whether a column of metrics.csv is a metric of an evaluation, not a loss or a speed."""
    return any(METRIC.fullmatch(word) for word in column.split(" "))


def without_counts(numbers: Mapping[str, float]) -> dict[str, float]:
    """The metrics without the counts."""
    return {name: value for name, value in numbers.items() if not name.startswith(HIDDEN)}


def is_recall(name: str) -> bool:
    """Whether a metric is R@K, for any K."""
    return name.startswith("R@") and name[2:].isdigit()


# --- definitions ----------------------------------------------------------------------------------


class Meaning(NamedTuple):
    """The definition of a metric, for the screen and for a paper."""

    text: str
    latex: str


MEANINGS = {
    "R@K": Meaning(
        "R@K: share of queries with an image of their class among the K nearest (cosine, the query "
        "left out).",
        "R@$K$: share of the queries with an image of their class among the $K$ nearest (cosine).",
    ),
    "RP": Meaning(
        "RP: share of the R nearest that are right, R = other images of the class.",
        "RP: share of the $R$ nearest that are right, $R$ being the other images of the class.",
    ),
    "MAP@R": Meaning(
        "MAP@R: Σ precision@j over right j ≤ R, over R.",
        r"MAP@R: $\frac{1}{R}\sum_{j\le R} P@j\cdot\mathrm{hit}_j$.",
    ),
    "mARP": Meaning(
        "mARP: the same sum over the number of right j ≤ R instead of R; not comparable with "
        "MAP@R.",
        r"mARP: $\sum_{j\le R} P@j\cdot\mathrm{hit}_j \,/\, \sum_{j\le R}\mathrm{hit}_j$; not "
        "comparable with MAP@R.",
    ),
    "MRR": Meaning(
        "MRR: mean of 1 / rank of the nearest right image.",
        "MRR: mean reciprocal rank of the nearest right image.",
    ),
    OTHER: Meaning(
        "R@1 other {group}s: R@1 where all images of the query's own {group} are left out of the "
        "gallery.",
        "R@1 other {group}s: R@1 where all images of the query's own {group} are left out of the "
        "gallery.",
    ),
    BESIDE: Meaning(
        "raw …: of the weights themselves; the others are of their running mean, where a run kept "
        "one (--ema).",
        r"raw \dots: of the weights themselves, the others of their running mean.",
    ),
    "NMI": Meaning(
        "NMI: agreement between the classes and as many clusters of k-means (arithmetic).",
        "NMI: arithmetic normalisation; $k$-means with one cluster per class.",
    ),
    "F1": Meaning(
        "F1: of the pairs in one cluster, taken as the pairs of one class.",
        "F1: of the pairs in one cluster, taken as the pairs of one class.",
    ),
    "AMI": Meaning("AMI: as NMI, but adjusted for chance.", "AMI: adjusted for chance."),
    "TAR@F": Meaning(
        "TAR@F: share of the pairs of one class that are accepted by the threshold that accepts at "
        "most the share F of the pairs of two classes (–: too few of these).",
        "TAR@$F$: share of the same-class pairs accepted where at most $F$ of the others are.",
    ),
    "EER": Meaning(
        "EER: error at the cosine where it is the same for both kinds of pairs; lower is better.",
        "EER: equal error rate of pairs; lower is better.",
    ),
    "AUC": Meaning(
        "AUC: probability that a same-class pair is nearer than another.",
        "AUC: area under the ROC curve of pairs.",
    ),
}


def _definitions(names: Iterable[str]) -> list[Meaning]:
    """The definitions of the metrics that have one."""
    known = {_family(name): name for name in names}
    return [_of(known[name], meaning) for name, meaning in MEANINGS.items() if name in known]


def _of(name: str, meaning: Meaning) -> Meaning:
    """A definition, with the groups named that a metric's name ends in ("drawing sets")."""
    if not name.startswith(OTHER):
        return meaning
    group = name.removeprefix(OTHER).strip().removesuffix("s")
    return Meaning(*(words.format(group=group) for words in meaning))


def in_words(names: Iterable[str]) -> str:
    """The definitions of metrics as sentences for the screen."""
    return " ".join(meaning.text for meaning in _definitions(names))


def in_latex(names: Iterable[str]) -> str:
    """The definitions of metrics for a paper."""
    return " ".join(meaning.latex for meaning in _definitions(names))


def _family(name: str) -> str:
    """The key of a metric's definition."""
    for known in (OTHER, BESIDE):
        if name.startswith(known):
            return known
    return "R@K" if is_recall(name) else "TAR@F" if name.startswith("TAR@") else name


# --- sentences about the numbers ------------------------------------------------------------------


def nothing_to_find(numbers: Mapping[str, float]) -> bool:
    """Whether no query had another image of its class to find, so that metrics mean nothing."""
    queries = numbers.get("queries", 0)
    return queries > 0 and numbers.get("queries_without_match") == queries


def about_matches(numbers: Mapping[str, float]) -> str:
    """A sentence if queries had no image of their class to find; "" if all had one."""
    alone, queries = numbers.get("queries_without_match", 0), numbers.get("queries", 0)
    if not alone:
        return ""
    if alone == queries:
        none = "The only query has no other image"
        if queries > 1:
            none = f"None of the {queries:,.0f} queries has another image"
        return (
            f"{none} of its class to find: R@K, MAP@R, NMI and all other metrics say nothing about "
            "the network."
        )
    have = "have" if alone > 1 else "has"
    return (
        f"{alone:,.0f} of the {queries:,.0f} queries {have} no other image of the same class to "
        "find: misses in R@K and MRR, left out of RP, MAP@R and mARP."
    )


def about_left_out(numbers: Mapping[str, float]) -> str:
    """A sentence if images were left out of an evaluation; else ""."""
    count = numbers.get(LEFT_OUT, 0)
    if not count:
        return ""
    images = "images that cannot be read were" if count > 1 else "image that cannot be read was"
    return f"{count:,.0f} {images} left out of the evaluation."


def doubts(numbers: Mapping[str, float]) -> list[str]:
    """Sentences about the limits of metrics: images left out, nothing to find, ties."""
    said = (about_left_out(numbers), about_matches(numbers), about_ties(numbers))
    return [words for words in said if words]
