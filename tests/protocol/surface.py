"""All that hosts can see of the protocol, read off the code as one JSON document.

``python -m tests.protocol.surface`` writes it to wire_surface.json. Whatever changes there
changes what hosts that already exist get to read, or may send.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import attrs

from protocol import codec, constants, retry, values
from protocol.errors import ErrorCode
from protocol.fields import OMITTED
from tests.protocol.kinds import KINDS

FROZEN = Path(__file__).with_name("wire_surface.json")
# A range is no value, and a mount is written as an array.
NO_OBJECTS = (values.IntRange, values.Mount)
PRIMITIVES = {str: "string", bytes: "base64", bool: "bool", object: "json"}


def surface() -> dict[str, Any]:
    """Constants, error codes, retry presets, values, and the variants of every kind."""
    return {
        "constants": dict(_constants()),
        "error_codes": {code.name: code.value for code in ErrorCode},
        "retry": {
            name: attrs.asdict(policy)
            for name, policy in vars(retry).items()
            if isinstance(policy, retry.RetryPolicy)
        },
        "values": {
            name: _fields(value)
            for name, value in vars(values).items()
            if isinstance(value, type) and attrs.has(value) and value not in NO_OBJECTS
        },
        "messages": {name: _variants(kind) for name, kind in KINDS.items()},
    }


def _constants() -> Iterator[tuple[str, Any]]:
    for name, value in vars(constants).items():
        if isinstance(value, int):
            yield name, value
    for enum in (constants.Port, constants.Cid):
        yield enum.__name__, {member.name: member.value for member in enum}


def _variants(kind: Any) -> dict[str, Any]:
    variants = codec.variants_of(kind)
    return {
        f"{variants.tag}={name}": _fields(variant) for name, variant in variants.by_name.items()
    }


def _fields(variant: type[Any]) -> dict[str, str]:
    hints = get_type_hints(variant, include_extras=True)
    return {
        field.name: wire_type(hints[field.name]) + _presence(field)
        for field in attrs.fields(variant)
    }


def _presence(field: Any) -> str:
    if field.default is attrs.NOTHING:
        return ", required"
    default = f", default {json.dumps(field.default)}"
    return default + (", omitted then" if field.metadata == OMITTED else "")


def wire_type(hint: Any) -> str:
    """A type in words of the wire."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{args[1].lowest}..{args[1].highest}"
    if origin in (Union, UnionType):
        return " or ".join("null" if arg is NoneType else wire_type(arg) for arg in args)
    if origin is tuple and args[-1] is Ellipsis:
        return f"array of {wire_type(args[0])}"
    if hint is values.Mount:
        args = tuple(get_type_hints(hint, include_extras=True).values())
    if origin is tuple or hint is values.Mount:
        return f"[{', '.join(map(wire_type, args))}]"
    return PRIMITIVES.get(hint) or hint.__name__


def write() -> str:
    """The document as it is frozen."""
    return json.dumps(surface(), indent=2) + "\n"


if __name__ == "__main__":
    FROZEN.write_text(write())
