"""Which devices containers may use: docker's default list, as a program for the kernel.

Containers keep CAP_MKNOD, as docker has it, so without this filter one could make itself a node
for the VM's own disk. The program belongs to the cgroup above all containers.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import attrs

# The kernel's enum bpf_devcg: struct bpf_cgroup_dev_ctx holds `access << 16 | kind`.
BLOCK, CHARACTER = 1, 2
MKNOD, READ, WRITE = 1, 2, 4
ANY_ACCESS = MKNOD | READ | WRITE

_REGISTER = 0  # the result, and also scratch
_CONTEXT, _ACCESS, _KIND, _MAJOR, _MINOR, _SCRATCH = 1, 2, 3, 4, 5, 6


@attrs.frozen
class DeviceRule:
    """Devices that may be used, and how. No number means every number."""

    kind: int
    major: int | None = None
    minor: int | None = None
    access: int = ANY_ACCESS


# moby's oci/defaults.go and what runc adds to it. Making a node is harmless without opening it.
DEFAULT_DEVICES: Sequence[DeviceRule] = (
    DeviceRule(CHARACTER, access=MKNOD),
    DeviceRule(BLOCK, access=MKNOD),
    DeviceRule(CHARACTER, 1, 3),  # null
    DeviceRule(CHARACTER, 1, 5),  # zero
    DeviceRule(CHARACTER, 1, 7),  # full
    DeviceRule(CHARACTER, 1, 8),  # random
    DeviceRule(CHARACTER, 1, 9),  # urandom
    DeviceRule(CHARACTER, 5, 0),  # tty
    DeviceRule(CHARACTER, 5, 1),  # console
    DeviceRule(CHARACTER, 5, 2),  # ptmx
    DeviceRule(CHARACTER, 136),  # pts/*
)

# For containers that are machines of their own: what FUSE takes besides. No disk is among them.
WHOLE_MACHINE_DEVICES: Sequence[DeviceRule] = (
    *DEFAULT_DEVICES,
    DeviceRule(CHARACTER, 10, 229),  # fuse
)


def device_program(rules: Sequence[DeviceRule]) -> bytes:
    """The eBPF instructions that allow what a rule allows, and nothing else.

    See Documentation/bpf/standardization/instruction-set.rst in the kernel's sources.
    """
    program = [
        _load(_ACCESS, offset=0),
        _instruction(0xBF, _KIND, _ACCESS),
        _instruction(0x57, _KIND, value=0xFFFF),
        _instruction(0x77, _ACCESS, value=16),
        _load(_MAJOR, offset=4),
        _load(_MINOR, offset=8),
    ]
    for rule in rules:
        program += _allow(rule)
    program += _return(0)
    return b"".join(program)


def _allow(rule: DeviceRule) -> list[bytes]:
    prepared = []
    checks = [(_KIND, rule.kind), (_MAJOR, rule.major), (_MINOR, rule.minor)]
    if rule.access != ANY_ACCESS:
        prepared = [
            _instruction(0xBF, _SCRATCH, _ACCESS),
            _instruction(0x57, _SCRATCH, value=ANY_ACCESS & ~rule.access),
        ]
        checks.append((_SCRATCH, 0))
    code = _return(1)
    for register, wanted in reversed(checks):
        if wanted is not None:
            # Another value jumps over the rest of this rule.
            code.insert(0, _instruction(0x55, register, value=wanted, offset=len(code)))
    return prepared + code


def _return(value: int) -> list[bytes]:
    return [_instruction(0xB7, _REGISTER, value=value), _instruction(0x95)]


def _load(register: int, offset: int) -> bytes:
    return _instruction(0x61, register, _CONTEXT, offset=offset)


def _instruction(
    code: int, target: int = 0, source: int = 0, *, offset: int = 0, value: int = 0
) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, offset, value)
