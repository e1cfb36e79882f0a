"""Names in pictures: long ones, other scripts, and what no font has."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from dataset.base import ImageSet, PathTable
from evaluation import lettering, pictures
from evaluation.lettering import Lettering
from utils import InputError

INK = (0, 0, 0)


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch):
    """A machine without any font but Pillow's own."""
    monkeypatch.setattr(lettering, "FOLDERS", ())
    for cache in (lettering.font_of, lettering.font_files):
        cache.cache_clear()
    yield
    for cache in (lettering.font_of, lettering.font_files):
        cache.cache_clear()


def drawn(letters: Lettering, text: str) -> bytes:
    canvas = Image.new("RGB", (300, 30), "white")
    letters.draw(canvas, (2, 2), text, INK)
    return canvas.tobytes()


def test_what_no_font_has_is_written_as_its_escape(no_fonts):
    letters = Lettering(13)
    assert letters.written("tea 茶") == "tea \\u8336"
    assert letters.written("plain") == "plain" and letters.written("a\x1b") == "a\\x1b"


def test_two_names_of_another_script_look_different():
    letters = Lettering(13)
    for one, other in (("日本", "本日"), ("зелёный", "красный"), ("crème", "creme")):
        assert drawn(letters, letters.written(one)) != drawn(letters, letters.written(other))


def test_a_line_of_english_is_set_as_its_font_sets_it():
    letters, plain = Lettering(13), ImageFont.load_default(size=13)
    for text in ("nearest right: place 7", "AVAVAVAV To", "IMG 5 0.jpg"):
        assert letters.length(text) == plain.getlength(text)
        drawn_at_once = Image.new("RGB", (300, 30), "white")
        ascent = plain.getmetrics()[0]
        ImageDraw.Draw(drawn_at_once).text((2, 2 + ascent), text, INK, font=plain, anchor="ls")
        assert drawn(letters, text) == drawn_at_once.tobytes(), text


@pytest.mark.skipif(not lettering.font_files(), reason="needs a font in a usual folder")
def test_letters_that_pillows_font_lacks_come_from_another():
    plain = ImageFont.load_default(size=13)
    assert lettering.font_of("a", 13).getname() == plain.getname()
    found = lettering.font_of("я", 13)
    assert found is None or found.getname() != plain.getname()


@pytest.mark.parametrize(
    "name", ["a" * 90, "one two three four five six seven", "under_scored_names_go_on_and_on", "x"]
)
def test_names_are_wrapped_to_their_width(name):
    letters = Lettering(11)
    lines = letters.wrapped(name, 90, 2)
    assert 1 <= len(lines) <= 2 and all(letters.length(line) <= 90 for line in lines)
    whole = "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert whole or lines[-1].endswith("…")
    file = f"folder/{name}_0012.jpg"
    end = letters.end_of(file, 60)
    assert end.endswith("12.jpg") and letters.length(end) <= 60
    if end != file:  # one letter more has no room
        assert letters.length("…" + file[-len(end) :]) > 60
    assert letters.end_of(file, 1) == "…" and letters.end_of(file, 9000) == file


def test_marks_stay_with_the_letter_they_stand_on():
    assert list(lettering.clusters("e\u0301a")) == ["e\u0301", "a"]
    family = "\U0001f469\u200d\U0001f467"
    assert list(lettering.clusters(f"{family}!")) == [family, "!"]


def images(names: tuple[str, ...], file: str) -> ImageSet:
    pixels = np.full((12, 40, 50, 3), 200, np.uint8)
    labels = np.arange(12) % len(names)
    paths = PathTable(f"photos/{file}{i:03d}.jpg" for i in range(12))
    return ImageSet("x", "eval", labels, names, paths, pixels=pixels)


def below_pictures(picture: Image.Image) -> np.ndarray:
    """The part of a sheet between its first row of pictures and the next, as pixels."""
    top = pictures.LEGEND + pictures.NAMED_CELL + 2
    left = pictures.EDGE + pictures.NAMED_NAME + pictures.NAMED_CELL + pictures.AFTER_QUERY
    return np.asarray(picture)[top : top + 50, left:]


def test_every_picture_has_its_cosine_its_class_and_its_file_below():
    queries, found = np.array([0, 1]), np.array([[2, 3, 4], [5, 6, 7]])
    cosines = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]])

    def sheet(**changed) -> np.ndarray:
        given = {"names": ("cup", "pot"), "file": "a", "cosines": cosines} | changed
        shown = images(given["names"], given["file"])
        return below_pictures(
            pictures.neighbours_picture(shown, queries, found, None, "", cosines=given["cosines"])
        )

    plain = sheet()
    assert (plain < 128).any()
    for changed in ({"names": ("cup", "jar")}, {"file": "b"}, {"cosines": cosines - 0.05}):
        assert (sheet(**changed) != plain).any(), changed
    compact = pictures.neighbours_picture(images(("cup", "pot"), "a"), queries, found)
    named = pictures.neighbours_picture(
        images(("cup", "pot"), "a"), queries, found, None, "", cosines=cosines
    )
    assert compact.width < named.width and compact.height < named.height


def test_a_row_says_at_which_place_the_right_image_stands():
    shown, found = images(("cup", "pot"), "a"), np.array([[1, 2, 3]])
    drawn = [
        np.asarray(
            pictures.neighbours_picture(
                shown, np.array([0]), found, None, "", cosines=np.ones((1, 3)), notes=[note]
            )
        )
        for note in ("nearest right: place 7", "nearest right: place 812")
    ]
    apart = (drawn[0] != drawn[1]).any(axis=(0, 2))
    assert apart.any() and np.flatnonzero(apart).max() < pictures.EDGE + pictures.NAMED_NAME


def test_answers_to_pictures_of_ones_own_have_names_below():
    shown = images(("cup", "日本酒 with a long name that goes on"), "a")
    queries = shown.subset(np.arange(2))
    notes = np.array([["0.912", "0.833"], ["0.7", "0.6"]])
    sheet = pictures.contact_sheet(queries, np.array([[1, 2], [3, 4]]), notes, shown)
    step = pictures.NAMED_CELL + pictures.GAP
    assert sheet.height > 2 * (step + 50)
    assert (below_pictures(sheet) < 128).any()


def test_a_sheet_that_nothing_opens_is_refused():
    shown = images(("cup", "pot"), "a")
    queries, found = shown.subset(np.zeros(600, int)), np.ones((600, 200), int)
    said = r"a picture of 600 queries with 200 images each has [\d,]+ × [\d,]+ pixels, more than"
    with pytest.raises(InputError, match=said):
        pictures.contact_sheet(queries, found, np.full(found.shape, "0.5"), shown)
