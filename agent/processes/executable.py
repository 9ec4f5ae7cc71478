"""Finding the file to execute, and saying why the kernel would not have it."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from agent.errors import AgentError
from agent.processes.command import DEFAULT_PATH, Command
from protocol.errors import ErrorCode

# Opens a path for reading; what is wrong with it is its OSError.
Opener = Callable[[str], int]

# The interpreter of a script may be a script itself; the kernel follows four.
_INTERPRETERS = 5

# elf(5). Programs have about a dozen headers; a hostile image may claim any number.
_PT_INTERP = 3
_PROGRAM_HEADERS = 64

# There when further formats of programs are registered (Documentation/admin-guide/binfmt-misc.rst).
_BINFMT_MISC = Path("/proc/sys/fs/binfmt_misc/status")


def find_executable(command: Command) -> str:
    """The path to execute for the command's first word, absolute or relative to its directory.

    As execvp(3) has it: a word with a slash is a path, any other is searched for on the command's
    own PATH, and a file that may not be executed is passed over for a later one that may.

    Raises:
        AgentError: SPAWN_FAILED, for a directory that is not there and for nothing to execute.
    """
    name = command.argv[0]
    where = command.directory
    if where != "/" and not Path(where).is_dir():
        what = "is not a directory" if Path(where).exists() else "does not exist"
        raise AgentError(ErrorCode.SPAWN_FAILED, f"start {name}: the workdir {where} {what}")
    path = command.environment.get("PATH", DEFAULT_PATH)
    if "/" in name:
        candidates = [name]
    else:
        candidates = [f"{directory or '.'}/{name}" for directory in path.split(":") if name]
    for candidate in candidates:
        # Every command comes through here: in strings, this takes a third of the time.
        if _is_executable(candidate if candidate[0] == "/" else f"{where}/{candidate}"):
            return candidate
    refusals = (
        f"{candidate}: {problem}"
        for candidate in candidates
        if (problem := _problem(Path(where, candidate))) not in (None, os.strerror(errno.ENOENT))
    )
    missing = "not found" if "/" in name else f"not found on the PATH {path}"
    raise AgentError(ErrorCode.SPAWN_FAILED, f"start {name}: {next(refusals, missing)}")


def _is_executable(file: str) -> bool:
    try:
        mode = os.stat(file).st_mode if os.access(file, os.X_OK) else 0  # noqa: PTH116
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode)


def _problem(file: Path) -> str | None:
    """Why a file cannot be executed, as far as its name and mode tell; None if it can."""
    try:
        mode = file.stat().st_mode
    except NotADirectoryError:
        return os.strerror(errno.ENOENT)
    except OSError as error:
        return error.strerror
    if stat.S_ISDIR(mode):
        return "is a directory"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    return None if os.access(file, os.X_OK) else "not executable"


def explain_refusal(path: str, refusal: int, opener: Opener) -> str:
    """In words, why execve(2) of ``path`` said ``refusal`` (an errno).

    ``opener`` sees files as the refused process did. The kernel does not tell a missing program
    from a missing interpreter; reading the file does.
    """
    if refusal in (errno.ENOENT, errno.EACCES):
        try:
            if blamed := _blamed_interpreter(path, opener):
                return blamed
        except (OSError, struct.error):
            return os.strerror(refusal)
    if refusal == errno.ENOEXEC:
        return (
            "exec format error: neither a program for this machine"
            " nor a script that begins with #! and its interpreter"
        )
    return os.strerror(refusal)


def unrunnable(
    argv: Sequence[str], environment: Mapping[str, str], directory: str, opener: Opener
) -> str | None:
    """Why execve(2) will refuse a command, as far as its file tells; None where nothing is wrong.

    For what a container's runtime finds executable and execve does not: a file that is neither a
    program nor a script, or whose interpreter is missing. What cannot be found is left to the
    runtime to tell. ``opener`` sees files as the command will.
    """
    name = argv[0]
    path = environment.get("PATH", DEFAULT_PATH)
    places = [directory] if "/" in name else [part or "." for part in path.split(":")]
    for place in places:
        candidate = str(PurePosixPath("/", directory, place, name))
        try:
            descriptor = opener(candidate)
        except OSError:
            continue
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode) or not mode & 0o111:
                continue
            head = os.pread(descriptor, 4, 0)
        finally:
            os.close(descriptor)
        if not head.startswith((b"#!", b"\x7fELF")):
            # The kernel may have been taught further formats.
            refusal = None if _BINFMT_MISC.exists() else errno.ENOEXEC
        else:
            refusal = errno.ENOENT
            try:
                if _blamed_interpreter(candidate, opener) is None:
                    refusal = None
            except OSError:
                pass
            except struct.error:
                refusal = errno.ENOEXEC
        if refusal is None:
            return None
        return f"{candidate}: {explain_refusal(candidate, refusal, opener)}"
    return None


def loader_of(program: str) -> str:
    """The dynamic loader that a program names, as a path without symbolic links.

    Raises:
        OSError: ENOEXEC for one that names none; what opening it said.
    """

    def opener(file: str) -> int:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)

    loader = _interpreter(program, opener)
    if loader is None:
        raise OSError(errno.ENOEXEC, "it is not dynamically linked", program)
    return os.path.realpath(loader)


def _blamed_interpreter(path: str, opener: Opener) -> str | None:
    for _ in range(_INTERPRETERS):
        interpreter = _interpreter(path, opener)
        if interpreter is None:
            return None
        try:
            descriptor = opener(interpreter)
        except OSError as error:
            return f"bad interpreter: {interpreter!r}: {error.strerror}"
        mode = os.fstat(descriptor).st_mode
        os.close(descriptor)
        if not stat.S_ISREG(mode) or not mode & 0o111:
            return f"bad interpreter: {interpreter!r}: not executable"
        path = interpreter
    return "bad interpreter: too many scripts that interpret one another"


def _interpreter(path: str, opener: Opener) -> str | None:
    """What ``path`` says that it is run by: a script's ``#!`` line, an ELF's PT_INTERP."""
    with os.fdopen(opener(path), "rb") as file:
        head = file.read(256)
        if head.startswith(b"#!"):
            words = head[2:].split(b"\n", 1)[0].split()
            return os.fsdecode(words[0]) if words else None
        # ELF64, little-endian: of this machine, that is; others are refused with ENOEXEC.
        if not head.startswith(b"\x7fELF\x02\x01"):
            return None
        offset, size, count = struct.unpack_from("<Q14xHH", head, 32)
        for number in range(min(count, _PROGRAM_HEADERS)):
            header = _read_at(file, offset + number * size, 40)
            kind, where, length = struct.unpack("<I4xQ16xQ", header)
            if kind == _PT_INTERP:
                return os.fsdecode(_read_at(file, where, min(length, 4096)).rstrip(b"\0"))
    return None


def _read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """As much of it as there is; nothing at offsets that no file has."""
    try:
        file.seek(offset)
    except (OverflowError, ValueError):
        return b""
    return file.read(length)
