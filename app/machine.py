"""How much of the machine we may use: its figures, capped by the limits of this process's control groups."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def available_cpus(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> int:
    """How many cores this process may really use, not how many the host has. More threads starve each other."""
    cpus = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _groups(cgroups, own, "cpu"):
        quota, period = _numbers(group / "cpu.max", 2)  # version 2: "200000 100000" or "max 100000"
        if quota is None:
            (quota,), (period,) = _numbers(group / "cpu.cfs_quota_us", 1), _numbers(group / "cpu.cfs_period_us", 1)
        if quota is not None and period:
            cpus = min(cpus, quota / period)
    return max(1, math.ceil(cpus))


def available_memory(cgroups: Path = CGROUPS, own: Path = OWN_GROUPS) -> float:
    """How many bytes this process and the others in its control groups may use; infinite if unknown."""
    try:
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        memory = math.inf
    for group in _groups(cgroups, own, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):  # version 2, version 1
            (limit,) = _numbers(group / name, 1)
            memory = min(memory, math.inf if limit is None else limit)
    return memory


def _groups(cgroups: Path, own: Path, controller: str) -> Iterator[Path]:
    """The visible folders of the control groups that this process is in, the outermost last.

    See cgroups(7). In a container the process's own group is often at the root, whatever path the kernel names.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    paths = {names: path for _, names, path in (line.split(":", 2) for line in lines if line.count(":") >= 2)}
    version_1 = next((path for names, path in paths.items() if controller in names.split(",")), "/")
    for root, path in ((cgroups, paths.get("", "/")), (cgroups / controller, version_1)):
        folder = root / path.strip("/")
        yield from (each for each in (folder, *folder.parents) if each == root or root in each.parents)


def _numbers(file: Path, count: int) -> list[int | None]:
    """The words of a file of `count` words, None for each that is not a whole number; all None for any other file."""
    try:
        words = file.read_text().split()
    except OSError:
        words = []
    return [int(word) if word.isdigit() else None for word in words] if len(words) == count else [None] * count
