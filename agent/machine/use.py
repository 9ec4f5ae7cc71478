"""What the whole machine uses: proc(5), and Documentation/admin-guide/iostats.rst."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agent.kernel_files import content, counted
from protocol.machine import CpuUse, DiskDevice, InterfaceUse, IoUse, MemoryUse

_SECTOR_BYTES = 512
_MOST_INTERFACES = 64
_MOST_DISKS = 64
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_use() -> CpuUse:
    """Raises OSError or ValueError: /proc is not what it should be."""
    first = Path("/proc/stat").read_bytes().partition(b"\n")[0].split()
    user, nice, system, _, iowait, irq, softirq, steal = (
        int(ticks) * 1_000_000 // _TICKS_PER_S for ticks in first[1:9]
    )
    load1, load5, load15 = os.getloadavg()
    return CpuUse(
        count=os.sysconf("SC_NPROCESSORS_ONLN"),
        usage_us=user + nice + system + irq + softirq,
        user_us=user + nice,
        system_us=system + irq + softirq,
        iowait_us=iowait,
        steal_us=steal,
        load1=load1,
        load5=load5,
        load15=load15,
    )


def memory_use() -> MemoryUse:
    """Raises OSError or KeyError: /proc is not what it should be."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    # In KiB, whatever it says.
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    return MemoryUse(
        total_bytes=sizes["MemTotal:"],
        available_bytes=sizes["MemAvailable:"],
        free_bytes=sizes["MemFree:"],
        cache_bytes=sizes["Cached:"] + sizes["Buffers:"] + sizes["SReclaimable:"],
        swap_total_bytes=sizes["SwapTotal:"],
        swap_free_bytes=sizes["SwapFree:"],
    )


def oom_kills() -> int | None:
    """How many processes the kernel has killed for memory since boot; None if it does not say.

    Raises:
        OSError: /proc is not what it should be.
    """
    return counted(Path("/proc/vmstat").read_bytes(), b"oom_kill")


def io_use() -> IoUse:
    """Of all disks; partitions, and loop devices on a file of another, count with these.

    Raises:
        OSError: /proc is not what it should be.
    """
    disks = set(_disk_names())
    lines = (line.split() for line in Path("/proc/diskstats").read_text().splitlines())
    counts = [[int(word) for word in words[3:10]] for words in lines if words[2] in disks]
    reads, _, sectors_read, _, writes, _, sectors_written = (
        map(sum, zip(*counts, strict=True)) if counts else (0,) * 7
    )
    return IoUse(
        read_bytes=sectors_read * _SECTOR_BYTES,
        written_bytes=sectors_written * _SECTOR_BYTES,
        reads=reads,
        writes=writes,
    )


def disk_devices() -> tuple[DiskDevice, ...]:
    """The disks that the machine has. Raises OSError: /sys is not there."""
    return tuple(
        DiskDevice(
            name=name,
            size_bytes=int(content(f"/sys/block/{name}/size") or 0) * _SECTOR_BYTES,
            read_only=content(f"/sys/block/{name}/ro").startswith(b"1"),
        )
        for name in sorted(_disk_names())[:_MOST_DISKS]
    )


def _disk_names() -> Iterator[str]:
    # What stands for a file, or for memory, has no device of its own.
    return (path.name for path in Path("/sys/block").iterdir() if (path / "device").exists())


def interface_uses() -> tuple[InterfaceUse, ...]:
    """Of all interfaces of this network namespace. Raises OSError."""
    found = []
    for line in Path("/proc/net/dev").read_text().splitlines()[2:][:_MOST_INTERFACES]:
        name, _, numbers = line.rpartition(":")
        counts = [int(number) for number in numbers.split()]
        received, sent = counts[:8], counts[8:]
        found.append(
            InterfaceUse(
                name=name.strip(),
                received_bytes=received[0],
                received_packets=received[1],
                received_errors=received[2],
                received_dropped=received[3],
                sent_bytes=sent[0],
                sent_packets=sent[1],
                sent_errors=sent[2],
                sent_dropped=sent[3],
            )
        )
    return tuple(found)
