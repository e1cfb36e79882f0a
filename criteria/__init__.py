"""The losses, one family per file. This file lists their names without importing any of them.

So `--help` can print them at once, without torch. A loss of your own needs a file,
`criteria/mine.py`, and a line in `COMMANDS`, `"Mine": "mine:MyLoss"`. A term that is added to other
losses needs a file and a line in `ATTACHMENTS`.
"""

from __future__ import annotations

import importlib
from typing import Any

from criteria.arguments import unknown
from flags import Search
from utils import InputError, nearest_names

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
    # losses published from 2018 to 2025, under the names they are known by
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
"""Published command → the losses named as in it → the file, and the class or function in it."""

LOSSES: dict[str, str] = {name: at for names in COMMANDS.values() for name, at in names.items()}
"""Name of a loss → the file, and the class or function in it."""

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
"""The ranges that a study searches for arguments of losses that have no flag of their own. For a
loss without an entry here, and without a flag that has a `search`, it searches learning rates only.
"""

ALIASES = {
    "SoftTripleLoss": "SoftTriple",  # AMLoss' command
    "ProxyAnchorLoss": "Proxy_Anchor",
    "recallatk": "RecallAtK",  # RS@k's
}
"""Other names of losses in published commands → the names here."""

LIBRARY = "pml:"
"""The prefix of a loss of pytorch-metric-learning."""

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

The function takes the loss's name, its `Term`, whether embeddings should have unit length
(`l2_norm`), and its own options by keyword. It returns named Terms, of which "metric" replaces that
of the loss, and raises ValueError for a combination that makes no sense. If it has one of these two
keywords, it is filled in: `embedding_size`, and `metric_of_size`, a function that makes the loss's
Term for embeddings of another size, with everything that was attached before.
"""


def losses_in_words() -> str:
    """The names of the losses for --help, grouped by the command that they come from."""
    groups = (f"{command}: {', '.join(names)}" for command, names in COMMANDS.items())
    return "; ".join(group.removeprefix(": ") for group in groups)


def name_of(name: str) -> str:
    """The name of a loss here, given this name or another one from a published command."""
    return ALIASES.get(name, name)


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest names, for a loss that does not exist."""
    if name not in LOSSES and not name.startswith(LIBRARY):
        raise ValueError(unknown("loss", name, [*LOSSES, f"{LIBRARY}NAME"]))


def load(place: str) -> Any:
    """Import the class or function at a place such as "proxies:ProxyAnchorLoss".

    Raises InputError if the file does not exist, or has nothing of that name.
    """
    file, _, name = place.partition(":")
    try:
        module = importlib.import_module(f".{file}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{file}":
            raise
        raise InputError(
            f"criteria/__init__.py lists {place}, but there is no criteria/{file}.py; correct "
            "that line, or write the file"
        ) from error
    if not hasattr(module, name):
        raise InputError(
            f"criteria/__init__.py lists {place}, but criteria/{file}.py has no {name}; "
            f"{nearest_names(name, vars(module))}"
        )
    return getattr(module, name)
