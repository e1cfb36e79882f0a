"""Several processes that train one model: torch.distributed, made small.

`torchrun train.py …`, or `--gpu-id -1` (which calls `launch`), starts the processes; each calls
`joined`. NCCL moves what lies on GPUs, gloo the rest. Without a launcher there is one process, and
every function here is its own trivial case, so that nobody has to ask.

One batch is drawn by all processes alike and each takes its `shard` of the images. The outputs are
put together by `gather_rows`, and every process computes the same loss of the whole batch. The
gradient that flows back into a process's own rows is that of the whole loss, counted once, so the
gradients of the network are *summed* over processes (`sum_gradients`). A parameter that is used by
the loss itself (a proxy, a margin, a mask) has the same gradient everywhere and must not be
multiplied: `once` lets only the main process's through. The update then equals that of one process.

A parameter may also be divided (`Share`): each process has some of its rows, their gradient and
their optimiser's state. What a process computes with its rows is one part of the loss, so the
embeddings that go in have their gradient summed (`part_of_all`), and the parts that come out are
gathered. Checkpoints hold the whole.

Processes watch each other through the launcher's key-value store: one that fails or falls silent
ends the others, on all machines, within `SILENCE` seconds and with a sentence, never in a hang. How
they find each other at the start stands in meeting.py.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from machine import cores, host
from meeting import PATIENCE, Place
from utils import InputError

T = TypeVar("T")
P = ParamSpec("P")

BEAT = 3.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one after which a process counts as dead
BUCKET_BYTES = 2**25
LAUNCHER = "ANCHORAGE_LAUNCHER"  # in the environment of processes that `launch` started: its pid


# --- who is who -----------------------------------------------------------------------------------


def is_group() -> bool:
    """Whether this process has joined others."""
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()


_ALONE = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What follows is done by this process without the others, which do not take part in it."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_group() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_group() else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_group() else 0


def gpu(asked: int) -> int:
    """The number of the GPU that this process takes: the one `asked` for, where it is alone.

    Of several processes each takes its own; where there are fewer GPUs, they share them.
    """
    if not is_group():
        return asked
    return local_rank() % max(1, torch.cuda.device_count())


def _gpu_in_words(local: int) -> str:
    """What tells the GPU that a process takes from all others, on all machines; "" without one."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return ""
    found = torch.cuda.get_device_properties(local % torch.cuda.device_count())
    return f"{host()} {found.pci_domain_id}:{found.pci_bus_id}:{found.pci_device_id}"


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Makes a function do nothing in all processes but the main one."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return wrapper


# --- rows -----------------------------------------------------------------------------------------


def shard(total: int, of: int | None = None) -> slice:
    """Which of `total` rows belong to this process, or to process `of`.

    Contiguous, in the order of the processes; sizes differ by one at most, and may be 0.
    """
    number, count = rank() if of is None else of, world()
    return slice(total * number // count, total * (number + 1) // count)


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """Each process's (n, …) rows, its `shard(total)` → all (total, …), in every process.

    The gradient of the result flows back into the process's own rows, not summed over processes:
    it is meant for a result of which every process computes the same function.
    """
    return _GatherRows.apply(rows, total) if is_group() else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        ctx.own = shard(total)
        # Collectives want equal sizes; the last row of a smaller share is filler.
        padded = rows.new_zeros(-(-total // world()), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(parts, padded)
        shares = [shard(total, of) for of in range(world())]
        return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own].contiguous(), None


def from_process(number: int, rows: Tensor, count: int) -> Tensor:
    """The `count` rows of process `number`, in every process; no gradient passes."""
    if not is_group():
        return rows
    own = number == rank()
    found = rows.contiguous() if own else rows.new_empty(count, *rows.shape[1:])
    dist.broadcast(found, src=number)
    return found


def sum_over(value: Tensor) -> Tensor:
    """The sum over processes of a tensor of one shape; so is its gradient."""
    return _Sum.apply(value) if is_group() else value


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def part_of_all(value: Tensor) -> Tensor:
    """The same tensor, for a part of a loss whose other parts are computed in other processes.

    It is the same in all of them; its gradient is the sum of what each finds for its part.
    """
    return _PartOfAll.apply(value) if is_group() else value


class _PartOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


# --- divided parameters ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Which rows of a parameter this process has.

    Attributes:
        count: units in the whole parameter, which are dealt out by `shard`. rows: of each unit.
    """

    count: int
    rows: int = 1

    @property
    def own(self) -> slice:
        """This process's units."""
        return shard(self.count)

    @property
    def starts(self) -> list[int]:
        """The first unit of every process, and how many units there are."""
        return [shard(self.count, of).start for of in range(world())] + [self.count]

    @property
    def counts(self) -> list[int]:
        """How many units every process has."""
        return [end - start for start, end in pairwise(self.starts)]

    def of(self, whole: Tensor) -> Tensor:
        """This process's rows of the whole (count · rows, …)."""
        own = self.own
        return whole[own.start * self.rows : own.stop * self.rows]

    def whole(self, part: Tensor) -> Tensor:
        """The whole, in every process, from each one's rows; all must ask."""
        units = part.detach().reshape(-1, self.rows, *part.shape[1:])
        return gather_rows(units, self.count).flatten(0, 1)


def divided(parameter: torch.nn.Parameter, share: Share) -> torch.nn.Parameter:
    """A parameter that holds this process's share of another one."""
    part = torch.nn.Parameter(share.of(parameter.detach()).clone(), parameter.requires_grad)
    part.share = share
    return part


def share_of(parameter: Tensor) -> Share | None:
    """Which rows these are, of a parameter that is divided; None for any other."""
    return getattr(parameter, "share", None)


def whole_size(parameter: Tensor) -> int:
    """How many numbers the parameter has in all processes together."""
    share = share_of(parameter)
    return parameter.numel() if share is None else share.count * share.rows * parameter[0].numel()


# --- gradients ------------------------------------------------------------------------------------


def once(tensor: Tensor) -> Tensor:
    """The same tensor, whose gradient counts in the main process only; see the file's header."""
    if not is_group() or not tensor.requires_grad:
        return tensor
    same = tensor.view_as(tensor)
    same.register_hook(_of_main)
    return same


def count_once(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Lets the gradients of parameters that belong to the loss count in the main process only.

    Those of divided ones are each process's own.
    """
    if not is_group():
        return
    for parameter in parameters:
        if parameter.requires_grad and share_of(parameter) is None:
            parameter.register_hook(_of_main)


def _of_main(gradient: Tensor) -> Tensor:
    return gradient if is_main() else torch.zeros_like(gradient)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sums `.grad` over processes, in place; the parameters come in the same order everywhere.

    Those of divided ones are left as they are.
    """
    if not is_group():
        return
    under_way = []
    whole = (p for p in parameters if share_of(p) is None)
    for bucket in _buckets(p.grad for p in whole if p.grad is not None):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in under_way:
        work.wait()
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, total in zip(bucket, flat.split(sizes), strict=True):
            gradient.copy_(total.view(gradient.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type and device, of about `BUCKET_BYTES`: one message each."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        full = sum(t.numel() * t.element_size() for t in bucket) >= BUCKET_BYTES
        if bucket and (full or not alike):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


# --- agreements -----------------------------------------------------------------------------------


def from_main(make: Callable[[], T]) -> T:
    """What `make()` returns in the main process, which alone calls it, in all of them."""
    if not is_group():
        return make()
    content = [make() if is_main() else None]
    dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    return content[0]


def largest(value: int) -> int:
    """The largest value of any process; all must ask."""
    if not is_group():
        return value
    asked = torch.tensor(value)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return int(asked)


def copy_main(tensors: Iterable[Tensor]) -> None:
    """Gives every process the main one's values, in place; the tensors come in the same order."""
    if not is_group():
        return
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def in_all(flag: Tensor) -> Tensor:
    """0-d bool, on its device: whether the flag is set in every process."""
    if not is_group():
        return flag
    asked = flag.int()
    dist.all_reduce(asked, dist.ReduceOp.MIN)
    return asked.bool()


def barrier() -> None:
    """Waits for all processes."""
    largest(0)


def check_alike(own: Callable[[], Mapping[str, Any]], advice: str) -> None:
    """Makes sure that all processes have the same; all must ask.

    Args:
        own: gives name → what this process has. advice: what to do where another has other things.

    Raises:
        InputError: in all processes; the sentence names the first thing that differs.
    """
    if not is_group():
        return
    found: list[dict[str, str]] = [{}] * world()
    dist.all_gather_object(found, {name: str(value) for name, value in own().items()})
    for number, others in enumerate(found):
        for name in found[0] | others:
            one, other = found[0].get(name, "none"), others.get(name, "none")
            if one != other:
                raise InputError(
                    f"the processes differ in {name}: it is {one} in process 0 and {other} in "
                    f"process {number}; {advice}"
                )


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process of each machine goes through the block alone, then the others.

    For what is downloaded once and found by the next. No collective may stand in the block.
    """
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()


# --- joining, and what happens when somebody dies -------------------------------------------------


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that a launcher started; alone without one.

    Processes other than the main one lose their standard output. An error in one ends all.

    Raises:
        InputError: what the launcher has set makes no sense, or the others do not come.
    """
    place = Place.of(os.environ)
    if place is None:
        yield
        return
    number, count = place.number, place.count
    _HAS_JOINED.append(number)
    store = place.store(place.keeps)
    place.meet(store)
    watch = _Watch(dist.PrefixStore("watch", place.another()), number, count)
    watch.start()
    hosts = place.tell(store, "host", host())
    # torchrun sets it; under srun, mpirun or a script of one's own it is the same count.
    os.environ.setdefault("LOCAL_RANK", str(hosts[:number].count(hosts[number])))
    gpus = place.tell(store, "gpu", _gpu_in_words(int(os.environ["LOCAL_RANK"])))
    # NCCL is the faster one between GPUs, and refuses two processes on one GPU.
    nccl = all(gpus) and len({*gpus}) == count
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        with _stdout_of_main():
            yield
        barrier()  # nobody leaves while another may still need the store
    except (InputError, SystemExit, KeyboardInterrupt) as error:
        watch.stop()
        _say_once(watch, error)
        raise
    except BaseException as error:
        watch.fail(error)
    watch.stop()
    dist.destroy_process_group()


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Around a whole program: one that has joined others ends without Python's own end.

    There a thread of torch's that still serves the group or the store takes the process down with
    SIGABRT, now and then on a busy machine, when all work is done.
    """
    status = 0
    try:
        yield
    except SystemExit as stop:
        if not _HAS_JOINED or isinstance(stop.code, str):  # which Python prints as it ends
            raise
        status = stop.code or 0
    if not _HAS_JOINED:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


_HAS_JOINED: list[int] = []
"""The numbers that this process has had in groups."""


@contextlib.contextmanager
def _stdout_of_main() -> Iterator[None]:
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


def _say_once(watch: _Watch, error: BaseException) -> None:
    """What is wrong for all is said by the main process, whose end ends the others.

    Raises:
        SystemExit: with status 2, where the main process has said it.
    """
    if isinstance(error, InputError):
        watch.first_to_fail()
        if watch.said_by_main(str(error)):
            raise SystemExit(2) from None


class _Watch(threading.Thread):
    """Gives signs of life and looks for those of the others; without them ends this process."""

    def __init__(self, store: dist.Store, number: int, count: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.number = number
        self.count = count
        self._store = store
        self._lock = threading.Lock()  # a store is not made for two threads
        self._over = threading.Event()
        self._launcher = int(os.environ.get(LAUNCHER, "0"))
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = time.monotonic()

    def run(self) -> None:
        """Beats until `stop`."""
        beats = 0
        while not self._over.wait(BEAT if beats else 0.0):
            woke = time.monotonic()
            if woke - self._looked > 3 * BEAT:  # it was stopped, and maybe the others with it
                self._seen.clear()
            try:
                with self._lock:
                    self._store.set(f"alive {self.number}", str(beats))
                    why = self._what_is_wrong(woke)
            except RuntimeError:
                why = "the store that the processes share went with the process that kept it"
            if why:
                self._end(why)
            # A store that many ask is slow to answer, which is no stop of this process.
            answered = time.monotonic()
            self._looked = answered if answered - woke < SILENCE / 2 else woke
            beats += 1

    def _what_is_wrong(self, now: float) -> str:
        if self._launcher and os.getppid() != self._launcher:
            return "the process that started it is gone"
        if self._store.check(["failed"]):
            time.sleep(BEAT)  # it may be about to fail itself, and to say so better
            return f"process {int(self._store.get('failed'))} failed"
        for other, beat in self._beats():
            if other not in self._seen or self._seen[other][0] != beat:
                self._seen[other] = beat, now
            elif now - self._seen[other][1] > SILENCE:
                return f"process {other} has been silent for {SILENCE:.0f} s"
        return ""

    def _beats(self) -> Iterator[tuple[int, bytes]]:
        """The others that have given a sign of life, and their last; few questions to the store."""
        keys = {n: f"alive {n}" for n in range(self.count) if n != self.number}
        if keys and not self._store.check([*keys.values()]):
            keys = {number: key for number, key in keys.items() if self._store.check([key])}
        return zip(keys, self._store.multi_get([*keys.values()]) if keys else [], strict=True)

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            print(f"process {self.number} of {self.count} stops: {why}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others and ends this process: with a traceback, unless another failed first."""
        self.stop()
        first = self.first_to_fail()
        if first == self.number or not isinstance(error, RuntimeError):
            traceback.print_exception(error)
        else:
            self._over.clear()
            self._end(f"process {first} failed" if first >= 0 else "the others are gone")
        sys.stderr.flush()
        os._exit(1)

    def first_to_fail(self) -> int:
        """Who failed first, this process if nobody did before; -1 when that cannot be known."""
        try:
            with self._lock:
                return int(self._store.compare_set("failed", "", str(self.number)))
        except RuntimeError:
            return -1

    def said_by_main(self, sentence: str) -> bool:
        """Whether the main process says this, within two seconds; it is what the main one says."""
        try:
            with self._lock:
                if not self.number:
                    self._store.set("said", sentence)
                    return False
                end = time.monotonic() + 2
                while not self._store.check(["said"]) and time.monotonic() < end:
                    time.sleep(0.1)
                return self._store.check(["said"]) and self._store.get("said").decode() == sentence
        except RuntimeError:
            return False

    def stop(self) -> None:
        """No more beats; waits for the one that is being given.

        A thread that is inside the store when Python ends would take the process down with SIGABRT.
        """
        self._over.set()
        if threading.current_thread() is not self:
            self.join(timeout=5 * BEAT)  # on a busy machine a beat takes a while


# --- starting them --------------------------------------------------------------------------------


def wanted(gpu_id: int) -> int:
    """How many processes are to be started: one for each visible GPU, for `--gpu-id -1`.

    1 where there are fewer than two GPUs, and in a process that a launcher has started.
    """
    if gpu_id != -1 or "WORLD_SIZE" in os.environ:
        return 1
    return max(1, torch.cuda.device_count())


def launch(command: Sequence[str], count: int) -> int:
    """Runs `count` processes of a command that calls `joined`, on this machine.

    When one fails the others are ended. Signals to stop are passed on, each once.

    Returns:
        The exit status: 0, or that of the first process that failed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    with _children() as (begin, children, stops):
        for number in range(count):
            begin(command, {**common, "RANK": str(number), "LOCAL_RANK": str(number)})
        return _wait_for(children, stops)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end; signals to stop are passed on, each once, and waited for.

    Returns:
        The exit status, as `subprocess` has it.
    """
    with _children() as (begin, children, _):
        begin(command, environment)
        return children[0].wait()


@contextlib.contextmanager
def _children() -> Iterator[tuple[Callable, list[subprocess.Popen], list[int]]]:
    """What begins a process, those that were begun, and the signals that were passed on to them.

    Those that are still there in the end are killed.
    """
    children: list[subprocess.Popen] = []
    stops: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        stops.append(number)
        for child in children:
            child.send_signal(number)

    def begin(command: Sequence[str], environment: Mapping[str, str]) -> None:
        # In a session of its own, so that Ctrl-C reaches a process once, through us.
        children.append(subprocess.Popen(command, env=environment, start_new_session=True))

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        yield begin, children, stops
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to stop; under nohup a terminal may be closed."""
    stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if stays else [signal.SIGHUP])]


def _wait_for(children: list[subprocess.Popen], stops: list[int]) -> int:
    while True:
        statuses = [child.poll() for child in children]
        failed = [number for number, status in enumerate(statuses) if status]
        if all(status is not None for status in statuses) or (failed and not stops):
            break
        time.sleep(0.1)
    if not failed:
        return 0
    # Those that lost the connection to a killed process end by themselves: it comes first.
    first = min(failed, key=lambda number: statuses[number] > 0)
    status = statuses[first]
    if status < 0 and not stops:
        name = signal.Signals(-status).name
        print(
            f"error: process {first} of {len(children)} was ended by {name}; the others were "
            "stopped",
            file=sys.stderr,
        )
    return 128 - status if status < 0 else status


# --- processes that read data ---------------------------------------------------------------------


def ignore_terminal(_: int) -> None:
    """For processes that read data: its signals reach them too, and the parent still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
