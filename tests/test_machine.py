"""The cores and memory available to us."""

from pathlib import Path

import pytest

from app.machine import available_cpus, available_memory


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, 5),
        ({"cpu.max": "9900000 100000\n"}, 5),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 5),
        ({}, 5),
    ],
)
def test_cores_by_affinity_and_control_group(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3, 7}, raising=False)
    for name, content in files.items():
        write(tmp_path / name, content)
    assert available_cpus(tmp_path) == cpus


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/system.slice/cifar.service\n", {"system.slice/cifar.service/cpu.max": "200000 100000"}, 2),
        ("0::/system.slice/cifar.service\n", {"system.slice/cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "300000 100000", "cpu.max": "max 100000"}, 3),
        ("0::/a\n", {"b/cpu.max": "100000 100000"}, 5),
        ("0::/not/seen/in/this/container\n", {"cpu.max": "100000 100000"}, 1),
        (
            "3:memory:/m\n2:cpu,cpuacct:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("nonsense\n", {}, 5),
    ],
)
def test_a_cpu_quota_may_come_from_this_control_group_or_a_parent(
    groups: str, files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1, 2, 3, 7}, raising=False)
    (tmp_path / "own").write_text(groups)
    for name, content in files.items():
        write(tmp_path / "groups" / name, content)
    assert available_cpus(tmp_path / "groups", tmp_path / "own") == cpus


@pytest.mark.parametrize(
    ("groups", "files", "memory"),
    [
        ("0::/\n", {"memory.max": "3000000000\n"}, 3e9),
        ("0::/\n", {"memory.max": "max\n"}, 8e9),
        ("0::/a/b\n", {"a/memory.max": "2000000000\n", "a/b/memory.max": "max\n"}, 2e9),
        ("3:memory:/a\n", {"memory/a/memory.limit_in_bytes": "1000000000\n"}, 1e9),
        ("3:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8e9),
        ("", {}, 8e9),
    ],
)
def test_memory_by_machine_and_control_group(
    groups: str, files: dict[str, str], memory: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2_000_000, "SC_PAGE_SIZE": 4000}.get, raising=False)
    (tmp_path / "own").write_text(groups)
    for name, content in files.items():
        write(tmp_path / "groups" / name, content)
    assert available_memory(tmp_path / "groups", tmp_path / "own") == memory


def write(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
