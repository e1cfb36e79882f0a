"""What all losses share: their inputs, their precision, their reports and small helpers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from devices import with_host_copy


class Embeddings(NamedTuple):
    """Raw outputs of a network's heads for one batch; nothing is normalised.

    ``embedding`` (B, d) · ``uncertainty`` (B, d), the introspective head · ``specific``, DDML's
    class-specific head on top of the main one. With it, both it and ``embedding`` are (B, 2d): the
    means, followed by the raw spreads.
    """

    embedding: Tensor
    uncertainty: Tensor | None = None
    specific: Tensor | None = None

    @property
    def retrieval(self) -> Tensor:
        """The test-time embedding (B, d): ``embedding``, or the mean in it with DDML."""
        return self.embedding if self.specific is None else self.embedding.chunk(2, dim=1)[0]

    def first(self, size: int) -> Embeddings:
        """Cuts every head, its means and its spreads, to the first ``size`` entries."""
        parts = 1 if self.specific is None else 2
        return Embeddings(*(None if head is None else _first(head, size, parts) for head in self))


class References(NamedTuple):
    """Embeddings that the images of a batch are compared with, instead of with each other.

    ``embeddings`` (R, d) and ``labels`` (R,), without a gradient; ``own`` (B,) is the index of each
    image of the batch among them.
    """

    embeddings: Tensor
    labels: Tensor
    own: Tensor


GROUPS = (Embeddings, References)
"""Types of arguments that hold several tensors."""


def _first(head: Tensor, size: int, parts: int) -> Tensor:
    return torch.cat([part[:, :size] for part in head.chunk(parts, dim=1)], dim=1)


def in_float32(function: Callable) -> Callable:
    """Run ``function`` outside autocast, in float32, or in float64 if one of its tensors is.

    Its tensors are converted, and so are a module's parameters if it is a method of one; gradients
    have the original types.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        owner = args[0] if args and isinstance(args[0], nn.Module) else None
        given = [*_tensors(args), *_tensors(kwargs.values())]
        types = {tensor.dtype for tensor in given if tensor.is_floating_point()}
        if owner is not None:
            types |= {each.dtype for each in _parameters(owner) if each.is_floating_point()}
        dtype = torch.float64 if torch.float64 in types else torch.float32
        device = given[0].device.type if given else "cpu"
        if types <= {dtype} and not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)  # a small loss would wait long for the conversion
        args = tuple(_as(dtype, value) for value in args)
        kwargs = {name: _as(dtype, value) for name, value in kwargs.items()}
        with torch.autocast(device, enabled=False), _parameters_as(dtype, owner):
            return function(*args, **kwargs)

    return wrapper


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, GROUPS):
            yield from _tensors(value)


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    """``module.parameters()`` without their names, which take longer than a small loss."""
    yield from (each for each in module._parameters.values() if each is not None)
    for child in module._modules.values():
        yield from _parameters(child)


def _as(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, GROUPS):
        return type(value)(*(_as(dtype, tensor) for tensor in value))
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _parameters_as(dtype: torch.dtype, owner: nn.Module | None) -> Iterator[None]:
    """Replaces a module's parameters by copies in ``dtype``, as functional_call would."""
    if owner is None or all(parameter.dtype == dtype for parameter in owner.parameters()):
        yield
        return
    replaced = [
        (module._parameters, name, parameter)
        for module in owner.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype
    ]
    try:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter.to(dtype)
        yield
    finally:
        for parameters, name, parameter in replaced:
            parameters[name] = parameter


class ParameterGroup(TypedDict, total=False):
    """Parameters that are trained alike: a parameter group of torch's, with some keys of our own.

    `name`, `params` and `lr` are always present. `weight_decay` and `eps` (Adam's) are present if
    they differ from the run's. `optimizer` names another kind of optimiser than the run's; `step`
    (epochs) and `gamma` are a step decay that replaces the run's schedule.
    """

    name: str
    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    eps: float
    optimizer: str
    step: int
    gamma: float


class Criterion(nn.Module):
    """A loss: it maps a batch to a scalar, and may have parameters and terms to report.

    What it says of its parameters, classes and time is, unless it says otherwise, what the criteria
    inside it say.

    ``terms`` holds detached 0-d tensors of the latest call; nothing waits for the device until they
    are read. ``unit_length`` says which embeddings an Objective passes to it: unit vectors (True),
    raw ones (False), or what the run's l2_norm says (None; irrelevant if the loss normalises).
    ``needs_pairs``: whether it needs batches with two images of one class, and with two classes.
    ``no_memory``: why it cannot be called with ``references`` (References); "" if it can.
    """

    unit_length: ClassVar[bool | None] = None
    needs_pairs: bool = False
    no_memory: str = "it compares a batch with nothing but itself"

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The groups of its parameters, given the network's learning rate; [] if it has none."""
        return [group for inner in _inside(self) for group in inner.parameter_groups(lr)]

    def torch_groups(self, lr: float) -> list[dict[str, Any]]:
        """``parameter_groups(lr)`` for a plain torch optimiser, without the keys it does not know.

        A group with an optimiser or a schedule of its own then gets those of all others.
        """
        known = ("params", "lr", "weight_decay", "eps")
        groups = self.parameter_groups(lr)
        return [{key: group[key] for key in known if key in group} for group in groups]

    def class_values(self) -> dict[str, Tensor]:
        """Learned values of each class, by their name in the singular: (C,), detached.

        If several have a name, those of the first: with Matryoshka, those of the whole embedding.
        """
        found: dict[str, Tensor] = {}
        for inner in _inside(self):
            found = inner.class_values() | found
        return found

    def cost(self) -> str:
        """A sentence about the time of a step on this machine, if the loss takes long."""
        return "; ".join(filter(None, (inner.cost() for inner in _inside(self))))

    def _report(self, **terms: Tensor) -> None:
        # Bypasses nn.Module.__setattr__, which takes as long as three operators.
        vars(self)["terms"] = {name: value.detach() for name, value in terms.items()}


def _inside(module: nn.Module) -> Iterator[Criterion]:
    """The criteria inside a module, without those inside of these."""
    for child in module.children():
        yield from [child] if isinstance(child, Criterion) else _inside(child)


def check_batch(
    embeddings: Tensor, labels: Tensor, size: int | None = None, classes: int | None = None
) -> Tensor:
    """Raise ValueError for a batch that no loss can use.

    Returns the labels as int64, where the embeddings are, as pytorch-metric-learning takes them.
    """
    check_embeddings(embeddings, size)
    _check_tensor("Labels", labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{len(embeddings)} embeddings came with labels of shape {tuple(labels.shape)}: "
            "give one label for each embedding."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"Labels must be integers, not {labels.dtype}: convert them with .long().")
    labels = labels.long()
    if classes is not None and labels.device.type == "cpu":
        low, high = (int(label) for label in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(
                f"Labels run from {low} to {high} but the loss was built for {classes} classes: "
                f"number the training classes 0 to {classes - 1}."
            )
    return labels.to(embeddings.device)


def check_embeddings(embeddings: Tensor, size: int | None = None) -> None:
    """Raise ValueError unless embeddings are a non-empty float matrix of this size."""
    _check_tensor("Embeddings", embeddings)
    if not embeddings.is_floating_point():
        raise ValueError(
            f"Embeddings must be floating-point numbers, not {embeddings.dtype}: convert them with "
            ".float()."
        )
    if embeddings.ndim != 2:
        raise ValueError(
            f"Embeddings must have the shape (batch, size), not {tuple(embeddings.shape)}."
        )
    if len(embeddings) == 0:
        raise ValueError("The batch is empty: a loss needs at least one image.")
    if size is not None and embeddings.shape[1] != size:
        raise ValueError(
            f"The embeddings have {embeddings.shape[1]} dimensions but the loss was built for "
            f"{size}: use the same embedding size for the network and the loss."
        )


def _check_tensor(name: str, values: object) -> None:
    """Raise ValueError for what is no tensor, such as an array or a list."""
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{name} must be a tensor, not {type(values).__name__}: convert them with "
            "torch.as_tensor()."
        )


LARGE = 1024**2
"""A batch with more pairs takes so long that waiting for the GPU costs nothing in comparison."""


def of_labels(
    function: Callable[[Tensor, References | None], tuple[Any, ...]],
    labels: Tensor,
    references: References | None = None,
) -> tuple[Any, ...]:
    """``function(labels, references)``: tensors and numbers that depend on labels alone.

    The number of pairs in a batch is an example. Reading it from a GPU would mean waiting for all
    work that is queued there, the whole network. So whatever depends on labels alone is computed
    from their copy in the host's memory, ``labels.host``, if there is one.
    """
    others = labels if references is None else references.labels
    if len(labels) * len(others) > LARGE:
        return function(labels, references)
    if references is None:
        return on_host(lambda labels: function(labels, None), labels)

    def of_both(labels: Tensor, others: Tensor, own: Tensor) -> tuple[Any, ...]:
        return function(labels, References(references.embeddings, others, own))

    return on_host(of_both, labels, references.labels, references.own)


def on_host(function: Callable[..., tuple[Any, ...]], *tensors: Tensor) -> tuple[Any, ...]:
    """``function(*tensors)``, computed from their ``host`` copies if all of them have one.

    The returned tensors then have such copies too. See ``of_labels``.
    """
    copies = [getattr(tensor, "host", None) for tensor in tensors]
    if any(copy is None for copy in copies):
        return function(*tensors)
    device = tensors[0].device
    return tuple(
        with_host_copy(found, device) if isinstance(found, Tensor) else found
        for found in function(*copies)
    )


def pair_masks(labels: Tensor, references: References | None = None) -> tuple[Tensor, Tensor]:
    """Masks (B, B) of the pairs of images of one class, and of those of two classes.

    With ``references`` (B, R): pairs of an image and a reference.
    """
    if references is not None:
        same = labels[:, None] == references.labels
        return same.scatter(1, references.own[:, None], False), ~same
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def positive_pairs(labels: Tensor, references: References | None) -> tuple[Tensor, Tensor]:
    """Both images of every ordered pair of one class, (P,) each; for ``of_labels``."""
    return pair_masks(labels, references)[0].nonzero(as_tuple=True)


def without_self(table: Tensor, references: References | None, value: float) -> Tensor:
    """A table (B, B), or (B, R) with ``references``, with ``value`` for an image and itself."""
    if references is not None:
        return table.scatter(1, references.own[:, None], value)
    return table.diagonal_scatter(torch.full_like(table[0], value))


def mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the entries that a mask marks, 0-d; 0 if it marks none."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def only_once(backward: Callable) -> Callable:
    """The ``backward`` of an autograd.Function, which cannot be differentiated again.

    torch's ``once_differentiable`` raises only if the incoming gradient has a graph itself; for the
    last function of a graph, a second derivative would silently be 0.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "This gradient is computed without one of its own, so that there is no second "
                "derivative: leave out create_graph=True."
            )
        return backward(ctx, *grads)

    return wrapper


def written_out(backward: Callable) -> Callable:
    """The ``backward`` of a loss's autograd.Function: in float32, and ``only_once``."""
    return in_float32(only_once(backward))


class _UnitRows(torch.autograd.Function):
    """x̂ = x/‖x‖ of each row, with the gradient (g - x̂·(x̂·g))/‖x‖ written out.

    F.normalize gives the same bits with more than twice the operators, and a small loss takes as
    long as its number of operators. The rows are passed twice, the second time for their lengths,
    so that autograd adds the two halves of the gradient in the same order as for F.normalize.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, measured: Tensor) -> Tensor:
        lengths = measured.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = rows / lengths
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        unit, lengths = ctx.saved_tensors
        along = (unit / lengths).mul_(grad).sum(dim=1, keepdim=True).neg_()
        return grad / lengths, unit * along


def unit_rows(rows: Tensor) -> Tensor:
    """x̂ = x/‖x‖₂ of every row of (n, d); a row of zeros stays one."""
    return _UnitRows.apply(rows, rows)


def unit_others(unit: Tensor, references: References | None) -> Tensor:
    """The vectors to compare with: ``unit`` itself, or the references at unit length."""
    return unit if references is None else unit_rows(references.embeddings)


def log_one_plus_sum_exp(exponents: Tensor, dim: int) -> Tensor:
    """log(1 + Σ e^x) along ``dim``: a log-sum-exp with an appended 0. −∞ leaves an entry out."""
    top = exponents.detach().amax(dim, keepdim=True).clamp_min(0)
    total = (exponents - top).exp_().sum(dim, keepdim=True) + torch.exp(-top)
    return (top + total.log()).squeeze(dim)
