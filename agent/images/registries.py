"""What is known of registries before any is spoken to: how to reach them, how they fail.

Light enough to be imported at the agent's start, which `registry.py` is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs


@attrs.frozen
class TimeLimits:
    """How long a registry may keep a pull waiting; each is a failure that may pass.

    ``connect_s`` is for a connection, ``silence_s`` without a byte. Where waiting for an answer's
    bytes adds up to ``window_s``, ``window_bytes`` have to have come in it, and so again and again:
    a byte now and then is no answer. Waiting counts, and not the time that what came is worked
    on; 1 KiB/s is less than a phone gets where there is hardly any network.
    """

    connect_s: float = 10
    mirror_connect_s: float = 1
    """For mirrors, whose place another takes; short enough to ask the registry within 2 s."""
    silence_s: float = 30
    window_s: float = 60
    window_bytes: int = 64 << 10


@attrs.frozen
class RegistrySettings:
    """How to reach particular registries, each named as in references: ``HOST`` or ``HOST:PORT``.

    ``insecure`` ones are spoken to by plain HTTP. ``ca_files`` are PEM files of certificates that
    are trusted for one registry, or the token server of one, beside the system's. All else is
    HTTPS with the system's. ``hosts_dir`` has mirrors and more of it (`registry_hosts.py`).
    """

    insecure: frozenset[str] = frozenset()
    ca_files: Mapping[str, Path] = attrs.field(factory=dict)
    hosts_dir: Path | None = None
    limits: TimeLimits = TimeLimits()


class RegistryError(Exception):
    """A registry did not give what it was asked for; the text is the cause, one line.

    ``transient``: another attempt may succeed, not before ``retry_after_s`` where the registry
    named a time. ``unreachable``: nothing was heard of the registry at all. ``timed_out``: a
    time limit was waited for.
    """

    def __init__(
        self,
        cause: str,
        *,
        transient: bool = False,
        unreachable: bool = False,
        timed_out: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(cause)
        self.transient = transient
        self.unreachable = unreachable
        self.timed_out = timed_out
        self.retry_after_s = retry_after_s


class MirrorError(RegistryError):
    """A mirror failed in the middle of a blob; it will not be asked for that one again."""
