"""How a run starts: in a new folder, or where an earlier start stood; and who is told of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import dataset
import options
import processes
from devices import environment
from methods.base import Options
from runs import RunFolder, find_run, run_name
from training.state import Training
from training.tracking import Tracker, wandb_mode


def to_continue(args: Options) -> tuple[Options, RunFolder | None]:
    """With --resume-run the options of that run, under those that are given now, and its folder.

    Raises:
        InputError: there is no run, or a flag would change what it is.
    """
    if not args.resume_run:
        return args, None
    run = processes.from_main(partial(RunFolder.open, args.resume_run))
    return options.continued(args, processes.from_main(run.read_args)), run


def to_find(args: Options, kept: dict[str, Any]) -> RunFolder | None:
    """With --resume auto the run that this very command began, if there is one."""
    if args.resume != "auto":
        return None
    wanted = options.same_command(kept)
    return processes.from_main(partial(find_run, args.LOG_DIR, wanted, options.same_command))


def is_finished(run: RunFolder) -> bool:
    """Whether the run came to its end, as the main process sees it."""
    return processes.from_main(lambda: run.is_finished)


def open_folder(
    args: Options, run: RunFolder | None, training: Training
) -> tuple[RunFolder, dict[str, Any] | None]:
    """The folder, held against other processes, and the checkpoint to go on from, if there is one.

    Raises:
        InputError: the folder cannot be made, another process is at work in it, or the images are
            not those that the run began with.
    """
    images = [training.data.train, *training.data.judged]
    data = {
        "data": training.data.train.fingerprint(),
        "images": processes.from_main(partial(dataset.fingerprints, *images)),
    }
    if run is not None:
        run.hold()
        processes.from_main(partial(run.check_data, **data))
        return run, processes.from_main(partial(run.load_last, options.same_training))
    name = args.name or run_name(args.dataset, args.model, args.loss, args.remark)
    run = processes.from_main(partial(RunFolder.create, args.LOG_DIR, name))
    about = {**environment(training.precision.device), **data}
    processes.from_main(partial(run.begin, training.options, about))
    return run, None


def go_back(run: RunFolder, training: Training, state: dict[str, Any]) -> None:
    """Puts a checkpoint into the run, and forgets what came after it."""
    training.load_state(state)
    clock = training.clock
    if processes.from_main(partial(run.forget_best_after, clock.step)):
        clock.best = -1.0  # the next evaluation is the best one there is
    first_to_go = clock.step + (state["row"] is None)
    run.metrics.keep_before(first_to_go)
    run.classes.keep_before(first_to_go)
    print(f"continuing after epoch {clock.epoch}, step {clock.step}")


def open_tracker(
    args: Options, run: RunFolder, training: Training, state: dict[str, Any] | None
) -> Tracker:
    """wandb and TensorBoard, as the options want them, continued where the run is."""
    step, first = training.clock.step, state is None or state["row"] is None
    return Tracker(
        wandb_mode(args.wandb) if processes.is_main() else "disabled",
        tensorboard=args.tensorboard and processes.is_main(),
        project=args.wandb_project,
        name=run.path.name,
        folder=run.path,
        config=training.options,
        run_id=None if state is None else state["wandb_id"],
        continued_at=step + first if step else None,
    )
