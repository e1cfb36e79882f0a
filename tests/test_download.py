"""Downloads, against a server on this machine: continued, checked, unpacked without surprises."""

from __future__ import annotations

import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import resource
import socket
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python, start_python, wait_for

import dataset
from dataset.download import SOURCES, Source, download, fetch, unpack
from storage import HeldError
from utils import InputError, MachineError

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content` at every address; breaks off as often as `breaks` has entries.

    Attributes:
        breaks: after how many bytes the next answers end too early. ranges: whether parts can be
            asked for. status: of every answer. asked: the Range header of each request.
        may_answer: until it is set, requests wait.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.breaks: list[int] = []
        self.ranges = True
        self.status = 200
        self.asked: list[str | None] = []
        self.may_answer = threading.Event()
        self.may_answer.set()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/{name}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        server.may_answer.wait()
        if server.status != 200:
            self.send_error(server.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            self.send_error(416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            last = len(server.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(server.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: server.breaks.pop(0)] if server.breaks else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(CONTENT) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


# --- the transfer ---------------------------------------------------------------------------------


def test_a_broken_transfer_continues_where_it_stood(server: Server, tmp_path: Path) -> None:
    server.breaks = [100_000, 50_000]
    target = tmp_path / "a.bin"
    fetched = fetch(server.url("a.bin"), target, MD5, pauses=(0.0,))
    assert fetched.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert list(tmp_path.iterdir()) == [fetched]


def test_the_next_call_continues_an_earlier_one(server: Server, tmp_path: Path) -> None:
    server.breaks = [120_000, 0, 0]
    target = tmp_path / "a.bin"
    with pytest.raises(
        InputError, match=r"a\.bin could not be fetched.*run the command again to continue"
    ):
        fetch(server.url("a.bin"), target, MD5, pauses=(0.0,))
    assert not target.exists()
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:120_000]
    server.breaks, server.asked = [], []
    assert fetch(server.url("a.bin"), target, MD5).read_bytes() == CONTENT
    assert server.asked == ["bytes=120000-"]


def test_a_server_without_ranges_is_asked_from_the_beginning(
    server: Server, tmp_path: Path
) -> None:
    server.ranges = False
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    assert fetch(server.url("a.bin"), tmp_path / "a.bin", MD5).read_bytes() == CONTENT


def test_a_complete_part_is_only_checked(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert fetch(server.url("a.bin"), tmp_path / "a.bin", MD5).read_bytes() == CONTENT
    assert server.asked == []


def test_where_there_is_more_than_the_server_has_the_checksum_decides(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    with pytest.raises(InputError, match=r"it was deleted; run the command again"):
        fetch(server.url("a.bin"), tmp_path / "a.bin", MD5)
    assert server.asked == [f"bytes={len(CONTENT) + 4}-"] and list(tmp_path.iterdir()) == []


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"checksum {MD5} instead of {'0' * 32}"):
        fetch(server.url("a.bin"), tmp_path / "a.bin", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_where_no_server_answers_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.bin"
        with pytest.raises(
            InputError, match=r"\(Connection refused\); run the command again, or"
        ) as caught:
            fetch(url, tmp_path / "a.bin", MD5, pauses=())
    assert "kept" not in str(caught.value) and "urlopen" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_says_no_is_asked_once(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(InputError, match=r"could not be fetched.*Not Found.*by hand"):
        fetch(server.url("a.bin"), tmp_path / "a.bin", MD5, pauses=(0.0, 0.0))
    assert len(server.asked) == 1
    server.status, server.asked = 503, []
    with pytest.raises(InputError, match="Service Unavailable"):
        fetch(server.url("a.bin"), tmp_path / "a.bin", MD5, pauses=(0.0, 0.0))
    assert len(server.asked) == 3


# --- archives -------------------------------------------------------------------------------------

GOOD = {"Birds/images/001.A/a 1.jpg": b"one", "Birds/images.txt": b"two", "other.txt": b"three"}


def tar_of(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


def zip_of(files: dict[str, bytes], *extra: zipfile.ZipInfo) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
        for info in extra:
            file.writestr(info, "target")
    return buffer.getvalue()


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_a_sound_archive_is_unpacked_whole(make: object, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(make(GOOD))
    (tmp_path / ".Birds.unpacking" / "Birds" / "images").mkdir(parents=True)  # of a killed process
    unpack(tmp_path / "a", "Birds", tmp_path)
    assert (tmp_path / "Birds" / "images" / "001.A" / "a 1.jpg").read_bytes() == b"one"
    assert (tmp_path / "Birds" / "images.txt").read_bytes() == b"two"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Birds", "a"]


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


MALICIOUS = {
    "parent": tar_of({**GOOD, "Birds/../../evil": b"x"}),
    "absolute": tar_of({**GOOD, "/tmp/evil": b"x"}),
    "backslash": tar_of({**GOOD, "Birds\\..\\..\\evil": b"x"}),
    "drive": tar_of({**GOOD, "C:/evil": b"x"}),
    "folder": tar_of(GOOD, special("../evil", tarfile.DIRTYPE)),
    "symlink": tar_of(GOOD, special("Birds/evil", tarfile.SYMTYPE, "/etc/passwd")),
    "inner symlink": tar_of(GOOD, special("Birds/evil", tarfile.SYMTYPE, "images.txt")),
    "hard link": tar_of(GOOD, special("Birds/evil", tarfile.LNKTYPE, "Birds/images.txt")),
    "device": tar_of(GOOD, special("Birds/evil", tarfile.CHRTYPE)),
    "pipe": tar_of(GOOD, special("Birds/evil", tarfile.FIFOTYPE)),
    "zip parent": zip_of({**GOOD, "../evil": b"x"}),
    "zip absolute": zip_of({**GOOD, "/evil": b"x"}),
}


def _zip_link() -> bytes:
    info = zipfile.ZipInfo("Birds/evil")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return zip_of(GOOD, info)


MALICIOUS["zip symlink"] = _zip_link()


@pytest.mark.parametrize("name", MALICIOUS)
def test_an_archive_with_surprises_is_refused_whole(name: str, tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "a").write_bytes(MALICIOUS[name])
    with pytest.raises(InputError, match=r"was not unpacked: its entry .*evil"):
        unpack(root / "a", "Birds", root)
    assert [path.name for path in root.iterdir()] == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no archive", "could not be unpacked"),
        (tar_of(GOOD)[:-30], "could not be unpacked"),
        (tar_of({"Else/a": b"x"}), "holds no folder Birds"),
    ],
    ids=["no archive", "cut short", "another folder"],  # an archive holds the time it was made
)
def test_a_damaged_archive_leaves_nothing(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        unpack(tmp_path / "a", "Birds", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- both -----------------------------------------------------------------------------------------


def source_of(server: Server, size: int = 1000) -> Source:
    return Source(server.url("b.tgz"), hashlib.md5(server.content).hexdigest(), size, "Birds")


def test_download_fetches_unpacks_and_cleans_up(server: Server, tmp_path: Path) -> None:
    server.content = tar_of({**GOOD, "Birds/noise": CONTENT})
    server.breaks = [1000]
    root = tmp_path / "data"
    assert download("cub", root, source_of(server)) == root / "Birds"
    assert [path.name for path in root.iterdir()] == ["Birds"]
    asked = len(server.asked)
    assert download("cub", root, source_of(server)) == root / "Birds"
    assert len(server.asked) == asked


def test_a_second_download_of_the_same_data_is_refused(server: Server, tmp_path: Path) -> None:
    """Two would write into one file; the first goes on undisturbed."""
    server.content = tar_of(GOOD)
    server.may_answer.clear()
    source = source_of(server)
    code = f"from dataset.download import Source, download; download('cub', '.', {source})"
    first = start_python("-c", code, cwd=tmp_path)
    wait_for(lambda: server.asked)
    with pytest.raises(HeldError, match="another process is changing"):
        download("cub", tmp_path, source)
    server.may_answer.set()
    assert first.wait(60) == 0 and len(server.asked) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["Birds"]
    assert download("cub", tmp_path, source) == tmp_path / "Birds"


@pytest.mark.parametrize("moment", ["unpack", "shutil.rmtree", "Path.unlink"])
def test_a_download_killed_as_it_unpacks_or_after_leaves_nothing(
    moment: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content = tar_of(GOOD)

    def killed() -> None:
        monkeypatch.setattr(f"dataset.download.{moment}", lambda *_, **__: os._exit(9))
        download("cub", tmp_path, source_of(server))

    first = multiprocessing.get_context("fork").Process(target=killed)
    first.start()
    first.join(60)
    assert first.exitcode == 9 and (tmp_path / "b.tgz.part").exists()
    assert download("cub", tmp_path, source_of(server)) == tmp_path / "Birds"
    assert [path.name for path in tmp_path.iterdir()] == ["Birds"]
    assert len(server.asked) == 1, "all of it is there"


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk that takes no more than `size` bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("content", "refused", "asked"),
    [
        ({"Birds/noise": CONTENT}, r"b\.tgz\.part", [None, "bytes=100000-"]),
        ({"Birds/zeros": bytes(300_000)}, "Birds", [None]),
    ],
    ids=["fetching", "unpacking"],
)
def test_a_disk_that_takes_no_more_is_not_the_networks_fault(
    content: dict[str, bytes], refused: str, asked: list, server: Server, tmp_path: Path
) -> None:
    """So nothing is tried again at once; the same command goes on from what has arrived."""
    server.content = tar_of(content)
    with no_file_above(100_000), pytest.raises(MachineError) as error:
        download("cub", tmp_path, source_of(server))
    assert re.fullmatch(
        rf"cannot write {tmp_path}/{refused}: File too large; check its disk and run the command "
        "again( to continue)?",
        str(error.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["b.tgz.part"]
    assert download("cub", tmp_path, source_of(server)) == tmp_path / "Birds"
    assert server.asked == asked and [path.name for path in tmp_path.iterdir()] == ["Birds"]


def test_an_archive_put_there_by_hand_is_used_and_kept(server: Server, tmp_path: Path) -> None:
    server.content = tar_of(GOOD)
    (tmp_path / "b.tgz").write_bytes(server.content)
    download("cub", tmp_path, source_of(server))
    assert server.asked == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Birds", "b.tgz"]


def test_another_archive_of_that_name_is_not_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "b.tgz").write_bytes(b"something else")
    with pytest.raises(InputError, match="not the published archive"):
        download("cub", tmp_path, source_of(server))
    assert (tmp_path / "b.tgz").read_bytes() == b"something else"


def test_a_full_disk_is_noticed_before_the_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"GB free and b\.tgz needs"):
        download("cub", tmp_path, source_of(server, size=10**16))
    assert server.asked == []


def test_a_data_root_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"cannot write .*data: .*--data-root"):
        download("cub", tmp_path / "file" / "data")


def test_what_has_no_public_link_says_where_to_get_it(tmp_path: Path) -> None:
    for name in ("cars", "inshop", "vid", "emoji"):
        with pytest.raises(InputError, match=f"{name} cannot be downloaded from here: ") as caught:
            download(name, tmp_path)
        assert dataset.find(name).origin in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert set(SOURCES) == {"cub", "sop"}


def test_a_folder_that_is_there_is_not_called_complete(tmp_path: Path) -> None:
    (tmp_path / "CUB_200_2011").mkdir()
    done = run_python("-m", "dataset", "download", "cub", "--data-root", str(tmp_path))
    assert done.returncode == 0
    assert "nothing is downloaded" in done.stderr and "complete" not in done.stdout + done.stderr
    assert f"`python -m dataset check cub --data-root {tmp_path}`" in done.stdout
