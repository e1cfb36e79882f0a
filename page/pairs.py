"""Two images, one class or two: the results of verification, and histograms of pairs' cosines."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch.nn.functional as F

from evaluation.thresholds import Rate, Thresholds
from page.document import percent
from page.findings import Search
from page.records import Record

QUERIES = 500  # a sample, whose pairs with all images are drawn
BINS = 80
WORDS = {"TAR@1e-2": "1 in 100", "TAR@1e-3": "1 in 1,000", "TAR@1e-4": "1 in 10,000"}


def pairs(record: Record, search: Search) -> dict[str, Any] | None:
    """Sentences about the verification in results.json, and cosines; None without verification.

    The cosines are those of some random queries with all other images, as shares of the pairs of
    one class and of the pairs of two.
    """
    title = search.judged.task.title
    numbers = (record.outcome.get("verification") or {}).get(title)
    if not numbers or numbers.get("EER") is None:
        return None
    kept = (record.outcome.get("thresholds") or {}).get(title)
    found = Thresholds.of_dict(kept) if kept else None
    ends = [] if found is None else [(found.different, "different"), (found.same, "same")]
    return {
        "said": [*_curve(numbers), *_rule(found)],
        "marks": [[round(value, 4), name] for value, name in ends],
        **_cosines(search),
    }


def _curve(numbers: dict[str, float]) -> list[str]:
    """Sentences about the ROC curve."""
    rates = [
        f"{percent(numbers[name])} % where {words} pairs of two classes is accepted too"
        for name, words in WORDS.items()
        if numbers.get(name) is not None and math.isfinite(numbers[name])
    ]
    said = [
        f"Equal error rate {percent(numbers['EER'])} %: at one cosine that share of the pairs of "
        "one class is rejected, and of the pairs of two classes accepted. A pair of one class is "
        f"nearer than one of two in {percent(numbers['AUC'])} of 100 cases (AUC)."
    ]
    return [*said, f"Pairs of one class accepted: {', '.join(rates)}."] if rates else said


def _rule(found: Thresholds | None) -> list[str]:
    """Sentences about the recommended thresholds and their expected errors."""
    if found is None:
        return ["Too few pairs to recommend a threshold."]
    return [
        f"Recommended for any two images: the same from a cosine of {found.same:.3f} on, which is "
        f"wrong for {_share(found.false_same)} of the pairs of two classes and finds "
        f"{_share(found.found_same)} of those of one; different below {found.different:.3f}, wrong "
        f"for {_share(found.false_different)} of the pairs of one class; in between unsure.",
        *([found.doubt] if found.doubt else []),
    ]


def _share(rate: Rate) -> str:
    return rate.percent(" (95 % over classes: {} to {})")


def _cosines(search: Search) -> dict[str, Any]:
    """Histograms of the cosines of same and of different pairs, as shares, on common edges."""
    judged = search.judged
    gallery_images, gallery = judged.searched
    unit = F.normalize(gallery.float(), dim=1)
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.permutation(len(judged.images))[:QUERIES])
    edges = np.linspace(-1, 1, BINS + 1)
    counts = np.zeros((2, BINS))
    for row in chosen.tolist():
        cosines = (unit @ F.normalize(judged.embeddings[row].float(), dim=0)).cpu().numpy()
        same = gallery_images.labels == judged.images.labels[row]
        others = np.ones(len(same), bool)
        if judged.gallery is None:
            others[row] = False  # itself
        for kind, pairs_of in enumerate((same & others, ~same & others)):
            counts[kind] += np.histogram(cosines[pairs_of].clip(-1, 1), edges)[0]
    seen = np.flatnonzero(counts.sum(axis=0))
    part = slice(seen[0], seen[-1] + 1) if len(seen) else slice(0, BINS)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    middles = (edges[:-1] + edges[1:]) / 2
    return {
        "cosines": [round(float(v), 4) for v in middles[part]],
        "same": [round(float(v), 5) for v in shares[0, part]],
        "different": [round(float(v), 5) for v in shares[1, part]],
        "queries": len(chosen),
        "counts": [int(counts[0].sum()), int(counts[1].sum())],
    }
