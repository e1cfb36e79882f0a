"""What fine-tuning a pretrained network takes: norms and starts of the head, what rests, PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import net
from net import Architecture
from options.stored import kept
from utils import InputError

SMALL = {"model": "resnet10", "embedding_size": 8, "width": 0.125, "stem": "small"}


def built(**described: object) -> net.EmbeddingNet:
    torch.manual_seed(0)
    return net.build(Architecture(**(SMALL | described)))


def pictures(batch: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- before and in the head -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "trained"), [("layer", 128), ("layer-plain", 0)])
def test_a_layer_norm_before_the_head(kind: str, trained: int) -> None:
    network = built(head_norm=kind, head_init="default", bn_freeze="affine")
    images = pictures()
    features = network.features(images)
    expected = network.model.embedding(nn.functional.layer_norm(features, features.shape[1:]))
    torch.testing.assert_close(network(images).embedding, expected)
    # It normalises each image by itself, in training as in evaluation.
    torch.testing.assert_close(network(images[:1]).embedding, network(images).embedding[:1])
    assert sum(p.numel() for p in network.head_parameters()) == 64 * 8 + 8 + trained
    decayed = network.parameter_groups(0.1, decay_all=False, decay_biases=True)
    vectors = next(group for group in decayed if group["name"] == "head vectors")
    assert sum(p.numel() for p in vectors["params"]) == trained


@pytest.mark.parametrize("size", [8, 100])
def test_an_orthogonal_start(size: int) -> None:
    head = built(head_init="orthogonal", embedding_size=size).model.embedding
    assert head.bias.abs().max() == 0
    rows = head.weight if size < 64 else head.weight.T
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "layer-plain"])
def test_a_run_with_a_layer_norm_is_evaluated_as_it_was(kind, images: Path, tmp_path: Path):
    flags = f"--head-norm {kind} --head-init orthogonal --epochs 1 --amp off"
    run = tiny.run(images, tmp_path, "run", flags)
    opened = net.load_run(run).model.network
    assert opened.architecture.head_norm == kind
    weights = tiny.saved(run, "best")["model_state_dict"]
    assert ("model.head_norm.weight" in weights) == (kind == "layer")
    assert kept(tiny.saved(run)["args"]).head_norm == kind


def test_what_stands_before_a_head_has_to_be_the_same(tmp_path: Path) -> None:
    saved = built(head_norm="layer")
    content = {"network": saved.description(), "model_state_dict": saved.state_dict()}
    with pytest.raises(InputError, match="embedding behind a LayerNorm, the network embedding;"):
        net.load_checkpoint(built(), content)
    with pytest.raises(InputError, match="head_norm 'batch' is unknown; use 0, 1, layer"):
        built(head_norm="batch")
