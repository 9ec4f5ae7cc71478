"""Every request has exactly one place where it goes."""

from typing import get_args, get_type_hints

import pytest

from agent.handlers import HANDLERS
from agent.session import DROPPED, OUTLIVE_THEIR_CONNECTION
from protocol import AgentRequest, requests
from protocol.codec import wire_name

REQUESTS = frozenset(get_args(AgentRequest))


def test_each_request_but_ping_is_answered_or_dropped_and_none_both() -> None:
    assert set(HANDLERS) | DROPPED == REQUESTS - {requests.Ping}
    assert set(HANDLERS) & DROPPED == set()


@pytest.mark.parametrize("kind", HANDLERS, ids=wire_name)
def test_a_handler_bears_the_name_of_its_method_and_takes_its_request(kind: type) -> None:
    handler = HANDLERS[kind]
    assert handler.__name__ == wire_name(kind)
    takes = get_type_hints(handler)["request"]
    assert takes in (kind, object)


def test_what_is_said_of_requests_is_said_of_some_that_are_answered() -> None:
    assert set(HANDLERS) >= OUTLIVE_THEIR_CONNECTION
