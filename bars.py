"""Progress bars."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from terminal import printable

SHARE = 0.02  # the share of the time that drawing may take
OFTEN, SELDOM = 0.1, 60.0  # seconds between drawings on a fast terminal, and at most on a slow one


class Bar(tqdm):
    """A progress bar on a terminal, which disappears when the work is done; elsewhere nothing.

    Slow terminals, such as a serial line or a bad connection, do not slow down the work: the longer
    the last drawing took, the later the next one comes.

    Args:
        title: names the work. total: its amount. speaks: False in all but one of several processes.
        more: tqdm's own arguments.
    """

    def __init__(
        self, title: str, total: float | None, *, speaks: bool = True, **more: Any
    ) -> None:
        look = {"unit": "img", "leave": False, "mininterval": OFTEN}
        look["disable"] = None if speaks else True
        super().__init__(desc=printable(title), total=total, **{**look, **more})

    def refresh(self, *args: Any, **more: Any) -> Any:
        """Draws it."""
        begun = time.perf_counter()
        drawn = super().refresh(*args, **more)
        self.mininterval = min(max(OFTEN, (time.perf_counter() - begun) / SHARE), SELDOM)
        return drawn
