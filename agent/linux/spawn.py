"""posix_spawn(3) with what Linux adds to it: a cgroup to be born in, a directory, nothing leaked.

glibc's posix_spawn shares the parent's memory until exec, so its cost does not grow with the
agent, no Python runs in the child, and what exec refuses comes back as an error here.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_SETSIGDEF, _SETSIGMASK, _SETSID, _SETCGROUP = 0x04, 0x08, 0x80, 0x100

# glibc's posix_spawnattr_t, posix_spawn_file_actions_t and sigset_t have 336, 80 and 128 bytes;
# all that matters here is that none has more than this.
_OPAQUE_BYTES = 512

_libc = ctypes.CDLL(None)

# clone3(2) with CLONE_INTO_CGROUP, since glibc 2.39.
HAS_SETCGROUP = hasattr(_libc, "posix_spawnattr_setcgroup_np")


def posix_spawn(
    path: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: str,
    stdin: int | None,
    stdout: int,
    stderr: int,
    cgroup: Path | None = None,
) -> int:
    """Start ``path`` in a session of its own; its pid, which the caller has to reap.

    ``path`` is taken relative to ``cwd`` and not searched for. ``stdin`` None is /dev/null. The
    descriptors are above 2, close-on-exec and stay the caller's; no others are passed on. All
    signals have their default dispositions and none is blocked. ``cgroup`` is a directory of
    cgroup2 that the process is in from its first instruction.

    Blocks until the program has been executed: for as long as its file system takes.

    Raises:
        OSError: what clone, chdir or exec said, without telling which (posix_spawn(3)).
        ValueError: a NUL byte in a string.
    """
    if cgroup is None:
        with _attributes() as attributes, _file_actions(cwd, (stdin, stdout, stderr)) as actions:
            return _spawn(path, argv, env, actions, attributes)
    if not HAS_SETCGROUP:
        return _spawn_through_python(path, argv, env, cwd, (stdin, stdout, stderr), cgroup)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with (
            _attributes(directory) as attributes,
            _file_actions(cwd, (stdin, stdout, stderr)) as actions,
        ):
            return _spawn(path, argv, env, actions, attributes)
    finally:
        os.close(directory)


def _spawn_through_python(
    path: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    stdio: tuple[int | None, int, int],
    cgroup: Path,
) -> int:
    """Where glibc is too old: with a Python in between that enters the cgroup, then executes.

    It reports what exec refuses on a pipe that exec closes. About 10 ms slower.
    """
    script = Path(__file__).with_name("enter_cgroup.py")
    python = [sys.executable, "-I", "-S", str(script)]
    words = [str(cgroup), path, str(len(env)), *(f"{k}={v}" for k, v in env.items()), *argv]
    reports, report = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            with _attributes() as attributes, _file_actions(cwd, (*stdio, report)) as actions:
                pid = _spawn(sys.executable, [*python, *words], {}, actions, attributes)
        finally:
            os.close(report)
        refused = os.read(reports, 16)
    finally:
        os.close(reports)
    if refused:
        os.waitpid(pid, 0)
        _check(int(refused))
    return pid


def _spawn(
    path: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    actions: ctypes.Array[ctypes.c_char],
    attributes: ctypes.Array[ctypes.c_char],
) -> int:
    pid = ctypes.c_int()
    _check(
        _libc.posix_spawn(
            ctypes.byref(pid),
            _text(path),
            actions,
            attributes,
            _strings(argv),
            _strings([f"{name}={value}" for name, value in env.items()]),
        )
    )
    return pid.value


@contextmanager
def _attributes(cgroup: int | None = None) -> Iterator[ctypes.Array[ctypes.c_char]]:
    attributes = ctypes.create_string_buffer(_OPAQUE_BYTES)
    signals = ctypes.create_string_buffer(_OPAQUE_BYTES)
    flags = _SETSIGDEF | _SETSIGMASK | _SETSID
    _check(_libc.posix_spawnattr_init(attributes))
    try:
        _check(_libc.posix_spawnattr_setsigmask(attributes, signals))
        # Not sigfillset(3), which leaves glibc's own two signals out; they would be ignored then.
        ctypes.memset(signals, 0xFF, _OPAQUE_BYTES)
        _check(_libc.posix_spawnattr_setsigdefault(attributes, signals))
        if cgroup is not None:
            flags |= _SETCGROUP
            _check(_libc.posix_spawnattr_setcgroup_np(attributes, cgroup))
        _check(_libc.posix_spawnattr_setflags(attributes, ctypes.c_short(flags)))
        yield attributes
    finally:
        _libc.posix_spawnattr_destroy(attributes)


@contextmanager
def _file_actions(cwd: str, files: Sequence[int | None]) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """What the child does before exec: ``files`` become its 0, 1, 2…, everything else is closed."""
    actions = ctypes.create_string_buffer(_OPAQUE_BYTES)
    _check(_libc.posix_spawn_file_actions_init(actions))
    try:
        for number, file in enumerate(files):
            if file is None:
                _check(
                    _libc.posix_spawn_file_actions_addopen(
                        actions, number, b"/dev/null", os.O_RDONLY, 0
                    )
                )
            else:
                _check(_libc.posix_spawn_file_actions_adddup2(actions, file, number))
        _check(_libc.posix_spawn_file_actions_addclosefrom_np(actions, len(files)))
        _check(_libc.posix_spawn_file_actions_addchdir_np(actions, _text(cwd)))
        yield actions
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*map(_text, texts), None)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogateescape")
    if b"\0" in encoded:
        raise ValueError("a NUL byte cannot be passed to a program")
    return encoded


def _check(error: int) -> None:
    """Raise what a function of the posix_spawn family returns instead of setting errno."""
    if error:
        raise OSError(error, os.strerror(error))
