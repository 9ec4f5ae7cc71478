"""What the agent is told of its workload at its start: the words of ``innkeep.workload.``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

RESTARTS = ("never", "on-failure", "always")

# One message's output at least; and all of it is memory of the VM's.
_LEAST_LOG_BYTES, _MOST_LOG_BYTES = 64 << 10, 1 << 30
_UNITS: Mapping[str, int] = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@attrs.frozen(kw_only=True)
class WorkloadConfig:
    """What the workload protocol's ports serve, and what runs there from the boot on."""

    token_file: Path | None = None
    """None: where the image has it, if anywhere."""
    image: str | None = None
    """The reference of the image whose container commands run in; None: in the VM itself."""
    overlay: str = "workload"
    """The ``persistent_overlay_id`` of that container."""
    command: tuple[str, ...] | None = None
    """To be started at boot; without words the image's own. None: nothing is."""
    restart: str = "never"
    """One of ``RESTARTS``."""
    log_bytes: int = 4 << 20
    """How much of the workload's output is kept."""

    @staticmethod
    def read(name: str, key: str, text: str) -> dict[str, Any]:
        """The field that a word sets, and its value; ``name`` is what the word is called.

        Raises:
            ValueError: a word that means nothing, or a value that is not what its word takes.
        """
        if key not in _READERS:
            raise ValueError(f"{name}: expected KEY=VALUE, KEY one of {_KEYS}")
        field, read = _READERS[key]
        return {field: read(name, text)}


def _command(name: str, text: str) -> tuple[str, ...]:
    """Words between commas; what a word or a kernel's command line cannot hold is %-encoded."""
    # Not needed by most boots, whose first answer its import would delay.
    from urllib.parse import unquote

    return tuple(map(unquote, text.split(","))) if text else ()


def _restart(name: str, text: str) -> str:
    if text not in RESTARTS:
        raise ValueError(f"{name}={text}: expected one of {', '.join(RESTARTS)}")
    return text


def _log_size(name: str, text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,9})([KMG])", text)
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if not _LEAST_LOG_BYTES <= size <= _MOST_LOG_BYTES:
        raise ValueError(f"{name}={text}: expected a size from 64K to 1G")
    return size


def _not_empty(name: str, text: str) -> str:
    if not text:
        raise ValueError(f"{name}: expected a value")
    return text


_READERS: Mapping[str, tuple[str, Callable[[str, str], object]]] = {
    "token_file": ("token_file", lambda name, text: Path(_not_empty(name, text))),
    "image": ("image", _not_empty),
    "overlay": ("overlay", _not_empty),
    "command": ("command", _command),
    "restart": ("restart", _restart),
    "log_size": ("log_bytes", _log_size),
}
WORKLOAD_KEYS = tuple(_READERS)
_KEYS = ", ".join(_READERS)
