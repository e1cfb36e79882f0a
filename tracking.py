"""Weights & Biases, made optional: online with a key, offline without, and never a prompt.

Nothing that goes wrong in wandb may stop a training run: the first failure is reported in one
sentence and tracking ends. The run folder holds the same numbers in any case.
"""

from __future__ import annotations

import logging
import netrc
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def wandb_mode(flag: str | None) -> str:
    """The flag, else $WANDB_MODE, else online where a key is configured and offline elsewhere."""
    if flag:
        return flag
    asked = os.environ.get("WANDB_MODE", "")
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """Sends configuration and rows of numbers to wandb; does nothing where that is not possible.

    Args:
        mode: online, offline or disabled.
        project, name: as wandb shows them.
        folder: the run folder; wandb's files go into its sub-folder `wandb`.
        config: the options.
        run_id: of an earlier run to continue.
    """

    def __init__(
        self,
        mode: str,
        *,
        project: str,
        name: str,
        folder: Path,
        config: dict[str, Any],
        run_id: str | None = None,
    ) -> None:
        self._run = None
        self.run_id = run_id
        self.status = mode
        if mode == "disabled":
            return
        try:
            import wandb
        except ImportError:
            self.status = "off (wandb is not installed)"
            return
        try:
            self._run = wandb.init(
                mode=mode,
                project=project,
                name=name,
                dir=str(folder),
                config=config,
                id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(silent=True, console="off", disable_git=True),
            )
            self.run_id = self._run.id
        except Exception as error:  # network, quota, version: whatever it is, training goes on
            self._give_up(error)

    def log(self, row: dict[str, Any], step: int) -> None:
        """Sends one row at optimisation step `step`."""
        if self._run is None:
            return
        try:
            self._run.log(row, step=step)
        except Exception as error:
            self._give_up(error)

    def log_histogram(self, name: str, values: Any, step: int) -> None:
        """Sends the distribution of an array at optimisation step `step`."""
        if self._run is None:
            return
        import wandb

        self.log({name: wandb.Histogram(values)}, step)

    def finish(self) -> None:
        """Ends the run."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("wandb stopped (%s); training goes on, metrics.csv has every number", error)
        self._run = None
        self.status = "off (it failed)"
