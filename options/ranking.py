"""The flags of post-processing as values; no torch, so that a typing error is reported at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flags import Options
from utils import InputError

ALPHA = 3.0
RERANKING = (20, 6, 0.3)  # k1, k2 and λ of Zhong et al., 2017


class Expansion(NamedTuple):
    """How many neighbours are averaged, each weighted by this power of its cosine."""

    k: int
    alpha: float


class Reranking(NamedTuple):
    """k1, k2 and λ of k-reciprocal re-ranking."""

    k1: int
    k2: int
    balance: float


class Ranking(NamedTuple):
    """What happens between the embeddings and the ranking; None for what does not."""

    expansion: Expansion | None
    augmentation: Expansion | None
    reranking: Reranking | None

    def __bool__(self) -> bool:
        return any(part is not None for part in self)

    def in_words(self) -> str:
        """A description for a line above a table; empty if nothing is done."""
        parts = []
        if self.augmentation:
            k, alpha = self.augmentation
            parts.append(f"database augmentation with {k} neighbours (alpha {alpha:g})")
        if self.expansion:
            k, alpha = self.expansion
            parts.append(f"query expansion with {k} neighbours (alpha {alpha:g})")
        if self.reranking:
            k1, k2, balance = self.reranking
            parts.append(f"k-reciprocal re-ranking (k1 {k1}, k2 {k2}, lambda {balance:g})")
        return ", ".join(parts)


def ranking_of(args: Options) -> Ranking:
    """The ranking that evaluate.py's flags describe; raises InputError as `ranking_by` does."""
    return ranking_by(args.query_expansion, args.rerank, args.database_augmentation)


def ranking_by(
    query_expansion: Sequence[float] | None,
    rerank: Sequence[float] | None,
    database_augmentation: Sequence[float] | None = None,
) -> Ranking:
    """The ranking that the numbers of these flags describe; None if a flag is not given.

    Raises:
        InputError: the numbers make no sense, or the flags do not go together.
    """
    ranking = Ranking(
        expansion_of("--query-expansion", query_expansion),
        expansion_of("--database-augmentation", database_augmentation),
        reranking_of(rerank),
    )
    if ranking.reranking and (ranking.expansion or ranking.augmentation):
        other = "--query-expansion" if ranking.expansion else "--database-augmentation"
        raise InputError(
            f"--rerank averages neighbours itself (its k2), so {other} is not combined with it; "
            "leave one of them out"
        )
    return ranking


def expansion_of(flag: str, values: Sequence[float] | None) -> Expansion | None:
    """K and alpha; raises InputError if the numbers cannot be these."""
    if values is None:
        return None
    if len(values) > 2 or not _is_count(values[0]):
        raise InputError(
            f"{flag} takes K, a whole number of neighbours, and alpha where it is not {ALPHA:g} "
            f"({flag} 5, or {flag} 5 {ALPHA:g})"
        )
    return Expansion(int(values[0]), *(values[1:] or [ALPHA]))


def reranking_of(values: Sequence[float] | None) -> Reranking | None:
    """k1, k2 and λ; raises InputError if the numbers cannot be these."""
    if values is None:
        return None
    k1, k2, balance = chosen = values or RERANKING if len(values) in (0, 3) else (0, 0, 0)
    if not (_is_count(k1) and _is_count(k2) and k2 <= k1 and balance <= 1):
        raise InputError(
            "--rerank takes nothing, or k1, k2 and lambda: whole numbers with k2 at most k1, and a "
            f"share from 0 to 1 (--rerank {' '.join(f'{value:g}' for value in RERANKING)})"
        )
    return Reranking(int(chosen[0]), int(chosen[1]), float(balance))


def _is_count(value: float) -> bool:
    return value >= 1 and value == int(value)
