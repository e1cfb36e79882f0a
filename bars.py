"""The line that moves on a terminal while something takes long."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm

from terminal import printable

SHARE = 0.02  # the part of the time that drawing may take
OFTEN, SELDOM = 0.1, 60.0  # seconds between two drawings, where it takes no time and where it does


class Bar(tqdm):
    """A bar that goes when its work is done; nothing off a terminal.

    A terminal that is slow to take it, such as a serial line or a connection that falters, is not
    waited for: the slower the last drawing was, the later the next one comes.

    Args:
        title: what is being done. total: of it. speaks: of several processes one does.
        more: as tqdm has it (leave=True: it stays).
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
