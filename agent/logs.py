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

trace_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("trace_id", default=None)
"""The trace_id of the request that this task works for; trio copies it into child tasks and
threads."""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``ts`` (UTC), ``level``, ``target``, ``msg``, ``trace_id`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.gmtime(record.created)
        line: dict[str, object] = {
            "ts": f"{time.strftime('%Y-%m-%dT%H:%M:%S', seconds)}.{int(record.msecs):03d}Z",
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


def configure(level: str) -> None:
    """Send every log line to stderr, which init connects to the console."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
