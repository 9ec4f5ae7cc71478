"""The rows of the table, by the names that they are asked for by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.guest import commands, containers, files, pings, streams, upkeep
from benchmarks.guest.row import Setting

# What a row comes to is printed by str().
ROWS: Mapping[str, Callable[[Setting], object]] = {
    "ping": pings.ping,
    "plain": commands.plain,
    "interactive": commands.interactive,
    "spaced-plain": commands.spaced_plain,
    "spaced-interactive": commands.spaced_interactive,
    "joined": containers.joined,
    "fresh": containers.fresh,
    "output": streams.output,
    "stdin": streams.stdin,
    "loaded-ping": pings.loaded_ping,
    "sleepers": upkeep.sleepers,
    "soak": upkeep.soak,
}

FILES: Mapping[str, Callable[[Setting], object]] = {
    "upload": files.upload,
    "download": files.download,
    "small-files": files.small_files,
}
