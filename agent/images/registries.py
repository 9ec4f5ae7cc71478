"""What is known of registries before any is spoken to: how to reach them, how they fail.

Light enough to be imported at the agent's start, which `registry.py` is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import attrs


@attrs.frozen
class RegistrySettings:
    """How to reach particular registries, each named as in references: ``HOST`` or ``HOST:PORT``.

    ``insecure`` ones are spoken to by plain HTTP. ``ca_files`` are PEM files of certificates that
    are trusted for one registry, or the token server of one, beside the system's. All else is
    HTTPS with the system's.
    """

    insecure: frozenset[str] = frozenset()
    ca_files: Mapping[str, Path] = attrs.field(factory=dict)


class RegistryError(Exception):
    """A registry did not give what it was asked for; the text is the cause, one line.

    ``transient``: another attempt may succeed, not before ``retry_after_s`` where the registry
    named a time. ``unreachable``: nothing was heard of the registry at all.
    """

    def __init__(
        self,
        cause: str,
        *,
        transient: bool = False,
        unreachable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(cause)
        self.transient = transient
        self.unreachable = unreachable
        self.retry_after_s = retry_after_s
