"""The host's memory, within the limits of control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lowmem_npo.environment import available_memory

MIB = 2**20
NAMES = {
    "v2": ("memory.max", "memory.current", "inactive_file", "sys/fs/cgroup", "0::"),
    "v1": (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "sys/fs/cgroup/memory", "4:memory:",
    ),
}  # fmt: skip


def cgroups(root: Path, version: str, path: str, groups: dict[str, tuple[object, int, int | None]]) -> int:
    """What is available, in MiB, to a process in the group `path`; groups: limit, use and what of it are files."""
    limit, used, files, mount, prefix = NAMES[version]
    for name, (most, now, cached) in groups.items():
        folder = root / mount / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{most * MIB if isinstance(most, int) else most}\n")
        (folder / used).write_text(f"{now * MIB}\n")
        if cached is not None:
            (folder / "memory.stat").write_text(f"anon 1\n{files} {cached * MIB}\nactive_file 7\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"9:name=systemd:/user\n{prefix}{path}\n")
    return available_memory(root) // MIB


@pytest.mark.parametrize("version", NAMES)
@pytest.mark.parametrize(
    ("path", "groups", "available"),
    [
        ("/", {"": (100, 30, None)}, 70),
        ("/", {"": (100, 90, 50)}, 60),  # of which 50 are files that were read
        ("/job/step", {"": (100, 30, 0), "job": (60, 40, 5), "job/step": (200, 20, 0)}, 25),  # its job's limit
        ("/job/step", {"job": (200, 40, 5), "job/step": (50, 40, 1), "other": (1, 1, 0)}, 11),
        ("/docker/id", {"": (100, 30, 0)}, 70),  # the container sees its own group as the root, under another name
        ("/", {"": (100, 130, 0)}, 0),
    ],
)
def test_the_tightest_limit_counts(version, path, groups, available, tmp_path):
    assert cgroups(tmp_path, version, path, groups) == available


def test_without_a_limit_it_is_the_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5 * MIB}))
    assert available_memory(tmp_path) == 5 * MIB
    assert cgroups(tmp_path, "v2", "/job", {"job": ("max", 1, 0)}) == 5
