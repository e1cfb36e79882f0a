"""How processes find each other: what is wrong is one sentence, and nobody waits without end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import together
from conftest import ROOT
from PIL import Image

import dataset
import devices
import processes
from processes import meeting, watching
from processes.meeting import Place
from training.data import Data, HeldOut
from training.data import load as load_data
from training.describing import describe
from utils import InputError

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


# --- what a launcher has set ----------------------------------------------------------------------


def test_without_a_launcher_there_is_no_place():
    assert Place.of({"MASTER_ADDR": "localhost"}) is None
    # RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS, outside of a job
    assert Place.of({"RANK": "", "WORLD_SIZE": "", "MASTER_ADDR": ""}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "no MASTER_ADDR and no MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "no MASTER_ADDR"),
        ({"RANK": ""}, "has WORLD_SIZE, as for one of several processes, but no RANK"),
        ({"WORLD_SIZE": None}, "has RANK, as for one of several processes, but no WORLD_SIZE"),
        ({"RANK": None}, "has WORLD_SIZE, as for one of several processes, but no RANK"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": "2"}, "from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": "²"}, "RANK is '²'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0'"),
        ({"MASTER_PORT": "99999"}, "from 1 to 65535"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK is 'a'"),
    ],
)
def test_what_makes_no_sense_is_named(changes, words):
    environment = {k: v for k, v in {**WHOLE, **changes}.items() if v is not None}
    with pytest.raises(InputError, match=words.replace("²", ".")):
        Place.of(environment)


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_the_limit_is_a_number_of_seconds(text):
    with pytest.raises(InputError, match="has to be a number of seconds"):
        meeting.longest_wait({meeting.WAIT: text})
    assert meeting.longest_wait({}) == meeting.LONGEST_WAIT
    assert meeting.longest_wait({meeting.WAIT: "7"}) == 7


# --- waiting --------------------------------------------------------------------------------------


@pytest.fixture
def port(monkeypatch) -> int:
    """A free port; who waits says so at once, and gives up soon."""
    monkeypatch.setattr(meeting, "WORD", 0.05)
    monkeypatch.setenv(meeting.WAIT, "0.6")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def taken(port) -> Iterator[int]:
    """A port on which another program listens, and says nothing."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        yield port


def place(number: int, count: int, port: int) -> Place:
    return Place(number, count, "127.0.0.1", port, 0, number == 0)


def test_who_does_not_come_is_named_and_waited_for_up_to_the_limit(port, capsys):
    first = place(0, 3, port)
    with pytest.raises(InputError, match=r"process 0 has waited 1 s for process 1, 2 of 3; start"):
        first.meet(first.store())
    assert capsys.readouterr().err == "process 0 waits for process 1, 2 of 3\n"


def test_a_store_that_is_never_opened_is_named(port, capsys):
    with pytest.raises(InputError, match=f"for process 0 at 127.0.0.1, port {port} .*refused"):
        place(1, 2, port).store()
    assert "process 1 waits for process 0 at 127.0.0.1" in capsys.readouterr().err


def test_a_port_in_use_is_a_sentence(taken):
    with pytest.raises(InputError, match="another program uses that port; choose a free MASTER"):
        place(0, 2, taken).store()


def test_a_port_that_only_root_may_use_is_a_sentence(port, monkeypatch):
    def refused(*_: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refused)
    with pytest.raises(InputError, match=r"that port cannot be used \(Permission denied\); choose"):
        place(0, 2, port).store()


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_store_for_this_machine_is_found_by_no_other_address(address, port):
    """And it knows who comes by an address that /etc/hosts has: no name server is asked."""
    first, second = (replace(place(n, 2, port), address=address) for n in range(2))
    kept = first.store()
    second.store().set("word", "here")
    assert kept.get("word") == b"here"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5)


@pytest.mark.parametrize("address", ["127.0.0.2", "::1"])
def test_a_store_is_found_by_the_address_it_is_known_by(address, port):
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    first, second = (replace(place(n, 2, port), address=address) for n in range(2))
    kept = first.store()
    second.store().set("word", "here")
    assert kept.get("word") == b"here"


def test_a_program_that_is_no_store_is_not_waited_for(taken, monkeypatch):
    monkeypatch.setattr(meeting, "ANSWER", 0.5)
    with pytest.raises(InputError, match="what listens there is not a store"):
        place(1, 2, taken).store()


def test_a_store_that_lets_a_connection_fall_is_asked_again(port, monkeypatch):
    kept, connect, tried = place(0, 2, port).store(), meeting.dist.TCPStore, []

    class Falling(connect):
        def __init__(self, *arguments, **options):
            tried.append(arguments)
            if len(tried) < meeting.TRIES:
                raise RuntimeError("failed to recv, got 0 bytes")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(meeting.dist, "TCPStore", Falling)
    place(1, 2, port).store().set("word", "here")
    assert kept.get("word") == b"here" and len(tried) == meeting.TRIES


def test_a_store_that_is_slow_to_answer_is_asked_once(port, monkeypatch):
    """As where a name server's answer is lost, which torch waits for at each connection."""
    kept, connect, tried = place(0, 2, port).store(), meeting.dist.TCPStore, []

    class Slow(connect):
        def __init__(self, *arguments, **options):
            tried.append(arguments)
            time.sleep(2)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(meeting.dist, "TCPStore", Slow)
    monkeypatch.setattr(meeting, "ANSWER", 5.0)
    place(1, 2, port).store().set("word", "here")
    assert kept.get("word") == b"here" and len(tried) == 1


def test_a_store_that_is_open_is_not_knocked_at_first(port, monkeypatch):
    """A knock is a connection too, for which the store looks for a name."""
    kept, second, knocked = place(0, 2, port).store(), place(1, 2, port), []
    knock = Place._closed
    monkeypatch.setattr(Place, "_closed", lambda self: knocked.append(1) or knock(self))
    second.store().set("word", "here")
    assert kept.get("word") == second.another().get("word") == b"here" and len(knocked) == 1


def test_two_of_one_number_and_other_counts_are_refused(port):
    first = place(0, 2, port)
    store = first.store()
    second = place(1, 3, port)

    def come() -> None:
        with contextlib.suppress(InputError):
            second.meet(second.store())

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(InputError, match="WORLD_SIZE=2 and process 1 with WORLD_SIZE=3"):
        first.meet(store)
    thread.join()
    with pytest.raises(InputError, match="two processes with RANK=0"):
        first.meet(store)


def test_a_store_that_falls_silent_is_not_waited_for(monkeypatch):
    """As when the network is cut while some are still to come."""
    monkeypatch.setattr(watching, "BEAT", 0.05)
    monkeypatch.setattr(watching, "SILENCE", 0.2)

    class Silent:
        def __getattr__(self, name: str):
            return lambda *_: time.sleep(5)

    with pytest.raises(InputError, match=r"process 1 stops: the store at .* has not answered for"):
        place(1, 2, 29500).meet(Silent())


# --- the same command, the same images ------------------------------------------------------------


def test_what_differs_is_named_in_all_processes(tmp_path):
    def work() -> str:
        processes.check_alike(lambda: {"--lr": 0.1, "--seed": 1}, "never said")
        own = {"--lr": 0.1, "--seed": processes.rank()}
        with pytest.raises(InputError) as raised:
            processes.check_alike(lambda: own, "give all the same")
        return str(raised.value)

    said = "the processes differ in --seed: it is 0 in process 0 and 1 in process 1; give all the"
    assert together.run(3, work, tmp_path) == [f"{said} same"] * 3


def test_images_are_compared_by_what_is_in_the_files(tmp_path):
    """As on two machines that keep their copies in folders of other names."""
    for rank, (copies, others) in enumerate([(10, 10), (10, 60)]):
        for name, first in (("copies", copies), ("others", others)):
            for k in range(8):
                file = tmp_path / f"{name}{rank}" / "abcd"[k % 4] / f"{k}.bmp"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (first + k, 0, 0)).save(file)  # all of one size

    def work() -> str:
        def load(name: str) -> Data:
            choice = dataset.Choice(f"folder:{tmp_path}/{name}{processes.rank()}")
            return load_data(choice, HeldOut(), 2)

        assert len(load("copies").train) == 4
        with pytest.raises(InputError) as raised:
            load("others")
        return str(raised.value)

    for said in together.run(2, work, tmp_path):
        assert said.startswith("the processes differ in their training images: it is 4 (")


def test_processes_of_another_precision_are_refused(images, tmp_path, monkeypatch):
    """As on two machines of which one computes in bfloat16, with --amp auto."""

    def work() -> str:
        monkeypatch.setattr(devices, "bf16_is_fast", lambda device: processes.rank() == 1)
        with pytest.raises(InputError) as raised:
            tiny.prepare(images)
        return str(raised.value)

    said = "the processes differ in their precision: it is off in process 0 and bf16 in process 1; "
    for found in together.run(2, work, tmp_path):
        assert found.startswith(said)


def test_only_the_machine_that_writes_the_run_needs_room_for_it(images, tmp_path, monkeypatch):
    def work() -> str:
        full = processes.rank() == 1
        monkeypatch.setattr("storage.space.free_space", lambda folder: 0 if full else 1e12)
        return describe(tiny.prepare(images))

    assert "1.0 TB free" in together.run(2, work, tmp_path)[1]


def test_images_are_told_apart_by_names_and_sizes(images, tmp_path):
    def fingerprints(root: Path) -> dict[str, str]:
        data = tiny.prepare(root).data
        return Data(data.train, data.selection, data.test).fingerprints()

    other = tiny.write_images(tmp_path / images.name)
    assert fingerprints(images) == fingerprints(other)
    (other / "eval" / "eval0" / "0.png").rename(other / "eval" / "eval0" / "new.png")
    one, two = fingerprints(images), fingerprints(other)
    assert [name for name in one if one[name] != two[name]] == ["their evaluation images"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["--seed", "--lr", "--epochs", "--save-every", "images"])
def test_processes_that_differ_end_with_a_sentence_and_status_2(what, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for number in range(2):
        folder = tmp_path / str(number)
        images = 6 + number if what == "images" else 6
        tiny.write_images(folder / "own", images=images)
        more = [] if what == "images" else [what, str(number + 1)]
        environment = {**WHOLE, "RANK": str(number), "MASTER_PORT": str(port)}
        command = [ROOT / "train.py", "--dataset", "folder:own", *tiny.NETWORK, *more]
        started.append(
            subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**os.environ, **environment},
                text=True,
                stderr=subprocess.PIPE,
            )
        )
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2], said
    name = "their training images" if what == "images" else what
    assert f"error: the processes differ in {name}" in said[0] and "Traceback" not in said[0]
    assert not list(tmp_path.glob("*/logs/*"))
