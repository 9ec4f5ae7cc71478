"""What ``innkeep stats`` shows of two answers: the second one, and what came since the first."""

from collections.abc import Iterator, Mapping

from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from protocol.cli.output import new_table, short_digest
from protocol.machine import CgroupUse, CommandUse, ContainerUse, Pressure, VmStats

_NOTHING = "-"
_HEADINGS = ("ID", "NAME", "PROGRAM", "CPU %", "MEM USAGE / LIMIT", "MEM %", "BLOCK I/O", "PIDS")


def summary(before: VmStats, after: VmStats) -> Iterator[Text]:
    """The VM itself, in a few lines."""
    cpu, memory = after.cpu, after.memory
    used = memory.total_bytes - memory.available_bytes
    loads = " ".join(f"{load:.2f}" for load in (cpu.load1, cpu.load5, cpu.load15))
    share = _percent(cpu.usage_us - before.cpu.usage_us, _elapsed_us(before, after))
    received, sent = _network(before, after)
    yield Text(f"cpu {share} of {cpu.count * 100}%, load {loads}, {_pressure(after.pressure)}")
    yield Text(
        f"memory {_size(used)} of {_size(memory.total_bytes)}, "
        f"{_size(memory.cache_bytes)} of files, {after.oom_kills or 0} killed for it"
    )
    yield Text(f"network {_size(received)}/s in, {_size(sent)}/s out")
    if after.left_out:
        yield Text(f"{after.left_out} more containers and commands are not shown")


def use_table(before: VmStats, after: VmStats) -> Table:
    """A line each for all workloads, the agent, and each container and command."""
    table = new_table(_HEADINGS)
    elapsed_us = _elapsed_us(before, after)
    earlier: Mapping[str, CgroupUse] = {_key(each): each for each in _uses(before)}
    for each in _uses(after):
        then = earlier.get(_key(each))
        table.add_row(*_names(each), *_row(then, each, elapsed_us))
    for name, then, now in (
        ("workloads", before.workloads, after.workloads),
        ("agent", before.agent, after.agent),
    ):
        if now is not None:
            table.add_row(_NOTHING, name, _NOTHING, *_row(then, now, elapsed_us))
    return table


def _uses(stats: VmStats) -> Iterator[ContainerUse | CommandUse]:
    """Each container, with its commands behind it; then those of the VM itself."""
    for container in stats.containers:
        yield container
        yield from (each for each in stats.commands if each.container == container.id)
    yield from (each for each in stats.commands if each.container is None)


def _key(use: ContainerUse | CommandUse) -> str:
    return use.id if isinstance(use, ContainerUse) else str(use.pid)


def _names(use: ContainerUse | CommandUse) -> tuple[str, str, str]:
    if isinstance(use, ContainerUse):
        return short_digest(use.id), use.overlay or _NOTHING, use.program or _NOTHING
    place = "in the VM" if use.container is None else f"in {short_digest(use.container)}"
    return str(use.pid), place, use.program or _NOTHING


def _row(before: CgroupUse | None, after: CgroupUse, elapsed_us: int) -> Iterator[str]:
    if after.cpu_us is None:
        yield _NOTHING
    else:
        began_at = (before and before.cpu_us) or 0
        # Of one that is new it is all that it has used so far.
        yield _percent(max(after.cpu_us - began_at, 0), elapsed_us)
    used, limit = after.memory_bytes, after.memory_limit_bytes
    yield f"{_size(used)} / {_size(limit)}"
    yield _NOTHING if used is None or not limit else _percent(used, limit)
    yield f"{_size(after.read_bytes)} / {_size(after.written_bytes)}"
    yield _NOTHING if after.pids is None else str(after.pids)


def _elapsed_us(before: VmStats, after: VmStats) -> int:
    return max((after.uptime_ms - before.uptime_ms) * 1000, 1)


def _network(before: VmStats, after: VmStats) -> tuple[int, int]:
    """Bytes a second, received and sent, without the loopback."""
    elapsed_s = _elapsed_us(before, after) / 1_000_000
    totals = [
        (
            sum(each.received_bytes for each in stats.network if each.name != "lo"),
            sum(each.sent_bytes for each in stats.network if each.name != "lo"),
        )
        for stats in (before, after)
    ]
    (received, sent), (received_then, sent_then) = totals[1], totals[0]
    return (
        max(int((received - received_then) / elapsed_s), 0),
        max(int((sent - sent_then) / elapsed_s), 0),
    )


def _pressure(pressure: Pressure | None) -> str:
    if pressure is None:
        return "pressure unknown"
    shares = (
        f"{name} {each.some.avg10:.1f}%"
        for name, each in (
            ("cpu", pressure.cpu),
            ("memory", pressure.memory),
            ("io", pressure.io),
        )
        if each.some is not None
    )
    return f"waiting in the last 10 s for {', '.join(shares)}"


def _percent(part: int, whole: int) -> str:
    return f"{part * 100 / whole:.1f}%"


def _size(number: int | None) -> str:
    """As docker has it, without a space that a line could be broken at: 114.7kB."""
    if number is None:
        return _NOTHING
    return decimal(number).replace(" bytes", "B").replace(" byte", "B").replace(" ", "")
