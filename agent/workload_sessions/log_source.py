"""The workload's output, as it is kept, told to one peer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import attrs

from agent.errors import cause_of
from agent.workload.log import Reader, WorkloadLog
from agent.workload.log_part import Counts
from agent.workload.supervisor import Run
from agent.workload_sessions.outbox import output
from agent.workload_sessions.outgoing import Outgoing
from protocol import GuestMessage, workload

log = logging.getLogger(__name__)

WORKLOAD_ID = 0
"""Of the workload that was started at boot, for everyone."""


@attrs.define(eq=False)
class LogSource:
    """All that is kept, and what is written from then on; or one run's output and its end.

    Made by ``whole`` and ``of_run``; whoever makes one closes it.
    """

    _request_id: int
    _outgoing: Outgoing
    _run: Run | None = None
    _until: Counts | None = None
    _forget: Callable[[], None] | None = None
    """To be called when the run's end is taken."""
    _reader: Reader | None = None
    _is_open: bool = False

    @classmethod
    def whole(cls, kept: WorkloadLog, outgoing: Outgoing, *, follow: bool) -> LogSource:
        """From the beginning of what is kept, to what is there now or on and on. Raises OSError."""
        source = cls(WORKLOAD_ID, outgoing, until=None if follow else kept.written)
        source._reader = kept.reader(source._grown)
        source.open()
        return source

    @classmethod
    def of_run(
        cls,
        kept: WorkloadLog,
        outgoing: Outgoing,
        request_id: int,
        run: Run,
        forget: Callable[[], None],
    ) -> LogSource:
        """From here to the end of a run, which has just begun; silent before ``open``.

        Raises OSError.
        """
        source = cls(request_id, outgoing, run, forget=forget)
        source._reader = kept.reader(source._grown, live=True)
        return source

    def open(self) -> None:
        """Let it be sent."""
        self._is_open = True
        self._grown()

    @property
    def has_ended(self) -> bool:
        return self._run is not None and self._run.over.is_set()

    @property
    def left_bytes(self) -> int:
        if self._reader is None or self._run is None:
            return 0
        return self._reader.left_bytes(self._run.written)

    def take(self) -> GuestMessage | None:
        if self._reader is None or not self._is_open:
            return None
        try:
            if self._until is not None and self._reader.has_read_until(self._until):
                return None
            if self._is_told(self._reader):
                return self._end()
            chunk = self._reader.read(self._limit())
        except OSError as error:
            log.error("read the workload's log: %s", cause_of(error))
            return self._end() if self.has_ended else None
        if chunk is None:
            return None
        stream, data, truncated = chunk
        return output(self._request_id, stream, data, truncated=truncated)

    def _limit(self) -> Counts | None:
        if self._run is not None and self._run.over.is_set():
            return self._run.written
        return self._until

    def _is_told(self, reader: Reader) -> bool:
        return self._run is not None and self.has_ended and reader.has_read_until(self._run.written)

    def _end(self) -> GuestMessage:
        assert self._run is not None
        self.close()
        if self._forget is not None:
            self._forget()
        return workload.Exit(self._request_id, self._run.result.code, self._run.result.reason)

    def _grown(self) -> None:
        if self._is_open:
            self._outgoing.ready(self)

    def close(self) -> None:
        """Be done with the log; once or again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
