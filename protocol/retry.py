"""When to try again, and how long to wait before it. Who sleeps is the caller."""

import errno
import random
from collections.abc import Iterator
from http import HTTPStatus
from typing import Final

import attrs


@attrs.frozen
class RetryPolicy:
    """``attempts`` tries in all; waits start at ``first_delay_s`` and double up to a limit.

    ``jitter`` is the share of each wait that is left to chance: 0.5 makes a wait of 1 s one of
    0.5 to 1 s, so that many clients of one broken server do not come back together.
    """

    attempts: int
    first_delay_s: float
    max_delay_s: float
    jitter: float = 0.5

    def delays(self) -> Iterator[float]:
        """The waits in seconds between the attempts: one fewer than there are attempts."""
        delay_s = self.first_delay_s
        for _ in range(self.attempts - 1):
            yield delay_s * (1 - self.jitter * random.random())
            delay_s = min(delay_s * 2, self.max_delay_s)


DEFAULT: Final = RetryPolicy(attempts=3, first_delay_s=0.1, max_delay_s=5)
CONNECTION: Final = RetryPolicy(attempts=3, first_delay_s=0.05, max_delay_s=2)
PULL: Final = RetryPolicy(attempts=4, first_delay_s=0.5, max_delay_s=5)

_TRANSIENT_ERRNOS: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ETIMEDOUT,
    }
)
_TRANSIENT_STATUSES: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


def is_transient(failure: BaseException | int) -> bool:
    """Whether the same attempt may succeed a moment later.

    ``failure`` is an exception or an HTTP status. Transient are: connections refused, reset,
    aborted or timed out, a body cut short (EOFError), and the statuses 408, 429 and 5xx.
    Everything else is permanent, 401, 403 and 404 above all.
    """
    if isinstance(failure, int):
        return failure in _TRANSIENT_STATUSES or 500 <= failure <= 599
    if isinstance(failure, (TimeoutError, EOFError)):
        return True
    return isinstance(failure, OSError) and failure.errno in _TRANSIENT_ERRNOS
