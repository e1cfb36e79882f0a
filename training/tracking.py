"""Weights & Biases and TensorBoard, which show a run live; both are optional.

wandb is online with a key, offline without one or if its server does not answer, and never prompts.
Its own commands and variables (`wandb disabled`, $WANDB_MODE, $WANDB_NAME) are respected. No error
in either may stop a run: the first one is reported in a sentence, and that tracker ends. The run
folder has the same numbers in any case.

Both get the columns of metrics.csv in groups: `train/` the loss and its terms, `eval/` metrics on
the classes that pick the best epoch, `best/` the highest R@1 so far, `lr/` and `time/`.
"""

from __future__ import annotations

import configparser
import http.client
import json
import logging
import netrc
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from dataset.kept import usual_place
from evaluation.meanings import HIDDEN, is_metric
from machine import expanded
from runs import MetricsRow

logger = logging.getLogger(__name__)

# --- online or offline ----------------------------------------------------------------------------


ANSWER, LOGIN = 4.0, 8.0  # seconds that wandb's server has to answer, and to take the run
WANDB_MODES = {name: name for name in ("online", "offline", "disabled")}
WANDB_MODES |= {"dryrun": "offline", "run": "online", "shared": "online"}  # its other names


def wandb_mode(flag: str | None) -> str:
    """online, offline or disabled.

    The flag decides; without it $WANDB_MODE; without that what `wandb disabled` and the like have
    set for this folder or for the user. Otherwise it is online if a key is configured.
    """
    for asked in (flag, os.environ.get("WANDB_MODE"), *_modes_in_files()):
        if asked in WANDB_MODES:
            return WANDB_MODES[asked]
    return "online" if _has_key() else "offline"


def _modes_in_files() -> Iterator[str]:
    """The modes in wandb's own settings files, that of the current folder first."""
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb"
    of_user = Path(os.environ.get("WANDB_CONFIG_DIR") or expanded("~/.config/wandb"))
    for file in (here / "settings", of_user / "settings"):
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(file, encoding="utf-8")
        except (OSError, ValueError, configparser.Error):
            continue
        yield settings.get("default", "mode", fallback="")


def wandb_server() -> str:
    """The address of wandb's server."""
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def answers(address: str, seconds: float) -> bool:
    """Whether a server answers within so many seconds, directly or through a proxy."""
    said = []

    def ask() -> None:
        try:
            urllib.request.urlopen(address, timeout=seconds).close()
        except urllib.error.HTTPError:
            said.append(True)  # a refusal is an answer
        except (OSError, ValueError, http.client.HTTPException):
            pass
        else:
            said.append(True)

    # In a thread, because no timeout applies to the look-up of a host name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(said)


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = wandb_server().split("//")[-1].split("/")[0]
    file = Path(expanded(os.environ.get("NETRC") or "~/.netrc"))
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


# --- names ----------------------------------------------------------------------------------------

TIMES = ("seconds", "images_per_second", "data_wait", "evaluation_seconds")
PLACES = ("epoch", "step")
"""Columns that give the position of a row; the others are plotted over them."""


def grouped(column: str) -> str:
    """The name of a column of metrics.csv with its group: `R@1` → `eval/R@1`."""
    if column in PLACES:
        return column
    if column in TIMES:
        return f"time/{column}"
    for group in ("lr", "best"):
        if column.startswith(f"{group} "):
            return f"{group}/{column.removeprefix(f'{group} ')}"
    measured = is_metric(column) or column.startswith(HIDDEN)
    return f"{'eval' if measured else 'train'}/{column}"


def summary_of(name: str) -> str:
    """Which values of a column wandb keeps in a run's summary, by its group."""
    if name.startswith("eval/") and not name.startswith(f"eval/{HIDDEN}"):
        return "max,last"
    return "min,last" if name.startswith("train/") else "last"


@dataclass(frozen=True)
class About:
    """The names of a run, and what distinguishes it from others.

    Attributes:
        project, name: as wandb shows them.
        folder: the run folder; files go into its sub-folders `wandb` and `tensorboard`.
        config: the options, the commit and the fingerprint of the data.
        group: shared by the seeds of one configuration. tags: method, data and seed.
    """

    project: str
    name: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    tags: tuple[str, ...] = ()


# --- sinks: what shows a run; their methods may raise whatever they like --------------------------


VARIABLES = {"name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "tags": "WANDB_TAGS"}
"""The variables from which wandb takes these if they are not passed."""


class _Wandb:
    """Weights & Biases; `id` identifies the run, to be passed when it continues.

    Attributes:
        status: its mode, in words.
    """

    name = "wandb"

    def __init__(self, mode: str, about: About, run_id: str | None) -> None:
        if not os.environ.get("WANDB_CACHE_DIR") and usual_place() is None:
            # Its second process writes its log there, or else to the terminal.
            os.environ["WANDB_CACHE_DIR"] = str(about.folder / "wandb")
        import wandb

        ours = {"name": about.name, "group": about.group or None, "tags": about.tags or None}
        named = {key: value for key, value in ours.items() if not os.environ.get(VARIABLES[key])}

        def begin(mode: str) -> Any:
            return wandb.init(
                mode=mode,
                project=about.project,
                dir=str(about.folder),
                config=dict(about.config),
                **named,
                id=run_id,
                resume="allow" if run_id else None,
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, init_timeout=LOGIN
                ),
            )

        self._wandb, self.status = wandb, mode
        try:
            if mode == "online" and not answers(wandb_server(), ANSWER):
                raise ConnectionError(f"{wandb_server()} does not answer")
            self._run = begin(mode)
        except Exception as error:  # of many kinds; none may cost a night's numbers
            if mode != "online":
                raise
            self.status = f"offline ({' '.join(str(error).split())}); `wandb sync` sends it later"
            self._run = begin("offline")
        self.id = self._run.id
        self._defined: set[str] = set()

    def log(self, row: MetricsRow, step: int) -> None:
        for name in row:
            if name not in self._defined and name not in PLACES:
                self._run.define_metric(name, summary=summary_of(name))
                self._defined.add(name)
        self._run.log(row, step=step)

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._run.log({name: self._wandb.Histogram(values)}, step=step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._run.log({name: self._wandb.Image(picture)}, step=step)

    def finish(self) -> None:
        self._run.finish()


class _TensorBoard:
    """TensorBoard's event files in the run folder's sub-folder `tensorboard`.

    `continued_at` is the step from which a continued run logs again: TensorBoard then ignores older
    entries from that step on.
    """

    name = "tensorboard"

    def __init__(self, about: About, continued_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        _quieten_threads_of("tensorboard")
        self._writer = SummaryWriter(about.folder / "tensorboard", purge_step=continued_at)
        if continued_at is None:
            listed = json.dumps(about.config, indent=2, default=str)
            self._writer.add_text("options", f"```\n{listed}\n```", 0)
            # Not by add_hparams, which would begin another run for them.
            for part in hparams(_plain(about.config), dict.fromkeys(JUDGED, 0.0))[:2]:
                self._writer.file_writer.add_summary(part)

    def log(self, row: MetricsRow, step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that nothing is lost if the run is killed

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._writer.add_histogram(name, values, step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        self._writer.add_image(name, np.array(picture), step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()


JUDGED = ("best/R@1", "eval/MAP@R")
"""The metrics in TensorBoard's table of hyperparameters."""


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values as that table accepts them: numbers, words, true and false."""
    kinds = (bool, int, float, str)
    return {k: v if isinstance(v, kinds) else str(v) for k, v in config.items() if v is not None}


def _quieten_threads_of(package: str) -> None:
    """Keeps a package's threads from printing tracebacks: its next call raises the error anyway."""
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        if not type(ended.thread).__module__.startswith(package):
            before(ended)

    threading.excepthook = hook


_Sink = TypeVar("_Sink", _Wandb, _TensorBoard)


class Tracker:
    """Sends a run's configuration, numbers and pictures to wandb and TensorBoard where they are.

    Args:
        mode: of wandb: online, offline or disabled.
        about: what the run is called, and where its files go.
        tensorboard: whether TensorBoard's files are written too.
        run_id: of an earlier run to continue in wandb.
        continued_at: the step from which a continued run logs again.

    Attributes:
        status: how each of the two stands, in words.
    """

    def __init__(
        self,
        mode: str,
        about: About,
        *,
        tensorboard: bool = False,
        run_id: str | None = None,
        continued_at: int | None = None,
    ) -> None:
        self._sinks: list[_Wandb | _TensorBoard] = []
        self.run_id = run_id
        self.status = {"wandb": mode}
        if mode != "disabled":
            opened = self._open("wandb", lambda: _Wandb(mode, about, run_id))
            if opened is not None:
                self.run_id, self.status["wandb"] = opened.id, opened.status
        if tensorboard:
            self.status["tensorboard"] = str(about.folder / "tensorboard")
            self._open("tensorboard", lambda: _TensorBoard(about, continued_at))

    def _open(self, name: str, make: Callable[[], _Sink]) -> _Sink | None:
        """Opens one of the two; None where it is not installed, or fails."""
        try:
            sink = make()
        except ImportError:
            self.status[name] = f"off ({name} is not installed: pip install {name})"
            return None
        except Exception as error:  # network, quota, version: whatever it is, training goes on
            self._give_up(name, error)
            return None
        self._sinks.append(sink)
        return sink

    def describe(self) -> str:
        """A line for each."""
        return "\n".join(f"{name:<11} {status}" for name, status in self.status.items())

    def log(self, row: MetricsRow, step: int) -> None:
        """Sends one row at optimisation step `step`; its columns are `grouped`."""
        named = {grouped(column): value for column, value in row.items()}
        self._to_all(lambda sink: sink.log(named, step))

    def log_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Sends the distribution of an array at optimisation step `step`, as `train/NAME`."""
        self._to_all(lambda sink: sink.log_histogram(f"train/{name}", values, step))

    def log_picture(self, name: str, draw: Callable[[], Image.Image], step: int) -> None:
        """Sends what `draw` returns as `eval/NAME`; it is called only where somebody shows it."""
        if not self._sinks:
            return
        try:
            picture = draw()
        except Exception as error:  # a file of the gallery may be gone by now
            logger.warning("no picture of %s (%s); training goes on", name, error)
            return
        self._to_all(lambda sink: sink.log_picture(f"eval/{name}", picture, step))

    def finish(self) -> None:
        """Ends the run."""
        self._to_all(lambda sink: sink.finish())

    def _to_all(self, send: Callable[[_Wandb | _TensorBoard], None]) -> None:
        for sink in list(self._sinks):
            try:
                send(sink)
            except Exception as error:
                self._sinks.remove(sink)
                self._give_up(sink.name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        logger.warning(
            "%s stopped (%s); training goes on, metrics.csv has every number", name, error
        )
        self.status[name] = "off (it failed)"
