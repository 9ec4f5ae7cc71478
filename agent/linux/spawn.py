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
    stdio: tuple[int | None, int, int] | str,
    cgroup: Path | None = None,
) -> int:
    """Start ``path`` in a session of its own; its pid, which the caller has to reap.

    ``path`` is taken relative to ``cwd`` and not searched for. ``stdio`` are descriptors for
    stdin (None is /dev/null), stdout and stderr, or the path of a terminal, which becomes all
    three and the session's controlling one (credentials(7)). The descriptors are above 2,
    close-on-exec and stay the caller's; no others are passed on. All signals have their default
    dispositions and none is blocked. ``cgroup`` is a directory of cgroup2 that the process is in
    from its first instruction.

    Blocks until the program has been executed: for as long as its file system takes.

    Raises:
        OSError: what clone, chdir or exec said, without telling which (posix_spawn(3)).
        ValueError: a NUL byte in a string.
    """
    if cgroup is None:
        return spawn_from_here(path, argv, env, cwd=cwd, stdio=stdio)
    if not HAS_SETCGROUP:
        return _spawn_through_python(path, argv, env, cwd, stdio, cgroup)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return spawn_from_here(path, argv, env, cwd=cwd, stdio=stdio, cgroup=directory)
    finally:
        os.close(directory)


def spawn_from_here(
    path: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: str,
    stdio: tuple[int | None, int, int] | str,
    cgroup: int | None = None,
) -> int:
    """As ``posix_spawn``, with all that is the calling thread's own: root, namespaces, identity.

    ``cgroup`` is a descriptor of the directory, for which glibc must have HAS_SETCGROUP.
    """
    with _attributes(cgroup) as attributes, _file_actions(cwd, stdio) as actions:
        return _spawn(path, argv, env, actions, attributes)


def _spawn_through_python(
    path: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str,
    stdio: tuple[int | None, int, int] | str,
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
            with _attributes() as attributes, _file_actions(cwd, stdio, report) as actions:
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
def _file_actions(
    cwd: str, stdio: tuple[int | None, int, int] | str, *more: int
) -> Iterator[ctypes.Array[ctypes.c_char]]:
    """What the child does before exec: ``stdio`` become its 0, 1 and 2, ``more`` its 3…, and
    everything else is closed."""
    actions = ctypes.create_string_buffer(_OPAQUE_BYTES)
    _check(_libc.posix_spawn_file_actions_init(actions))
    try:
        if isinstance(stdio, str):
            # Opened by the leader of a session that has none, it is the controlling terminal.
            _add_open(actions, 0, _text(stdio), os.O_RDWR)
            files = ((1, 0), (2, 0))
        else:
            stdin, stdout, stderr = stdio
            if stdin is None:
                _add_open(actions, 0, b"/dev/null", os.O_RDONLY)
            else:
                _add_dup2(actions, stdin, 0)
            files = ((1, stdout), (2, stderr))
        for number, file in (*files, *enumerate(more, 3)):
            _add_dup2(actions, file, number)
        _check(_libc.posix_spawn_file_actions_addclosefrom_np(actions, 3 + len(more)))
        _check(_libc.posix_spawn_file_actions_addchdir_np(actions, _text(cwd)))
        yield actions
    finally:
        _libc.posix_spawn_file_actions_destroy(actions)


def _add_open(actions: ctypes.Array[ctypes.c_char], number: int, path: bytes, flags: int) -> None:
    _check(_libc.posix_spawn_file_actions_addopen(actions, number, path, flags, 0))


def _add_dup2(actions: ctypes.Array[ctypes.c_char], file: int, number: int) -> None:
    _check(_libc.posix_spawn_file_actions_adddup2(actions, file, number))


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
