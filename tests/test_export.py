"""Exported networks and `load_run` give what evaluation gives."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import SMALL, refusal, run_cli, run_python
from PIL import Image

import dataset
import net
import net.__main__ as command
from dataset.augment import Shrunk
from dataset.transforms import to_network
from net import export, load_run
from utils import InputError

# What the tests do to look at a file of TorchScript; the command itself is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")


def write_blobs(folder: Path, count: int) -> list[Path]:
    """Pictures of several shapes and modes, one of them turned by EXIF."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    paths = [folder / f"{k}.{'jpg' if k % 2 else 'png'}" for k in range(count)]
    for k, path in enumerate(paths):
        image = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = image.resize((50 + 7 * k, 40)).convert("L" if k == 2 else "RGB")
        exif = Image.Exif()
        exif[0x0112] = 6 if k == 1 else 1
        image.save(path, exif=exif)
    return paths


# --- the graph ------------------------------------------------------------------------------------

NETWORKS = {
    "disentangled": {"heads": ("embedding", "specific")},
    "introspective": {"heads": ("embedding", "uncertainty"), "head_norm": True},
    "masks": {"masks": "sum", "bn_freeze": "1"},
    "white": {"input_spec": "white", "pooling": "grid"},
    "bgr": {"input_spec": "caffe", "pooling": "avg"},
}


def make(model: str, masks: str | None = None, **more: object) -> net.EmbeddingNet:
    torch.manual_seed(0)
    laid = None
    if masks is not None:
        laid = net.EmbeddingMasks(8, init="normal", full=masks)
        laid.split()
    width = {} if model == "bn_inception" else {"width": 0.125}
    network = net.build(net.Architecture(model, 8, stem="small", **width, **more), masks=laid)
    for module in network.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def evaluated(network: net.EmbeddingNet, images: torch.Tensor, zoom: float) -> torch.Tensor:
    """Embeddings as evaluation makes them, of pixels (B, 3, S, S) in 0..255."""
    shrunk = None if zoom == 1 else Shrunk(zoom)
    with torch.no_grad():
        raw = network.embed(to_network(images, network.input, shrunk, np.empty((len(images), 0))))
    return torch.nn.functional.normalize(raw, dim=1)


@pytest.mark.parametrize("zoom", [1.0, 0.8])
@pytest.mark.parametrize("name", NETWORKS)
def test_torchscript_gives_what_evaluation_gives(name, zoom, tmp_path):
    network = make("resnet10", **NETWORKS[name])
    file = tmp_path / "net.pt"
    assert export.export_torchscript(export.Graph(network, 32, zoom), file) < 1e-5
    loaded = torch.jit.load(file)
    for count in (1, 4):
        images = torch.rand(count, 3, 32, 32) * 255
        expected = evaluated(network, images, zoom)
        assert expected.shape == (count, 8)
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_of_torch_export_gives_what_evaluation_gives(name, tmp_path):
    network = make("resnet10", **NETWORKS[name])
    file = tmp_path / "net.pt2"
    assert export.export_program(export.Graph(network, 32, 0.8), file, "RGB") < export.TOLERANCE
    said = {"input": ""}
    loaded = torch.export.load(file, extra_files=said).module()
    assert said == {"input": "RGB"}
    for count in (1, 4):
        images = torch.rand(count, 3, 32, 32) * 255
        expected = evaluated(network, images, 0.8)
        torch.testing.assert_close(loaded(images), expected, rtol=0, atol=1e-4)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("model", "name", "zoom"),
    [
        ("resnet10", "disentangled", 0.8),
        pytest.param("resnet50", "introspective", 1.0, marks=pytest.mark.slow),
        pytest.param("bn_inception", "masks", 1.0, marks=pytest.mark.slow),
        pytest.param("bn_inception", "bgr", 1.0, marks=pytest.mark.slow),
    ],
)
def test_onnx_gives_what_evaluation_gives(model, name, zoom, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    network = make(model, **NETWORKS[name])
    file = tmp_path / "net.onnx"
    assert export.export_onnx(export.Graph(network, 32, zoom), file, "RGB") < 1e-4
    onnx.checker.check_model(str(file))
    assert {each.key: each.value for each in onnx.load(file).metadata_props}["input"] == "RGB"
    session = runtime.InferenceSession(file)
    for count in (1, 4):
        images = torch.rand(count, 3, 32, 32) * 255
        (found,) = session.run(["embeddings"], {"images": images.numpy()})
        expected = evaluated(network, images, zoom)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    assert list(tmp_path.iterdir()) == [file]


def test_an_onnxscript_that_is_too_old_for_torch_is_named(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)

    def exported(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript._framework_apis.torch_9_9'")

    monkeypatch.setattr(torch.onnx, "export", exported)
    with pytest.raises(InputError, match=r"not go with torch .*pip install --upgrade onnxscript"):
        export.export_onnx(export.Graph(make("resnet10"), 32), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_not_written(tmp_path):
    graph = export.Graph(make("resnet10"), 32)
    for wrong in (lambda x: graph(x) + 2e-4, lambda x: graph(x) * torch.nan):
        with pytest.raises(InputError, match="differ"):
            export.write_checked(graph, wrong, b"", tmp_path / "net.pt", "it")
    assert not list(tmp_path.iterdir())


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on files, with a batch of its own to look at: a folder with run, images, .npz."""
    root = tmp_path_factory.mktemp("export")
    images = tiny.write_images(root / "data")
    run = tiny.run(images, root, "run", "--epochs 2 --warm 0 --amp off --disent True --be 1")
    flags = ["--amp", "off", "--export", str(root / "e.npz"), "--workers", "0"]
    done = run_cli("evaluate.py", "--resume", tiny.best_checkpoint(run), *flags, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def test_load_run_repeats_the_embeddings_of_an_evaluation(trained):
    exported = np.load(trained / "e.npz")
    paths = exported["paths"].tolist()
    embed = load_run(trained / "run", device="cpu", amp="off")
    found = embed(paths)
    assert found.dtype == np.float32 and found.shape == exported["embeddings"].shape == (24, 8)
    np.testing.assert_allclose(found, exported["embeddings"], atol=1e-6)
    assert np.abs(found - found[0]).max() > 1e-2  # they are not all the same
    opened = [Image.open(path) for path in paths]
    np.testing.assert_allclose(embed([opened[0], Path(paths[1])]), found[:2], atol=1e-5)
    np.testing.assert_allclose(embed(opened[2]), found[2:3], atol=1e-5)
    assert embed([]).shape == (0, 8)
    checkpoint = load_run(tiny.best_checkpoint(trained / "run"), device="cpu", amp="off")
    np.testing.assert_array_equal(checkpoint(paths), found)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        pytest.param(
            {"device": "cuda"},
            "device cuda: this machine has no GPU that torch can use; use cpu, or leave it out",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"device": "gpu"}, "device gpu: torch cannot use it here .*; use cpu, or leave it out"),
        (
            {"device": "cpu", "amp": "fp16"},
            r"fp16 needs a GPU; on a CPU use bf16 or off \(--amp, in Python amp=\)",
        ),
        (
            {"device": "cpu", "amp": "fp32"},
            r"precision fp32 is unknown; use auto, bf16, fp16, off \(amp=\)",
        ),
        ({"device": "cpu", "dims": 9}, "9 dimensions cannot be taken .* choose 1 to 8"),
        ({"device": "cpu", "weights": "mean"}, "weights 'mean' is unknown; use ema, raw"),
        ({"device": "cpu", "whiten": 99}, "whitening to 99 numbers: the .*; choose 1 to [1-8]"),
    ],
)
def test_load_run_names_the_argument_that_it_cannot_take(trained, asked, said):
    with pytest.raises(InputError, match=f"^{said}$"):
        load_run(trained / "run", **asked)


def test_pictures_are_turned_upright_and_stay_as_they_are(trained, tmp_path):
    paths = write_blobs(tmp_path / "blobs", 4)
    embed = load_run(trained / "run", device="cpu", amp="off")
    opened = [Image.open(path) for path in paths]
    before = [image.size for image in opened]
    np.testing.assert_allclose(embed(paths), embed(opened), atol=1e-5)
    assert [image.size for image in opened] == before
    assert embed(paths[0].with_suffix(".png")).shape == (1, 8)


def test_an_exported_run_agrees_with_load_run(trained, tmp_path):
    pytest.importorskip("onnxscript")
    onnx, script, program = (tmp_path / f"net.{kind}" for kind in ("onnx", "pt", "pt2"))
    flags = ("--onnx", onnx, "--torchscript", script, "--torch-export", program)
    done = run_python("-m", "net", "export", trained / "run", *flags)
    assert done.returncode == 0, done.stderr
    for who in ("onnxruntime", "TorchScript", "torch.export"):
        assert f"{who} and torch differ by" in done.stdout
    assert "0..255" in done.stdout and "has deprecated TorchScript" in done.stdout
    assert done.stderr == "" and len(done.stdout.splitlines()) == 5
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    images = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    (found,) = session.run(None, {"images": images})
    embed = load_run(trained / "run", device="cpu", amp="off")
    # Brought to the short side of 37 pixels and cut, a picture is another; 37 is given as it is.
    side = embed.model.resize
    framed = np.zeros((3, side, side, 3), np.uint8)
    corner = round((side - 32) / 2)
    framed[:, corner : corner + 32, corner : corner + 32] = pixels
    expected = embed([Image.fromarray(each) for each in framed])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    traced = torch.jit.load(script)(torch.from_numpy(images))
    np.testing.assert_allclose(traced.numpy(), expected, atol=1e-4)
    exported = torch.export.load(program).module()(torch.from_numpy(images))
    np.testing.assert_allclose(exported.numpy(), expected, atol=1e-4)
    # The note is enough to prepare a product that was cut out.
    note = session.get_modelmeta().custom_metadata_map["input"]
    assert "EXIF" in note and "transparency laid on white" in note and "central 32" in note
    cut_out = Image.new("RGBA", (60, 45), (250, 30, 20, 0))
    cut_out.paste((30, 90, 200, 255), (25, 10, 40, 35))
    seen = Image.alpha_composite(Image.new("RGBA", cut_out.size, "white"), cut_out).convert("RGB")
    seen = seen.resize((int(60 * side / 45), side), Image.Resampling.BILINEAR)
    left, top = round((seen.width - 32) / 2), round((seen.height - 32) / 2)
    seen = np.asarray(seen.crop((left, top, left + 32, top + 32)), np.float32)
    (found,) = session.run(None, {"images": seen.transpose(2, 0, 1)[None]})
    np.testing.assert_allclose(found, embed(cut_out), atol=1e-4)


@pytest.mark.slow
def test_drawings_are_seen_as_the_embedded_set_is(session_workdir):
    flags = "--loss AMLoss --max-steps 2 --name drawn --eval-zoom 0.9 --metrics retrieval --amp off"
    done = run_cli("train.py", *SMALL, *flags.split(), cwd=session_workdir)
    assert done.returncode == 0, done.stderr
    run = session_workdir / "logs" / "drawn"
    flags = ["--amp", "off", "--metrics", "retrieval", "--export", "drawn.npz"]
    done = run_cli(
        "evaluate.py", "--resume", tiny.best_checkpoint(run), *flags, cwd=session_workdir
    )
    assert done.returncode == 0, done.stderr
    images = dataset.load("emoji", session_workdir / "data", "eval")
    pictures = [Image.fromarray(images.pixels[k]) for k in range(40)]
    embed = load_run(run, device="cpu", amp="off")
    exported = np.load(session_workdir / "drawn.npz")["embeddings"][:40]
    np.testing.assert_allclose(embed(pictures), exported, atol=1e-5)
    wide = Image.new("RGB", (128, 64), "white")
    wide.paste(pictures[0], (32, 0))
    assert embed([wide]).shape == (1, 16)
    graph = export.Graph(embed.model.network, 64, embed.model.viewing.zoom)
    pixels = torch.from_numpy(images.pixels[:40]).permute(0, 3, 1, 2).float()
    np.testing.assert_allclose(graph(pixels).numpy(), exported, atol=1e-5)


# --- faults ---------------------------------------------------------------------------------------


def test_what_cannot_be_opened_is_one_sentence(trained, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_run(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="holds no checkpoint"):
        load_run(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    embed = load_run(trained / "run")
    for name in ("text.png", "away.png"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            embed(tmp_path / name)


def test_pictures_may_be_arrays_and_files_in_memory(trained, tmp_path):
    embed = load_run(trained / "run", device="cpu", amp="off")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")  # and it stands at its end now
    (tmp_path / "picture.png").write_bytes(file.getvalue())
    expected = embed(tmp_path / "picture.png")
    with (tmp_path / "picture.png").open("rb") as opened:
        given = [pixels, Image.fromarray(pixels), file, file.getvalue(), opened]
        assert all(np.array_equal(embed(picture), expected) for picture in given)
        np.testing.assert_allclose(embed(given), np.repeat(expected, 5, axis=0), atol=1e-6)
    stacked = embed(np.stack([pixels] * 2))
    np.testing.assert_allclose(stacked, np.repeat(expected, 2, axis=0), atol=1e-6)
    grey = embed(Image.fromarray(pixels[..., 0]))
    assert np.array_equal(embed(pixels[..., 0]), grey)
    assert np.array_equal(embed(pixels[..., :1]), grey)


@pytest.mark.parametrize(
    "picture",
    [
        np.full((8, 8, 3), 0.123456789),
        np.full((3, 8, 8), 123, np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        torch.full((3, 8, 8), 123),
        b"123, 123, 123",
        io.BytesIO(b"123, 123, 123"),
        None,
    ],
    ids=lambda picture: type(picture).__name__,
)
def test_what_is_no_picture_is_named_without_its_pixels(picture, trained):
    embed = load_run(trained / "run", device="cpu", amp="off")
    with pytest.raises(InputError, match="picture 2 cannot be read") as raised:
        embed([np.zeros((8, 8, 3), np.uint8), picture])
    assert "123" not in str(raised.value) and len(str(raised.value)) < 300


def test_missing_packages_and_targets_are_status_2(trained, tmp_path, monkeypatch, capsys):
    file = tmp_path / "net.onnx"
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for flags, words in (
        (["--onnx", str(file)], ["--onnx needs onnxscript", "pip install onnxscript"]),
        ([], ["--onnx FILE", "--torchscript FILE"]),
    ):
        said = refusal(capsys, command.main, ["export", str(trained / "run"), *flags])
        assert all(word in said for word in words)
    assert not file.exists()


def test_unknown_names_in_net_are_reported():
    with pytest.raises(AttributeError, match="no attribute 'lode_run'"):
        net.lode_run  # noqa: B018


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_a_run_stands_on_its_own_when_its_photographs_are_gone(tmp_path, monkeypatch, kind):
    images = tiny.write_images(tmp_path / "photos")
    data = f"folder:{images}"
    if kind == "csv":
        rows = [f"{p},{p.parent.name},{p.parent.parent.name}" for p in images.rglob("*.png")]
        (tmp_path / "photos.csv").write_text("\n".join(["path,label,split", *sorted(rows)]))
        data = f"csv:{tmp_path / 'photos.csv'}"
    flags = ("--dataset", data, *tiny.NETWORK, "--epochs", "1", "--seed", "2")
    done = run_cli("train.py", *flags, "--LOG_DIR", tmp_path, "--name", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "elsewhere").mkdir()
    picture = shutil.copy(next(images.rglob("eval1/*.png")), tmp_path / "elsewhere" / "own.png")
    before = load_run(tmp_path / "run")([picture])
    shutil.rmtree(images)
    (tmp_path / "photos.csv").unlink(missing_ok=True)
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for path in ("moved", moved, next(moved.glob("*_best.pth")), moved / "last.pth"):
        assert load_run(path)([picture]).shape == (1, 8)
    assert np.array_equal(load_run("moved")([picture]), before)
    exported = run_python(
        *("-m", "net", "export", "moved", "--torchscript", "m.pt"), cwd=tmp_path / "elsewhere"
    )
    assert exported.returncode == 0, exported.stderr
    lonely = Path(shutil.copy(next(moved.glob("*_best.pth")), "one file.pth"))
    shutil.rmtree(moved)
    assert np.array_equal(load_run(lonely)([picture]), before)
