"""Two machines, as network namespaces with names of their own: needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"),
        reason="makes network namespaces",
    ),
]

PORT = "29500"  # free in a namespace of its own
WORK = """
import os, sys, time
import door
door.enter()
import processes
from processes import watching
from utils import sentence_errors

watching.BEAT, watching.SILENCE = 0.2, 3.0
steps = int(sys.argv[1])
with processes.ended_at_once(), sentence_errors(), processes.joined():
    print("together", file=sys.stderr, flush=True)
    for _ in range(steps):
        processes.barrier()
        time.sleep(0.05)
"""

NAME_SERVER = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 53))
    print("ready", flush=True)
    while True:
        asked, who = server.recvfrom(4096)
        print("asked", flush=True)
        server.sendto(asked[:2] + bytes([0x81, 0x83]) + asked[4:], who)  # there is no such name
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two machines with a cable between them: 10.9.8.1 and 10.9.8.2."""
    names = [f"anchorage{os.getpid()}{letter}" for letter in "ab"]
    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr}")
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        one, other = names
        ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "cable", "netns", other)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.9.8.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)


def start(machines: Sequence[str], hosts: Path, master: str, steps: int) -> list[subprocess.Popen]:
    """One process on each machine; `hosts` is what their /etc/hosts hold, {name} for their own."""
    started = []
    for number, name in enumerate(machines):
        own = hosts.with_name(f"hosts of {name}")
        own.write_text(hosts.read_text().format(name=name))
        inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        words = [sys.executable, "-c", WORK, str(steps)]
        environment = {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_PORT": PORT}
        started.append(
            subprocess.Popen(
                [*f"ip netns exec {name} unshare --uts sh -c".split(), inside, name, own, *words],
                cwd=ROOT,
                env={**os.environ, **environment, "MASTER_ADDR": master},
                text=True,
                stderr=subprocess.PIPE,
            )
        )
    return started


@pytest.mark.parametrize(
    ("hosts", "master"),
    [
        ("127.0.0.1 localhost\n127.0.1.1 {name}\n", "10.9.8.1"),  # as Debian has it
        ("127.0.0.1 localhost\n", "10.9.8.1"),
        ("127.0.0.1 localhost\n10.9.8.1 first\n127.0.1.1 {name}\n", "first"),
    ],
    ids=["a name of its own alone", "no name", "a name of the first"],
)
def test_machines_find_each_other_whatever_their_names_are(hosts, master, machines, tmp_path):
    (tmp_path / "hosts").write_text(hosts)
    started = start(machines, tmp_path / "hosts", master, steps=3)
    said = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said


def test_the_store_asks_no_name_server_who_comes_from_its_own_machine(machines, tmp_path):
    """Nobody is served meanwhile, and an answer may be lost. (The processes themselves do ask.)"""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    inside = f"ip netns exec {machines[0]}".split()
    with (tmp_path / "asked").open("w") as told:
        server = subprocess.Popen([*inside, sys.executable, "-c", NAME_SERVER], stdout=told)
    try:
        wait_for(lambda: "ready" in (tmp_path / "asked").read_text())
        words = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        command = [*inside, *["sh", "-c", words, tmp_path / "resolv.conf", sys.executable]]
        started = [
            subprocess.Popen(
                [*command, "-c", WORK, "3"],
                cwd=ROOT,
                env={**os.environ, **of_three, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT},
                text=True,
                stderr=subprocess.PIPE,
            )
            for of_three in ({"RANK": str(number), "WORLD_SIZE": "3"} for number in range(3))
        ]
        said = [process.communicate(timeout=200)[1] for process in started]
    finally:
        server.kill()
        server.wait()
    assert [process.returncode for process in started] == [0, 0, 0], said
    connections = 2 * len(started)  # each has one for its watch
    assert (tmp_path / "asked").read_text().count("asked") <= connections


def test_a_machine_that_loses_its_network_ends_all_with_a_sentence(machines, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    started = start(machines, tmp_path / "hosts", "10.9.8.1", steps=10**6)
    for process in started:
        while "together" not in (line := process.stderr.readline()):
            assert line, "it has ended"
    time.sleep(1)
    ip("-n", machines[1], "link", "set", "cable", "down")
    said = [process.communicate(timeout=30)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert f"process 1 on {machines[1]} has been silent for 3 s" in said[0]
    assert "the store at 10.9.8.1, port 29500 has not answered for 3 s" in said[1]
