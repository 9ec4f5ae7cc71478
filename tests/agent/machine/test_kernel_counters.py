"""The kernel's counters as values: of the machine, and of a cgroup of this very kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from agent.kernel_files import as_number, content, counted
from agent.machine import use
from agent.machine.cgroup_use import memory_events_of, use_of_cgroup
from agent.machine.pressure import pressure_of_machine
from agent.processes.cgroup import Cgroup
from protocol.machine import CgroupUse, MemoryEvents, ResourcePressure, Stall
from tests.support.cgroups import cgroup_corner

# What a kernel with all controllers has, by Documentation/admin-guide/cgroup-v2.rst.
FILES = {
    "cpu.stat": "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 0\n",
    "memory.current": "4096\n",
    "memory.peak": "8192\n",
    "memory.max": "max\n",
    "memory.swap.current": "0\n",
    "memory.events": "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 0\n",
    "pids.current": "3\n",
    "pids.max": "64\n",
    "io.stat": "254:0 rbytes=100 wbytes=20 rios=3 wios=2\n254:16 rbytes=1 wbytes=2\n",
}


def written(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


def test_every_controller_is_told_of(tmp_path: Path) -> None:
    assert use_of_cgroup(written(tmp_path, FILES)) == CgroupUse(
        cpu_us=1500,
        user_us=1000,
        system_us=500,
        memory_bytes=4096,
        memory_peak_bytes=8192,
        memory_limit_bytes=None,
        swap_bytes=0,
        pids=3,
        pids_limit=64,
        read_bytes=101,
        written_bytes=22,
        oom_kills=4,
    )
    assert memory_events_of(tmp_path) == MemoryEvents(high=1, max=2, oom=3, oom_kill=4)


def test_a_cgroup_that_has_used_no_disk_has_read_nothing(tmp_path: Path) -> None:
    told = use_of_cgroup(written(tmp_path, {**FILES, "io.stat": ""}))
    assert told is not None
    assert (told.read_bytes, told.written_bytes) == (0, 0)


async def test_without_controllers_only_the_processor_is_counted() -> None:
    async with cgroup_corner() as corner:
        cgroup = Cgroup.make(corner)
        enter = f"echo $$ >{cgroup.path}/cgroup.procs"
        work = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
        await trio.run_process(["sh", "-c", f"{enter}; {work}"])
        told = use_of_cgroup(cgroup.path)
        controllers = (cgroup.path / "cgroup.controllers").read_text().split()
        assert "memory" not in controllers
        assert told is not None
        assert told.cpu_us is not None
        assert told.cpu_us > 1000
        assert (told.memory_bytes, told.oom_kills, memory_events_of(cgroup.path)) == (None,) * 3
        assert cgroup.remove()
        assert use_of_cgroup(cgroup.path) is None


async def test_a_cgroup_keeps_the_pid_that_a_host_was_told() -> None:
    async with cgroup_corner() as corner:
        cgroup = Cgroup.make(corner, "command")
        assert cgroup.told_pid() is None
        cgroup.tell_pid(4711)
        assert [each.told_pid() for each in Cgroup.all_in(corner)] == [4711]


def test_pressure_is_read_line_by_line(tmp_path: Path) -> None:
    some = "some avg10=1.25 avg60=0.50 avg300=0.00 total=12345\n"
    for name in ("memory", "io"):
        (tmp_path / name).write_text(some + some.replace("some", "full").replace("1.25", "0.75"))
    (tmp_path / "cpu").write_text(some)
    pressure = pressure_of_machine(tmp_path)
    stall = Stall(avg10=1.25, avg60=0.5, avg300=0.0, total_us=12345)
    assert pressure.cpu == ResourcePressure(stall, None)
    assert pressure.memory.some == stall
    assert pressure.memory.full is not None
    assert pressure.memory.full.avg10 == 0.75


def test_a_kernel_that_counts_no_pressure_is_named_as_the_cause(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"counts no pressure .*psi=1.*No such file") as caught:
        pressure_of_machine(tmp_path / "none")
    assert caught.value.errno is None


def test_the_machine_has_processors_memory_and_a_loopback() -> None:
    before = use.cpu_use()
    subprocess.run([sys.executable, "-c", "sum(range(2_000_000))"], check=True)
    after = use.cpu_use()
    assert after.count == os.cpu_count()
    assert after.usage_us > before.usage_us
    assert after.usage_us >= after.user_us
    memory = use.memory_use()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert memory.free_bytes <= memory.total_bytes
    (loopback,) = (each for each in use.interface_uses() if each.name == "lo")
    assert loopback.received_bytes == loopback.sent_bytes
    assert use.oom_kills() is not None


def test_disks_are_counted_without_their_partitions_and_what_stands_for_files() -> None:
    names = {each.name for each in use.disk_devices()}
    assert not any(name.startswith(("loop", "ram", "dm-")) for name in names)
    partitions = {path.parent.name for path in Path("/sys/class/block").glob("*/partition")}
    assert not names & partitions
    assert (use.io_use().read_bytes > 0) == bool(names)


def test_a_file_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    assert content(str(tmp_path / "none")) == b""
    assert content(str(tmp_path)) == b""
    assert (as_number(b""), as_number(b"max\n"), as_number(b"12\n")) == (None, None, 12)
    assert (counted(b"a 1\nab 2\n", b"ab"), counted(b"a 1\n", b"b")) == (2, None)
