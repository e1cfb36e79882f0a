"""Sound pictures are read whatever surrounds them; what cannot be used gets its true reason."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import textwrap
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from conftest import run_python
from PIL import EpsImagePlugin, Image, PngImagePlugin

from dataset.base import BadImageError, ImageSet, PathTable
from dataset.check import check
from dataset.decoding import UnfitImageError, central_part, decode, to_rgb, without_metadata
from dataset.facts import examine
from dataset.glance import looks_whole
from dataset.loader import eval_loader, train_loader
from dataset.reading import Reading
from dataset.samplers import SequentialSampler
from dataset.showing import as_text
from dataset.transforms import Views, centre_views, cut
from net import INPUTS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def image_set(*paths: Path) -> ImageSet:
    labels = np.arange(len(paths)) % 2
    return ImageSet("x", "train", labels, ("a", "b"), PathTable(map(str, paths)))


def traits(path: Path) -> tuple[str, ...]:
    facts = examine(str(path))
    assert not facts.fault, facts
    return facts.traits


def png(*chunks: tuple[bytes, bytes], pixels: np.ndarray = PIXELS, damage: bytes = b"") -> bytes:
    """A PNG of 8 or 16 bits with more chunks before its pixels; those called `damage` are wrong."""
    height, width, _ = pixels.shape
    bits = 8 * pixels.itemsize
    lines = b"".join(b"\0" + line.astype(f">u{pixels.itemsize}").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data) ^ (kind == damage)
        found += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return found


# --- metadata -------------------------------------------------------------------------------------

BROKEN_EXIF = [
    b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0no TIFF at all",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x09\xff\xff\xff\xff",
    b"II*\0\x08\0\0\0\x05\0",
    b"",
]


@pytest.mark.parametrize("exif", BROKEN_EXIF)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_pictures_with_broken_exif_are_read(kind: str, exif: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind.lower()}"
    exact = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    image = Image.fromarray(PIXELS)
    image.save(path, kind, **exact)
    plain = decode(path)
    if kind == "TIFF":
        image.save(path, kind, tiffinfo={34665: 10**6, 274: 99})
    elif kind == "PNG":
        path.write_bytes(png((b"eXIf", exif.removeprefix(b"Exif\0\0"))))
    else:
        image.save(path, kind, exif=exif, **exact)
    assert np.array_equal(decode(path), plain)
    assert not examine(str(path)).fault


def test_broken_exif_is_a_note_of_check(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    for number, c in enumerate("abcd"):
        for k, split in enumerate(("train" if c < "c" else "val",) * 2):
            (tmp_path / split / c).mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS + number + 4 * k).save(tmp_path / split / c / f"{k}.png")
    exif = b"Exif\0\0no TIFF at all"
    image.save(tmp_path / "train" / "a" / "x.webp", exif=exif)
    (tmp_path / "train" / "a" / "y.png").write_bytes(png((b"eXIf", exif[6:]), pixels=255 - PIXELS))
    report = check(f"folder:{tmp_path}")
    assert report.exit_status == 0
    (note,) = (finding for finding in report.findings if finding.kind.startswith("damaged"))
    assert note.note and note.count == 2 and "used as they are" in note.meaning


def compressed(text: bytes) -> bytes:
    return zlib.compress(text)


LARGE = b"x" * (3 << 20)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Comment\0\0" + compressed(LARGE)),
        (b"iTXt", b"Comment\0\1\0\0\0" + compressed(LARGE)),
        (b"iCCP", b"profile\0\0" + compressed(LARGE)),
        (b"tEXt", b"Comment\0" + LARGE),
        (b"zTXt", b"Comment\0\0no zlib"),
        (b"tEXt", b"Comment\0wrong checksum"),
        (b"pHYs", b"\0"),
        (b"abCd", b"nobody knows"),
    ],
)
def test_pictures_with_large_or_damaged_chunks_are_read(
    chunk: tuple[bytes, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(chunk, damage=chunk[0] if b"checksum" in chunk[1] else b""))
    assert np.array_equal(decode(path), PIXELS)
    assert np.array_equal(decode(io.BytesIO(path.read_bytes())), PIXELS)
    assert not examine(str(path)).fault


def test_damaged_pixels_stay_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    whole = png((b"zTXt", b"C\0\0" + compressed(LARGE)))
    garbled = whole.replace(whole[-600:-500], bytes(100))
    for content in (garbled, whole[:30], whole[:60], whole[:200], whole[:-700]):
        path.write_bytes(content)
        with pytest.raises(BadImageError):
            image_set(path).read(0)
        assert examine(str(path)).fault == "unreadable or truncated file"


def test_a_jpeg_without_its_metadata_shows_the_same() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(
        buffer, "JPEG", exif=b"Exif\0\0" + b"x" * 100, icc_profile=b"y" * 70_000, comment=b"z"
    )
    bare = without_metadata(buffer.getvalue())
    assert len(bare) < len(buffer.getvalue()) - 70_000
    assert np.array_equal(decode(io.BytesIO(bare)), decode(buffer))  # Adobe's mark is kept
    assert without_metadata(b"GIF89a") is None


@pytest.mark.parametrize("key", ["Raw profile type exif", "XML:com.adobe.xmp", "exif"])
def test_check_and_training_agree_on_what_is_turned(key: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path, data = tmp_path / "x.png", exif.tobytes()
    info = PngImagePlugin.PngInfo()
    if key == "exif":
        Image.fromarray(PIXELS).save(path, exif=exif)
    else:
        text = '<x xmlns:tiff="t" tiff:Orientation="6"/>'
        if key.startswith("Raw"):
            text = f"\nexif\n{len(data):8}\n{data.hex()}\n"
        info.add_itxt(key, text) if key.startswith("XML") else info.add_text(key, text)
        Image.fromarray(PIXELS).save(path, pnginfo=info)
    turned = decode(path).shape == (24, 16, 3)
    assert ("EXIF rotation" in traits(path)) == turned
    assert turned


def test_a_given_picture_is_left_as_it_was() -> None:
    image = Image.fromarray(PIXELS)
    image.info["exif"] = BROKEN_EXIF[0]
    assert np.array_equal(to_rgb(image), PIXELS)
    assert image.info["exif"] == BROKEN_EXIF[0]


# --- what is too large, or has no decoder ---------------------------------------------------------


def test_a_picture_of_200_million_pixels_is_too_large_and_not_damaged(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    header = struct.pack(">IIBBBBB", 20_000, 10_000, 1, 0, 0, 0, 0)
    head = (
        struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + png()[33:])
    with pytest.raises(BadImageError, match="more than the limit of 179 million"):
        image_set(path).read(0)
    facts = examine(str(path))
    assert facts.fault == "picture that cannot be used as it is" and "smaller" in facts.error


@pytest.mark.parametrize("start", [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"])
def test_a_file_of_300_gigabytes_is_not_read_whole(start: bytes, tmp_path: Path) -> None:
    """It takes no room on the disk, nor in an archive, and all of it would go into memory."""
    path = tmp_path / "x.jpg"
    path.write_bytes(start)
    os.truncate(path, 300 * 10**9)
    words = "its 300 GB are more than the limit of 4.3 GB"
    with pytest.raises(BadImageError, match=words):
        image_set(path).read(0)
    facts = examine(str(path))
    assert facts.fault == "picture that cannot be used as it is" and words in facts.error


def test_commands_read_odd_pictures_without_a_word_from_pillow(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png((b"eXIf", BROKEN_EXIF[2][6:])))
    script = (
        "import door; door.enter()\n"
        "from PIL import Image; from dataset.decoding import decode; import sys\n"
        f"Image.MAX_IMAGE_PIXELS = {PIXELS[..., 0].size - 1}; decode(sys.argv[1])"
    )
    (tmp_path / "reading.py").write_text(script)
    done = run_python(tmp_path / "reading.py", path)
    assert (done.returncode, done.stderr) == (0, "")


def ftyp(*brands: bytes) -> bytes:
    size = 8 + 4 * (len(brands) + 1)
    return struct.pack(">I", size) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:]) + b"meta"


def without_decoder(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Makes Pillow forget some formats."""
    kept = {suffix: kind for suffix, kind in Image.EXTENSION.items() if kind not in kinds}
    monkeypatch.setattr(Image, "EXTENSION", kept)
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind not in kinds])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.heic", ftyp(b"heic", b"mif1", b"heic"), "HEIC pictures need pillow-heif"),
        ("x.jpg", ftyp(b"mif1", b"heix"), "pip install pillow-heif"),
        ("x.HIF", b"something", "HEIC pictures need pillow-heif"),
        ("x.jxl", b"\xff\x0a" + bytes(20), "JPEG XL pictures need pillow-jxl-plugin"),
        ("x.png", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "JPEG XL pictures need"),
        ("x.png", b"<?xml version='1.0'?>\n<svg></svg>", "SVG pictures have no pixels"),
        ("x.jpg", POSTSCRIPT, "PostScript pictures have no pixels"),
        ("x.eps", b"\xc5\xd0\xd3\xc6" + bytes(30), "PostScript pictures have no pixels"),
    ],
)
def test_formats_without_a_decoder_are_called_by_name(
    name: str, content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_decoder(monkeypatch, "HEIF", "JXL", "JPEG XL")  # where plugins are installed
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadImageError, match=words):
        image_set(path).read(0)
    facts = examine(str(path))
    assert facts.fault == "picture that cannot be used as it is" and words in facts.error


def test_no_other_program_is_started_for_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow has Ghostscript do what an EPS file says, and any file may be one."""
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\necho $@ >> {started}\necho 10.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # is looked for once
    path = tmp_path / "x.jpg"
    path.write_bytes(POSTSCRIPT)
    for read in (decode, examine, looks_whole, lambda path: image_set(Path(path)).read(0)):
        with contextlib.suppress(OSError, ValueError):
            read(str(path))
    assert not started.exists()


def test_avif_is_called_by_name_where_pillow_lacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.avif"
    path.write_bytes(ftyp(b"avif", b"mif1", b"miaf"))
    without_decoder(monkeypatch, "AVIF", "HEIF")
    with pytest.raises(
        UnfitImageError,
        match=r"AVIF pictures need Pillow 11\.3 or newer, or pillow-avif-plugin; `pip install --up",
    ):
        decode(path)


def test_a_damaged_file_of_a_known_format_is_damaged(tmp_path: Path) -> None:
    for name, content in (("x.jpg", b"no picture"), ("x.png", b"\x89PNG"), ("x.bmp", b"BMx")):
        (tmp_path / name).write_bytes(content)
        assert examine(str(tmp_path / name)).fault == "unreadable or truncated file"


def test_pillow_heif_is_registered_where_it_is_installed(tmp_path: Path) -> None:
    (tmp_path / "pillow_heif.py").write_text(
        textwrap.dedent(
            """
            from PIL import Image, ImageFile

            class Heif(ImageFile.ImageFile):
                format = "HEIF"

                def _open(self):
                    self._mode, self._size = "RGB", (3, 2)
                    self.tile = [ImageFile._Tile("raw", (0, 0, 3, 2), 16, ("RGB", 0, 1))]

            def register_heif_opener():
                Image.register_open("HEIF", Heif, lambda head: head[4:12] == b"ftypheic")
                Image.register_extension("HEIF", ".heic")
            """
        )
    )
    (tmp_path / "x.heic").write_bytes((ftyp(b"heic") + bytes(16))[:16] + bytes(range(18)))
    script = "import sys; from dataset.base import decode; print(decode(sys.argv[1]).tolist())"
    (tmp_path / "reading.py").write_text(script)  # beside the plugin, which it so finds
    done = run_python(tmp_path / "reading.py", tmp_path / "x.heic")
    assert done.returncode == 0, done.stderr
    assert np.array(json.loads(done.stdout)).ravel().tolist() == list(range(18))


# --- deep pictures --------------------------------------------------------------------------------

GREY = PIXELS[..., 0]


@pytest.mark.parametrize(
    ("values", "expected", "said"),
    [
        (GREY.astype(np.uint16) * 256 + 9, GREY, "16-bit"),
        (GREY.astype(np.uint16) * 16 + 9, GREY, "8 or 12 bits in a deeper"),
        (GREY.astype(np.uint16), GREY, "8 or 12 bits in a deeper"),
        (GREY.astype(np.int32), GREY, "8 or 12 bits in a deeper"),
        (GREY.astype(np.int32) * 256, GREY, "32-bit"),
        (GREY.astype(np.uint16) * 0, GREY * 0, "8 or 12 bits in a deeper"),
    ],
)
@pytest.mark.parametrize("suffix", [".tif", ".png"])  # 32 bits go into a TIFF alone
def test_values_are_scaled_by_the_bits_they_need(
    values: np.ndarray, expected: np.ndarray, said: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"x{'.tif' if values.dtype == np.int32 else suffix}"
    Image.fromarray(values).save(path)
    assert np.array_equal(decode(path)[..., 1], expected)
    assert {"grey", said} == set(traits(path))


@pytest.mark.parametrize("values", [GREY.astype(np.int32) - 1000, GREY.astype(np.int32) << 16])
def test_values_without_an_agreed_white_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(UnfitImageError, match="no agreed black and white"):
        decode(tmp_path / "x.tif")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "f.tif")
    for name in ("x.tif", "f.tif"):
        assert examine(str(tmp_path / name)).fault == "picture that cannot be used as it is"


def test_colours_of_12_bits_in_16_are_refused_and_of_16_taken(tmp_path: Path) -> None:
    deep = PIXELS.astype(np.uint16)
    (tmp_path / "16.png").write_bytes(png(pixels=deep * 256 + 77))
    assert np.array_equal(decode(tmp_path / "16.png"), PIXELS)
    assert traits(tmp_path / "16.png") == ("16-bit",)
    for factor in (1, 16):
        (tmp_path / "12.png").write_bytes(png(pixels=deep * factor))
        with pytest.raises(UnfitImageError, match="would be black; save it with 8 bits"):
            decode(tmp_path / "12.png")
    black = png(pixels=np.zeros((4, 4, 3), np.uint8))
    assert not decode(io.BytesIO(black)).any()


# --- extreme shapes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kept", "first"),
    [
        ((1, 3000), (1, 32), 1484),
        ((3000, 1), (32, 1), 1484),
        ((2, 65), (2, 64), 0),
        ((2, 64), (2, 64), 0),
        ((64, 2), (64, 2), 0),
        ((10, 10), (10, 10), 0),
    ],
)
def test_of_extreme_shapes_the_centre_is_kept(
    shape: tuple[int, int], kept: tuple[int, int], first: int
) -> None:
    pixels = np.arange(shape[0] * shape[1] * 3).reshape(*shape, 3)
    part = central_part(pixels)
    assert part.shape == (*kept, 3)
    assert part[0, 0, 0] == first * 3


def test_extreme_shapes_cost_no_memory_anywhere(tmp_path: Path) -> None:
    spec = INPUTS["imagenet"]
    paths = [tmp_path / name for name in ("wide.png", "high.png", "plain.png", "line.png")]
    for path, size in zip(paths, [(3000, 1), (2, 60_000), (40, 30), (40_000, 1)], strict=True):
        Image.new("RGB", size, (200, 40, 90)).save(path)
    images = image_set(*paths)
    options = {"spec": spec, "device": torch.device("cpu"), "workers": 0}
    tracemalloc.start()
    exact = list(eval_loader(images, batch_size=4, **options))
    cached = list(
        eval_loader(
            images, batch_size=4, reading=Reading("cache", cache_dir=tmp_path / "c"), **options
        )
    )
    for augment in ("crop", "sec"):
        sampler = SequentialSampler(4, 4)
        list(train_loader(images, sampler, augment=augment, seed=0, **options))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(exact[0].images, cached[0].images)
    flat = exact[0].images.flatten(2)
    assert (flat.std(dim=2) < 1e-3).all() and torch.allclose(flat[0].mean(1), flat[2].mean(1))
    kept = sum(file.stat().st_size for file in (tmp_path / "c").rglob("*.pixels"))
    assert kept < 3 * 256 * 256 * 33 * 4
    assert peak < 200 << 20
    report_kind = "shape more than 32 times as long as wide"
    assert examine(str(paths[0])).size == (3000, 1)
    for c in "abcd":
        (tmp_path / "f" / ("train" if c < "c" else "val") / c).mkdir(parents=True)
        for k in range(2):
            shade = (ord(c), 40 * k, 7)
            Image.new("RGB", (640 if c == "a" and k else 20, 20), shade).save(
                tmp_path / "f" / ("train" if c < "c" else "val") / c / f"{k}.png"
            )
    assert check(f"folder:{tmp_path / 'f'}").status == "clean"
    Image.new("RGB", (700, 20)).save(tmp_path / "f" / "train" / "a" / "long.png")
    report = check(f"folder:{tmp_path / 'f'}")
    assert [f.kind for f in report.findings] == [report_kind] and report.exit_status == 1
    assert "only the centre" in as_text(report)


# --- beside the loaders of published code ---------------------------------------------------------


def as_published(path: Path) -> np.ndarray:
    """What `Image.open(path).convert("RGB")` gives: how the released programs read a file."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def saved(path: Path, image: Image.Image, **how: object) -> Path:
    image.save(path, **how)
    return path


def test_files_of_the_benchmarks_kinds_are_read_as_published_code_reads_them(
    tmp_path: Path,
) -> None:
    image = Image.fromarray(PIXELS)
    files = [saved(tmp_path / f"{mode}.jpg", image.convert(mode)) for mode in ("RGB", "L", "CMYK")]
    files += [saved(tmp_path / f"{mode}.png", image.convert(mode)) for mode in ("RGB", "P", "1")]
    for path in files:
        assert np.array_equal(decode(path), as_published(path)), path.name


def test_transparency_is_laid_on_white_where_published_code_drops_it(tmp_path: Path) -> None:
    clear = np.dstack([PIXELS, np.zeros(PIXELS.shape[:2], np.uint8)])
    path = saved(tmp_path / "x.png", Image.fromarray(clear))
    assert (decode(path) == 255).all()
    assert np.array_equal(as_published(path), PIXELS)


def keyed_png(bits: int, levels: list[int], transparent: int, colour: bool = False) -> bytes:
    """A PNG of one row, grey or `colour`, whose samples have so many bits; one is transparent."""
    channels = 3 if colour else 1
    bytes_ = np.repeat(np.array(levels, ">u2"), channels).view(np.uint8).reshape(-1, 2)
    line = np.packbits(np.unpackbits(bytes_, axis=1)[:, 16 - bits :])
    header = struct.pack(">IIBBBBB", len(levels), 1, bits, 2 if colour else 0, 0, 0, 0)
    key = struct.pack(">H", transparent) * channels
    found = b"\x89PNG\r\n\x1a\n"
    chunks = ((b"IHDR", header), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + line.tobytes())))
    for kind, data in (*chunks, (b"IEND", b"")):
        found += (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )
    return found


@pytest.mark.parametrize(
    ("bits", "colour"),
    [(1, False), (2, False), (4, False), (8, False), (16, False), (8, True), (16, True)],
)
def test_a_transparent_colour_is_laid_on_white_however_many_bits_it_has(bits: int, colour: bool):
    most = 2**bits - 1
    third = most // 3 + (bits == 16)  # whose two bytes differ
    for transparent in (0, most, third):
        levels = [0, third, most, 2 * most // 3]
        seen = decode(io.BytesIO(keyed_png(bits, levels, transparent, colour)))
        wanted = [255 if level == transparent else 255 * level // most for level in levels]
        assert seen.tolist() == [[[level] * 3 for level in wanted]]


def test_deep_grey_is_scaled_where_published_code_cuts_it_off(tmp_path: Path) -> None:
    grey = PIXELS[..., :1].repeat(3, axis=2)
    path = saved(tmp_path / "x.png", Image.fromarray(grey[..., 0].astype(np.uint16) * 256))
    assert np.array_equal(decode(path), grey)
    assert np.array_equal(as_published(path), np.where(grey, 255, 0))


def test_a_turned_file_can_be_taken_as_published_code_takes_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(PIXELS), exif=turned_right())
    assert decode(path).shape == (24, 16, 3)
    assert np.array_equal(decode(path, upright=False), as_published(path))
    assert examine(str(path)).size == (16, 24) and examine(str(path), False).size == (24, 16)


def turned_right() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_evaluation_cuts_to_the_bit_what_torchvision_cuts(tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (375, 500, 3), np.uint8)
    theirs = T.CenterCrop(224)(T.Resize(256)(Image.fromarray(pixels)))
    views = centre_views(np.array([pixels.shape[:2]]), 256, 224)
    assert np.array_equal(cut(pixels, views, 0, 224).numpy(), np.asarray(theirs))


def test_training_crops_are_within_a_level_of_torchvisions_bilinear_ones() -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (375, 500, 3), np.uint8)
    for box in ((30, 40, 200, 260), (0, 0, 370, 480), (100, 7, 90, 120)):
        theirs = T.functional.resized_crop(Image.fromarray(pixels), *box, (224, 224))
        views = Views(0, np.array([box]), np.array([False]))
        ours = cut(pixels, views, 0, 224).numpy().astype(int)
        assert np.abs(ours - np.asarray(theirs)).max() <= 1


def test_a_file_cut_short_is_said_to_be_cut_short_by_check_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.jpg", Image.fromarray(PIXELS), quality=95)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadImageError, match="truncated"):
        image_set(path).read(0)
    assert "truncated" in examine(str(path)).error
    with path.open("rb") as file:
        with pytest.raises(OSError, match="truncated"):
            decode(file)
        assert not file.closed


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, 32:] = (200, 90, 30)
    Image.fromarray(pixels).save(tmp_path / "phone.HEIC", quality=90)
    found = decode(tmp_path / "phone.HEIC").astype(int)
    assert found.shape == pixels.shape and np.abs(found - pixels).mean() < 6
    assert looks_whole(tmp_path / "phone.HEIC")
    content = (tmp_path / "phone.HEIC").read_bytes()
    (tmp_path / "phone.HEIC").write_bytes(content[: len(content) * 2 // 3])
    assert not looks_whole(tmp_path / "phone.HEIC")
