"""bpf(2), as far as a cgroup's device filter needs it (BPF_PROG_TYPE_CGROUP_DEVICE)."""

from __future__ import annotations

import ctypes
import os
import struct

_SYS_BPF = {"x86_64": 321}.get(os.uname().machine, 280)  # 280 in the generic table, so on arm64

_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_DEVICE = 15
_CGROUP_DEVICE = 6
_INSTRUCTION_BYTES = 8
# The kernel takes a longer union bpf_attr than it knows as long as the rest is zero.
_ATTR_BYTES = 128

_libc = ctypes.CDLL(None, use_errno=True)


def load_device_filter(instructions: bytes) -> int:
    """A descriptor of the verified program, close-on-exec; the caller closes it.

    Raises:
        OSError: no permission, no BPF in this kernel, or a program that the verifier refuses.
    """
    program = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    return _bpf(
        _PROG_LOAD,
        struct.pack(
            "=IIQQ",
            _PROG_TYPE_CGROUP_DEVICE,
            len(instructions) // _INSTRUCTION_BYTES,
            ctypes.addressof(program),
            ctypes.addressof(licence),
        ),
    )


def attach_device_filter(cgroup: int, program: int) -> None:
    """Make ``program`` the filter of the cgroup that ``cgroup`` is a directory descriptor of.

    It replaces the one attached before, if any, holds for all cgroups below, and stays for as
    long as the cgroup.

    Raises:
        OSError: no permission, or a cgroup above that allows none below.
    """
    _bpf(_PROG_ATTACH, struct.pack("=IIII", cgroup, program, _CGROUP_DEVICE, 0))


def _bpf(command: int, attributes: bytes) -> int:
    union = ctypes.create_string_buffer(attributes, _ATTR_BYTES)
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_BPF),
        ctypes.c_int(command),
        ctypes.byref(union),
        ctypes.c_uint(_ATTR_BYTES),
    )
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
