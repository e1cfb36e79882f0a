"""In which precision the losses compute, whatever types their inputs and parameters have."""

from __future__ import annotations

import pytest
import torch

import criteria
from losses import Embeddings, build, compose, introspective_similarity

CLASSES, SIZE = 8, 16
TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Three images of each class; the numbers are exact in half precision."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(CLASSES).repeat_interleave(3)
    numbers = torch.randint(-64, 65, (len(labels), SIZE), generator=generator) / 32
    return numbers.to(dtype).requires_grad_(), labels


def built(make):
    """The same parameters each time, in numbers that are exact in half precision."""
    torch.manual_seed(0)
    criterion = make()
    for parameter in criterion.parameters():
        parameter.data = parameter.data.half().to(torch.bfloat16).to(parameter.dtype)
    return criterion


def value_and_gradients(criterion, inputs, labels, autocast=False, **context):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        torch.manual_seed(1)
        loss = criterion(inputs, labels, **context)
    loss.backward()
    leaves = inputs if isinstance(inputs, Embeddings) else (inputs,)
    return loss, [leaf for leaf in leaves if leaf is not None], list(criterion.parameters())


def check(make, wrap, **context):
    """Every type of inputs × every type of parameters, against float32 throughout."""
    reference = value_and_gradients(built(make), *wrap(torch.float32), **context)[0]
    for given in TYPES:
        for learnt in TYPES:
            for autocast in (False, True):
                criterion = built(make).to(learnt)
                inputs, labels = wrap(given)
                loss, leaves, parameters = value_and_gradients(
                    criterion, inputs, labels, autocast, **context
                )
                words = f"{given} inputs, {learnt} parameters, autocast {autocast}"
                double = given == torch.float64 or (learnt == torch.float64 and parameters)
                assert loss.dtype == (torch.float64 if double else torch.float32), words
                assert loss.item() == pytest.approx(reference.item(), rel=1e-3, abs=1e-5), words
                for leaf in leaves:
                    assert leaf.grad.dtype == given and leaf.grad.isfinite().all(), words
                for parameter in parameters:
                    assert parameter.dtype == learnt and parameter.is_leaf, words
                    if parameter.requires_grad:
                        assert parameter.grad.dtype == learnt, words
                        assert parameter.grad.isfinite().all(), words


@pytest.mark.parametrize("name", criteria.LOSSES)
def test_every_loss_takes_every_type(name):
    fewer = {"ancestors": 24} if name == "HIER" else {}  # 512 of them take a minute and a half
    check(lambda: build(name, CLASSES, SIZE, **fewer), batch)


HEADS = {
    "introspective": ({"introspective": {}}, lambda x: Embeddings(x, leaf(x.flip(0)))),
    "disentangled": (
        {"disentangled": {}},
        lambda x: Embeddings(leaf(x.repeat(1, 2)), specific=leaf(x.flip(0).repeat(1, 2))),
    ),
    "sec and l2": ({"sec": {"momentum": 0.5}, "l2": {}}, Embeddings),
    "masks": ({"masks": {}}, Embeddings),
}


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("name", HEADS)
def test_every_attachment_takes_every_type(name):
    attach, heads = HEADS[name]

    def wrap(dtype):
        x, labels = batch(dtype)
        return heads(x), labels

    context = {"masks": torch.eye(2, SIZE)} if name == "masks" else {}
    check(lambda: compose("Proxy_Anchor", CLASSES, SIZE, attach), wrap, **context)


def test_a_part_by_itself_takes_types_that_differ():
    x, _ = batch(torch.float64)
    proxies = torch.randn(CLASSES, SIZE, dtype=torch.bfloat16)
    found = introspective_similarity(x, torch.ones(len(x), SIZE), proxies)
    assert found.dtype == torch.float64
    assert build("Proxy_Anchor", CLASSES, SIZE).similarity(x).dtype == torch.float64


def test_float64_is_not_rounded_on_the_way():
    criterion = build("AMLoss", CLASSES, SIZE)
    x, labels = batch(torch.float64)
    few = x.detach()[:6].requires_grad_()
    torch.autograd.gradcheck(lambda x: criterion(x, labels[:6]), (few,))
