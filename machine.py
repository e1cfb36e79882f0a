"""Facts about this machine that are known without torch: home, name, cores."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def expanded(path: str) -> str:
    """A path with `~` expanded as by a shell; unchanged if no home folder is known."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path.expanduser would raise there)


def home() -> Path | None:
    """The user's home folder; None if neither $HOME nor the system knows one."""
    found = Path(expanded("~"))
    return found if found.is_absolute() else None


def host() -> str:
    """A name that this machine, or this container, shares with no other."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # machines cloned from one image share a name
    with contextlib.suppress(OSError):
        return f"{platform.node()} {boot.read_text().strip()}"
    return platform.node()


def cores(root: Path = Path("/")) -> int:
    """The number of CPU cores that this process may use, given its affinity and its container.

    Args:
        root: the folder of `proc` and `sys`.
    """
    bound = getattr(os, "sched_getaffinity", None)  # macOS has no such thing
    count = len(bound(0)) if bound else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(share) for share in _cpu_shares(root))]))


def _cpu_shares(root: Path) -> Iterator[float]:
    """The limits, in cores, that Linux's control groups put on this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        above = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the group's own folder is mounted as the root.
        for folder in {above, *(above / part for part in _prefixes(group))}:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota = int((folder / "cpu.cfs_quota_us").read_text())
                    period = int((folder / "cpu.cfs_period_us").read_text())
                else:
                    quota, period = map(int, (folder / "cpu.max").read_text().split())
                if quota > 0:
                    yield quota / period


def _prefixes(group: str) -> Iterator[Path]:
    """`/a/b` → a, a/b."""
    parts = group.strip("/").split("/")
    return (Path(*parts[: end + 1]) for end in range(len(parts)))
