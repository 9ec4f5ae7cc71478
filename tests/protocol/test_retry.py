"""When to try again, and how long to wait."""

import errno
from itertools import pairwise

import pytest

from protocol import retry
from protocol.retry import RetryPolicy, is_transient


def test_waits_double_up_to_the_limit_one_fewer_than_attempts() -> None:
    policy = RetryPolicy(attempts=6, first_delay_s=0.5, max_delay_s=5, jitter=0)
    assert list(policy.delays()) == [0.5, 1, 2, 4, 5]


def test_one_attempt_waits_never() -> None:
    assert list(RetryPolicy(attempts=1, first_delay_s=1, max_delay_s=1).delays()) == []


def test_jitter_only_shortens_a_wait_and_by_no_more_than_its_share() -> None:
    policy = RetryPolicy(attempts=100, first_delay_s=2, max_delay_s=2, jitter=0.5)
    delays = list(policy.delays())
    assert all(1 <= delay <= 2 for delay in delays)
    assert any(a != b for a, b in pairwise(delays))


@pytest.mark.parametrize(
    ("policy", "attempts", "first_delay_s", "max_delay_s"),
    [(retry.DEFAULT, 3, 0.1, 5), (retry.CONNECTION, 3, 0.05, 2), (retry.PULL, 4, 0.5, 5)],
)
def test_the_presets(
    policy: RetryPolicy, attempts: int, first_delay_s: float, max_delay_s: float
) -> None:
    assert policy.attempts == attempts
    assert policy.first_delay_s == first_delay_s
    assert policy.max_delay_s == max_delay_s
    assert 0 < policy.jitter <= 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 599])
def test_transient_statuses(status: int) -> None:
    assert is_transient(status)


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403, 404, 416, 600])
def test_permanent_statuses(status: int) -> None:
    assert not is_transient(status)


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ConnectionAbortedError(errno.ECONNABORTED, "aborted"),
        BrokenPipeError(errno.EPIPE, "broken pipe"),
        TimeoutError(),
        OSError(errno.ETIMEDOUT, "timed out"),
        EOFError("body cut short"),
    ],
    ids=repr,
)
def test_transient_failures(failure: BaseException) -> None:
    assert is_transient(failure)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "no space"),
        PermissionError(errno.EACCES, "permission denied"),
        FileNotFoundError(errno.ENOENT, "no such file"),
        OSError("no errno"),
        ValueError("bad reference"),
    ],
    ids=repr,
)
def test_permanent_failures(failure: BaseException) -> None:
    assert not is_transient(failure)
