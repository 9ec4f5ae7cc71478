"""Telling the host that the VM is ready."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import trio

from agent.errors import cause_of
from agent.network.host import Host
from agent.services import Services
from agent.uptime import uptime_s

log = logging.getLogger(__name__)

READY_PORT = 6004
_MOUNTINFO = Path("/proc/self/mountinfo")
# Where the VM's root is a layer over the share, the share itself is there.
_ROOTS = ("/", "/oldroot")


async def ring_doorbell(services: Services, steps: MutableMapping[str, float]) -> None:
    """Tell the host once when storage and network are up, or known not to come up: of that it
    learns from the request that needs them. Nobody need listen.

    ``steps`` are what came before, and when, in seconds after boot; these are added.
    """
    for gate in (services.images, services.network):
        await gate.decided()
    ready_s = uptime_s()
    steps["storage"] = services.images.decided_s
    steps["network"] = services.network.decided_s
    steps["doorbell"] = ready_s
    log.info(
        "ready %.3f s after boot (%s)",
        ready_s,
        ", ".join(f"{step} {at_s:.3f}" for step, at_s in steps.items()),
    )
    async with trio.open_nursery() as nursery:
        if services.config.in_image:
            nursery.start_soon(_mark, services.config.ready_marker, ready_s)
        nursery.start_soon(_ring, services.host)


async def _ring(host: Host) -> None:
    try:
        await (await host.connect(READY_PORT)).aclose()
    except OSError as error:
        log.debug("nobody at the doorbell: %s", cause_of(error))


async def _mark(marker: str, ready_s: float) -> None:
    def mark() -> None:
        for root in shared_roots(_MOUNTINFO.read_text(errors="replace").splitlines()):
            write_marker(root / marker.lstrip("/"), ready_s)

    try:
        await trio.to_thread.run_sync(mark)
    except OSError as error:
        log.error("tell by a file that the VM is ready: %s", cause_of(error))


def shared_roots(mountinfo: Iterable[str]) -> list[Path]:
    """Those of the VM's roots that are virtiofs shares, by the lines of proc_pid_mountinfo(5)."""
    types: dict[str, str] = {}
    for line in mountinfo:
        fields = line.split(" ")
        # A later one at the same place lies above.
        types[fields[4]] = fields[fields.index("-", 6) + 1]
    return [Path(root) for root in _ROOTS if types.get(root) == "virtiofs"]


def write_marker(path: Path, ready_s: float) -> None:
    """Have a file that says when the VM was ready, in milliseconds after boot, whole and on the
    disk when it is there. Blocks; raises OSError."""
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(b"%d" % (ready_s * 1000))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
