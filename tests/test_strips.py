"""Losses with proxies make a large table of similarities in strips: same numbers, less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from benchmarks import losses as table
from benchmarks.formulas import make_batch
from criteria import strips
from criteria.base import unit_rows

CLASSES, SIZE = 23, 6
PROXY_LOSSES = {
    "Proxy_Anchor": ("Proxy_Anchor", {}),
    "AMLoss": ("AMLoss", {"alphap": 48.0}),
    "NormSoftmax": ("NormSoftmax", {}),
    "NormSoftmax smoothed": ("NormSoftmax", {"smoothing": 0.1}),
    "ProxyNCA_pp": ("ProxyNCA_pp", {}),
    "ArcFace": ("ArcFace", {"exact_gradient": True}),
    "ArcFace sub-centres": ("ArcFace", {"sub_centers": 3}),
    "ArcFace sampled": ("ArcFace", {"sub_centers": 2, "sample_rate": 0.5}),
    "CosFace": ("CosFace", {}),
}
ATTACHED: dict[str, dict[str, dict[str, Any]]] = {
    "alone": {},
    "introspective": {"introspective": {"variant": "paper"}},
    "disentangled": {"disentangled": {"al": 1.0, "be": 0.1, "gam": 1e-3}},
}


def step(name: str, attached: str, dtype: torch.dtype) -> list[Tensor]:
    """The loss, what it reports, and all gradients, of a batch that a seed gives."""
    torch.manual_seed(0)
    kind, options = PROXY_LOSSES[name]
    objective = losses.compose(kind, CLASSES, SIZE, ATTACHED[attached], **options).to(dtype)
    wide = 2 * SIZE if "specific" in objective.heads else SIZE
    heads = [torch.randn(15, wide, dtype=dtype, requires_grad=True) for _ in objective.heads]
    labels = torch.randint(CLASSES, (5,)).repeat(3)
    outputs = losses.Embeddings(**dict(zip(objective.heads, heads, strict=True)))
    loss = objective(outputs, labels)
    loss.backward()
    learnt = [parameter.grad for parameter in objective.parameters()]
    return [loss.detach(), *objective.terms.values(), *(head.grad for head in heads), *learnt]


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_strips_give_the_numbers_of_the_whole(name, attached, monkeypatch):
    whole = step(name, attached, torch.float64)
    for elements in (15 * 8, 1):  # a short last strip; one class a strip
        monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
        for one, other in zip(step(name, attached, torch.float64), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["Proxy_Anchor", "IDML", "DDML", "NormSoftmax", "ArcFace"])
def test_strips_agree_with_the_plain_formula_at_11318_classes(name, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 2**16)
    case = next(case for case in table.CASES if case.name == name)
    batch = make_batch(11_318, 32, 60, "cpu", case.wide)
    found = []
    for make in table.variants(case._replace(library=None), batch, 32, "cpu").values():
        torch.manual_seed(1)
        for leaf in batch.leaves:
            leaf.grad = None
        loss = make()
        loss.backward()
        found.append([loss.detach(), batch.embeddings.grad, batch.proxies.grad])
    for ours, plain in zip(*found, strict=True):
        # To 1e-5 of the largest entry.
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


class LargestTable(TorchDispatchMode):
    """Sees the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and not function.is_view:
                self.elements = max(self.elements, tensor.numel())
        return made


@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_no_more_than_a_strip_is_made(name, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 2**14)
    monkeypatch.setattr(losses.ProxyCrowding, "strip_elements", 2**14)
    kind, options = PROXY_LOSSES[name]
    criterion = losses.build(kind, 3000, 4, **options)
    embeddings = torch.randn(64, 4, requires_grad=True)
    with LargestTable() as largest:
        criterion(embeddings, torch.arange(64) // 2).backward()
    # The whole would be 64 × 3,000 and more; the proxies and their gradients are what they are.
    assert largest.elements <= max(2**14, criterion.proxies.numel()) < 64 * 3000 / 5


def test_a_small_table_is_made_once():
    criterion = losses.build("Proxy_Anchor", 50, 4)
    calls = []
    compared = criterion.compared
    criterion.compared = lambda *given: calls.append(1) or compared(*given)
    criterion(torch.randn(8, 4, requires_grad=True), torch.arange(8)).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_written_out_gradients_are_those_of_autograd_to_the_bit(dtype):
    torch.manual_seed(0)
    rows, proxies = torch.randn(33, 65, dtype=dtype), torch.randn(77, 65, dtype=dtype)
    rows[3], proxies[5] = 0, 0
    weight, more = torch.randn(33, 77, dtype=dtype), torch.randn(33, 65, dtype=dtype)

    def autograd(rows: Tensor, proxies: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(rows)
        return unit, unit @ proxies.T / proxies.norm(dim=1).clamp_min(1e-12)

    def ours(rows: Tensor, proxies: Tensor) -> tuple[Tensor, Tensor]:
        return unit_rows(rows), losses.cosine_similarity(rows, proxies)

    found = []
    for function in (autograd, ours):
        leaves = [tensor.clone().requires_grad_() for tensor in (rows, proxies)]
        unit, cosines = function(*leaves)
        found.append([unit, cosines, *torch.autograd.grad((cosines * weight).sum(), leaves)])
        unit, _ = function(*leaves)
        found[-1] += torch.autograd.grad((unit * more).sum(), leaves[:1])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_proxies_that_rest_get_no_gradient():
    embeddings = torch.randn(6, 4, requires_grad=True)
    criterion = losses.build("Proxy_Anchor", 3, 4)
    criterion.proxies.requires_grad_(False)
    criterion(embeddings, torch.arange(6) // 2).backward()
    assert embeddings.grad.any() and criterion.proxies.grad is None
