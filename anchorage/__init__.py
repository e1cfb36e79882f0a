"""Anchorage: deep metric learning from one command line, and as a library.

    from anchorage import load_run
    embed = load_run("logs/demo")
    embeddings = embed(["one.jpg", "two.png"])  # (2, d), unit length

    from anchorage.losses import AMLoss  # if it is installed; in the repository: from losses …
    from anchorage.metrics import retrieval_metrics

In the repository the modules (losses, metrics, net, …) are at the top and are imported by these
names. In an installation all of them are inside this package, where hatch_build.py puts them, so
that their names do not clash with those of other packages. Modules are imported when a name in them
is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from utils import our_name

if TYPE_CHECKING:
    from evaluation.inference import load_run
    from metrics import clustering_metrics, retrieval_metrics

__version__ = "0.1.0"
__all__ = ["__version__", "clustering_metrics", "load_run", "retrieval_metrics"]

_HOMES = {
    "load_run": "evaluation.inference",
    "clustering_metrics": "metrics",
    "retrieval_metrics": "metrics",
}
"""Names that are imported on first use, and their modules."""


def __getattr__(name: str) -> Any:
    """Imports a name of `_HOMES`."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(our_name(_HOMES[name])), name)
