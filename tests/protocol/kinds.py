"""The four kinds of message, and examples and strategies for every class of them."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import attrs
from hypothesis import strategies as st

from protocol import AgentRequest, AgentResponse, GuestMessage, HostMessage
from protocol.values import IntRange

KINDS: Mapping[str, Any] = {
    "AgentRequest": AgentRequest,
    "AgentResponse": AgentResponse,
    "HostMessage": HostMessage,
    "GuestMessage": GuestMessage,
}
MESSAGES = [(kind, variant) for kind in KINDS.values() for variant in get_args(kind)]
MESSAGE_IDS = [f"{name}-{c.__name__}" for name, kind in KINDS.items() for c in get_args(kind)]

_TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=5,
)
_PRIMITIVES: Mapping[Any, st.SearchStrategy[Any]] = {
    str: _TEXT,
    bytes: st.binary(),
    bool: st.booleans(),
    object: _JSON,
    NoneType: st.none(),
}


def messages(variant: type[Any]) -> st.SearchStrategy[Any]:
    """Any message of a class."""
    hints = get_type_hints(variant, include_extras=True)
    fields = {field.name: _values(hints[field.name]) for field in attrs.fields(variant)}
    return st.builds(variant, **fields)


def _values(hint: Any) -> st.SearchStrategy[Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        limits = args[1]
        assert isinstance(limits, IntRange)
        return st.integers(limits.lowest, limits.highest)
    if origin in (Union, UnionType):
        return st.one_of(*(_values(arg) for arg in args))
    if origin is tuple:
        if args[-1] is Ellipsis:
            return st.lists(_values(args[0]), max_size=3).map(tuple)
        return st.tuples(*map(_values, args))
    if attrs.has(hint):
        return messages(hint)
    return _PRIMITIVES[hint]
