"""search.py serve: what the server answers and refuses, and the page in a browser."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from conftest import ROOT, refusal, start_python
from PIL import Image, ImageOps
from programs import Program

import search
from evaluation.thresholds import Rate, Thresholds
from index import Index
from serving import guards, handler, pictures
from serving.api import Api
from serving.gallery import Gallery
from serving.pictures import Crop
from serving.server import MOST_CONNECTIONS, Server

EVIL = "<script>alert(1)<∕script>"  # a file name has no slash
RATES = {name: Rate(0.01) for name in ("found_same", "found_different", "false_different")}
LIMITS = Thresholds(0.99, 0.5, false_same=Rate(0.02), **RATES, index_size=22)


class Shop(NamedTuple):
    """A folder with a run, photos and their index."""

    folder: Path
    run: Path
    index: Path

    def photo(self, number: int = 0) -> Path:
        return sorted(self.folder.glob("photos/eval*/*.png"))[number]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    images = tiny.write_images(folder / "images")
    run = tiny.run(images, folder, "run", "--loss AMLoss --epochs 1 --warm 0")
    shutil.move(images / "eval", folder / "photos")
    (folder / "photos" / "eval0").rename(folder / "photos" / EVIL)
    (folder / "photos" / EVIL / "0.png").rename(folder / "photos" / EVIL / f"{EVIL}.png")
    found = Shop(folder, run, folder / "shop.index")
    command = ["build", run, "--images", folder / "photos", "--index", found.index]
    search.main(list(map(str, [*command, "--workers", 0])))
    gone = folder / "photos" / EVIL / f"{EVIL}.png"
    gone.rename(gone.with_suffix(".away"))
    return found


@contextlib.contextmanager
def serving(index: Path) -> Iterator[Server]:
    limit = Image.MAX_IMAGE_PIXELS
    pictures.bound_pixels()
    gallery = Gallery(index)
    with Server("127.0.0.1", 0, Api(gallery), ["shop.example"]) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:  # a test that fails would wait for the thread
            server.shutdown()
            thread.join()
            gallery.close()
            Image.MAX_IMAGE_PIXELS = limit


@pytest.fixture(scope="module")
def server(shop: Shop) -> Iterator[Server]:
    with serving(shop.index) as found:
        yield found


class Answer(NamedTuple):
    status: int
    headers: Any
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> str:
        return self.json["error"]


def port_of(server: Server) -> int:
    return server.server_address[1]


def ask(
    server: Server, path: str, body: bytes | None = None, method: str = "", **headers: str
) -> Answer:
    connection = HTTPConnection("127.0.0.1", port_of(server), timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if body is None else "POST"), path, body, named)
    answer = connection.getresponse()
    found = Answer(answer.status, answer.headers, answer.read())
    connection.close()
    return found


def find(server: Server, body: bytes = b"", **wishes: object) -> Answer:
    query = "&".join(f"{name}={value}" for name, value in wishes.items())
    return ask(server, f"/api/search?{query}", body)


def raw(server: Server, *lines: str, body: bytes = b"", wait: float = 20) -> Answer:
    """What comes back for a request that no library would send; status 0 where nothing does."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=wait) as connection:
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        connection.sendall(head + b"\r\n" + body)
        answer = HTTPResponse(connection)
        try:
            answer.begin()
        except (OSError, HTTPException):
            return Answer(0, {}, b"")
        return Answer(answer.status, answer.headers, answer.read())


def host(server: Server) -> str:
    return f"Host: 127.0.0.1:{port_of(server)}"


def as_bytes(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def alive(server: Server) -> bool:
    return ask(server, "/api/info").status == 200


# --- searching ------------------------------------------------------------------------------------


def test_a_picture_finds_itself_and_what_the_index_finds(shop, server):
    photo = shop.photo(3)
    answer = find(server, photo.read_bytes(), top=5)
    assert answer.status == 200
    found = answer.json["neighbours"]
    index = Index.open(shop.index)
    hits = index.search(index.embedder()(str(photo)), 5)
    assert [one["row"] for one in found] == hits.rows[0].tolist()
    assert [one["cosine"] for one in found] == pytest.approx(hits.scores[0].tolist(), abs=1e-6)
    first = found[0]
    assert (first["name"], first["label"]) == (photo.name, photo.parent.name)
    assert first["cosine"] == pytest.approx(1, abs=1e-5)


def test_without_thresholds_there_is_no_verdict(shop, server, monkeypatch):
    monkeypatch.setattr(Index, "thresholds", None)
    answer = find(server, shop.photo(3).read_bytes(), top=100).json
    assert answer["thresholds"] is None
    assert {one["verdict"] for one in answer["neighbours"]} == {None}


def test_verdicts_are_those_of_the_thresholds(shop, server, monkeypatch):
    monkeypatch.setattr(Index, "thresholds", property(lambda index: LIMITS))
    answer = find(server, shop.photo(3).read_bytes(), top=100).json
    for one in answer["neighbours"]:
        assert one["verdict"] == LIMITS.verdict(one["cosine"])
    assert {one["verdict"] for one in answer["neighbours"]} >= {"same", "unsure"}
    assert answer["thresholds"]["same"] == 0.99 and answer["thresholds"]["false_same"] == 0.02
    assert answer["thresholds"]["doubt"] is None


def test_thresholds_of_few_classes_come_with_a_doubt(server, monkeypatch):
    limits = replace(LIMITS, classes=8)
    monkeypatch.setattr(Index, "thresholds", property(lambda index: limits))
    said = ask(server, "/api/info").json["thresholds"]["doubt"]
    assert said.startswith("Measured on 8 classes alone, these errors are a rough guess")


def test_where_nothing_is_called_same_no_cosine_is_given(shop, server, monkeypatch):
    limits = replace(LIMITS, same=math.inf, false_same=Rate(0.0))
    monkeypatch.setattr(Index, "thresholds", property(lambda index: limits))
    answer = find(server, shop.photo(3).read_bytes(), top=100).json
    assert answer["thresholds"]["same"] is None and answer["thresholds"]["different"] == 0.5
    # But for the very file that was sent.
    first, *others = answer["neighbours"]
    assert (first["name"], first["verdict"], first["same_file"]) == (
        shop.photo(3).name,
        "same",
        True,
    )
    assert {one["verdict"] for one in others} == {"unsure", "different"}
    assert not any(one["same_file"] for one in others)
    part = find(server, shop.photo(3).read_bytes(), top=1, crop="0,0,1,0.9").json["neighbours"]
    assert not part[0]["same_file"]
    assert ask(server, "/api/info").json["thresholds"]["same"] is None


def test_an_entry_is_searched_from_and_leaves_itself_out(shop, server):
    entries = ask(server, "/api/entries?count=200").json["entries"]
    assert len(entries) == 24 and len({entry["row"] for entry in entries}) == 24
    own = entries[7]
    answer = find(server, entry=own["row"], check=own["check"], top=200).json
    assert len(answer["neighbours"]) == 23 and answer["query"]["id"] == own["id"]
    assert own["row"] not in [one["row"] for one in answer["neighbours"]]


def test_a_crop_is_the_picture_cut_there(shop, server):
    left = Image.open(shop.photo(3)).convert("RGB")
    both = Image.new("RGB", (80, 36))
    both.paste(left, (0, 0))
    both.paste(Image.open(shop.photo(20)).convert("RGB"), (40, 0))
    whole = find(server, as_bytes(both), top=24).json["neighbours"]
    cut = find(server, as_bytes(both), top=24, crop="0,0,0.5,1").json["neighbours"]
    alone = find(server, as_bytes(left, "BMP"), top=24).json["neighbours"]
    assert cut == alone != whole
    row = alone[0]["row"]
    uncut = find(server, entry=row, top=24).json["neighbours"]
    part = find(server, entry=row, top=24, crop="0,0,0.5,0.5").json["neighbours"]
    assert {one["row"] for one in part} == {one["row"] for one in uncut}
    assert [one["cosine"] for one in part] != [one["cosine"] for one in uncut]


@pytest.mark.parametrize(
    "crop", ["0.5,0,0.5,1", "0,0,2,1", "nan,0,1,1", "0,0,1", "a,b,c,d", "-1,0,1,1", "inf,0,1,1"]
)
def test_a_crop_that_is_none_is_refused(shop, server, crop):
    answer = find(server, shop.photo(3).read_bytes(), crop=crop)
    assert answer.status == 422 and answer.error.startswith("crop ")


def test_a_crop_holds_at_least_a_pixel():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert Crop(0.6, 0.6, 0.61, 0.61).cut(pixels).tolist() == [[[9, 10, 11]]]
    assert Crop(0, 0, 1, 1).cut(pixels).shape == (2, 2, 3)


def test_pictures_are_upright_as_the_run_has_them(shop, server):
    upright = Image.open(shop.photo(3)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned = as_bytes(upright.transpose(Image.Transpose.ROTATE_90), exif=exif)
    assert (
        find(server, turned).json["neighbours"]
        == (find(server, as_bytes(upright, "BMP")).json["neighbours"])
    )
    assert ask(server, "/api/info").json["upright"] is True


def test_results_are_filtered_by_label_and_by_name(shop, server):
    body = shop.photo(3).read_bytes()
    found = find(server, body, label="EVAL3", top=10).json["neighbours"]
    assert [one["label"] for one in found] == ["eval3"] * 3
    everything = find(server, body, top=200).json["neighbours"]
    assert found == [one for one in everything if one["label"] == "eval3"]
    assert len(find(server, body, label="2.png", top=200).json["neighbours"]) == 8
    none = find(server, body, label="unicorn", top=10).json
    assert none["neighbours"] == [] and none["looked_at"] == none["entries"] == 24
    listed = ask(server, "/api/entries?label=eval3&count=2").json["entries"]
    assert len(listed) == 2 and {one["label"] for one in listed} == {"eval3"}


@pytest.mark.parametrize(
    "top", ["0", "-1", "201", "1e9", "x", "", "²", "0000000200000", "9" * 5000]
)
def test_a_number_of_results_that_is_none_is_refused(server, top):
    answer = ask(server, f"/api/entries?count={top.replace('²', '%C2%B2')}")
    assert answer.status == 400 and "give 1 to 200" in answer.error


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("/api/search?topp=3", "no parameter topp here; did you mean top or crop?"),
        ("/api/search?top=3&top=4", "top is given more than once"),
        ("/api/entries?top=3", "no parameter top here; known names: count, label"),
        ("/api/entries/1?label=x", "no parameter label here"),
        ("/api/info?%3Cb%3E=1", "no parameter <b> here; leave it out"),
    ],
)
def test_a_parameter_that_would_change_nothing_is_refused(shop, server, address, words):
    body = shop.photo().read_bytes() if "search" in address else None
    answer = ask(server, address, body)
    assert answer.status == 400 and words in answer.error
    assert ask(server, "/?source=mail").status == 200  # a link to the page may have any


def test_a_search_is_from_a_picture_or_from_an_entry(shop, server):
    assert "not both" in find(server, shop.photo().read_bytes(), entry=3).error


def test_nothing_is_taken_for_a_picture(server):
    assert "no bytes" in find(server, b"").error


# --- pictures that are shown ----------------------------------------------------------------------


def test_thumbnails_are_jpegs_made_here(shop, server):
    entry = find(server, shop.photo(3).read_bytes(), top=1).json["neighbours"][0]
    answer = ask(server, entry["thumbnail"])
    assert answer.headers["Content-Type"] == "image/jpeg" and answer.content[:2] == b"\xff\xd8"
    assert Image.open(io.BytesIO(answer.content)).size == (40, 36)
    again = ask(server, entry["thumbnail"], If_None_Match=answer.headers["ETag"])
    assert (again.status, again.content) == (304, b"")
    head = ask(server, entry["image"], method="HEAD")
    assert head.status == 200 and head.content == b"" and int(head.headers["Content-Length"]) > 100


def test_a_large_picture_is_made_small():
    jpeg = pictures.as_jpeg(np.zeros((600, 3000, 3), np.uint8), 256)
    assert Image.open(io.BytesIO(jpeg)).size == (256, 51)


def test_thumbnails_in_memory_are_bounded(shop, monkeypatch):
    monkeypatch.setattr(pictures.Shown, "MOST_BYTES", 3000)
    shown, as_jpeg, made = pictures.Shown(), pictures.as_jpeg, []
    monkeypatch.setattr(pictures, "as_jpeg", lambda *how: made.append(as_jpeg(*how)) or made[-1])

    def ask(number: int) -> bytes:
        path = str(shop.photo(number))
        return shown.jpeg(path, shown.stamp(path), 256, True)

    for number in range(1, 12):
        assert ask(number) == ask(number)
    assert len(made) == 11
    kept = []  # the last ones, which are not made again
    for number in range(11, 0, -1):
        kept.append(ask(number))
        if len(made) > 11:
            break
    assert len(kept) > 1 and len(made) == 12 and sum(map(len, kept[:-1])) <= 3000


def test_a_picture_that_is_gone_is_said_to_be(shop, server):
    entries = ask(server, "/api/entries?count=24").json["entries"]
    gone = [entry for entry in entries if entry["gone"]]
    assert len(gone) == 1
    answer = ask(server, gone[0]["thumbnail"])
    assert answer.status == 404 and "is gone" in answer.error
    assert find(server, entry=gone[0]["row"], top=3).status == 200, "its embedding is there"
    assert find(server, entry=gone[0]["row"], crop="0,0,1,0.5").status == 422


@pytest.mark.parametrize("row", [3, 99])
def test_a_row_that_became_anothers_is_not_shown(server, row):
    answer = ask(server, f"/api/entries/{row}/thumbnail?check=00000000")
    assert answer.status == 404 and "search again" in answer.error


@pytest.mark.parametrize(
    "path",
    [
        *("/api/entries/99", "/api/entries/-1", "/api/entries/999999999999", "/api/entries/1e1"),
        *("/api/entries/../../etc/passwd", "/../../etc/passwd", "/..%2f..%2fetc/passwd"),
        *("/%2e%2e/page.py", "/serving/page.html", "/page.html", "/page.css/..", "//etc/passwd"),
        *("/api/entries//etc/passwd/image", "/api/entries/0/image/../../../../etc/passwd"),
        *("/api/entries/٣", "/api/entries/0%00/image", "/api/entries/0/original", "/api"),
    ],
)
def test_no_path_leads_to_a_file(server, path):
    answer = raw(server, f"GET {path.encode().decode('latin-1')} HTTP/1.1", host(server))
    assert answer.status == 404 and answer.error
    assert b"root:" not in answer.content


# --- the page's headers, and who may ask ----------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/page.js", "/api/info", "/api/entries/1/image", "/none"])
def test_every_answer_keeps_the_browser_here(server, path):
    headers = ask(server, path).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Frame-Options"] == "DENY" and headers["Referrer-Policy"] == "no-referrer"
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert "Python" not in headers["Server"]


def test_the_page_loads_nothing_from_elsewhere(server):
    for path in ("/", "/page.css", "/page.js", "/icon.svg"):
        content = ask(server, path).content.decode()
        assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)", content)
    assert not re.search(r"<script>|<style|\s(style|on\w+)=", ask(server, "/").content.decode())


@pytest.mark.parametrize(
    ("name", "status"),
    [
        *(("127.0.0.1", 200), ("localhost:8000", 200), ("[::1]:80", 200), ("LOCALHOST", 200)),
        *(("shop.example", 200), ("Shop.Example:443", 200), ("192.168.1.7:8000", 200)),
        *(("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil", 421)),
        *(("", 400), ("a b", 400), ("127.0.0.1@evil.example", 400), ("<b>", 400), ("[::1", 400)),
    ],
)
def test_only_names_of_this_machine_are_answered(server, name, status):
    answer = raw(server, "GET /api/info HTTP/1.1", f"Host: {name}")
    assert answer.status == status and b"<" not in answer.content


def test_one_host_header_is_needed(server):
    assert raw(server, "GET / HTTP/1.1").status == 400
    assert raw(server, "GET / HTTP/1.1", host(server), "Host: evil.example").status == 400


@pytest.mark.parametrize(
    "header",
    [
        *("Origin: http://evil.example", "Origin: null", "Origin: https://127.0.0.1"),
        "Origin: http://[",
        *("Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"),
    ],
)
def test_pages_of_other_sites_may_not_search(shop, server, header):
    body = shop.photo(3).read_bytes()
    lines = ["POST /api/search HTTP/1.1", host(server), f"Content-Length: {len(body)}"]
    assert raw(server, *lines, header, body=body).status == 403
    own = f"Origin: http://127.0.0.1:{port_of(server)}"
    assert raw(server, *lines, own, "Sec-Fetch-Site: same-origin", body=body).status == 200
    assert raw(server, "GET /api/entries/1/image HTTP/1.1", host(server), header).status == 403
    assert raw(server, "GET / HTTP/1.1", host(server), header).status == 200, "a link may"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/search"), ("POST", "/"), ("OPTIONS", "/"), ("DELETE", "/")]
)
def test_other_methods_are_refused(server, method, path):
    answer = ask(server, path, method=method)
    assert answer.status == 405 and answer.headers["Allow"] in ("GET, HEAD", "POST")


# --- requests that mean harm ----------------------------------------------------------------------

TOO_MUCH = guards.MOST_BYTES + 1


@pytest.mark.parametrize(
    ("lengths", "status"),
    [
        ([], 411),
        ([f"Content-Length: {TOO_MUCH}"], 413),
        (["Content-Length: 999999999999999999"], 413),
        (["Content-Length: 9999999999999999999999"], 400),
        (["Content-Length: -1"], 400),
        (["Content-Length: +5"], 400),
        (["Content-Length: 5_0"], 400),
        (["Content-Length: 0x10"], 400),
        (["Content-Length: "], 400),
        (["Content-Length: 5", "Content-Length: 6"], 400),
        (["Transfer-Encoding: chunked"], 501),
        (["Transfer-Encoding: chunked", "Content-Length: 5"], 501),
        ([f"Content-Length: {TOO_MUCH}", "Expect: 100-continue"], 413),
        (["Content-Length: 5", "Content-Type: multipart/form-data; boundary=x"], 415),
    ],
)
def test_bodies_are_measured_before_they_are_read(server, lengths, status):
    start = time.monotonic()
    answer = raw(server, "POST /api/search HTTP/1.1", host(server), *lengths, body=b"12345")
    assert answer.status == status and answer.error
    assert answer.headers["Connection"] == "close", "what follows is no request"
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["POST /api/search HTTP/1.1", "Content-Length: 0", "Content-Length: 55"], 400),
        (["GET / HTTP/1.1", "Content-Length: 0", "Content-Length: 55"], 200),
        (["GET / HTTP/1.1", "no header", "Content-Length: 55"], 400),
        (["GET / HTTP/1.1", "Content-Length : 55"], 400),
        (["GET / HTTP/1.1", "Transfer-Encoding : chunked"], 400),
    ],
)
def test_what_may_be_a_body_is_no_second_request(server, lines, status):
    """A proxy in between that counts otherwise would give its answer to somebody else."""
    second = f"GET /api/info HTTP/1.1\r\n{host(server)}\r\n\r\n".encode()
    answer = raw(server, lines[0], host(server), *lines[1:], body=second)
    assert answer.status == status
    assert answer.headers["Connection"] == "close", "what follows is no request"


@pytest.mark.parametrize("line", ["no header", ": nameless", "Origin : http://evil.example"])
def test_a_line_that_is_no_header_hides_none(server, line):
    head = ["GET /api/info HTTP/1.1", host(server), line, "Sec-Fetch-Site: cross-site"]
    assert raw(server, *head).status == 400
    assert raw(server, head[0], " Host: evil.example", host(server)).status == 400


def test_a_body_is_waited_for_where_it_is_announced(shop, server):
    body = shop.photo(3).read_bytes()
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as connection:
        lines = ["POST /api/search?top=1 HTTP/1.1", host(server), "Expect: 100-continue"]
        lines.append(f"Content-Length: {len(body)}")
        connection.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert b" 200 " in connection.recv(20)


def test_a_large_upload_is_answered_although_it_is_not_read(server):
    answer = ask(server, "/api/search", bytes(TOO_MUCH))
    assert answer.status == 413 and "save it smaller" in answer.error


def test_one_connection_carries_several_requests(server):
    connection = HTTPConnection("127.0.0.1", port_of(server), timeout=20)
    for path in ("/api/info", "/none", "/api/entries/99", "/"):
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert not answer.will_close
    connection.close()


@pytest.mark.parametrize(
    "lines",
    [
        ["GET / HTTP/9.9"],
        ["<script>alert(1)</script>"],
        ["GET / HTTP/1.1", *(f"X-{number}: x" for number in range(200))],
        ["GET / HTTP/1.1", f"X: {'x' * 70000}"],
        [f"GET /{'x' * 70000} HTTP/1.1"],
        ["GET http://evil.example/ HTTP/1.1", "Host: localhost"],
        ["BREW / HTTP/1.1", "Host: localhost"],
        ["GET /api/info?" + "a=1&" * 50 + " HTTP/1.1", "Host: localhost"],
        ["\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"],
    ],
)
def test_requests_that_are_none_are_refused_and_not_repeated(server, lines):
    answer = raw(server, *lines)
    assert 400 <= answer.status < 600 and answer.error
    assert b"<" not in answer.content and b"evil" not in answer.content
    assert alive(server)


@pytest.mark.parametrize("part", [b"GET / HT", b"POST /api/search HTTP/1.1\r\nContent-Length: 9"])
def test_slow_clients_are_left(server, monkeypatch, part):
    """One byte every now and then keeps no thread: the time is that of the whole head."""
    monkeypatch.setattr(handler, "HEAD_SECONDS", 0.6)
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=10) as connection:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in part + b"x" * 1000:
                connection.sendall(bytes([byte]))
                connection.settimeout(0.1)
                try:
                    if connection.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
        assert time.monotonic() - start < 5
    assert alive(server)


def test_slow_bodies_are_left(server, monkeypatch):
    monkeypatch.setattr(handler, "BODY_SECONDS", 0.3)
    lines = ["POST /api/search HTTP/1.1", host(server), "Content-Length: 100"]
    assert raw(server, *lines, body=b"12345", wait=10).status == 0
    assert alive(server)


def test_slow_bodies_keep_nobody_from_searching(shop, server):
    lines = ["POST /api/search HTTP/1.1", host(server), "Content-Length: 100"]
    with contextlib.ExitStack() as slow:
        for _ in range(handler.MOST_SEARCHES):
            connection = slow.enter_context(connection_of_another(server))
            connection.sendall("\r\n".join([*lines, "", "12345"]).encode())
        time.sleep(0.3)  # until their heads are read
        assert find(server, shop.photo(3).read_bytes()).status == 200


def test_clients_that_go_away_do_no_harm(server, capfd):
    for head in (
        b"",
        b"GET",
        b"POST /api/search HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\nx",
    ):
        with socket.create_connection(("127.0.0.1", port_of(server))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head)
    assert alive(server)
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_searches_and_connections_are_bounded(shop, server):
    searches = server.RequestHandlerClass.searches
    for _ in range(handler.MOST_SEARCHES):
        assert searches.acquire(blocking=False)
    try:
        answer = find(server, shop.photo(3).read_bytes())
        assert (
            answer.status == 503 and "try again" in answer.error and answer.headers["Retry-After"]
        )
    finally:
        searches.release(handler.MOST_SEARCHES)
    assert find(server, shop.photo(3).read_bytes()).status == 200
    with contextlib.ExitStack() as others:
        for _ in range(MOST_CONNECTIONS):  # one that has just been answered may be there yet
            others.enter_context(connection_of_another(server))
        until(lambda: status_of_info(server) == 503)
    until(lambda: status_of_info(server) == 200)


def test_what_arrives_of_all_pictures_is_bounded(shop, server):
    """Otherwise as many as there may be connections would lie in memory, each up to its bound."""
    photo = shop.photo(3).read_bytes()
    room = server.RequestHandlerClass.room = guards.Room(len(photo) + 500)
    announced = ["POST /api/search HTTP/1.1", host(server), "Content-Length: 20000000"]
    head = "\r\n".join([*announced, "", ""]).encode()
    with contextlib.ExitStack() as slow:
        for _ in range(2):
            slow.enter_context(connection_of_another(server)).sendall(head)
        assert find(server, photo).status == 200, "they have sent nothing yet"
        large = slow.enter_context(connection_of_another(server))
        large.sendall(head + bytes(guards.BLOCK))
        assert b" 503 " in large.recv(20), "more than there is room for"
        room.most = 2 * guards.BLOCK + 500
        for _ in range(2):
            slow.enter_context(connection_of_another(server)).sendall(head + bytes(guards.BLOCK))
        until(lambda: room.taken == 2 * guards.BLOCK)
        answer = find(server, photo)
        assert answer.status == 503 and answer.headers["Retry-After"] and "moment" in answer.error
    until(lambda: find(server, photo).status == 200)
    assert room.taken == 0


def status_of_info(server):
    """0 for a connection that was closed before the answer was read."""
    try:
        return ask(server, "/api/info").status
    except (OSError, HTTPException):
        return 0


def connection_of_another(server):
    """Somebody who has said nothing yet."""
    return socket.create_connection(("127.0.0.1", port_of(server)))


def until(holds: Callable[[], bool], seconds: float = 200) -> None:
    """Waits for it."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never was so"
        time.sleep(0.05)


def test_searches_at_once_find_what_one_finds(shop, server):
    bodies = [shop.photo(number).read_bytes() for number in range(1, 7)]
    alone = [find(server, body).json["neighbours"] for body in bodies]
    found: list[Any] = [None] * len(bodies)

    def one(number: int) -> None:
        found[number] = find(server, bodies[number]).json["neighbours"]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_a_mistake_of_ours_ends_one_request(shop, server, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("<secret>")

    with monkeypatch.context() as patch:
        patch.setattr(Index, "search", fail)
        answer = find(server, shop.photo(3).read_bytes())
    assert answer.status == 500 and "secret" not in answer.error
    assert "ZeroDivisionError" in caplog.text and alive(server)


# --- uploads that mean harm -----------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(100000))), chunk(b"IEND", b"")]
    )


NOISE = as_bytes(Image.effect_noise((64, 64), 50))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/etc/passwd) run\n%%EOF\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bomb(60000, 60000), "million pixels, more than the limit of"),
        (bomb(11000, 11000), "million pixels, more than the limit of"),
        (b"not a picture", "no picture"),
        (b"<!doctype html><script>alert(1)</script>", "no picture"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>', "SVG pictures have no"),
        (EPS, "PostScript pictures have no pixels"),
        (NOISE[: len(NOISE) // 2], "cannot be read"),
        (b"\xff\xd8\xff\xe0" + bytes(1000), "cannot be read"),
        (bytes(1000), "no picture"),
        (b"GIF89a", "cannot be read"),
    ],
)
def test_what_is_no_picture_gets_a_sentence(server, content, words):
    answer = find(server, content)
    assert answer.status == 422 and words in answer.error
    assert b"<" not in answer.content and answer.headers["Content-Type"] == "application/json"
    assert alive(server)


def test_a_disk_that_fails_is_neither_the_pictures_fault_nor_the_browsers(server, monkeypatch):
    """A program may ask again later; what is no picture (422) it had better not."""

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/srv/photos/secret.jpg")

    with monkeypatch.context() as patched:
        patched.setattr("serving.pictures.decode", fails)
        answer = ask(server, "/api/entries/3/image")
    assert answer.status == 503 and "secret" not in answer.error
    assert re.match(
        r"the picture cannot be read .* \(Input/output error\); try again", answer.error
    )
    assert ask(server, "/api/entries/3/image").status == 200


def repeated(scans: int, filling: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    whole = as_bytes(Image.new("RGB", (900, 900)), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scans * (filling + last) + whole[-2:]


@pytest.mark.parametrize("filling", [b"", b"\xff\xff", b"\xff\xd0"])
def test_a_jpeg_is_not_drawn_hundreds_of_times(server, filling):
    """An upload of 30 MB could be hours of work; between scans a decoder skips what it must not."""
    start = time.monotonic()
    answer = find(server, repeated(3_000, filling))
    assert answer.status == 422 and "more than the limit of 64; save it again" in answer.error
    assert time.monotonic() - start < 5
    assert find(server, repeated(20, filling)).status == 200


def test_no_other_program_is_started_for_an_upload(server, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("a program was started"))
    from PIL import EpsImagePlugin

    monkeypatch.setattr(
        EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started")
    )
    assert find(server, EPS).status == 422


def test_very_long_pictures_fit_into_memory(server):
    assert find(server, as_bytes(Image.new("RGB", (1, 60000), "red"))).status == 200


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_usual_formats_are_taken(server, kind):
    assert find(server, as_bytes(Image.new("RGB", (30, 20), "red"), kind)).status == 200


def test_names_are_data_in_every_answer(shop, server):
    entries = ask(server, "/api/entries?count=24").json["entries"]
    assert EVIL in {entry["label"] for entry in entries}
    assert ask(server, "/api/entries").headers["Content-Type"] == "application/json"
    assert "<script>alert" not in ask(server, "/").content.decode()


# --- an index that changes ------------------------------------------------------------------------


@pytest.fixture
def own_shop(shop: Shop, tmp_path: Path) -> Shop:
    shutil.copytree(shop.folder, tmp_path / "shop")
    return Shop(tmp_path / "shop", tmp_path / "shop" / "run", tmp_path / "shop" / "shop.index")


def test_what_is_added_and_removed_is_seen_at_once(own_shop, caplog):
    red = Image.new("RGB", (40, 36), "red")
    (own_shop.folder / "new").mkdir()
    red.save(own_shop.folder / "new" / "red.png")
    with serving(own_shop.index) as server:
        assert len(find(server, as_bytes(red), top=200).json["neighbours"]) == 24
        search.main(["add", str(own_shop.index), str(own_shop.folder / "new"), "--workers", "0"])
        found = find(server, as_bytes(red), top=200).json["neighbours"]
        assert len(found) == 25 and found[0]["name"] == "red.png"
        assert ask(server, found[0]["thumbnail"]).status == 200
        first = ask(server, "/api/entries/0").json
        search.main(["remove", str(own_shop.index), first["id"]])
        assert ask(server, "/api/info").json["entries"] == 24
        left = ask(server, f"/api/entries/0?check={first['check']}")
        assert left.status == 404 and "no longer in the index; search again" in left.error
        # The others are one row lower now, and still found in the row that they had.
        moved = ask(server, f"/api/entries/24?check={found[0]['check']}").json
        assert (moved["row"], moved["name"]) == (23, "red.png")
        assert ask(server, found[0]["thumbnail"]).status == 200
        onwards = find(server, entry=24, check=found[0]["check"], top=3).json
        assert onwards["query"] == moved and moved not in onwards["neighbours"]
        # Gone, or damaged: what was read serves on.
        kept = own_shop.index.read_bytes()
        own_shop.index.unlink()
        assert find(server, as_bytes(red)).status == 200
        own_shop.index.write_bytes(b"damaged" + kept)
        assert find(server, as_bytes(red)).status == 200
    assert caplog.text.count("served as it was") == 2


def test_a_picture_whose_file_or_label_changes_is_still_found_from_an_open_page(own_shop):
    with serving(own_shop.index) as server:
        first, other = (ask(server, f"/api/entries/{row}").json for row in (0, 1))
        path = own_shop.folder / first["id"]
        ImageOps.mirror(Image.open(path)).save(path)
        table = own_shop.folder / "labels.csv"
        table.write_text(f"path,label\n{other['id']},Renamed\n")
        add = ["add", str(own_shop.index), str(path), str(table), "--workers", "0"]
        search.main(add)
        for known, label in ((first, first["label"]), (other, "Renamed")):
            now = ask(server, f"/api/entries/{known['row']}?check={known['check']}").json
            assert (now["id"], now["label"]) == (known["id"], label)
            assert now["row"] >= 22  # both are among the last now
            assert ask(server, known["thumbnail"]).status == 200
            place = {"entry": known["row"], "check": known["check"]}
            assert find(server, **place).json["query"] == now


def test_an_index_that_is_being_copied_over_is_not_searched_as_it_was(own_shop, caplog):
    kept, photo = own_shop.index.read_bytes(), own_shop.photo(3).read_bytes()
    with serving(own_shop.index) as server:
        assert find(server, photo).status == 200
        for left in (0, 100, len(kept) - 64):  # what lay there would end the process
            own_shop.index.write_bytes(kept[:left])
            for answer in (find(server, photo), ask(server, "/api/entries")):
                assert answer.status == 422 and "index" in answer.error
        own_shop.index.write_bytes(kept)
        assert find(server, photo).status == 200
    assert not caplog.text


def test_labels_are_found_however_their_accents_are_written(own_shop):
    (own_shop.folder / "new" / "gru\u0308n").mkdir(parents=True)  # as a Mac spells it
    picture = own_shop.folder / "new" / "gru\u0308n" / "1.png"
    Image.new("RGB", (40, 36), "green").save(picture)
    search.main(["add", str(own_shop.index), str(own_shop.folder / "new"), "--workers", "0"])
    with serving(own_shop.index) as server:
        for label in (
            "gr%C3%BCn",
            "GR%C3%9CN",
            "gru%CC%88n",
            "gr\u00fcn".encode().decode("latin-1"),
        ):
            line = f"GET /api/entries?label={label} HTTP/1.1"
            (entry,) = raw(server, line, host(server)).json["entries"]
            assert entry["name"] == "1.png", label


def test_an_index_built_anew_by_another_network_is_searched_with_that(own_shop):
    images = tiny.write_images(own_shop.folder / "images2")
    other = tiny.run(images, own_shop.folder, "other", "--loss AMLoss --epochs 1 --seed 3")
    with serving(own_shop.index) as server:
        body = own_shop.photo(3).read_bytes()
        before = find(server, body).json["neighbours"]
        command = ["build", other, "--images", own_shop.folder / "photos", "--overwrite"]
        command += ["--index", own_shop.index, "--workers", 0]
        search.main(list(map(str, command)))
        after = find(server, body).json["neighbours"]
    assert after[0]["cosine"] == pytest.approx(1, abs=1e-5) and after[1:] != before[1:]


def test_an_empty_index_is_served(own_shop):
    with serving(own_shop.index) as server:
        ids = [one["id"] for one in ask(server, "/api/entries?count=200").json["entries"]]
        search.main(["remove", str(own_shop.index), *ids])
        assert ask(server, "/api/info").json["entries"] == 0
        assert ask(server, "/api/entries?label=x").json["entries"] == []
        assert find(server, own_shop.photo(3).read_bytes()).json["neighbours"] == []
        assert "it is empty" in ask(server, "/api/entries/0").error


# --- the command ----------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    return refusal(capsys, search.main, ["serve", *map(str, arguments)])


def test_what_cannot_be_served_gets_a_sentence(shop, server, capsys, tmp_path):
    assert "is taken" in refused(capsys, shop.index, "--port", port_of(server))
    assert "does not exist" in refused(capsys, tmp_path / "none.index")
    assert "not an address of this machine" in refused(capsys, shop.index, "--host", "192.0.2.1")
    assert "not an address of this machine" in refused(capsys, shop.index, "--host", "no host")
    assert "65535" in refused(capsys, shop.index, "--port", 70000)
    for name in ("https://shop.example", "shop.example:8443", "shop.example/search", ""):
        assert "more than a name" in refused(capsys, shop.index, "--allow-host", name)


@contextlib.contextmanager
def command(
    shop: Shop, *flags: str, home: Path = ROOT, **variables: str
) -> Iterator[tuple[Program | subprocess.Popen[str], int]]:
    """`search.py serve` as a user has it, once it answers; and its port."""
    words = [home / "search.py", "serve", shop.index, "--port", "0", *flags]
    process = start_python(*words, cwd=shop.folder, **variables)
    try:
        address = next(line for line in process.stdout if line.startswith("open "))
        yield process, int(re.search(r"http://127\.0\.0\.1:(\d+)/", address)[1])
    finally:
        process.kill()
        process.wait()


def entries_at(port: int) -> int:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/api/info")
    return json.loads(connection.getresponse().read())["entries"]


def test_ctrl_c_ends_it_cleanly(shop):
    with command(shop) as (process, port):
        assert entries_at(port) == 24
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("stopped\n", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_the_image_of_the_dockerfile_has_all_that_serving_needs(shop, tmp_path):
    """As in the container: its files, its packages, every address, and SIGTERM in the end."""
    wanted = [line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"]
    for pattern in wanted:
        for found in ROOT.glob(pattern):
            copy = shutil.copytree if found.is_dir() else shutil.copy
            copy(found, tmp_path / found.name)
    installed = re.search(r"--extra-index-url \S+ \\\n +(.*)", (ROOT / "Dockerfile").read_text())[1]
    named = "".join(file.read_text() for file in ROOT.glob("requirements*.txt"))
    ours = set(re.findall(r"^[a-z][\w-]*", named, re.MULTILINE)) - set(installed.split())
    missing = [m for m, packages in packages_distributions().items() if ours & {*packages}]
    assert {"scipy", "sklearn", "wandb"} <= {*missing} and "torch" not in missing
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))  # importing them fails\n"
    )
    flags = ("--host", "0.0.0.0")
    own = {"PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}  # a Python that starts with that
    with command(shop, *flags, home=tmp_path, **own) as (process, port):
        assert entries_at(port) == 24
        connection = HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/api/search?top=1", shop.photo(3).read_bytes())
        found = json.loads(connection.getresponse().read())["neighbours"]
        assert found[0]["cosine"] == pytest.approx(1, abs=1e-5)
        process.send_signal(signal.SIGTERM)
        said, warned = process.communicate(timeout=20)
    assert process.returncode == 0 and said == "stopped\n"
    assert warned.startswith("warning: ") and "see all 24 pictures" in warned


# --- in a browser ---------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(browser: Any, server: Any, **context: object) -> Iterator[tuple[Any, list[str]]]:
    """The page in a window of its own, and what its console says, or where else it asks."""
    size = {"width": 1280, "height": 900}
    window = browser.new_context(**{"viewport": size, **context}).new_page()
    said: list[str] = []
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    ours = (server.url, f"blob:{re.match('[a-z]+://[^/]+/', server.url)[0]}")
    window.on("request", lambda r: r.url.startswith(ours) or said.append(r.url))
    window.goto(server.url)
    window.wait_for_selector("html[data-ready]", state="attached", timeout=20_000)
    yield window, said
    window.context.close()


def settled(window: Any) -> list[str]:
    """The names of the entries shown, once no search is at work."""
    window.wait_for_timeout(50)
    window.wait_for_selector("#busy", state="hidden", timeout=20_000)
    return window.locator(".neighbour .name").all_inner_texts()


def choose(window: Any, file: Path) -> list[str]:
    window.set_input_files("#choose", str(file))
    window.wait_for_selector(".score", timeout=20_000)
    return settled(window)


def dropped(window: Any, name: str, kind: str, content: bytes) -> None:
    """Drops a file onto the page."""
    window.evaluate(
        """([name, kind, bytes]) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], name, {type: kind}));
          for (const event of ["dragover", "drop"]) document.body.dispatchEvent(
            new DragEvent(event, {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [name, kind, list(content)],
    )


def scores(window: Any) -> list[str]:
    return window.locator(".score > span:first-child").all_inner_texts()


def drag(window: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    box = window.locator("#picture").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    window.mouse.move(*points[0])
    window.mouse.down()
    window.mouse.move(*points[1], steps=5)
    window.mouse.up()


@pytest.mark.slow
def test_choose_crop_and_search_on(browser, shop, server, monkeypatch):
    monkeypatch.setattr(Index, "thresholds", property(lambda index: LIMITS))
    with opened(browser, server) as (window, said):
        assert len(settled(window)) == 20 and "search from it" in window.inner_text("#status")
        names = choose(window, shop.photo(3))
        first = window.locator(".neighbour").first
        assert names[0] == shop.photo(3).name and "✓ same" in first.inner_text()
        assert "20 pictures of 24" in window.inner_text("#status")
        assert "Same: 0.990 or more (wrong for 2 %" in window.inner_text("#legend")
        assert "guess" not in window.inner_text("#legend")
        for image in window.locator(".neighbour img").all()[:4]:
            image.scroll_into_view_if_needed()
            window.wait_for_timeout(100)
            assert image.evaluate("image => image.naturalWidth") == 40
        whole = scores(window)
        # A part of it.
        assert window.locator("#uncrop").is_hidden()
        drag(window, (0.1, 0.1), (0.5, 0.6))
        settled(window)
        cropped = scores(window)
        assert cropped != whole and window.locator("#crop").is_visible()
        window.get_by_role("button", name="Reset crop").click()
        settled(window)
        assert scores(window) == whole and window.locator("#crop").is_hidden()
        # From a neighbour on, and back.
        second = window.locator(".neighbour").nth(1)
        label = second.locator("b").inner_text()
        second.click()
        settled(window)
        assert window.inner_text("#what b") == label and scores(window) != whole
        assert len(scores(window)) == 20
        drag(window, (0.0, 0.0), (0.4, 0.4))
        settled(window)
        window.go_back()
        settled(window)
        assert window.inner_text("#what b") == shop.photo(3).name and scores(window) == whole
        assert said == []


@pytest.mark.slow
def test_the_page_says_that_nothing_is_called_same(browser, shop, server, monkeypatch):
    limits = replace(LIMITS, same=math.inf, false_same=Rate(0.0), classes=8)
    monkeypatch.setattr(Index, "thresholds", property(lambda index: limits))
    with opened(browser, server) as (window, said):
        choose(window, shop.photo(3))
        legend = window.inner_text("#legend")
        assert "Nothing but the same file is called same, because too few pictures" in legend
        assert "different: less than 0.500 (wrong for 1 %" in legend
        assert legend.endswith("a rough guess, and probably too low.")
        assert said == []


@pytest.mark.slow
def test_the_page_says_what_a_proxy_refuses(browser, shop, server):
    with opened(browser, server) as (window, _):
        answers: list[int] = []

        def answer(route: Any) -> None:
            route.fulfill(status=answers[-1], content_type="text/html", body="<h1>nginx</h1>")

        window.route("**/api/search*", answer)
        for status, words in ((413, "save it smaller"), (502, "is it still running"), (404, "404")):
            answers.append(status)
            window.set_input_files("input[type=file]", str(shop.photo(3)))
            window.wait_for_selector(f"#trouble p:has-text('{words}')")
            assert not settled(window)


@pytest.mark.slow
def test_a_dropped_picture_and_a_pasted_one_are_searched_for(browser, shop, server, monkeypatch):
    monkeypatch.setattr(Index, "thresholds", None)
    with opened(browser, server) as (window, said):
        chosen = choose(window, shop.photo(5))
        window.reload()
        window.wait_for_selector("html[data-ready]", state="attached")
        dropped(window, "mine.png", "image/png", shop.photo(5).read_bytes())
        window.wait_for_selector(".score")
        assert settled(window) == chosen and window.inner_text("#what b") == "mine.png"
        assert window.locator("#over").is_hidden()
        assert "no threshold" in window.inner_text("#legend")
        assert window.locator(".verdict").count() == 0
        window.evaluate(
            """bytes => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
              document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
            }""",
            list(shop.photo(9).read_bytes()),
        )
        assert settled(window)[0] == shop.photo(9).name
        assert said == []


@pytest.mark.slow
def test_results_and_labels_are_asked_for(browser, shop, server):
    with opened(browser, server) as (window, said):
        choose(window, shop.photo(3))
        window.select_option("#top", "10")
        assert len(settled(window)) == 10
        window.fill("#label", "eval3")
        window.wait_for_timeout(400)
        assert len(settled(window)) == 3
        assert set(window.locator(".neighbour b").all_inner_texts()) == {"eval3"}
        window.fill("#label", "unicorn<b>")
        window.wait_for_timeout(400)
        assert settled(window) == [] and "“unicorn<b>”" in window.inner_text("#status")
        assert said == []


@pytest.mark.slow
def test_keys_alone_are_enough(browser, shop, server, monkeypatch):
    monkeypatch.setattr(Index, "thresholds", None)
    with opened(browser, server) as (window, said):
        choose(window, shop.photo(3))
        whole = scores(window)
        window.focus("#edges summary")
        window.keyboard.press("Enter")
        window.keyboard.press("Tab")
        assert window.evaluate("document.activeElement.dataset.edge") == "0"
        for _ in range(30):
            window.keyboard.press("ArrowRight")
        window.wait_for_timeout(450)
        settled(window)
        assert scores(window) != whole and window.locator("#crop").is_visible()
        assert window.locator("#edges fieldset span").first.inner_text() == "30 %"
        window.keyboard.press("Escape")
        settled(window)
        assert scores(window) == whole
        window.locator(".neighbour").nth(2).focus()
        window.keyboard.press("Enter")
        settled(window)
        assert scores(window) != whole
        assert window.evaluate("document.activeElement.id") == "found-title"
        # What a screen reader is told.
        assert window.get_by_role("status").inner_text().startswith("20 pictures")
        name = re.compile(r"^\S+ ?, \d\.png ?, cosine 0\.\d+ ?; search on from here$")
        assert window.get_by_role("button", name=name).count() == 19, "one file is gone"
        for role, name in (("combobox", "results"), ("searchbox", "label or name contains")):
            assert window.get_by_role(role, name=name).count() == 1
        assert said == []


@pytest.mark.slow
def test_what_goes_wrong_is_said_on_the_page(browser, shop, server):
    with opened(browser, server) as (window, said):
        trouble = window.get_by_role("alert")
        shown = settled(window)
        dropped(window, "notes.txt", "text/plain", b"words")
        assert "not a picture" in trouble.inner_text()
        assert settled(window) == shown != []  # what was found before stays
        dropped(window, "empty.png", "image/png", b"")
        assert "is empty" in trouble.inner_text()
        window.evaluate(
            "document.body.dispatchEvent(new DragEvent('drop', {bubbles: true, "
            "cancelable: true, dataTransfer: new DataTransfer()}))"
        )
        assert "Nothing is fetched" in trouble.inner_text()
        assert said == []
        dropped(window, "broken.png", "image/png", b"\x89PNG broken")
        window.wait_for_selector("#trouble p")
        settled(window)
        assert trouble.inner_text().startswith("The picture cannot be read")
        window.wait_for_selector("#unshown")
        choose(window, shop.photo(3))
        assert trouble.inner_text() == "" and window.locator("#picture").is_visible()
        window.route("**/api/search*", lambda route: route.abort())
        window.select_option("#top", "50")
        window.wait_for_selector("#trouble button")
        assert "does not answer" in trouble.inner_text()
        window.unroute("**/api/search*")
        window.get_by_role("button", name="Try again").click()
        assert len(settled(window)) == 24


@pytest.mark.slow
def test_back_and_reload_keep_what_was_searched_from(browser, shop, server):
    with opened(browser, server) as (window, said):
        window.locator(".neighbour").first.click()
        first = (settled(window), window.inner_text("#what"))
        window.locator(".neighbour").nth(3).click()
        second = (settled(window), window.inner_text("#what"))
        assert first[1] != second[1]
        window.reload()
        window.wait_for_selector("html[data-ready]", state="attached", timeout=20_000)
        assert (settled(window), window.inner_text("#what")) == second
        choose(window, shop.photo(3))
        for expected in (second, first):
            window.go_back()
            assert (settled(window), window.inner_text("#what")) == expected
        window.go_back()
        settled(window)
        assert window.locator("#shown").is_hidden()
        assert said == []


@pytest.mark.slow
def test_back_in_the_moment_after_an_edge_was_moved_searches_what_is_shown(browser, shop, server):
    with opened(browser, server) as (window, said):
        settled(window)
        window.locator(".neighbour").first.click()
        settled(window)
        window.locator("#edges summary").click()
        window.locator("[data-edge='0']").fill("20")
        window.go_back()
        window.wait_for_timeout(500)
        assert len(settled(window)) == 20 and "search from it" in window.inner_text("#status")
        assert window.get_by_role("alert").inner_text() == "" and said == []


@pytest.mark.slow
def test_a_file_is_searched_with_as_it_was_when_it_was_chosen(browser, shop, server, tmp_path):
    with opened(browser, server) as (window, said):
        mine = tmp_path / "mine.png"
        shutil.copy(shop.photo(3), mine)
        names = choose(window, mine)
        Image.new("RGB", (90, 30), "red").save(mine)
        window.select_option("#top", "10")
        assert settled(window) == names[:10]
        mine.unlink()
        window.select_option("#top", "20")
        assert settled(window) == names and said == []
        # As with a folder, which browsers hand over as if it were a file.
        window.evaluate("void (Blob.prototype.arrayBuffer = () => Promise.reject(new Error()))")
        dropped(window, "photos", "", b"....")
        window.wait_for_selector("#trouble p")
        assert "photos cannot be read" in window.inner_text("#trouble")
        assert settled(window) == names and said == []


@pytest.mark.slow
def test_text_is_pasted_as_text_where_a_picture_of_it_is_copied_too(browser, shop, server):
    """As spreadsheets do."""
    with opened(browser, server) as (window, said):
        pasted = """where => {
          const data = new DataTransfer();
          data.setData("text/plain", "mug");
          data.items.add(new File([new Uint8Array(9)], "image.png", {type: "image/png"}));
          const about = {clipboardData: data, bubbles: true, cancelable: true};
          return document.querySelector(where).dispatchEvent(new ClipboardEvent("paste", about));
        }"""
        assert window.evaluate(pasted, "#label"), "the browser pastes"
        assert settled(window) and window.locator("#shown").is_hidden() and said == []
        assert not window.evaluate(pasted, "body"), "the page takes the picture"


@pytest.mark.slow
def test_an_index_that_changes_under_the_page_leads_nowhere_else(browser, own_shop):
    with serving(own_shop.index) as server, opened(browser, server) as (window, said):
        window.select_option("#top", "50")
        settled(window)
        shown = window.locator(".neighbour").evaluate_all("all => all.map((b) => b.title)")
        search.main(["remove", str(own_shop.index), shown[0]])
        name = window.locator(".neighbour b").nth(9).inner_text()
        window.locator(".neighbour").nth(9).click()
        assert len(settled(window)) == 22 and window.inner_text("#what b") == name
        assert window.title().startswith(f"{name} · shop.index") and said == []
        last = window.locator(".neighbour").last
        search.main(["remove", str(own_shop.index), last.get_attribute("title")])
        last.click()
        window.wait_for_selector("#trouble p")
        assert "no longer in the index" in window.inner_text("#trouble")
        window.get_by_role("button", name="Show the index").click()
        assert len(settled(window)) == 22 and window.locator("#shown").is_hidden()
        window.go_back()
        window.go_back()
        assert len(settled(window)) == 21 and window.inner_text("#what b") == name


@pytest.mark.slow
def test_without_javascript_the_page_says_what_it_needs(browser, server):
    window = browser.new_context(java_script_enabled=False).new_page()
    window.goto(server.url)
    assert window.locator("body").inner_text().strip().endswith("needs JavaScript, which is off.")
    assert window.locator("main, button").locator("visible=true").count() == 0


@pytest.mark.slow
def test_names_run_nothing_and_what_is_gone_has_a_place(browser, shop, server):
    with opened(browser, server) as (window, said):
        window.select_option("#top", "50")
        assert len(settled(window)) == 24
        assert EVIL in window.locator(".neighbour b").all_inner_texts()
        assert window.locator("script").count() == 1
        gone = window.locator(".thumb.none")
        assert gone.count() == 1 and gone.inner_text() == f"{EVIL}.png is gone"
        gone.click()
        settled(window)
        assert window.inner_text("#what b") == EVIL and window.locator("#stage").is_hidden()
        assert len(window.locator(".neighbour").all()) == 23
        assert said == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_the_page_fits_the_screen_in_light_and_dark(browser, shop, server, width, scheme):
    phone = {"has_touch": True, "is_mobile": True} if width == 390 else {}
    size = {"width": width, "height": 844}
    with opened(browser, server, viewport=size, color_scheme=scheme, **phone) as (window, said):
        assert window.locator("#hint").is_visible() != bool(phone)
        for step in ("start", "search", "crop"):
            if step == "search":
                choose(window, shop.photo(3))
            if step == "crop":
                drag(window, (0.2, 0.2), (0.7, 0.8))
                window.locator("#edges summary").click()
                settled(window)
                edges = window.locator("#edges input").all()
                assert all(edge.bounding_box()["height"] >= 24 for edge in edges)
            assert window.evaluate("document.documentElement.scrollWidth") <= width
        assert window.locator(".camera").is_visible() == bool(phone)
        paper = window.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")
        window.get_by_role("button", name="light / dark").click()
        assert window.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        assert said == []


class Proxy(NamedTuple):
    url: str


@contextlib.contextmanager
def proxy(server: Server, below: str) -> Iterator[Proxy]:
    """Hands on what is asked for below a path, as nginx does with `proxy_pass .../;`."""

    class Passing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(below):
                return self.send_error(404)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = "/" + self.path.removeprefix(below)
            connection = HTTPConnection("127.0.0.1", port_of(server), timeout=30)
            connection.request(self.command, path, body, dict(self.headers))
            answer = connection.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.read())
            connection.close()

        do_POST = do_GET

        def log_message(self, format: str, *values: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Passing) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        yield Proxy(f"http://127.0.0.1:{found.server_address[1]}{below}")
        found.shutdown()
        thread.join()


@pytest.mark.slow
def test_the_page_works_below_a_path_of_a_proxy(browser, shop, server):
    with (
        proxy(server, "/shop/search/") as there,
        opened(browser, there) as (window, said),
    ):
        assert len(settled(window)) == 20
        assert choose(window, shop.photo(3))[0] == shop.photo(3).name
        window.locator(".neighbour").nth(1).click()
        settled(window)
        for picture in ("#picture", ".neighbour img"):
            window.wait_for_function(
                "where => document.querySelector(where).naturalWidth > 0", arg=picture
            )
        assert said == []


@pytest.mark.slow
def test_tiny_pictures_keep_their_shape_and_can_be_dragged_over(browser, shop, server):
    with opened(browser, server) as (window, said):
        for width, height in ((16, 16), (10, 60), (90, 30), (40, 400), (400, 40)):
            dropped(window, "tiny.png", "image/png", as_bytes(Image.new("RGB", (width, height))))
            window.wait_for_function(
                "width => document.querySelector('#picture').naturalWidth == width", arg=width
            )
            settled(window)
            box = window.locator("#picture").bounding_box()
            assert box["width"] / box["height"] == pytest.approx(width / height, rel=0.03)
            assert max(box["width"], box["height"]) >= 120
        assert said == []


@pytest.mark.slow
def test_a_finger_crops(browser, shop, server):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, server, **phone) as (window, said):
        choose(window, shop.photo(3))
        whole = scores(window)
        box = window.locator("#picture").bounding_box()
        finger = window.context.new_cdp_session(window)

        def touch(kind: str, share: float | None) -> None:
            at = (
                []
                if share is None
                else [{"x": box["x"] + share * box["width"], "y": box["y"] + share * box["height"]}]
            )
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": at})

        for kind, share in (("touchStart", 0.2), ("touchMove", 0.5), ("touchMove", 0.8)):
            touch(kind, share)
        touch("touchEnd", None)
        settled(window)
        assert scores(window) != whole and window.locator("#crop").is_visible()
        assert window.evaluate("scrollY") == 0, "the page stays where it is"
        assert said == []
