"""How much of the machine is ours."""

import math
import os
from pathlib import Path


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may really use: its affinity, cut down to its control group's quota if there is one.

    The host's core count is neither; more threads than this starve each other.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # version 2: "200000 100000" or "max 100000"
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:  # version 1; a quota of -1 means none
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return cpus
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return cpus
    return max(1, min(cpus, math.ceil(int(quota) / int(period))))
