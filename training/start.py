"""How a run starts: in a new folder, or where an earlier start stood."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import dataset
import methods
import options
import processes
from devices import environment
from evaluation.networks import checkpoint_file, found_again, looked_for
from flags import Options
from net.base import describe_base
from runs import Checkpoint, RunFolder, data_name, find_run, run_name
from terminal import fitted, say
from training.state import Training
from training.tracking import About, Tracker, wandb_mode
from utils import InputError


def to_continue(args: Options) -> tuple[Options, RunFolder | None]:
    """The options to train with, and the folder of the run to continue, if there is one.

    --resume-run continues the run that it names, with the flags of this command in place of the
    run's own. --resume auto continues the run that this same command began.

    Raises:
        InputError: there is no run, a flag would change what it is, or processes that are to work
            together were given different flags.
    """
    processes.check_alike(partial(options.of_all_processes, args), "give all of them the same")
    if args.resume_run:
        return _by_folder(args)
    return _by_command(args) if args.resume == "auto" else (args, None)


def _by_folder(args: Options) -> tuple[Options, RunFolder]:
    """The run of --resume-run, and its options with the flags of this command in their place."""
    run = processes.from_main(partial(RunFolder.open, args.resume_run))
    stored = processes.from_main(run.read_args)
    if "dataset" not in args.given:
        stored = {**stored, "dataset": processes.from_main(partial(_images_of, run, stored))}
    args = options.continued(args, stored)
    if stored.get("max_steps") and args.max_steps is None:
        _print(
            f"begun with --max-steps {stored['max_steps']}, continued to the end of the run "
            "(--max-steps N stops it earlier)"
        )
    _print_stretching(args, stored)
    return args, run


def _by_command(args: Options) -> tuple[Options, RunFolder | None]:
    """The run that this same command began, if there is one, and the options to continue it."""
    closeness = options.closeness(options.plain(args))
    run = processes.from_main(partial(find_run, args.LOG_DIR, args.name, closeness))
    if run is None:
        return args, None
    stored = processes.from_main(run.read_args)
    for name in options.at_first(stored):
        if name in args.given and stored[name] != getattr(args, name):
            flag = f"--{name.replace('_', '-')}"
            say(f"the run was continued with {flag} {stored[name]}, which holds from then on")
    return options.as_begun(args, stored), run


def _print(sentence: str) -> None:
    say(fitted(sentence, "  "))


def _print_stretching(args: Options, stored: dict[str, Any]) -> None:
    """Warns that a new length changes rates whose schedule spans the whole run."""
    follows = args.schedule == "onecycle" or (args.schedule == "cosine" and not args.cosine_epochs)
    for name in ("epochs", "steps"):
        before, now = stored.get(name), getattr(args, name)
        if follows and None not in (before, now) and before != now:
            _print(
                f"--{name} {now} stretches the {args.schedule} that was begun for {before:,} "
                f"{name}: the rates change at once, and those of the run are of neither length"
            )


@contextlib.contextmanager
def without_explained_warnings(args: Options) -> Iterator[None]:
    """Silences warnings about a cache that was chosen for the user, which is explained elsewhere.

    Of several processes only the main one warns about a cache at all.
    """
    views = logging.getLogger("dataset.views")
    level = views.level
    chosen = args.chosen and "decode" not in args.given
    if chosen or not processes.is_main():
        views.setLevel(logging.ERROR)
    try:
        yield
    finally:
        views.setLevel(level)


def _images_of(run: RunFolder, stored: dict[str, Any]) -> str:
    """The name by which the images of a run are found from here.

    Raises:
        InputError: they are not there.
    """
    choice = found_again(dataset.Choice(stored["dataset"]), run.path)
    if choice.is_gone:
        raise InputError(
            f"--resume-run {run.path}: the images that it was trained on are not there any more "
            f"({looked_for(choice, run.path)}); name their new place: --dataset "
            f"{choice.name.partition(':')[0]}:PATH"
        )
    return choice.found_by


def precision_of(args: Options, run: RunFolder | None) -> str:
    """--amp; where a run with `auto` is continued, what that was on the machine where it began."""
    if args.amp != "auto" or run is None:
        return args.amp
    began = processes.from_main(run.read_environment).get("precision")
    return began if began in ("bf16", "off") else args.amp


def is_finished(run: RunFolder) -> bool:
    """Whether the run came to its end, as the main process sees it."""
    return processes.from_main(lambda: run.is_finished)


def open_folder(
    args: Options, run: RunFolder | None, training: Training
) -> tuple[RunFolder, Checkpoint | None]:
    """The folder, held against other processes, and the checkpoint to go on from, if there is one.

    Raises:
        InputError: the folder cannot be made, another process is at work in it, or the images are
            not those that the run began with.
    """
    images = [training.data.train, *training.data.judged]
    train = training.data.train
    data = {
        "data": train.fingerprint(),
        "images": processes.from_main(partial(dataset.fingerprints, *images)),
    }
    if run is not None:
        run.hold()
        processes.from_main(partial(run.check_data, **data))
        return run, processes.from_main(partial(run.load_last, options.same_training))
    about = {**environment(training.precision.device), **data}
    about |= {"source": train.source, "concern": train.concern}
    about["precision"] = training.precision.name
    if (place := dataset.find(args.dataset).place) is not None:
        about["place"] = str(place)  # a relative path leads there from this folder alone
    network, chosen = training.network, training.options
    begun = chosen["checkpoint"] and str(checkpoint_file(chosen["checkpoint"]))
    training.base = describe_base(network, chosen["pretrained"], begun)
    base = training.base and {**training.base, "base_state_dict": network.base_state()}
    run = processes.from_main(partial(_new_folder, args))
    processes.from_main(partial(run.begin, training.options, about, base))
    return run, None


def _new_folder(args: Options) -> RunFolder:
    """The folder of a run that begins.

    --resume auto takes the one in which this same command has begun before, if that start was
    killed before it saved anything.
    """
    if args.resume == "auto":
        closeness = options.closeness(options.plain(args))
        begun = find_run(args.LOG_DIR, args.name, closeness, saved=False)
        if begun is not None:
            return begun
    name = args.name or run_name(args.dataset, args.model, args.loss, args.remark)
    return RunFolder.create(args.LOG_DIR, name)


def go_back(run: RunFolder, training: Training, state: Checkpoint) -> None:
    """Continues from a checkpoint, and removes from the folder what came after it."""
    training.load_state(state)
    clock = training.clock
    _check_length(training)
    if not training.finished:
        processes.from_main(run.forget_results)  # first: with them the longer run looks finished
    lengthened = partial(options.lengthened, now=training.options)
    processes.from_main(partial(run.change_args, lengthened))
    processes.from_main(partial(run.forget_after, clock.step))
    if processes.from_main(run.best_checkpoint) is None:
        clock.best = -1.0  # the next evaluation is the best one there is
    first_to_go = clock.step + (state["row"] is None)
    run.metrics.keep_before(first_to_go)
    run.classes.keep_before(first_to_go)
    place = f"after epoch {clock.epoch}, step {clock.step}"
    if training.finished:
        length = training.length
        longer = "--max-steps" if length.max_steps else "--steps" if length.steps else "--epochs"
        _print(f"finished {place}; it is evaluated again (a larger {longer} trains it further)")
    else:
        _print(f"continuing {place}")


def _check_length(training: Training) -> None:
    """Raises InputError where a continued run is to be shorter than it is."""
    clock, length = training.clock, training.length
    done = clock.epoch + (clock.step_in_epoch > 0)
    if not length.steps and done > length.epochs:
        raise InputError(
            f"--epochs {length.epochs} is less than the {done} epochs that the run has begun; "
            f"give at least --epochs {done}"
        )
    for flag, most in (("--steps", length.steps), ("--max-steps", length.max_steps)):
        if most is not None and clock.step > most:
            raise InputError(
                f"{flag} {most} is less than the {clock.step} steps that the run has done; choose "
                f"more, or leave {flag} out"
            )


def open_tracker(
    args: Options, run: RunFolder, training: Training, state: Checkpoint | None
) -> Tracker:
    """wandb and TensorBoard, as the options want them, continued where the run is."""
    step, first = training.clock.step, state is None or state["row"] is None
    return Tracker(
        wandb_mode(args.wandb) if processes.is_main() else "disabled",
        _about(args, run, training),
        tensorboard=args.tensorboard and processes.is_main(),
        run_id=None if state is None else state["wandb_id"],
        continued_at=step + first if step else None,
    )


def _about(args: Options, run: RunFolder, training: Training) -> About:
    """How the trackers tell the run from others; its seeds have a group in common."""
    chosen, began = training.options, run.read_environment()
    title = methods.title(options.kept(chosen))
    shared = options.configuration(chosen)
    data, words = data_name(shared["dataset"]), json.dumps(shared, sort_keys=True, default=str)
    group = f"{title} on {data} ({hashlib.sha256(words.encode()).hexdigest()[:6]})"
    facts = {"commit": began.get("git_commit"), "data fingerprint": began.get("data")}
    tags = (title, data, f"seed {chosen['seed']}")
    return About(
        args.wandb_project,
        run.path.name,
        run.path,
        {**options.by_flag(chosen), **facts},
        group[-128:],
        tuple(tag[:64] for tag in tags),
    )
