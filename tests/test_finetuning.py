"""What fine-tuning a pretrained network takes: norms and starts of the head, what rests, PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import refusal
from tiny import same
from torch import nn

import evaluate
import net
import net.__main__ as command
import options
from evaluation.networks import open_checkpoint
from net import Architecture
from net.blocks import belongs
from net.depth import DropPath
from net.peft import merge_lora
from options.stored import kept
from storage import save_tensors
from training.describing import describe
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


# --- with and without a head ----------------------------------------------------------------------


@pytest.mark.parametrize("head", ["training", "none"])
def test_pooled_features_are_compared(head: str, images: Path, tmp_path: Path) -> None:
    """`training`: only the losses see the head. `none`: there is none."""
    flags = f"--head {head} --embedding-size 64 --pooling avg --warm 0 --epochs 1 --amp off"
    run = tiny.run(images, tmp_path, "run", flags)
    network = net.load_run(run).model.network
    with torch.no_grad():
        features = network.features(pictures())
        assert torch.equal(network.embed(pictures()), features) and network.test_size == 64
        outputs = network(pictures()).embedding
    assert torch.equal(outputs, features) == (head == "none")
    weights = tiny.saved(run, "best")["model_state_dict"]
    assert ("model.embedding.weight" in weights) == (head == "training")
    tiny.resume(run, "--epochs 2")


def test_a_trained_head_can_be_left_aside(images: Path, tmp_path: Path) -> None:
    run = tiny.run(images, tmp_path, "run", "--epochs 1 --amp off")
    line = ["--resume", str(run), "--head", "none"]
    opened = open_checkpoint(run, options.parse_evaluate(line)).network.eval()
    assert opened.embed(pictures()).shape == (4, opened.test_size) == (4, 64)


def test_a_network_is_evaluated_as_it_starts(images: Path, weights: Path, tmp_path: Path) -> None:
    words = f"--dataset folder:{images} --model timm:vit_tiny_patch16_224 --image-size 32"
    words += " --model-args depth=3 embed_dim=32 num_heads=2 --metrics retrieval --workers 0"
    words += f" --pretrained {weights} --amp off --export {tmp_path / 'e.npz'}"
    evaluate.run(options.parse_evaluate(words.split()))
    with np.load(tmp_path / "e.npz") as exported:
        assert exported["embeddings"].shape == (24, 32)
        names, found = exported["paths"].tolist(), exported["embeddings"]
    trained = tiny.run(images, tmp_path, "run", f"{TINY_VIT}--head training --freeze-blocks all "
                       f"--epochs 1 --pretrained {weights} --amp off")  # fmt: skip
    np.testing.assert_allclose(net.load_run(trained, amp="off")(names), found, atol=1e-6)


def test_flags_of_batch_norms_are_noticed_where_there_are_none(images: Path) -> None:
    flags = "--bn-freeze 0 --bn-momentum 0.5 --warm 0"
    note = (
        "--bn-freeze and --bn-momentum change nothing: timm:vit_tiny_patch16_224 has no BatchNorm"
    )
    assert note in describe(tiny.prepare(images, f"{TINY_VIT}{flags}"))
    assert "no BatchNorm" not in describe(tiny.prepare(images, f"{TINY_VIT}--warm 0"))
    assert "no BatchNorm" not in describe(tiny.prepare(images, flags))


def test_a_head_that_cannot_be_left_out(images: Path, capsys) -> None:
    with pytest.raises(InputError, match="resnet10 have 64 dimensions; use --embedding-size 64"):
        built(head="none")
    with pytest.raises(InputError, match="head none: the method needs the heads embedding, unc"):
        tiny.prepare(images, "--head none --introspective paper")
    with pytest.raises(InputError, match=r"nothing would train: .*--warm 0"):
        tiny.prepare(images, "--head none --embedding-size 64 --loss MS --IPC 3 --warm 1")
    assert "--model NAME" in refusal(capsys, options.parse_evaluate, [])


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


def test_trained_statistics_are_not_compiled_and_recomputed(images: Path) -> None:
    with pytest.raises(InputError, match=r"--compile cannot compute .* use --bn-freeze 1"):
        tiny.prepare(images, "--grad-checkpointing --compile --bn-freeze 0")


def test_a_recomputed_transformer_can_be_compiled() -> None:
    found = []
    for compiled in (False, True):
        network = drawn(transformer(peft="lora:2"))
        network.recompute_blocks()
        if compiled:
            network.compile(backend="aot_eager")
        network(shown(network)).embedding.square().sum().backward()
        found.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_blocks_that_rest_are_not_recomputed() -> None:
    with pytest.raises(InputError, match="--grad-checkpointing: all blocks are frozen"):
        built(freeze_blocks="all").recompute_blocks()


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


@pytest.mark.parametrize("warm", [0, 1])
@pytest.mark.parametrize("bn_freeze", ["0", "1", "statistics"])
def test_bitfit_trains_the_norms_of_pretrained_weights(images: Path, bn_freeze, warm) -> None:
    flags = f"--peft bitfit --bn-freeze {bn_freeze} --warm {warm} --amp off"
    network = tiny.prepare(images, flags).network
    counts = network.counts()
    network.freeze_backbone(False)
    assert all(p.requires_grad for p in network.backbone_parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert counts == network.counts() == (trained, sum(p.numel() for p in network.parameters()))
    assert network.updates_statistics == (bn_freeze == "0")


@pytest.mark.parametrize(("bn_freeze", "warm"), [("1", 0), ("1", 1), ("affine", 0), ("affine", 1)])
def test_what_is_said_to_train_trains(images: Path, bn_freeze: str, warm: int) -> None:
    flags = f"--freeze-blocks 1 --bn-freeze {bn_freeze} --warm {warm} --amp off"
    network = tiny.prepare(images, flags).network
    said, _ = network.counts()
    network.freeze_backbone(False)
    assert said == sum(p.numel() for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--peft bitfit --bn-freeze affine", "bitfit trains nothing.*affine .*--bn-freeze 1"),
        ("--peft lora:4", "--peft lora:4: .* no linear layers.*timm:NAME.*bitfit"),
        ("--peft prompts:2", "--peft prompts needs blocks with attention.*lora"),
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
        ("lora:8:8", "lora:8"),
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


# --- transformers: LoRA, prompts, stochastic depth ------------------------------------------------

VIT = {"model": "timm:vit_tiny_patch16_224", "embedding_size": 8, "image_size": 32}
VIT |= {"model_args": (("depth", 3), ("embed_dim", 32), ("num_heads", 2))}
ROTARY = VIT | {"model": "timm:vit_small_patch16_dinov3"}
SWIN = {"model": "timm:swin_tiny_patch4_window7_224", "embedding_size": 8, "image_size": 56}
SWIN |= {"model_args": (("embed_dim", 16), ("depths", (1, 1, 1, 1)), ("num_heads", (1, 1, 2, 2)))}
CONVNEXT = {"model": "timm:test_convnext", "embedding_size": 8, "image_size": 64}
FAMILIES = {"vit": VIT, "rotary": ROTARY, "swin": SWIN, "convnext": CONVNEXT}


def transformer(family: str = "vit", **more: object) -> net.EmbeddingNet:
    torch.manual_seed(0)
    return net.build(Architecture(**(FAMILIES[family] | more)))


def shown(network: net.EmbeddingNet) -> torch.Tensor:
    return pictures(size=network.architecture.image_size)


def drawn(network: net.EmbeddingNet) -> net.EmbeddingNet:
    """With LoRA's second factor, which starts at 0, as if it had been trained."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(std=0.3, generator=generator)
    return network


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_starts_as_the_base_and_trains_beside_it(family: str) -> None:
    base, network = transformer(family).eval(), transformer(family, peft="lora:2").eval()
    network.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(base.embed(shown(base)), network.embed(shown(network)))
    drawn(network)(shown(network)).embedding.square().sum().backward()
    added = {name for name, p in network.model.named_parameters() if ".lora_" in name}
    blocks = in_block(network, slice(1, None))
    linear = [n for n, m in base.model.named_modules() if isinstance(m, nn.Linear)]
    expected = {f"{n}.{key}" for n in linear for key in ("lora_a", "lora_b") if n != "embedding"}
    assert added == {name for name in expected if name in blocks} and len(added) >= 8
    trained = {n for n, p in network.model.named_parameters() if p.grad is not None}
    assert trained == added | {"embedding.weight", "embedding.bias"}
    assert all(p.grad.abs().max() > 0 for n, p in network.model.named_parameters() if n in added)


@pytest.mark.parametrize("peft", ["lora:2", "lora:3:12", "lora:2,bitfit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_lora_is_the_same_network(family: str, peft: str) -> None:
    network = drawn(transformer(family, peft=peft)).eval()
    images, scale = shown(network), 4.0 if peft == "lora:3:12" else 1.0
    content = {"network": network.description(), "model_state_dict": network.state_dict()}
    by_hand = {k: v.clone() for k, v in network.state_dict().items() if ".lora_" not in k}
    for name in (name for name in content["model_state_dict"] if name.endswith("lora_a")):
        layer = name.removesuffix("lora_a")
        a, b = (content["model_state_dict"][f"{layer}lora_{each}"] for each in "ab")
        by_hand[f"{layer}weight"] += scale * b @ a
    with torch.no_grad():
        expected = network.embed(images)
        plain = transformer(family).eval()
        assert (plain.embed(images) - expected).abs().max() > 1e-2  # it does something
        plain.load_state_dict(by_hand)
        torch.testing.assert_close(plain.embed(images), expected, rtol=0, atol=1e-5)
        started = transformer(family).eval()
        net.load_checkpoint(started, content)  # as --checkpoint does
        torch.testing.assert_close(started.embed(images), expected, rtol=0, atol=1e-5)
        merge_lora(network)
        assert network.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(network.embed(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "rotary"])
def test_each_block_sees_its_own_prompts_and_passes_on_the_image_alone(family: str) -> None:
    network = transformer(family, peft="prompts:5").eval()
    for name, parameter in network.named_parameters():
        if "gamma" in name:  # LayerScale, which starts near 0
            parameter.data.fill_(1.0)
    base, images = transformer(family).eval(), shown(network)
    base.load_state_dict({k: v for k, v in network.state_dict().items() if "prompts" not in k})
    assert [n for n, p in network.model.named_parameters() if p.requires_grad] == [
        *(f"body.blocks.{place}.prompts" for place in range(3)),
        *("embedding.weight", "embedding.bias"),
    ]
    with torch.no_grad():
        assert network.model(images).shape == base.model(images).shape
        assert (network.embed(images) - base.embed(images)).abs().max() > 1e-3
        # By hand: the prompts of a block stand in front, and what becomes of them is dropped.
        seen = []
        hook = base.model.body.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        base.model(images)
        hook.remove()
        if family == "vit":
            tokens = seen[0]
            for ours, theirs in zip(network.model.body.blocks, base.model.body.blocks, strict=True):
                prompts = ours.prompts.expand(len(images), -1, -1)
                tokens = theirs(torch.cat([prompts, tokens], 1))[:, 5:]
            torch.testing.assert_close(network.model(images), base.model.body.norm(tokens))


def test_prompts_start_as_the_patch_embedding_would() -> None:
    bound = (6 / (3 * 16 * 16 + 32)) ** 0.5
    for block in transformer(peft="prompts:40").model.body.blocks:
        assert 0.9 * bound < block.prompts.abs().max() <= bound


def test_prompts_need_tokens_that_see_each_other() -> None:
    for family in ("swin", "convnext"):
        with pytest.raises(InputError, match=r"--peft prompts .* tokens, .* plain ViT"):
            transformer(family, peft="prompts:2")


@pytest.mark.parametrize("model", ["levit_128s", "xcit_nano_12_p16_224", "convit_tiny"])
def test_prompts_are_refused_where_tokens_have_places(model: str) -> None:
    with pytest.raises(InputError, match=r"--peft prompts needs blocks with attention"):
        net.build(Architecture(f"timm:{model}", 8, peft="prompts:2")).check_image_size(224)


def test_peft_leaves_frozen_blocks_alone() -> None:
    network = transformer(peft="lora:2,prompts:2,bitfit", freeze_blocks=1)
    trained = {n for n, p in network.model.named_parameters() if p.requires_grad}
    assert not any(belongs(name, tuple(network.blocks()[1])) for name in trained)
    assert {"body.blocks.1.attn.qkv.lora_a", "body.blocks.2.prompts"} <= trained
    assert {"body.blocks.1.norm1.weight", "body.blocks.2.mlp.fc1.bias", "body.norm.bias"} <= trained
    assert "body.patch_embed.proj.bias" not in trained
    assert "body.cls_token" not in trained and "body.blocks.1.mlp.fc1.weight" not in trained


def test_a_frozen_stem_of_a_vit_is_its_patch_embedding_alone() -> None:
    network = transformer(freeze_stem=True)
    asleep = {n for n, p in network.model.named_parameters() if not p.requires_grad}
    assert asleep == {"body.patch_embed.proj.weight", "body.patch_embed.proj.bias"}
    asleep = in_block(transformer(freeze_blocks=1), slice(2)).values()
    assert not any(parameter.requires_grad for parameter in asleep)


@pytest.mark.parametrize("family", FAMILIES)
def test_stochastic_depth_rises_from_nothing(family: str) -> None:
    network = transformer(family, drop_path=0.5)
    places = [m.p for m in network.modules() if type(m) is DropPath]
    assert places == sorted(places) and (places[0], places[-1]) == (0.0, 0.5)
    images = shown(network)
    torch.manual_seed(1)
    first, second = network.features(images), network.features(images)
    assert not torch.equal(first, second)
    network.eval()
    assert torch.equal(network.features(images), transformer(family).eval().features(images))


def test_stochastic_depth_of_blocks_that_are_not_numbered() -> None:
    with torch.device("meta"):
        network = net.build(Architecture("timm:regnety_002", 8, drop_path=0.3))
    places = [m.p for m in network.modules() if type(m) is DropPath]
    assert len(places) == 13 and places == pytest.approx([0.3 * at / 12 for at in range(13)])


def test_stochastic_depth_of_a_single_block() -> None:
    with pytest.raises(InputError, match="no residual branches above its first block"):
        transformer(model_args=(*VIT["model_args"][1:], ("depth", 1)), drop_path=0.3)


def test_what_stochastic_depth_leaves_out_is_whole_images() -> None:
    left = DropPath(0.25)(torch.ones(4000, 2, 3)).flatten(1)
    assert ((left == 0) | (left == 4 / 3)).all() and (left == left[:, :1]).all()
    assert left.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_transformers_have_the_same_gradients(family: str) -> None:
    found = []
    for recomputed in (False, True):
        peft = {"vit": "lora:2,prompts:3", "rotary": "prompts:2"}.get(family, "none")
        network = drawn(transformer(family, drop_path=0.4, peft=peft))
        if recomputed:
            network.recompute_blocks()
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            network(shown(network)).embedding.square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append([gradients, torch.get_rng_state()])
    assert same(*found)


# --- runs of transformers -------------------------------------------------------------------------

TINY_VIT = (
    "--model timm:vit_tiny_patch16_224 --model-args depth=3 embed_dim=32 num_heads=2 "
    "--image-size 32 --width 1 --stem imagenet --epochs 2 --warm 0 --lr 1e-2 --save-every 3 "
)
PEFT = "--peft lora:2,prompts:3,bitfit --head-norm layer --drop-path 0.2 --amp bf16 "


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the tiny ViT starts from."""
    file = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.manual_seed(7)
    torch.save(net.build(Architecture(**VIT)).model.body.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def tuned(images: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    logs = tmp_path_factory.mktemp("logs")
    return tiny.run(images, logs, "run", f"{TINY_VIT}{PEFT}--pretrained {weights} --keep 2")


def test_checkpoints_hold_what_was_trained_and_the_folder_holds_the_base_once(tuned: Path) -> None:
    whole = net.load_run(tuned).model.network
    best, base = tiny.saved(tuned, "best"), torch.load(tuned / "base.pth", weights_only=True)
    held, resting = best["model_state_dict"], base["base_state_dict"]
    assert held.keys() == {name for name, p in whole.named_parameters() if p.requires_grad}
    assert held.keys() | resting.keys() == whole.state_dict().keys()
    assert not held.keys() & resting.keys()
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in (held | resting).items())
    assert best["base"]["pretrained"].endswith("vit.pth") and len(best["base"]["fingerprint"]) == 32
    assert tiny.saved(tuned)["base"] == best["base"] and "network" in best


def test_a_killed_peft_run_goes_on_bit_for_bit(images, weights, tuned, tmp_path) -> None:
    run = tiny.run(images, tmp_path, "run", f"{TINY_VIT}{PEFT}--pretrained {weights} --max-steps 3")
    before = (run / "base.pth").read_bytes()
    tiny.resume(run, "")
    assert (run / "base.pth").read_bytes() == before
    first, second = tiny.saved(run), tiny.saved(tuned)
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "random", "base"):
        assert same(first[part], second[part]), part
    assert tiny.untimed_rows(run)[-1] == tiny.untimed_rows(tuned)[-1]


def test_a_run_goes_on_without_what_it_started_from(images, weights, tmp_path) -> None:
    start = Path(shutil.copy(weights, tmp_path / "start.pth"))
    run = tiny.run(
        images, tmp_path, "run", f"{TINY_VIT}--peft lora:2 --pretrained {start} --max-steps 3"
    )
    start.unlink()
    tiny.resume(run, "--max-steps 4")
    assert tiny.saved(run)["clock"]["step"] == 4
    from_run = f"{TINY_VIT}--pretrained none --max-steps 3 --checkpoint"
    second = tiny.run(images, tmp_path, "second", f"{from_run} {shutil.copytree(run, start)}")
    shutil.rmtree(start)
    tiny.resume(second, "--max-steps 4")
    assert tiny.saved(second)["clock"]["step"] == 4


def test_a_checkpoint_needs_no_weights_before_it(images: Path, tmp_path: Path, monkeypatch) -> None:
    """With photographs' default, --pretrained imagenet: the norms' default stays its own."""

    def nowhere(*_: object) -> None:
        raise AssertionError("weights are looked for")

    monkeypatch.setattr("net.building.imagenet_file", nowhere)
    first = built(width=1.0, stem="imagenet")
    file = tmp_path / "first.pth"
    torch.save({"network": first.description(), "model_state_dict": first.state_dict()}, file)
    flags = "--width 1 --stem imagenet --pretrained imagenet --warm 0 --checkpoint"
    training = tiny.prepare(images, f"{flags} {file}")
    network = training.network
    assert same(network.state_dict(), first.state_dict())
    assert network.architecture.bn_freeze == "1"
    assert f"checkpoint {file}" in describe(training)
    run = tiny.run(images, tmp_path, "run", f"{flags} {file} --peft bitfit --epochs 1 --amp off")
    (run / "base.pth").unlink()  # then it is built anew
    load = net.load_run(run, device="cpu").model.network
    assert torch.equal(load.model.conv1.weight, first.model.conv1.weight)


def test_the_running_mean_of_a_peft_run_leaves_out_the_base_too(images, weights, tmp_path) -> None:
    flags = f"{TINY_VIT}--peft lora:2 --ema 0.9 --amp off --pretrained {weights}"
    run = tiny.run(images, tmp_path, "run", f"{flags} --max-steps 3")
    held = tiny.saved(run)
    assert held["ema_state_dict"].keys() == held["model_state_dict"].keys()
    tiny.resume(run, "")
    undisturbed = tiny.saved(tiny.run(images, tmp_path, "whole", flags))
    assert same(tiny.saved(run)["ema_state_dict"], undisturbed["ema_state_dict"])
    alone = Path(shutil.copy(tiny.best_checkpoint(run), tmp_path))
    np.testing.assert_array_equal(embeddings(alone), embeddings(run))


def embeddings(path: Path) -> np.ndarray:
    picture = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    return net.load_run(path, device="cpu", amp="off")(picture)


def test_a_peft_checkpoint_alone_finds_its_base_again(tuned, weights, tmp_path) -> None:
    alone = Path(shutil.copy(tiny.best_checkpoint(tuned), tmp_path))
    np.testing.assert_array_equal(embeddings(alone), embeddings(tuned))
    content = torch.load(alone, weights_only=True)
    content["base"]["pretrained"] = str(tmp_path / "gone.pth")
    torch.save(content, alone)
    with pytest.raises(InputError, match=r"on top of a timm:vit.*gone.pth; put the base.pth of"):
        embeddings(alone)
    torch.manual_seed(8)
    torch.save(net.build(Architecture(**VIT)).model.body.state_dict(), tmp_path / "gone.pth")
    with pytest.raises(InputError, match=r"gone.pth that is here is another one"):
        embeddings(alone)
    content["base"]["pretrained"] = "none"
    torch.save(content, alone)
    with pytest.raises(InputError, match=r"that was started at random; put the base.pth of"):
        embeddings(alone)
    shutil.copy(tuned / "base.pth", tmp_path)
    np.testing.assert_array_equal(embeddings(alone), embeddings(tuned))


def test_a_base_that_is_missing_or_anothers(tuned: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    with pytest.raises(
        InputError, match=r"base.pth holds the weights that a run left as they were"
    ):
        net.load_run(run / "base.pth")
    base = torch.load(run / "base.pth", weights_only=True)
    save_tensors(run / "base.pth", base | {"fingerprint": "0" * 32})
    with pytest.raises(InputError, match=r"base.pth is not the base of .*best.pth"):
        net.load_run(run)
    (run / "base.pth").unlink()
    with pytest.raises(InputError, match=r"--resume-run .*base.pth .* not in its folder; put it"):
        tiny.resume(run, "--epochs 3")


def test_a_peft_run_is_evaluated_and_exported(tuned: Path, tmp_path: Path) -> None:
    row = tiny.metrics_rows(tuned)[-1]
    line = ["--resume", str(tuned / "last.pth"), "--json", str(tmp_path / "n.json")]
    evaluate.run(options.parse_evaluate([*line, "--workers", "0", "--amp", "bf16"]))
    (found,) = json.loads((tmp_path / "n.json").read_text())["results"]
    assert found["R@1"] == pytest.approx(float(row["R@1"]), abs=1e-6)
    command.main(["export", str(tuned), "--torchscript", str(tmp_path / "net.pt")])
    exported = torch.jit.load(tmp_path / "net.pt")
    network, images = net.load_run(tuned).model.network, torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = nn.functional.normalize(network.embed((images - 0.5) / 0.5))
    torch.testing.assert_close(exported(images * 255), expected, rtol=0, atol=1e-5)
    assert not any("lora" in name for name, _ in exported.named_parameters())


def test_a_run_starts_from_a_peft_run(images: Path, tuned: Path) -> None:
    begun = f"{TINY_VIT}--head-norm layer --pretrained none --checkpoint {tuned}"
    for peft, words in (("none", "none"), ("prompts:4", "4")):
        with pytest.raises(
            InputError, match=f"has 3 prompts .* network {words}, .*--peft lora:2,prompts:3,bitfit"
        ):
            tiny.prepare(images, f"{begun} --peft {peft}")
    network, trained = (
        tiny.prepare(images, f"{begun} --peft lora:4,prompts:3").network.eval(),
        net.load_run(tuned, device="cpu").model.network,
    )
    with torch.no_grad():
        found, expected = network.embed(pictures()), trained.embed(pictures())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    again = tiny.prepare(images, f"{TINY_VIT}{PEFT}--pretrained none --checkpoint {tuned}").network
    assert same(again.state_dict(), net.load_run(tuned).model.network.state_dict())


# --- a run's own checkpoint as --pretrained -------------------------------------------------------


def started_from(file: Path, **more: object) -> net.EmbeddingNet:
    return net.build(Architecture(**(VIT | more)), pretrained=str(file)).eval()


def features_of_run(run: Path, images: torch.Tensor, **more: object) -> torch.Tensor:
    with torch.no_grad():
        return net.load_run(run, device="cpu", **more).model.network.features(images)


def test_a_backbone_starts_from_what_a_peft_run_has_trained(images, weights, tmp_path, capsys):
    flags = f"{TINY_VIT}--peft lora:2,bitfit --amp off --pretrained {weights} --max-steps 3"
    run, file = tiny.run(images, tmp_path, "run", flags), tmp_path / "run.safetensors"
    command.main(["export", str(run), "--safetensors", str(file)])
    seen = pictures()
    expected = features_of_run(run, seen)
    with torch.no_grad():
        assert (started_from(weights).features(seen) - expected).abs().max() > 1e-3
        for start in (tiny.best_checkpoint(run), run / "last.pth", file):
            for peft in ("none", "lora:4"):
                found = started_from(start, peft=peft).features(seen)
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_backbone_starts_from_the_running_mean(images: Path, tmp_path: Path) -> None:
    run = tiny.run(images, tmp_path, "run", "--ema 0.9 --epochs 2 --warm 0 --amp off")
    network = net.build(Architecture(**SMALL), pretrained=str(run / "last.pth")).eval()
    mean, raw = (
        features_of_run(run / "last.pth", pictures(), weights=kind) for kind in ("ema", "raw")
    )
    with torch.no_grad():
        found = network.features(pictures())
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-5)
    assert (found - raw).abs().max() > 1e-3


def test_prompts_are_no_part_of_a_backbone_alone(tuned: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.safetensors"
    command.main(["export", str(tuned), "--safetensors", str(file)])
    for start in (tiny.best_checkpoint(tuned), file):
        with pytest.raises(
            InputError, match=r"holds prompts, .*--checkpoint .* --peft lora:2,prompts:3,bitfit"
        ):
            started_from(start)


def test_a_file_of_another_family_is_one_sentence(weights: Path) -> None:
    words = r"vit\.pth does not hold the weights of a timm:test_convnext.* \(KeyError: .*--model"
    with pytest.raises(InputError, match=words):
        net.build(Architecture(**CONVNEXT), pretrained=str(weights))


def test_a_file_of_lightning_is_read(weights: Path, tmp_path: Path) -> None:
    held = torch.load(weights, weights_only=True)
    wrapped = {f"model.{name}": value for name, value in held.items()}
    torch.save({"state_dict": wrapped, "global_step": 3}, tmp_path / "epoch.ckpt")
    body = started_from(tmp_path / "epoch.ckpt").model.body
    assert same(dict(body.state_dict()), held)
