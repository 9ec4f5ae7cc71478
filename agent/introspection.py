"""What the agent knows of itself."""

from __future__ import annotations

import attrs

from agent.hangup import HangupWatch
from agent.logs import Failures


@attrs.frozen
class Introspection:
    """Kept from its first moment on, for ``diagnose``."""

    failures: Failures = attrs.field(factory=Failures)
    """What the log has had of warnings, errors and failed requests."""
    hangups: HangupWatch = attrs.field(factory=HangupWatch)
    """Of all connections."""
    steps: dict[str, float] = attrs.field(factory=dict)
    """Of the start: when each was done, in seconds after boot."""
