"""Matryoshka (Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022), for any loss."""

from __future__ import annotations

from flags import Group, Kind, Options, flag, whole
from methods.base import Method
from utils import program


def refuses(options: Options) -> str:
    """Refuses settings in which the first entries of the embedding are not an embedding."""
    if options.nb_clusters is not None:
        return (
            "--matryoshka cannot go with divide and conquer (--nb-clusters): each cluster learns "
            "its own part of the embedding, and the first entries would hold the parts of some; "
            "leave one of them out"
        )
    if options.head == "training":
        return (
            "--matryoshka cannot go with --head training: evaluation compares the pooled features "
            "there, whose entries no loss puts in order; leave one of them out"
        )
    last, size = options.matryoshka[-1], options.embedding_size
    if last != size:
        return (
            f"the last size of --matryoshka is {last} and must be the whole embedding's, {size}; "
            f"end with {size}, or give --embedding-size {last}"
        )
    return ""


# fmt: off
METHOD = Method(
    name="matryoshka",
    title="Matryoshka",
    flags=(Group("Matryoshka: embeddings that can be cut short, for any loss", (
        flag("--matryoshka", (), Kind(whole(1), "D", nargs="+"),
             "add the loss of the first D dimensions of the embedding for each D; the last one is "
             f"--embedding-size; `{program('evaluate')} --dims` measures them", shown="off"),
    )),),
    wanted=lambda options: bool(options.matryoshka),
    attach={"sizes": "matryoshka"},
    off={"matryoshka": ()},
    refuses=refuses,
)
