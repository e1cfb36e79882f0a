"""The same numbers on a GPU as on the CPU, and every command there.

Run by make gpu-check; skipped where there is no GPU.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_layouts
import pytest
import tiny
import torch
from conftest import ROOT, SMALL, run_cli, run_python

import dataset
import losses
import metrics
import net
import net.replay
import options
from dataset.augment import AUGMENTATIONS
from dataset.base import ImageSet
from dataset.loader import train_loader
from dataset.pixel_store import PixelStore
from dataset.reading import Reading
from dataset.samplers import make_sampler
from dataset.transforms import RandomCrop, uniforms
from dataset.waiting import waiting_on
from devices import Precision
from utils import InputError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")


# --- the longest comes first: others run beside it ------------------------------------------------


def worked(done) -> str:
    """What a command printed, once it has succeeded."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_from_training_to_a_search(tmp_path):
    """train.py, evaluate.py on either device, report.py, load_run, and an export, from files."""
    images = tiny.write_images(tmp_path / "data", images=12)
    common = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--amp", "off"]
    reading = ["--decode", "cache", "--cache-dir", tmp_path / "cache", "--data-device", "cuda"]
    where = ["--epochs", "2", "--LOG_DIR", tmp_path, "--name", "run"]
    said = worked(run_cli("train.py", *common, *reading, *where, cwd=tmp_path))
    assert torch.cuda.get_device_name() in said
    numbers = {}
    for device in ("gpu", "cpu"):
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        out = tmp_path / f"{device}.npz"
        command = ["--resume", tmp_path / "run", "--export", out, "--amp", "off"]
        worked(run_cli("evaluate.py", *command, cwd=tmp_path, **hidden))
        with np.load(out) as file:
            numbers[device] = file["embeddings"]
    np.testing.assert_allclose(numbers["gpu"], numbers["cpu"], atol=2e-3)
    worked(run_cli("report.py", tmp_path / "run", cwd=tmp_path))
    worked(run_python("-m", "net", "export", tmp_path / "run", "--onnx", "a.onnx", cwd=tmp_path))
    embed = net.load_run(tmp_path / "run")
    paths = sorted((images / "eval").rglob("*.png"))[:5]
    assert embed(paths).shape == (5, 8)
    for more in (
        ["--rerank", "--bootstrap", "100"],
        ["--whiten", "4", "--query", paths[0]],
        ["--dims", "4", "--metrics", "retrieval", "nmi", "f1", "ami", "verification"],
    ):
        worked(run_cli("evaluate.py", "--resume", tmp_path / "run", *more, cwd=tmp_path))
    index = tmp_path / "photos.npz"
    build = ["build", tmp_path / "run", "--images", images / "eval", "--index", index]
    worked(run_cli("search.py", *build, cwd=tmp_path))
    assert paths[0].name in worked(run_cli("search.py", "query", index, paths[0], cwd=tmp_path))


# --- numbers -------------------------------------------------------------------------------------


def batch(images: int = 48, size: int = 32, classes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % classes
    return torch.randn(images, size, generator=generator), labels


# These draw as they compute, and their draws differ between devices.
AT_RANDOM = {"MarginLoss", "TripletLoss", "Margin", "HIER"}


@pytest.mark.parametrize("name", [name for name in losses.CRITERIA if name not in AT_RANDOM])
def test_losses_and_gradients(name):
    if isinstance(losses.CRITERIA[name], losses.LibraryEntry):
        pytest.importorskip("pytorch_metric_learning")
    found = {}
    for device in (torch.device("cpu"), DEVICE):
        torch.manual_seed(1)
        criterion = losses.build(name, 12, 32)
        embeddings, labels = batch()
        embeddings = embeddings.to(device).requires_grad_()
        loss = criterion.to(device)(embeddings, labels.to(device))
        loss.backward()
        found[device.type] = (loss.detach().cpu(), embeddings.grad.cpu())
    for cpu, gpu in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=2e-4, atol=2e-5)


NOT_WAITING = ["Proxy_Anchor", "AMLoss", "triplet", "semihtriplet", "n-npair", "ms", "Sph", "Hyp"]
NOT_WAITING += ["RecallAtK", "SupAP", "SupCon", "HIST", "MarginLoss", "TripletLoss"]
NOT_WAITING = {name: (name, {}, {}) for name in NOT_WAITING} | {
    "drawn by distance": ("MarginLoss", {"miner": "distanceweighted"}, {}),
    "SiMix": ("RecallAtK", {"simix": True}, {}),
    "PartialFC": ("ArcFace", {"sample_rate": 0.8}, {}),
    "memory": ("semihtriplet", {}, {"memory": {"size": 100}}),
    "mined from a memory": ("MarginLoss", {}, {"memory": {"size": 100}}),
}


@pytest.mark.parametrize("case", NOT_WAITING)
def test_a_loss_does_not_wait_for_the_card(case):
    name, arguments, attached = NOT_WAITING[case]
    objective = losses.compose(name, 12, 32, attached, l2_norm=False, **arguments).to(DEVICE)

    def criterion(embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return objective(losses.Embeddings(embeddings), labels)

    embeddings, host = batch()
    embeddings, labels = embeddings.to(DEVICE).requires_grad_(), host.to(DEVICE)
    labels.host = host
    criterion(embeddings, labels).backward()  # libraries set themselves up
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(embeddings, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_retrieval_metrics_are_the_same_numbers():
    embeddings, labels = batch(3000, 64, 200)
    embeddings = embeddings + 2 * torch.nn.functional.one_hot(labels % 64, 64)
    cpu = metrics.retrieval_metrics(embeddings, labels)
    gpu = metrics.retrieval_metrics(embeddings.to(DEVICE), labels.to(DEVICE))
    assert gpu == pytest.approx(cpu, abs=1e-6)


def images_that_tie(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of images, some of which lie where others do."""
    embeddings, labels = batch(6000, 64, classes)
    embeddings += 2 * torch.randn(classes, 64, generator=torch.Generator().manual_seed(1))[labels]
    embeddings[::9] = embeddings[1::9][: len(embeddings[::9])]
    return embeddings, labels


@pytest.mark.parametrize("classes", [3, 1500], ids=["large classes", "small classes"])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_query_finds_the_same(classes, grouped):
    embeddings, labels = images_that_tie(classes)
    groups = {"exclude": torch.arange(6000) % 50} if grouped else {}
    cpu = metrics.retrieval_per_query(embeddings, labels, **groups)
    gpu = metrics.retrieval_per_query(embeddings, labels, device=DEVICE, **groups)
    for name, values in cpu.items():
        torch.testing.assert_close(gpu[name], values, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_products_of_the_metrics_are_whole_float32(setting):
    embeddings, labels = batch(9000, 64, 900)
    embeddings = 1.5 * embeddings + torch.randn(900, 64)[labels]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        gpu = metrics.retrieval_per_query(embeddings, labels, device=DEVICE)
        first, again = (metrics.kmeans(embeddings.to(DEVICE), 300) for _ in range(2))
    finally:
        torch.set_float32_matmul_precision(before)
    for name, values in metrics.retrieval_per_query(embeddings, labels).items():
        assert torch.equal(values, gpu[name]), name
    assert torch.equal(first.labels, again.labels)
    assert first.inertia == pytest.approx(metrics.kmeans(embeddings, 300).inertia, rel=0.01)


@pytest.mark.parametrize("padding, counted", [(1, True), (1, False), (0, True)])
def test_gradients_of_averages(padding, counted):
    """torch's own are wrong in some releases, and are replaced."""
    Precision("off", DEVICE)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        maps = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(0)).to(device)
        maps = maps.to(memory_format=torch.channels_last).requires_grad_()
        out = torch.nn.functional.avg_pool2d(maps, 3, 2, padding, count_include_pad=counted)
        out.square().sum().backward()
        found.append(maps.grad.cpu())
    torch.testing.assert_close(*found)


def test_clustering_metrics_are_close():
    embeddings, labels = batch(3000, 64, 60)
    embeddings = embeddings + 4 * torch.nn.functional.one_hot(labels, 64)
    cpu = metrics.clustering_metrics(embeddings, labels)
    gpu = metrics.clustering_metrics(embeddings.to(DEVICE), labels.to(DEVICE))
    assert gpu["NMI"] == pytest.approx(cpu["NMI"], abs=0.02)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_one_training_step(amp, tmp_path):
    import train

    weights = {}
    for gpu in (False, True):
        command = [*SMALL, "--loss", "AMLoss", "--amp", amp, "--data-root", str(ROOT / "data")]
        args = options.parse_train([*command, "--LOG_DIR", str(tmp_path)])
        with pytest.MonkeyPatch.context() as patch:
            if not gpu:
                patch.setattr(torch.cuda, "is_available", lambda: False)
            training = train.prepare(args)
        training.loader.set_epoch(0)
        assert training.precision.device.type == ("cuda" if gpu else "cpu")
        train.step(training, next(iter(training.loader)))
        weights[gpu] = training.network.state_dict()["model.embedding.weight"].float().cpu()
    tolerance = 1e-4 if amp == "off" else 1e-2
    torch.testing.assert_close(weights[True], weights[False], rtol=tolerance, atol=tolerance)


VIT = "--model timm:test_vit --width 1 --stem imagenet --image-size 32"
RECENT = ["CosFace", "SupCon", "HIST", "HIER", "PFML", "Sph", "Hyp"]
METHODS = {
    "AMLoss": "--loss AMLoss",
    "disentangled": "--disent True --al 1 --be 0.1 --gam 1e-5",
    "SEC": "--use_loss semihtriplet --instances 2 --sec_wei 1 --norm_momentum 0.5 --steps 16",
    "introspective": "--introspective paper",
    "divided": "--nb-clusters 2 --mod-epoch 1 --IPC 2 --warm 0",
    "margin": "--experiment margin_loss_resnet50 --model resnet10 --IPC 2 --warm 0",
    "fp16": "--amp fp16",
    "fp16, by norm": "--amp fp16 --clip-norm 1 --ema 0.9 --layer-decay 0.7 --lr-warmup 2",
    "mean": "--ema 0.9 --schedule onecycle --clip-norm 1",
    "compiled": "--compile --amp off",
    "vit": VIT,
    "low rank": f"{VIT} --peft lora:2 --drop-path 0.1",
    "prompts": f"{VIT} --peft prompts:2",
    "biases": "--peft bitfit --warm 0",
    "a frozen part": "--freeze-blocks 2 --layer-decay 0.7 --warm 0",
    "less memory": "--grad-checkpointing --warm 0",
    "in parts": "--loss RecallAtK --IPC 3 --micro-batch 5",
    "in parts, bf16": "--loss SupAP --IPC 3 --micro-batch 5 --amp bf16",
    "memory bank": "--loss ms --IPC 3 --memory-bank 30 --memory-bank-start 2",
    "matryoshka": "--matryoshka 2 8",
    "mixup": "--mixup 1",
    "rmsprop": "--optimizer rmsprop --schedule cosine --lr-warmup 2 --decay-vectors 0",
    "not a number": "--on-nan skip --optimizer sgd --lr 0.01",
    **{name: f"--loss {name} --IPC 3" for name in RECENT},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method, tmp_path):
    if "timm:" in METHODS[method]:
        pytest.importorskip("timm")
    images = tiny.write_images(tmp_path / "data", images=12)
    epochs = "" if "--steps" in METHODS[method] else "--epochs 2"
    folder = tiny.run(images, tmp_path, "run", f"{METHODS[method]} {epochs}")
    rows = tiny.metrics_rows(folder)
    assert all(np.isfinite(float(row["loss"])) for row in rows) and float(rows[-1]["R@1"]) > 0


CONTINUED = ["AMLoss", "SEC", "introspective", "divided", "mean", "in parts", "memory bank", "PFML"]


@pytest.mark.parametrize("method", CONTINUED)
def test_a_continued_run_ends_like_an_uninterrupted_one(method, tmp_path):
    images = tiny.write_images(tmp_path / "data", images=12)
    flags = f"{METHODS[method]} --deterministic --amp off"
    flags += "" if "--steps" in flags else " --epochs 2"
    whole = tiny.run(images, tmp_path, "whole", flags)
    folder = tiny.run(images, tmp_path, "run", f"{flags} --max-steps 5")
    tiny.resume(folder, "")
    first, second = (torch.load(p / "last.pth", weights_only=True) for p in (whole, folder))
    for part in ("model_state_dict", "ema_state_dict"):
        held = first.get(part, {})
        assert all(torch.equal(held[name], second[part][name]) for name in held)


RECORDED = {
    "AMLoss": "--loss AMLoss",
    "trained BatchNorms": "--bn-freeze 0 --dropout 0.2",
    "frozen BatchNorms": "--bn-freeze 1 --warm 0",
    "divided": METHODS["divided"],
    "two batches a step": METHODS["introspective"],
    "mixup, dropout": "--mixup 1 --dropout 0.2 --bn-freeze 0",
    "bf16": "--amp bf16",
}


@pytest.mark.parametrize("what", RECORDED)
def test_a_recorded_step_gives_the_same_bits(what, tmp_path, monkeypatch):
    images = tiny.write_images(tmp_path / "data", images=12)
    flags = f"--epochs 3 --deterministic --amp off {RECORDED[what]}"
    plain = tiny.saved(tiny.run(images, tmp_path, "plain", f"{flags} --cuda-graphs 0"))
    played, play = [], net.replay.Tape.play
    monkeypatch.setattr(
        net.replay.Tape, "play", lambda tape, batch: played.append(1) or play(tape, batch)
    )
    recorded = tiny.saved(tiny.run(images, tmp_path, "recorded", flags))
    assert played
    assert tiny.same(plain["model_state_dict"], recorded["model_state_dict"])


def test_the_memory_of_a_recorded_step_can_be_had_back():
    network = net.build(net.Architecture("resnet18", 64)).to(DEVICE)
    network.record()
    images = torch.randn(32, 3, 128, 128, device=DEVICE)
    for _ in range(net.replay.CALLS_BEFORE + 2):
        network.zero_grad(set_to_none=True)
        network(images).embedding.sum().backward()
    assert network.is_recorded
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    network.record(False)
    network.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    assert held - torch.cuda.memory_reserved() > 2**26  # its activations take a quarter of a GiB


def test_bf16_is_close_to_float32():
    network = net.build(net.Architecture("resnet18", 64)).eval()
    network.to(DEVICE, memory_format=torch.channels_last)
    images = torch.randn(16, 3, 128, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        exact = network(images).embedding
        with torch.autocast("cuda", torch.bfloat16):
            rounded = network(images).embedding
    cosine = torch.nn.functional.cosine_similarity(exact, rounded)
    assert rounded.dtype == torch.float32 and cosine.min() > 0.99


def batches(images: ImageSet, device: torch.device, reading: Reading) -> list[torch.Tensor]:
    """Two epochs of 224-pixel crops, in pixel values 0..255."""
    spec = net.InputSpec(scale=255.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    sampler = make_sampler(images.labels, 8)
    loader = train_loader(
        images,
        sampler,
        augment="crop",
        spec=spec,
        device=device,
        workers=0,
        seed=3,
        reading=reading,
    )
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [batch.images.cpu() for batch in loader]
    return found


def test_crops_from_gpu_memory_are_those_of_the_cpu(tmp_path):
    official_layouts.write("cub", "official", tmp_path, classes=4, images=6)
    images = dataset.load("cub", tmp_path, "train")
    cache = Reading("cache", cache_dir=tmp_path / "cache")
    cpu = batches(images, torch.device("cpu"), cache)
    for place in (None, "cuda"):
        gpu = batches(images, DEVICE, replace(cache, data_device=place))
        for one, other in zip(cpu, gpu, strict=True):
            assert (one - other).abs().mean() < 1  # of 255 levels


def test_a_busy_gpu_does_not_wait_for_data():
    """While the host waits for a batch, a GPU lacks nothing until it has done its work."""
    square = torch.randn(4096, 4096, device=DEVICE)
    waited = []
    for products in (400, 0):  # .1 s of work or more, whatever the card; none
        waiting = waiting_on(DEVICE)
        torch.cuda.synchronize()
        for _ in range(products):
            torch.mm(square, square)
        waiting.asked()
        time.sleep(0.05)
        waiting.given()
        waited.append(waiting.seconds())
    assert waited[0] < 0.01 and 0.05 <= waited[1] < 0.2


def test_epochs_use_the_memory_of_those_before(tmp_path):
    official_layouts.write("cub", "official", tmp_path, classes=4, images=6)
    images = dataset.load("cub", tmp_path, "train")
    cache = Reading("cache", cache_dir=tmp_path / "cache", data_device="cuda")
    taken = []
    for _ in range(4):
        torch.cuda.synchronize()
        batches(images, DEVICE, cache)  # two epochs
        taken.append(torch.cuda.memory_reserved())
    assert taken[-1] - taken[0] < 2**26  # an epoch takes as much; crops differ in size


@pytest.mark.parametrize("cubic", [False, True])
def test_crops_of_a_batch_differ_by_rounding(cubic):
    """Half precision on the GPU: a quarter of one of 255 levels."""
    shapes = np.array([(256, 341), (341, 256), (256, 500), (97, 83)] * 6)
    pixels = torch.randint(0, 256, (int(shapes.prod(axis=1).sum()), 3), dtype=torch.uint8)
    crop = RandomCrop()
    views = crop.views(shapes, uniforms(0, 0, np.arange(24), crop.draws), 0)._replace(cubic=cubic)
    cpu, gpu = (PixelStore(each, shapes).cut(np.arange(24), views, 224) for each in both(pixels))
    assert (gpu.cpu() - cpu).abs().max() < 0.4


def both(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU and on the GPU."""
    return tensor, tensor.to(DEVICE)


@pytest.mark.parametrize("name", ["emoji", "Geom", "GeomColor", "ColorHeavy"])
def test_changes_of_a_batch(name):
    change = AUGMENTATIONS[name].change
    pixels = torch.randint(0, 256, (32, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels = torch.nn.functional.interpolate(pixels.float(), (64, 64), mode="bicubic")
    pixels = pixels.clamp(0, 255).to(torch.uint8)
    u = uniforms(1, 0, np.arange(32), change.draws)
    difference = (change(pixels.to(DEVICE), u).cpu() - change(pixels, u)).abs()
    assert difference.mean() < 0.1


def test_network_fixture_in_float32():
    fixture = np.load(Path(__file__).parent / "fixtures" / "net_resnet50_0.npz")
    network = net.build(net.Architecture("resnet50", 512)).eval()
    images = torch.from_numpy(fixture["input"])
    with torch.no_grad():
        cpu = network(images).embedding
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        gpu = network.to(DEVICE)(images.to(DEVICE)).embedding.cpu()
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)


# --- the commands ---------------------------------------------------------------------------------


def test_two_processes_share_a_card(tmp_path):
    images = tiny.write_images(tmp_path / "data", images=12)
    flags = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--amp", "off", "--max-steps", "5"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worked(run_cli("train.py", *flags, "--LOG_DIR", tmp_path, "--name", "one", cwd=tmp_path))
    train_py = ROOT / "train.py"
    flags += ["--LOG_DIR", tmp_path, "--name", "two"]
    worked(run_python(*launcher, train_py, *flags, cwd=tmp_path))
    one, two = (tiny.saved(tmp_path / name)["model_state_dict"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4, msg=name)


def test_a_card_that_is_not_there(tmp_path):
    count = torch.cuda.device_count()
    done = run_cli("train.py", "--gpu-id", str(count), *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(f"error: --gpu-id {count}: ")


def test_a_full_card_is_explained(tmp_path, images):
    import train

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(InputError, match="the GPU's memory is full with --batch-size 12"):
            train.main(tiny.parse(images, f"--image-size 512 --LOG_DIR {tmp_path} --name full"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
