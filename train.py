"""Train an embedding network, judge it on classes it never saw, keep everything in a run folder.

    python train.py @recipes/emoji_scratch.txt
    python train.py --dataset cub --model bn_inception --loss AMLoss --batch-size 180 --alphap 48 …

Options become the parts of a run (`prepare`), which are used in one optimisation step (`step`), in
many (`advance`), in the whole run (`fit`). The loop knows no method: the objective computes the
loss, routines do whatever a method does around steps, parameter groups say how parameters train.
"""

import door
from flags import Options

if __name__ == "__main__":
    door.enter(loads_torch=True)

import options

ARGS = options.parse_train() if __name__ == "__main__" else None

import logging
import sys
import time
from collections.abc import Iterator

import torch

import dataset
import methods
import processes
from dataset.loader import Batch
from dataset.samplers import make_sampler
from devices import Precision, pick_device, seed_everything
from evaluation.embedding import Viewing
from methods.base import Forward
from runs import MetricsRow, RunFolder
from terminal import hear, notice_if_slow, say
from training import data as run_data
from training import setup, start
from training.average import Average
from training.clock import Estimate, Length
from training.describing import describe
from training.faults import NonFinite, Step, Watch, memory_in_words
from training.keeping import Keeper
from training.progress import print_estimate, progress_bar, show
from training.signals import Interrupted, Signals
from training.state import Training
from utils import sentence_errors


def prepare(args: Options, *, run: RunFolder | None = None) -> Training:
    """Builds and checks everything a run needs, before anything is written.

    Args:
        run: the run to continue, if there is one.

    Raises:
        InputError: options do not go together, or data or weights are missing.
    """
    device = pick_device(processes.gpu(args.gpu_id))
    precision = Precision(start.precision_of(args, run), device)
    processes.check_alike(precision.shared, "give all the same --amp, and machines that are alike")
    setup.check(args, continued=run is not None)
    seed_everything(args.seed, args.deterministic)
    held_out = run_data.HeldOut(args.val_classes, args.val_fold, args.seed, args.val_folds)
    choice = dataset.Choice.of(args)
    with notice_if_slow(f"looking for the images of {args.dataset}"):
        data = run_data.load(choice, held_out, args.batch_size, args.max_bad_images)
    labels = data.train.labels
    objective = setup.build_objective(args, data.train.num_classes, device)
    routines = methods.routines(args, labels)
    with notice_if_slow(f"building {args.model}"):
        network = setup.build_network(
            args, objective.heads, routines, precision, continued=run is not None
        )
    viewing = Viewing.of(args)
    batches = methods.sampler(args, labels) or make_sampler(
        labels, args.batch_size, instances=args.IPC, repeat=bool(args.IPC_repeat), seed=args.seed
    )
    setup.rehearse(args, objective, data.train, batches)
    data = run_data.look_through(data, viewing)
    loader = setup.build_loader(args, data.train, batches, network.input, viewing, device)
    length = Length.of(args, len(loader))
    loader.read_ahead(length.epochs_begun(len(loader)))
    groups = setup.trained_groups(args, network, objective, routines)
    rates = setup.build_rates(args, length, len(loader))
    optimisers = setup.build_optimisers(args, groups, rates, precision.scaler)
    return Training(
        data,
        network,
        objective,
        optimisers,
        routines,
        loader,
        precision,
        viewing,
        length,
        watch=Watch(args.on_nan, device),
        options=options.plain(args),
        chosen=args.metrics,
        seed=args.seed,
        micro_batch=args.micro_batch,
        average=Average(network.trained_state, args.ema) if args.ema else None,
        estimate=Estimate.on(device),
    )


# --- one step -------------------------------------------------------------------------------------


def step(training: Training, batch: Batch) -> dict[str, torch.Tensor] | None:
    """One optimisation step.

    Returns:
        The loss and its terms, detached, on the device; None when the step was skipped.

    Raises:
        NonFinite: the loss or a gradient is not finite.
    """
    watch, clock = training.watch, training.clock
    before = [b.clone() for b in training.running_statistics()] if watch.policy == "skip" else []
    loss, terms = loss_of(training, batch)
    values = {"loss": loss.detach(), **terms}
    epochs = clock.epoch + clock.step_in_epoch / len(training.loader)
    finite = training.optimisers.step(loss, epochs, clock.step, careful=watch.careful)
    clock.step += 1
    clock.step_in_epoch += 1
    rates = training.optimisers.learning_rates()
    if watch.saw(Step(clock.epoch, clock.step, batch.index, values, rates, finite)):
        if training.average is not None:
            training.average.update()
        return values
    for buffer, value in zip(training.running_statistics(), before, strict=True):
        buffer.copy_(value)
    return None


def loss_of(training: Training, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch, 0-d with its graph, and the terms of the images as they are."""
    for routine in training.routines:
        batch = routine.prepare(batch)
    forwards, context = [Forward(batch.images, [(1.0, batch.labels)])], {}
    for routine in training.routines:
        forwards = routine.forwards(batch, forwards)
        context |= routine.context()
    loss, terms = 0.0, None
    for images, targets in forwards:
        outputs = training.outputs(images, batch)
        for weight, labels in targets:
            again = terms is not None
            loss = loss + weight * training.objective(outputs, labels, again=again, **context)
            terms = training.objective.terms if terms is None else terms
    return loss, terms


# --- many steps -----------------------------------------------------------------------------------


def advance(training: Training, signals: Signals | None = None) -> bool:
    """Trains until the next stop or pause; returns whether it is a stop.

    A stop gets a row in metrics.csv: it is the end of an epoch, an evaluation by --eval-steps, or
    the run's last step. A pause is a checkpoint by --save-every, or a signal.

    Raises:
        NonFinite: a loss or gradient is not finite.
    """
    clock, lap, loader = training.clock, training.lap, training.loader
    batches, signals = rest_of_epoch(training), signals or Signals()
    training.network.train()  # except frozen BatchNorms: see EmbeddingNet.train
    training.objective.train()
    started, waited = time.perf_counter(), lap.waited - loader.wait_seconds()
    with progress_bar(training) as bar:
        while not (stop := training.stops_here):
            batch = signals.next_of(batches)
            if batch is None:
                break
            values = step(training, batch)
            if values is not None:
                lap.add(values)
            now = time.perf_counter()
            took = now - started
            training.took(took)
            lap.images += len(batch.labels)
            started = now
            show(bar, training, batch, values)
            print_estimate(bar, training, took)
            if training.length.saves_at(clock):
                stop = training.stops_here
                break
    lap.waited = waited + loader.wait_seconds()
    training.watch.check()
    training.took(time.perf_counter() - started)  # until a GPU had done what it was given
    if stop and training.epoch_ended:
        clock.epoch, clock.step_in_epoch, clock.begun = clock.epoch + 1, 0, False
        training.batches = None
    return stop


def rest_of_epoch(training: Training) -> Iterator[Batch]:
    """The remaining batches of the current epoch, which is begun if it has not begun yet."""
    if training.batches is None:
        for routine in training.routines:
            begin = routine.resume if training.clock.begun else routine.begin_epoch
            begin(training)
        training.clock.begun = True
        training.loader.set_epoch(training.clock.epoch)
        training.loader.skip(training.clock.step_in_epoch)
        training.batches = iter(training.loader)
    return training.batches


# --- the whole run --------------------------------------------------------------------------------


def fit(training: Training, keeper: Keeper, signals: Signals, row: MetricsRow | None) -> None:
    """Trains to the end; `row` is the row that the last checkpoint left incomplete.

    Raises:
        Interrupted: by a signal, after a checkpoint.
        InputError: a loss or gradient is not finite.
    """
    while True:
        if row is not None:
            results = None
            if training.length.evaluation_due(training.clock):
                signals.agreed()  # so that all processes evaluate, or none does
                with signals.at_once():
                    results = training.evaluate(training.data.selection)
            keeper.complete(row, results)
        if signals.agreed() is not None:
            raise Interrupted(signals.requested)
        if training.finished:
            if row is not None:
                keeper.save_end()
            return
        epoch = training.clock.epoch + 1
        try:
            stopped = advance(training, signals)
        except NonFinite as fault:
            raise keeper.recorded(fault) from fault
        row = training.end_lap(epoch) if stopped else None
        keeper.save(row)


def main(args: Options) -> None:
    """Runs train.py with parsed options."""
    # All processes would print the same warnings while a run is built, so only one does.
    hear(logging.WARNING if processes.is_main() else logging.ERROR)
    args, run = start.to_continue(args)
    with start.without_explained_warnings(args), memory_in_words(args.batch_size, args.image_size):
        _train(args, run)


def _train(args: Options, run: RunFolder | None) -> None:
    """Prepares a run, or continues it from its last checkpoint, and trains it to the end."""
    with dataset.asked_once():  # about the files: both parts look at all of them
        training = prepare(args, run=run)
        if args.dry_run:
            with door.answering():
                say(describe(training))
            return
        if args.resume == "auto" and run is not None and start.is_finished(run):
            say(f"this run is finished: {run.path}")
            return
        say(describe(training), flush=True)
        logging.getLogger().setLevel(logging.WARNING)
        with notice_if_slow("making the run folder, and fingerprints of the images"):
            run, state = start.open_folder(args, run, training)
    if state is not None:
        start.go_back(run, training, state)
    row = None if state is None else state["row"]
    with notice_if_slow("starting wandb"):
        tracker = start.open_tracker(args, run, training, state)
    keeper = Keeper(training, run, tracker, kept=args.keep, picture_every=args.wandb_images)
    say(f"run folder  {run.path}\n{tracker.describe()}\n", flush=True)
    try:
        with Signals() as signals:
            keeper.save(row)  # so that the run can be continued from the start on
            fit(training, keeper, signals, row)
            with signals.at_once():
                keeper.conclude(look_at_test=not args.no_test, page=not args.no_report)
    except Interrupted as interrupted:
        say(f"\n{keeper.stopped(interrupted)}", flush=True)
        raise SystemExit(interrupted.status) from None
    finally:
        tracker.finish()


if __name__ == "__main__":
    door.loaded()
    with processes.ended_at_once(), sentence_errors():
        if ARGS.folds:
            from training import folds  # imported here, because it loads what pages need

            folds.start(ARGS)
        if (count := processes.wanted(ARGS.gpu_id)) > 1:
            sys.exit(processes.launch([sys.executable, *sys.orig_argv[1:]], count))
        with processes.joined():
            main(ARGS)
