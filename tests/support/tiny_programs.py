"""Programs of a few instructions, made without a compiler, for x86-64.

Each makes one system call and exits with its errno, or with 0 when it succeeded.
"""

import struct

# Below 4 GiB, so that 32-bit system calls can be given addresses.
_BASE = 0x10000
_HEADERS_BYTES = 64 + 56
_SCRATCH = _BASE + 0x800

_SYSCALL, _INT_80 = b"\x0f\x05", b"\xcd\x80"
_REGISTERS = {"eax": 0xB8, "ecx": 0xB9, "edx": 0xBA, "ebx": 0xBB, "esi": 0xBE, "edi": 0xBF}

_SOCK_STREAM = 1


def socket_program(family: int) -> bytes:
    """socket(2), with all 64 bits of the register that the family is in."""
    family_in_rdi = b"\x48\xbf" + struct.pack("<Q", family)
    return _elf(family_in_rdi + _move(eax=41, esi=_SOCK_STREAM, edx=0) + _SYSCALL)


def socket_program_of_32_bits(family: int) -> bytes:
    """socket(2) as 32-bit programs call it since Linux 4.3."""
    return _elf(_move(eax=359, ebx=family, ecx=_SOCK_STREAM, edx=0) + _INT_80)


def socketcall_program_of_32_bits(family: int) -> bytes:
    """socketcall(2), which takes its arguments in memory."""
    stored = b"".join(
        b"\xc7\x04\x25" + struct.pack("<iI", _SCRATCH + 4 * index, value)
        for index, value in enumerate((family, _SOCK_STREAM, 0))
    )
    return _elf(stored + _move(eax=102, ebx=1, ecx=_SCRATCH) + _INT_80)


def io_uring_program() -> bytes:
    """io_uring_setup(2), without the parameters that it would need to succeed."""
    return _elf(_move(eax=425, edi=8, esi=0) + _SYSCALL)


def _move(**registers: int) -> bytes:
    return b"".join(
        bytes([_REGISTERS[name]]) + struct.pack("<I", value) for name, value in registers.items()
    )


def _elf(call: bytes) -> bytes:
    # errno = eax < 0 ? -eax : 0; exit(errno)
    code = call + b"\xf7\xd8" + b"\x79\x02" + b"\x31\xc0" + b"\x89\xc7" + _move(eax=60) + _SYSCALL
    size = _HEADERS_BYTES + len(code)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, _BASE + _HEADERS_BYTES, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    # One segment to read, write and execute, with a page more than the file for the scratch.
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size + 4096, 4096)
    return header + segment + code
