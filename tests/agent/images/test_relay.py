"""A second thread takes what the first hands over: in order, a few at a time, until one fails."""

from __future__ import annotations

import threading

import pytest

from agent.images.relay import Chunk, Relay


def test_all_chunks_are_taken_in_their_order_by_another_thread() -> None:
    taken: list[Chunk] = []
    threads = set()

    def take(chunk: Chunk) -> None:
        taken.append(chunk)
        threads.add(threading.get_ident())

    relay = Relay(take, most_waiting=2)
    chunks = [b"%d" % n for n in range(1000)]
    for chunk in chunks:
        relay.put(chunk)
    relay.finish()
    relay.close()
    assert taken == chunks
    assert threads.isdisjoint({threading.get_ident()})


def test_no_more_chunks_wait_than_may() -> None:
    go_on = threading.Semaphore(0)
    waiting: list[int] = []
    put = 0

    def take(chunk: Chunk) -> None:
        assert go_on.acquire(timeout=10)
        waiting.append(put - int(chunk))

    relay = Relay(take, most_waiting=3)
    for n in range(20):
        put = n
        if n >= 4:  # three wait, and one is being taken
            go_on.release()
        relay.put(b"%d" % n)
    go_on.release(4)
    relay.finish()
    assert max(waiting) <= 4


def put_many(relay: Relay) -> None:
    for _ in range(3):
        relay.put(b"")


def test_what_the_other_thread_raises_is_raised_to_whoever_puts_or_finishes() -> None:
    def take(chunk: Chunk) -> None:
        raise ValueError("spoilt")

    relay = Relay(take, most_waiting=1)
    relay.put(b"1")
    with pytest.raises(ValueError, match="spoilt"):
        put_many(relay)
    with pytest.raises(ValueError, match="spoilt"):
        relay.finish()
    relay.close()


def test_one_that_is_closed_ends_its_thread() -> None:
    before = threading.active_count()
    relay = Relay(lambda chunk: None, most_waiting=5)
    relay.put(b"one")
    relay.close()
    assert threading.active_count() == before
