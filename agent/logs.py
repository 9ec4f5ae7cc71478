"""JSON log lines on the console, each with the trace_id of the request it belongs to.

Secrets never get this far: the messages' own repr leaves them out, and nothing else of a request
is ever logged.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Final

import attrs

trace_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("trace_id", default=None)
"""The trace_id of the request that this task works for; trio copies it into child tasks and
threads."""


FAILED_REQUEST: Final[Mapping[str, bool]] = {"failed_request": True}
"""``extra`` of a line that is no warning, and is to be kept as one is."""

_KEPT_LINES = 64
_KEPT_CHARACTERS = 1000


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``ts`` (UTC), ``level``, ``target``, ``msg``, ``trace_id`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": timestamp(record.created),
            "level": record.levelname.lower(),
            "target": record.name,
            "msg": record.getMessage(),
        }
        traced = trace_id.get()
        if traced is not None:
            line["trace_id"] = traced
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


@attrs.frozen(kw_only=True)
class Failure:
    """A line of the log, cut where it is long: ``ts`` as on the console."""

    ts: str
    level: str
    target: str
    message: str
    trace_id: str | None


class Failures(logging.Handler):
    """Keeps the last warnings, errors and failed requests for who asks for them later."""

    def __init__(self) -> None:
        super().__init__()
        self._last: deque[Failure] = deque(maxlen=_KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not hasattr(record, "failed_request"):
            return
        message = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            message += f": {type(error).__name__}: {error}"
        traced = trace_id.get()
        self._last.append(
            Failure(
                ts=timestamp(record.created),
                level=record.levelname.lower(),
                target=record.name,
                message=message[:_KEPT_CHARACTERS],
                trace_id=None if traced is None else traced[:_KEPT_CHARACTERS],
            )
        )

    def last(self) -> list[Failure]:
        """The newest last."""
        return list(self._last)


def timestamp(seconds: float) -> str:
    """A time, in seconds since the epoch, in UTC and with milliseconds."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d}Z"


def configure(level: str, failures: Failures) -> None:
    """Send every log line to stderr, which init connects to the console; those of failures to
    ``failures``, too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler, failures]
    root.setLevel(level)
