"""Downloads a published data set, on request only: resumed, checked, and unpacked safely.

What arrives is kept as `<archive>.part` until it is unpacked, and an interrupted transfer is
continued by the next call; `<archive>` itself is one that the user has put there, and stays. An
archive is unpacked only if its checksum is right, and the folder gets its final name only when all
of it is unpacked. Unpacking stops at an entry that is no plain file or folder, or that would be
outside the target folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO

import dataset
from bars import Bar
from dataset.base import ROOT
from dataset.decoding import reason
from storage import held, in_bytes
from terminal import notice_if_slow
from utils import InputError, not_written

logger = logging.getLogger("dataset")

_BLOCK = 1 << 20
_TIMEOUT = 60  # seconds without a byte
_PAUSES = (1, 5, 20)  # seconds before each further attempt


@dataclass(frozen=True)
class Source:
    """A public archive.

    Attributes:
        url: its address. md5: its published checksum. size: bytes, for the check of free space.
        folder: the folder inside that becomes `<data root>/<folder>`.
    """

    url: str
    md5: str
    size: int
    folder: str

    @property
    def file_name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


SOURCES = {
    "cub": Source(
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "97eceeb196236b17998738112f37df78",
        1_150_585_339,
        "CUB_200_2011",
    ),
    "sop": Source(
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "7f73d41a2f44250d4779881525aea32e",
        3_000_000_000,
        "Stanford_Online_Products",
    ),
}


def download(name: str, root: str | Path = ROOT, source: Source | None = None) -> Path:
    """Fetches and unpacks a data set under the data root.

    Args:
        name: the name of the data set. source: an archive to use instead of the public one.

    Returns:
        The folder of the data set; if it exists already, nothing is downloaded.

    Raises:
        InputError: there is no public link, it cannot be reached, the checksum is wrong, the disk
            is full, or the archive is not safe to unpack.
        HeldError: another process is fetching it.
    """
    entry = dataset.find(name)
    source = source or SOURCES.get(entry.name)
    if source is None:
        origin = entry.origin or "no public link to it is known"
        raise InputError(f"{entry.name} cannot be downloaded from here: {origin}")
    root = Path(root)
    target = root / source.folder
    if target.exists():
        with contextlib.suppress(InputError), held(target):
            _remove_remains(source, root)
        logger.info("%s is there already; nothing is downloaded", target)
        return target
    _check_writable(root)
    with held(target):
        if not target.exists():  # another process may have made it since the first check
            _fetch_and_unpack(source, root)
    logger.info("%s is complete", target)
    return target


def _fetch_and_unpack(source: Source, root: Path) -> None:
    archive = root / source.file_name
    if not archive.exists():
        _check_space(root, source)
        archive = fetch(source.url, archive, source.md5)
    elif _md5(archive) != source.md5:
        raise InputError(
            f"{archive} is there already but not the published archive (another MD5 checksum); "
            "move it away and run the command again"
        )
    unpack(archive, source.folder, root)
    _remove_remains(source, root)


def _remove_remains(source: Source, root: Path) -> None:
    """Removes what is left of a download that is unpacked, unless the disk does not let it."""
    shutil.rmtree(_unpacking(root, source.folder), ignore_errors=True)
    with contextlib.suppress(OSError):
        _part(root / source.file_name).unlink()


def _check_writable(root: Path) -> None:
    """Make the data root; raises InputError if nothing can be written there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise not_written(root, error, "or give another folder (--data-root)") from error


def _check_space(root: Path, source: Source) -> None:
    # Twice its size, for the archive and its content: JPEGs hardly shrink in an archive.
    need = 2 * source.size - _size(_part(root / source.file_name))
    free = shutil.disk_usage(root).free
    if free < need:
        raise InputError(
            f"{root} has {in_bytes(free)} free and {source.file_name} needs {in_bytes(need)} to be "
            "fetched and unpacked; free some space or give another --data-root"
        )
    logger.info(
        "%s has %s; with its unpacked files it takes %s of the %s that %s has free",
        *(source.file_name, in_bytes(source.size), in_bytes(need), in_bytes(free), root),
    )


# --- the transfer ---------------------------------------------------------------------------------


def fetch(url: str, archive: Path, md5: str, pauses: tuple[float, ...] = _PAUSES) -> Path:
    """Download `url` to `<archive>.part`, continuing it if it exists; returns its path.

    Args:
        archive: where a user would put the file. md5: the checksum of the whole file.
        pauses: seconds before further attempts.

    Raises:
        InputError: not reachable after all attempts, or another checksum (the part is deleted).
    """
    part = _part(archive)
    if part.exists() and _md5(part) == md5:  # a process was killed as it unpacked it
        return part
    attempts = 0
    while True:
        before = _size(part)
        try:
            _transfer(url, part)
            break
        except (OSError, HTTPException) as error:
            attempts = 0 if _size(part) > before else attempts  # only those without progress count
            if attempts == len(pauses) or _is_final(error):
                again = "run the command again"
                kept = f"the part that arrived is kept in {part}: {again} to continue"
                raise InputError(
                    f"{url} could not be fetched ({_why(error)}); "
                    f"{kept if _size(part) else again}, or put the archive at {archive} by hand"
                ) from error
            logger.warning("%s: %s; trying again in %s s", url, _why(error), pauses[attempts])
            time.sleep(pauses[attempts])
            attempts += 1
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise InputError(
            f"{url} has the MD5 checksum {found} instead of {md5}: it is damaged or not the "
            "published file; it was deleted; run the command again"
        )
    return part


def _part(archive: Path) -> Path:
    return archive.with_name(archive.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _why(error: Exception) -> str:
    """The reason of an error, without urllib's wrapper."""
    inner = getattr(error, "reason", None)
    return reason(inner if isinstance(inner, Exception) else error)


def _is_final(error: Exception) -> bool:
    """Whether another attempt is useless, because the server refuses."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500


def _transfer(url: str, part: Path) -> None:
    """One attempt to download the missing part; returns when the file is complete."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "python-dataset-download"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # there is nothing more: the checksum decides
            return
        raise
    with contextlib.closing(response):
        continued = response.status == 206 and _starts_at(response, have)
        start = have if continued else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with _on_disk(part):
            file = part.open("r+b" if continued else "wb")
        with file:
            file.seek(start)
            _copy(response, file, start, total, part)
    if total is not None and part.stat().st_size < total:
        raise ConnectionError("the connection was closed too early")


def _starts_at(response: HTTPResponse, offset: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _copy(source: HTTPResponse, file: IO[bytes], start: int, total: int | None, part: Path) -> None:
    look = {"unit": "B", "unit_scale": True, "leave": True}
    with Bar(part.name, total, initial=start, **look) as bar:
        while block := source.read(_BLOCK):
            with _on_disk(part):
                file.write(block)
                file.flush()
            bar.update(len(block))


@contextlib.contextmanager
def _on_disk(part: Path) -> Iterator[None]:
    """Raises MachineError if the disk fails, which another attempt would not mend."""
    try:
        yield
    except OSError as error:
        raise not_written(part, error, "and run the command again to continue") from error


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)  # the checksum that the publishers give
    with path.open("rb") as file, notice_if_slow(f"comparing the checksum of {path.name}"):
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# --- unpacking ------------------------------------------------------------------------------------


def unpack(archive: Path, folder: str, root: Path) -> Path:
    """Unpack `folder`/ of an archive to `root`/`folder`, whole or not at all.

    Raises:
        InputError: an entry is absolute, leads out of the folder, or is a link or a device; the
            archive is damaged or holds no such folder.
        MachineError: the disk is full, or fails.
    """
    target, temporary = root / folder, _unpacking(root, folder)
    try:
        if temporary.exists():  # a process that was killed has left it
            shutil.rmtree(temporary)
        temporary.mkdir()
        with notice_if_slow(f"unpacking {archive.name}"):
            _extract(archive, temporary)
        content = temporary / folder
        if not content.is_dir():
            raise InputError(f"{archive} holds no folder {folder}; it is not the published archive")
        content.chmod(0o755)
        content.replace(target)
    except (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile) as error:
        if isinstance(error, OSError) and error.errno:  # gzip's have no number
            raise not_written(target, error, "and run the command again") from error
        raise InputError(
            f"{archive} could not be unpacked ({reason(error)}); get it again from its source"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _unpacking(root: Path, folder: str) -> Path:
    return root / f".{folder}.unpacking"


def _extract(archive: Path, folder: Path) -> None:
    if not zipfile.is_zipfile(archive):
        with tarfile.open(archive) as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # older Pythons have none
            for member in tar:
                _check_entry(archive, member.name, member.isreg() or member.isdir())
                if member.isreg():
                    tar.extract(member, folder, set_attrs=False)
        return
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            _check_entry(archive, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            file.extract(info, folder)


def _check_entry(archive: Path, name: str, plain: bool) -> None:
    """Raise InputError unless an entry is a file or folder inside the target folder."""
    clean = name.replace("\\", "/")
    outside = clean.startswith("/") or clean[1:2] == ":" or ".." in clean.split("/")
    if outside or not plain:
        what = "outside the target folder" if plain else "a link or a device, not a regular file"
        raise InputError(
            f"{archive} was not unpacked: its entry {name!r} is {what}, and no published archive "
            "has such an entry; get it from its source again"
        )
