"""Time and memory of every loss, against pytorch-metric-learning and the plain formula.

    python benchmarks/losses.py [--repeats 9] [--only Proxy_Anchor AMLoss] [--device cuda]
    python benchmarks/losses.py --classes 1000000 --batch 512 --only Proxy_Anchor ArcFace --alone

A call is a forward and a backward pass. All variants of a row are called in turn, in one run, on
the same batch in float32; the table has the median, and the fastest call, because other programs on
the machine can only slow a call down. Before the timing, ours and the plain formula must give the
same loss. The plain formula is the paper's equation, written down directly in PyTorch: full
matrices, masks, exponentials before logarithms. "Operators" are those of PyTorch that compute
something: each starts a kernel on a GPU, where little else takes time. "Memory" is the peak that a
call adds, with gradients, if the system reports it. Pair losses do not depend on the number of
classes and are timed once. ``--alone`` leaves the others out, for sizes at which they run out of
memory. On a machine that is not idle, set OMP_WAIT_POLICY=PASSIVE: otherwise threads that spin
while they wait for each other would be timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import losses
from benchmarks import formulas
from benchmarks.formulas import Batch, make_batch
from benchmarks.measuring import Memory, heads, in_turn, line, timed

# --- the rows -------------------------------------------------------------------------------------

Step = Callable[[], Tensor]
HAS_LIBRARY = importlib.util.find_spec("pytorch_metric_learning") is not None


class Case(NamedTuple):
    """A row: the plain formula, the library's loss, and our criterion with its inputs.

    `ours` is by default our loss of the row's name.
    """

    name: str
    plain: Callable[[Batch], Tensor]
    library: str | None = None
    inputs: Callable[[Batch], tuple] = lambda batch: (batch.embeddings, batch.labels)
    ours: Callable[[int, int], nn.Module] | None = None
    by_class: bool = False
    wide: bool = False
    most: int = sys.maxsize  # classes that the plain formula has memory for

    def criterion(self, classes: int, size: int) -> nn.Module:
        """Ours, for so many classes and embeddings of this size."""
        return (self.ours or functools.partial(losses.build, self.name))(classes, size)


def unit_inputs(batch: Batch) -> tuple:
    """(unit embeddings, labels)."""
    return F.normalize(batch.embeddings), batch.labels


def mined_inputs(batch: Batch) -> tuple:
    """(unit embeddings, labels, all triplets)."""
    return *unit_inputs(batch), formulas.every_triplet(batch.labels)


def introspective_inputs(batch: Batch) -> tuple:
    """(embeddings, labels, uncertainty) at unit length."""
    return *unit_inputs(batch), F.normalize(batch.second)


def both_heads(batch: Batch) -> tuple:
    """(main head, specific head, labels)."""
    return batch.embeddings, batch.second, batch.labels


def disentangling(classes: int, size: int) -> nn.Module:
    """DDML around Proxy-Anchor."""
    return losses.DisentanglingLoss(losses.ProxyAnchorLoss(classes, size), 1.0, 0.1, 1e-5)


def sphere(*_: int) -> nn.Module:
    """SEC's constraint."""
    return losses.SphericalConstraint()


def orthogonality(*_: int) -> nn.Module:
    """Divide and conquer's term for its masks."""
    return losses.MaskOrthogonality()


def named(name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    """Our loss of this name, with options."""
    return functools.partial(losses.build, name, **options)


by_class = functools.partial(Case, by_class=True)
CASES = (
    by_class("Proxy_Anchor", formulas.proxy_anchor, "pml:ProxyAnchorLoss"),
    by_class("AMLoss", formulas.amloss),
    by_class("IDML", formulas.introspective, None, introspective_inputs, named("Proxy_Anchor")),
    by_class("DDML", formulas.disentangling, None, both_heads, disentangling, wide=True),
    Case("triplet", formulas.triplet, "pml:TripletMarginLoss"),
    Case("semihtriplet", formulas.semihard, "Triplet"),
    Case("n-npair", formulas.n_pair, "pml:NPairsLoss"),
    Case("ms", formulas.multi_similarity, "MS"),
    Case("MarginLoss", formulas.margin, None, mined_inputs),
    Case("SEC", formulas.sphere, None, lambda b: (b.embeddings,), sphere),
    Case("Sph", formulas.sphere_pairs),
    Case("Hyp", formulas.hyperbolic_pairs),
    Case("RecallAtK", formulas.recall, None, unit_inputs),
    Case("SupAP", formulas.average_precision, None, unit_inputs, named("SupAP", weight=1.0)),
    Case("SupCon", formulas.contrast, "pml:SupConLoss", ours=named("SupCon", temperature=0.1)),
    by_class("NormSoftmax", formulas.softmax, "pml:NormalizedSoftmaxLoss"),
    by_class(
        "ArcFace", formulas.arcface, "pml:ArcFaceLoss", ours=named("ArcFace", exact_gradient=True)
    ),
    by_class("CosFace", formulas.cosface, "pml:CosFaceLoss"),
    by_class("HIST", formulas.hypergraph, most=1000),
    by_class("HIER", formulas.hierarchy),
    by_class("PFML", formulas.field, most=1000),
    Case("masks", formulas.masks, None, lambda b: (b.masks,), orthogonality),
)


def variants(
    case: Case, batch: Batch, size: int, device: str, alone: bool = False
) -> dict[str, Step]:
    """The steps to time: ours, the plain formula's, the library's, with the same parameters."""
    criterion = case.criterion(len(batch.proxies), size).to(device)
    steps: dict[str, Step] = {"ours": lambda: criterion(*case.inputs(batch))}
    share_parameters(criterion, batch)
    batch.learnt = criterion
    if alone:
        return steps
    steps["plain"] = lambda: case.plain(batch)
    if case.library and HAS_LIBRARY:
        library = losses.build(case.library, len(batch.proxies), size).to(device)
        share_parameters(library, batch)
        steps["library"] = lambda: library(batch.embeddings, batch.labels)
    return steps


def share_parameters(criterion: nn.Module, batch: Batch) -> None:
    """Makes the batch's proxies and margins the criterion's."""
    shared = {"proxies": batch.proxies, "margins": batch.margins}
    for module in criterion.modules():
        for name in shared.keys() & dict(module.named_parameters(recurse=False)).keys():
            if getattr(module, name).shape != shared[name].shape:
                continue  # several proxies of a class
            del module._parameters[name]
            setattr(module, name, shared[name])  # the same leaf, so that its gradient is cleared


# --- measuring ------------------------------------------------------------------------------------


def duration(step: Step, clear: Callable[[], None], device: str) -> float:
    """Seconds of one forward and backward pass."""
    clear()
    return timed(lambda: step().backward(), device)


def peak_mebibytes(step: Step, clear: Callable[[], None], device: str) -> float | None:
    """The peak memory that one pass adds, or None if the system does not report it."""
    clear()
    try:
        memory = Memory(device)
    except (OSError, AttributeError):
        return None
    step().backward()
    return memory.peak() / 2**20


class OperatorCount(TorchDispatchMode):
    """Counts the operators that compute something: neither views nor empty memory."""

    IDLE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Counts an operator, and runs it."""
        name = function.overloadpacket.__name__
        self.count += not function.is_view and name not in self.IDLE
        return function(*args, **(kwargs or {}))


def operators(step: Step, clear: Callable[[], None]) -> int:
    """Operators of one forward and backward pass."""
    clear()
    with OperatorCount() as counter:
        step().backward()
    return counter.count


def check_agreement(case: Case, steps: dict[str, Step]) -> None:
    """Exits if ours and the plain formula differ."""
    values = []
    for kind in ("ours", "plain"):
        torch.manual_seed(1)
        values.append(steps[kind]().item())
    if not math.isclose(*values, rel_tol=1e-3):
        raise SystemExit(
            f"{case.name}: ours gives {values[0]:.6f}, the plain formula {values[1]:.6f}"
        )


def measure(case: Case, classes: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    batch = make_batch(classes, args.dim, args.batch, args.device, case.wide)
    steps = variants(case, batch, args.dim, args.device, args.alone)
    if not args.alone:
        check_agreement(case, steps)

    def clear() -> None:
        for leaf in batch.leaves:
            leaf.grad = None

    counts = {} if args.alone else {kind: operators(step, clear) for kind, step in steps.items()}
    memory = {kind: peak_mebibytes(step, clear, args.device) for kind, step in steps.items()}
    works = {kind: functools.partial(duration, s, clear, args.device) for kind, s in steps.items()}
    times = in_turn(works, args.repeats)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    fastest = {kind: min(values) for kind, values in times.items()}
    cells = [case.name, f"{classes:,}" if case.by_class else "any"]
    cells += [
        f"{1e3 * medians[kind]:.2f} ({1e3 * fastest[kind]:.2f})" if kind in steps else "–"
        for kind in COLUMNS
    ]
    cells += [f"{gain(medians):.2f}× ({gain(fastest):.2f}×)" if len(steps) > 1 else "–"]
    cells += [f"{counts[kind]}" if kind in counts else "–" for kind in ("ours", "plain")]
    cells += [f"{memory[kind]:.0f}" if memory.get(kind) is not None else "–" for kind in COLUMNS]
    return line(cells)


def gain(times: dict[str, float]) -> float:
    """The time of the faster one of the others, divided by ours."""
    return min(value for kind, value in times.items() if kind != "ours") / times["ours"]


COLUMNS = ("ours", "plain", "library")
HEADER = (
    *("loss", "C", "ours, ms", "plain formula, ms", "library, ms", "faster other / ours"),
    *("operators ours", "plain", "memory ours, MiB", "plain", "library"),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 11318])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="time ours and nothing else")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(
        f"torch {torch.__version__}, {where}, {args.threads} threads, float32, B = {args.batch}, "
        f"d = {args.dim}, median (fastest) of {args.repeats}"
        f"{'' if HAS_LIBRARY else '; no pytorch-metric-learning'}\n\n{heads(HEADER)}"
    )
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        for classes in args.classes if case.by_class else args.classes[:1]:
            if classes > case.most and not args.alone:
                continue
            print(measure(case, classes, args), flush=True)


if __name__ == "__main__":
    main()
