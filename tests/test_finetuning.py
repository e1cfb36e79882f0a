"""What fine-tuning a pretrained network takes: norms and starts of the head, what rests, PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from conftest import refusal
from tiny import same
from torch import nn

import net
import options
from net import Architecture
from net.blocks import belongs
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


# --- frozen blocks --------------------------------------------------------------------------------


def in_block(network: net.EmbeddingNet, blocks: slice) -> dict[str, nn.Parameter]:
    """The backbone's parameters in some of its blocks, the stem being block 0."""
    parts = tuple(part for block in network.blocks()[blocks] for part in block)
    return {n: p for n, p in network.model.named_parameters() if belongs(n, parts)}


@pytest.mark.parametrize(("asked", "rested"), [(0, 0), (1, 2), (3, 4), (4, 5), ("all", 5)])
def test_frozen_blocks_have_no_gradient_and_above_them_nothing_changes(asked, rested) -> None:
    free, network = built(bn_freeze="affine"), built(bn_freeze="affine", freeze_blocks=asked)
    for each in (free, network):
        each(pictures()).embedding.square().sum().backward()
    expected = in_block(free, slice(None))
    below, above = in_block(network, slice(rested)), in_block(network, slice(rested, None))
    assert all(p.grad is None and not p.requires_grad for p in below.values())
    for name, parameter in above.items():
        assert same(parameter.grad, expected[name].grad), name
    listed = [p for block in network.block_parameters() for p in block]
    assert {id(p) for p in listed} == {id(p) for p in above.values()}
    heads = sum(p.numel() for p in network.head_parameters())
    trained = heads + sum(p.numel() for n, p in above.items() if expected[n].requires_grad)
    assert network.counts() == (trained, sum(p.numel() for p in network.parameters()))


def test_frozen_blocks_are_in_evaluation_mode_and_stay_there() -> None:
    network = built(freeze_blocks=2).eval().train()
    network.freeze_backbone(True)  # a warm-up comes and goes
    network.freeze_backbone(False)
    norms = {n: m for n, m in network.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    asleep = {name for name, norm in norms.items() if not norm.training}
    assert asleep == {name for name in norms if name.startswith(("bn1", "layer1", "layer2"))}
    network(pictures()).embedding.square().sum().backward()
    for name, norm in norms.items():
        untouched = torch.equal(norm.running_mean, torch.zeros_like(norm.running_mean))
        assert untouched == (name in asleep) == (norm.weight.grad is None), name


def test_a_frozen_stem_is_the_stem_alone() -> None:
    network = built(freeze_stem=True)
    network(pictures()).embedding.square().sum().backward()
    asleep = {name for name, p in network.model.named_parameters() if p.grad is None}
    assert asleep == {"conv1.weight", "bn1.weight", "bn1.bias"} == set(in_block(network, slice(1)))
    assert not network.model.bn1.training and network.model.layer1[0].bn1.training


@pytest.mark.parametrize("model", ["bn_inception", "googlenet"])
def test_blocks_without_a_module_of_their_own_rest_too(model: str) -> None:
    network = built(model=model, width=1.0, freeze_blocks=1)
    rests = {n for n, m in network.model.named_modules() if not m.training}
    parts = tuple(part for block in network.blocks()[:2] for part in block)
    norms = {n for n, m in network.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms & rests == {name for name in norms if belongs(name, parts)} != set()


def test_more_blocks_than_there_are(images: Path) -> None:
    with pytest.raises(InputError, match="--freeze-blocks 5: resnet10 has 4 blocks; choose at mo"):
        tiny.prepare(images, "--freeze-blocks 5")


def test_a_run_with_frozen_blocks(images: Path, tmp_path: Path, capsys) -> None:
    flags = "--freeze-blocks 2 --warm 1 --epochs 2 --amp off"
    run = tiny.run(images, tmp_path, "run", flags)
    said = capsys.readouterr().out
    assert "\n            72,776 of them train (93.46%)\nloss" in said
    network = tiny.prepare(images, flags).network
    start, end = network.state_dict(), tiny.saved(run)["model_state_dict"]
    below = {f"model.{name}" for name in in_block(network, slice(3))}
    for name, _ in network.named_parameters():
        assert torch.equal(start[name], end[name]) == (name in below), name
    assert net.load_run(run).model.network.architecture.freeze_blocks == 2
    tiny.run(images, tmp_path, "part", f"{flags} --max-steps 6 --save-every 1")
    tiny.resume(tmp_path / "part", "")
    assert same(tiny.saved(tmp_path / "part")["model_state_dict"], end)


def test_only_the_heads_train(images: Path, tmp_path: Path) -> None:
    run = tiny.run(images, tmp_path, "run", "--freeze-blocks all --epochs 1 --warm 0 --amp off")
    start = tiny.prepare(images, "--freeze-blocks all").network.state_dict()
    end = tiny.saved(run)["model_state_dict"]
    assert {name for name in start if not torch.equal(start[name], end[name])} == {
        "model.embedding.weight",
        "model.embedding.bias",
    }


# --- recomputation --------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["resnet10", "googlenet"])
@pytest.mark.parametrize("bn_freeze", ["0", "1"])
def test_recomputed_blocks_have_the_same_gradients_and_statistics(model, bn_freeze) -> None:
    found = []
    for recomputed in (False, True):
        network = built(model=model, width=1.0, bn_freeze=bn_freeze, freeze_stem=True)
        if recomputed:
            network.recompute_blocks()
        torch.manual_seed(3)
        network(pictures()).embedding.square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append([gradients, network.state_dict(), torch.get_rng_state()])
    assert len(found[0][0]) > 10 and same(*found)


def test_a_run_with_recomputation_is_the_same_run(images: Path, tmp_path: Path) -> None:
    flags = "--epochs 1 --amp off --dropout 0.2"
    plain = tiny.saved(tiny.run(images, tmp_path, "plain", flags))
    flags += " --grad-checkpointing"
    recomputed = tiny.saved(tiny.run(images, tmp_path, "recomputed", flags))
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "random"):
        assert same(plain[part], recomputed[part]), part


def test_blocks_that_are_no_modules_are_not_recomputed(images: Path) -> None:
    network = built(model="bn_inception", width=1.0)
    with pytest.raises(InputError, match=r"--grad-checkpointing: .* not modules"):
        network.recompute_blocks()


# --- BitFit, and what a network has no place for --------------------------------------------------


def test_bitfit_trains_norms_and_heads_alone(images: Path, tmp_path: Path) -> None:
    flags = "--peft bitfit --epochs 1 --warm 0 --amp off --keep 1"
    run = tiny.run(images, tmp_path, "run", flags)
    start = tiny.prepare(images, flags).network
    trained = {f"model.{n}" for n, p in start.model.named_parameters() if p.dim() == 1}
    trained |= {"model.embedding.weight"}
    end = net.load_run(run / "last.pth").model.network.state_dict()
    for name, before in start.named_parameters():
        assert torch.equal(before, end[name]) == (name not in trained), name
    statistics = {name for name in end if "running" in name or "tracked" in name}
    assert tiny.saved(run)["model_state_dict"].keys() == trained | statistics


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--peft lora:4", "--peft lora:4: .* no linear layers.*timm:NAME.*bitfit"),
        ("--peft prompts:2", "--peft prompts: .* do not pass on tokens.*lora"),
        ("--peft bitfit --freeze-blocks all", "--peft bitfit trains nothing, because all blocks"),
        ("--drop-path 0.1", "--drop-path 0.1: .*no residual branches.*timm:NAME"),
    ],
)
def test_what_a_network_has_no_place_for(flags: str, words: str, images: Path) -> None:
    with pytest.raises(InputError, match=words):
        tiny.prepare(images, flags)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("none", "none"),
        ("lora:8", "lora:8"),
        ("bitfit,prompts:10,lora:4:8", "lora:4:8,prompts:10,bitfit"),
    ],
)
def test_peft_is_kept_in_one_spelling(text: str, kept: str) -> None:
    assert options.parse_train(["--peft", text]).peft == kept


@pytest.mark.parametrize("text", ["", "lora", "lora:0", "prompts:x", "lora:4,lora:8", "adapters"])
def test_peft_that_is_unknown(text: str, capsys) -> None:
    assert "argument --peft: " in refusal(capsys, options.parse_train, ["--peft", text])


def test_numbers_of_blocks(capsys) -> None:
    assert options.parse_train(["--freeze-blocks", "all"]).freeze_blocks == "all"
    said = refusal(capsys, options.parse_train, ["--freeze-blocks", "-1"])
    assert "'-1' is neither a number of blocks nor all" in said
