"""The losses, one family per file, of torch alone; this file names them and loads none.

So `--help` can list them at once. A loss of your own costs its file, `criteria/mine.py`, and a line
in `COMMANDS`, `"Mine": "mine:MyLoss"`; a term that goes with other losses its file and a line in
`ATTACHMENTS`.
"""

from __future__ import annotations

import importlib
from typing import Any

from criteria.arguments import unknown
from flags import Search

PROXY_LR_SCALE = 100.0
"""The learning rate of proxies as a multiple of the network's, as Proxy-Anchor was published."""

COMMANDS: dict[str, dict[str, str]] = {
    # Proxy-Anchor's and AMLoss' commands, --loss; and losses of your own
    "": {
        "Proxy_Anchor": "proxies:ProxyAnchorLoss",
        "AMLoss": "amloss:AMLoss",
        "Proxy_NCA": "library:PROXY_NCA",
        "MS": "library:MULTI_SIMILARITY",
        "Contrastive": "library:CONTRASTIVE",
        "Triplet": "library:TRIPLET",
        "NPair": "library:N_PAIR",
        "SoftTriple": "library:SOFT_TRIPLE",
        "Circle": "library:CIRCLE",
        "CircleLoss": "circle:CircleLoss",
        "Margin": "library:MARGIN",
    },
    # SEC's command, --use_loss
    "spherical embeddings'": {
        "triplet": "pairs:TripletLoss",
        "semihtriplet": "pairs:SemihardTripletLoss",
        "n-npair": "pairs:NPairLoss",
        "ms": "pairs:MultiSimilarityLoss",
    },
    # divide and conquer's command, --criterion
    "divide and conquer's": {
        "MarginLoss": "margin:margin_loss",
        "TripletLoss": "pairs:mined_triplet_loss",
        "TripletAllLoss": "pairs:all_triplet_loss",
        "TripletSemihardLoss": "pairs:semihard_triplet_loss",
        "NPairsLoss": "pairs:SoftmaxPairLoss",
    },
    # the references of 2018 to 2025, each by the name it goes by
    "of 2018 to 2025": {
        "Hyp": "hyperbolic:HyperbolicPairLoss",
        "Sph": "hyperbolic:SphericalPairLoss",
        "RecallAtK": "recall:RecallAtKLoss",
        "SupAP": "average_precision:SupAPLoss",
        "NormSoftmax": "softmax:NormalisedSoftmaxLoss",
        "ProxyNCA_pp": "softmax:ProxyNCAPlusPlusLoss",
        "ArcFace": "softmax:ArcFaceLoss",
        "CosFace": "softmax:CosFaceLoss",
        "SupCon": "supcon:SupConLoss",
        "HIST": "hypergraph:HistLoss",
        "HIER": "hierarchy:HierLoss",
        "PFML": "potential:PotentialFieldLoss",
    },
}
"""The published command that a loss is named by → the loss's name → the file and what builds it."""

LOSSES: dict[str, str] = {name: at for names in COMMANDS.values() for name, at in names.items()}
"""Every loss: its name → the file and what builds it."""

SEARCHED: dict[str, dict[str, Search]] = {
    "MS": {"base": Search(0.3, 0.7, log=False)},
    "Contrastive": {"neg_margin": Search(0.2, 1.2, log=False)},
    "Triplet": {"margin": Search(0.02, 0.5)},
    "SoftTriple": {"la": Search(5, 50), "gamma": Search(0.03, 0.3)},
    "Circle": {"m": Search(0.2, 0.6, log=False), "gamma": Search(16, 256)},
    "CircleLoss": {"m": Search(0.2, 0.6, log=False), "gamma": Search(16, 256)},
    "Margin": {"beta": Search(0.8, 1.4, log=False), "margin": Search(0.05, 0.5, log=False)},
    "ms": {"base": Search(0.3, 0.7, log=False)},
    "MarginLoss": {"beta": Search(0.8, 1.4, log=False)},
    "Hyp": {"temperature": Search(0.05, 0.5), "curvature": Search(0.03, 0.3)},
    "Sph": {"temperature": Search(0.03, 0.3)},
    "RecallAtK": {"temperature": Search(3e-3, 3e-2)},
    "SupAP": {"temperature": Search(3e-3, 3e-2)},
    "NormSoftmax": {"temperature": Search(0.02, 0.2)},
    "ProxyNCA_pp": {"temperature": Search(0.03, 0.3)},
    "ArcFace": {"margin": Search(0.1, 0.7, log=False), "scale": Search(8, 64, log=False)},
    "CosFace": {"margin": Search(0.1, 0.5, log=False), "scale": Search(8, 64, log=False)},
    "SupCon": {"temperature": Search(0.03, 0.3)},
    "HIST": {"tau": Search(8, 64), "lam": Search(0.3, 3)},
    "HIER": {"weight": Search(0.1, 2)},
    "PFML": {"delta": Search(0.05, 0.5)},
}
"""What a study tries for the arguments of a loss that have no flag of their own. Of a loss without
an entry here, and without a flag that has a `search`, it tries learning rates alone."""

ALIASES = {
    "SoftTripleLoss": "SoftTriple",  # AMLoss' command
    "ProxyAnchorLoss": "Proxy_Anchor",
    "recallatk": "RecallAtK",  # RS@k's
}
"""What a published command also calls a loss → its name here."""

LIBRARY = "pml:"
"""What the name of a loss of pytorch-metric-learning begins with."""

ATTACHMENTS: dict[str, str] = {
    "introspective": "idml:introspective",
    "disentangled": "ddml:disentangled",
    "memory": "memory:memory",
    "matryoshka": "matryoshka:matryoshka",
    "sec": "sphere:sec",
    "l2": "sphere:l2",
    "masks": "masks:masks",
}
"""What can be attached to a loss, in the order of attaching → the file and the function in it.

A function takes the loss's name, its `Term`, whether unit length is asked for (`l2_norm`), and its
own options by keyword. It returns named Terms, of which "metric" takes the loss's place, and raises
a ValueError for what makes no sense. Two keywords are not the user's to give, and filled in where
they are asked for: `embedding_size`, and `metric_of_size`, which makes the Term for embeddings of
another size, with all that was attached to it before.
"""


def losses_in_words() -> str:
    """The names of the losses for --help, by the command that they come from."""
    groups = (f"{command}: {', '.join(names)}" for command, names in COMMANDS.items())
    return "; ".join(group.removeprefix(": ") for group in groups)


def name_of(name: str) -> str:
    """The name of a loss, where a published command calls it by another one."""
    return ALIASES.get(name, name)


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest names, for a loss that there is not."""
    if name not in LOSSES and not name.startswith(LIBRARY):
        raise ValueError(unknown("loss", name, [*LOSSES, f"{LIBRARY}NAME"]))


def load(place: str) -> Any:
    """What stands at a place such as "proxies:ProxyAnchorLoss", its file imported now."""
    file, _, name = place.partition(":")
    return getattr(importlib.import_module(f".{file}", __name__), name)
