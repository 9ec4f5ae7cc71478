"""All that hosts can see of the protocol, read off the code as one JSON document.

``python -m tests.protocol.surface`` writes it to wire_surface.json, and for people to
docs/messages.md. Whatever changes there changes what hosts that already exist get to read, or may
send.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import attrs

from protocol import codec, constants, machine, retry, values
from protocol.errors import ErrorCode
from protocol.fields import OMITTED
from tests.protocol.kinds import KINDS

FROZEN = Path(__file__).with_name("wire_surface.json")
REFERENCE = Path(__file__).parents[2] / "docs" / "messages.md"
# A range is no value, and a mount is written as an array.
NO_OBJECTS = (values.IntRange, values.Mount)
PRIMITIVES = {str: "string", bytes: "base64", bool: "bool", float: "number", object: "json"}


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
            for name, value in {**vars(values), **vars(machine)}.items()
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


_TITLES = {
    "AgentRequest": "Requests of the agent protocol",
    "AgentResponse": "Answers of the agent protocol",
    "HostMessage": "Messages of a host, in the workload protocol",
    "GuestMessage": "Messages of the agent, in the workload protocol",
}
_RANGES = {
    f"0..{2**8 - 1}": "u8",
    f"0..{2**16 - 1}": "u16",
    f"0..{2**32 - 1}": "u32",
    f"0..{2**64 - 1}": "u64",
    f"-{2**31}..{2**31 - 1}": "i32",
    f"-{2**63}..{2**63 - 1}": "i64",
}
_PREFACE = """\
# Every message, field by field

Written by `python -m tests.protocol.surface`; [protocol.md](protocol.md) says what they mean. Each
is a JSON object. A message has, beside its fields, the one that its table names, with the name in
the first column. u8 to u64 and i32, i64 are integers of that size, without a sign and with one;
base64 is a string of it, of the standard alphabet with padding; json is any value. A field with a
default may be missing; one in brackets is left out by the agent and by our client where it holds
its default.
"""


def reference() -> str:
    """The same for people who write a client."""
    whole = surface()
    parts = [_PREFACE]
    for kind, variants in whole["messages"].items():
        tag = next(iter(variants)).partition("=")[0]
        parts.append(f"## {_TITLES[kind]}\n\n| `{tag}` | fields |\n|---|---|\n")
        parts[-1] += "".join(_row(name.partition("=")[2], of) for name, of in variants.items())
    parts.append("## Values\n\n| | fields |\n|---|---|\n")
    parts[-1] += "".join(_row(name, of) for name, of in whole["values"].items())
    return "\n".join(parts)


def _row(name: str, fields: dict[str, str]) -> str:
    told = ", ".join(_field(field, words) for field, words in fields.items())
    return f"| `{name}` | {told} |\n"


def _field(name: str, words: str) -> str:
    for numbers, short in _RANGES.items():
        words = words.replace(numbers, short)
    kind, _, presence = words.partition(", ")
    if kind.startswith("array of ["):
        kind, _, presence = words.partition("], ")
        kind += "]"
    omitted = presence.endswith(", omitted then")
    default = presence.removesuffix(", omitted then").removeprefix("default ")
    told = f"`{name}` {kind}"
    if default != "required":
        told += f" = {default}"
    return f"[{told}]" if omitted else told


if __name__ == "__main__":
    FROZEN.write_text(write())
    REFERENCE.write_text(reference())
