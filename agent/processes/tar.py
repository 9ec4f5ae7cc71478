"""Directories as tar streams, both ways: GNU tar in a process whose root is the directory.

Where a name leads, the kernel decides, in that root (`agent.linux.confined_spawn`); tar itself is
told to believe every name (``--absolute-names``). Why so: docs/decisions/.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import attrs
import trio

from agent.errors import AgentError, failing_as
from agent.linux.identity import (
    CAP_CHOWN,
    CAP_DAC_OVERRIDE,
    CAP_FOWNER,
    CAP_FSETID,
    CAP_SETFCAP,
)
from agent.linux.syncfs import syncfs
from agent.processes.command import DEFAULT_PATH, Command, Confinement
from agent.processes.process import Process, Stdio, Stream
from agent.processes.service import Processes
from protocol.constants import FILE_WRITE_CHUNK_SIZE
from protocol.errors import ErrorCode

# Nothing of these is looked up in the directory: no locale; no character sets either, whose cache
# glibc would believe without checking it (iconv_open(3), GCONV_PATH).
_ENVIRONMENT = {"PATH": DEFAULT_PATH, "LC_ALL": "C", "GCONV_PATH": "/dev/null"}

# Numbers only: names would be looked up by libraries that the directory's own nsswitch.conf names.
# ACLs are among the attributes, as they are stored; trusted.* needs CAP_SYS_ADMIN.
_KEEPING = ("--numeric-owner", "--xattrs", "--xattrs-include=*", "--xattrs-exclude=trusted.*")

# Records of 64 KiB, what a pipe holds at first: with tar's own 10 KiB the two sides of it wake each
# other six times as often, and packing many files takes three times as long.
_STREAM = ("--file=-", "--blocking-factor=128")

_EXTRACT = (
    "--extract",
    *_STREAM,
    "--directory=/",
    "--absolute-names",
    # What is a link to a directory stays one when the stream has a directory of that name.
    "--keep-directory-symlink",
    "--same-permissions",
    "--delay-directory-restore",
    # Other programs' records in pax headers, and clocks that differ.
    "--warning=no-unknown-keyword",
    "--warning=no-timestamp",
    "--quoting-style=literal",
    *_KEEPING,
)
_CREATE = (
    "--create",
    *_STREAM,
    "--no-unquote",
    "--format=posix",
    "--quoting-style=literal",
    *_KEEPING,
)

# Neither the archiver's pid in names of headers, nor times that nobody restores.
_REPRODUCIBLE = "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"

_WRITES = (CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_SETFCAP)
_READS = (CAP_DAC_OVERRIDE,)

# POSIX pax, "ustar Interchange Format": two blocks of zeros at the end.
_END_MARK_BYTES = 1024
_WORDS_BYTES = 4096
_SHOWN_LINES = 3
# After these tar would go on, through all that is still to come, and make nothing but empty files.
_HOPELESS = (b"No space left on device", b"Disk quota exceeded", b"Read-only file system")
# "Some files differ": changed, or removed, while they were read (tar's manual, "Synopsis").
_SOME_FILES_DIFFER = 1


@attrs.define(eq=False)
class Unpacking:
    """A tar stream on its way into a directory; see ``unpacking``."""

    _directory: int
    _process: Process
    _words: _Words
    _total_bytes: int = 0
    _tail: bytes = b""

    async def feed(self, data: bytes) -> None:
        """Give it the next bytes, as fast as it takes them.

        Raises:
            AgentError: FILE_IO_FAILED with tar's own words: it has given up.
        """
        stdin = self._process.stdin
        assert stdin is not None
        self._total_bytes += len(data)
        self._tail = (self._tail + data[-_END_MARK_BYTES:])[-_END_MARK_BYTES:]
        await stdin.send(data)
        # It reads on after the end mark, so an end before the stream's own is a failure.
        if not stdin.is_open and await self._process.wait() != 0:
            raise await self._failure()

    async def finish(self) -> tuple[str, ...]:
        """No more comes: wait for its end, and for the disk; what it had to remark, line by line.

        Raises:
            AgentError: FILE_IO_FAILED with tar's own words, or for a stream without its end.
        """
        stdin = self._process.stdin
        assert stdin is not None
        await stdin.end()
        if await self._process.wait() != 0:
            raise await self._failure()
        if self._tail.strip(b"\0") or len(self._tail) < _END_MARK_BYTES:
            raise AgentError(
                ErrorCode.FILE_IO_FAILED,
                f"the tar stream has no end mark after {self._total_bytes} bytes: it was cut short,"
                " or is no tar stream",
            )
        with failing_as(ErrorCode.FILE_IO_FAILED, "write the unpacked tar stream to the disk"):
            await trio.to_thread.run_sync(syncfs, self._directory)
        return await self._words.lines()

    async def _failure(self) -> AgentError:
        return await _failure("unpack the tar stream", self._process, self._words)


@asynccontextmanager
async def unpacking(
    processes: Processes,
    directory: int,
    *,
    namespace: int | None = None,
    owner: tuple[int, int] | None = None,
) -> AsyncIterator[Unpacking]:
    """A tar that unpacks into an open directory, whose mounts are part of it, for the block.

    ``owner`` has all that is made; without one, who the stream says. ``namespace`` is as for
    ``Confinement``. A block that is left before ``finish`` leaves what was unpacked by then.

    Raises:
        AgentError: SPAWN_FAILED with the cause.
    """
    uid, gid = owner or (0, 0)
    ownership = "--same-owner" if owner is None else "--no-same-owner"
    command = Command(
        argv=("tar", *_EXTRACT, ownership),
        environment=_ENVIRONMENT,
        confinement=Confinement(
            root=directory, namespace=namespace, uid=uid, gid=gid, capabilities=_WRITES
        ),
    )
    async with (
        processes.running(command, Stdio(takes_stdin=True)) as process,
        _Words.heard(process) as words,
    ):
        yield Unpacking(directory, process, words)


async def pack(
    processes: Processes,
    directory: int,
    send: Callable[[bytes], Awaitable[None]],
    *,
    name: str = ".",
    called: str | None = None,
    namespace: int | None = None,
) -> tuple[str, ...]:
    """Send what is in an open directory as a tar stream; what tar had to remark, line by line.

    ``name`` is what to pack of it, without what other file systems are mounted there; ``called``
    stands in its place in the stream. ``send`` gets at most 1 MiB at a time, and is waited for.

    Raises:
        AgentError: SPAWN_FAILED; FILE_IO_FAILED with tar's own words, for what it could not read.
    """
    renaming = () if called is None else (_renaming(name, called),)
    command = Command(
        argv=("tar", *_CREATE, _REPRODUCIBLE, *renaming, "--directory=/", "--", name),
        environment=_ENVIRONMENT,
        confinement=Confinement(
            root=directory,
            namespace=namespace,
            read_only=True,
            with_mounts=False,
            capabilities=_READS,
        ),
    )
    async with (
        processes.running(command, Stdio(takes_stdin=True)) as process,
        _Words.heard(process) as words,
    ):
        stream = process.outputs[Stream.STDOUT]
        while data := await stream.receive(FILE_WRITE_CHUNK_SIZE):
            await send(data)
        if await process.wait() not in (0, _SOME_FILES_DIFFER):
            raise await _failure("pack the directory", process, words)
        return await words.lines()


def _renaming(name: str, called: str) -> str:
    """tar's option to replace a name at the beginning of names, and of hard links' targets."""
    pattern = "".join(f"\\{c}" if c in "\\.[]*^$," else c for c in name)
    replacement = "".join(f"\\{c}" if c in "\\&," else c for c in called)
    return f"--transform=flags=rSh;s,^{pattern},{replacement},"


@attrs.define(eq=False)
class _Words:
    """What tar says on stderr: the beginning of it is kept."""

    _kept: bytearray = attrs.field(factory=bytearray)
    _ended: trio.Event = attrs.field(factory=trio.Event)

    @classmethod
    @asynccontextmanager
    async def heard(cls, process: Process) -> AsyncIterator[_Words]:
        """Listen for the block."""
        words = cls()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(words._listen, process)
            yield words
            nursery.cancel_scope.cancel()

    async def _listen(self, process: Process) -> None:
        while data := await process.outputs[Stream.STDERR].receive():
            self._kept += data[: _WORDS_BYTES - len(self._kept)]
            if any(reason in data for reason in _HOPELESS):
                process.kill_tree()
        self._ended.set()

    async def lines(self) -> tuple[str, ...]:
        """All of it, once tar has ended."""
        await self._ended.wait()
        lines = self._kept.decode("utf-8", "replace").splitlines()
        # The loader reads the directory's own /etc/ld.so.preload, and may not map what that names.
        said = (line for line in lines if line.strip() and not line.startswith("ERROR: ld.so:"))
        return tuple(line.removeprefix("tar: ") for line in said)


async def _failure(doing: str, process: Process, words: _Words) -> AgentError:
    lines = await words.lines()
    # Its last line says no more than that there are some before it.
    said = [line for line in lines if not line.startswith("Exiting with failure status")]
    said = said or list(lines)
    if process.outcome().oom:
        cause = "tar ran out of memory"
    else:
        cause = "; ".join(said[:_SHOWN_LINES]) or f"tar ended with status {process.exit_code}"
        if len(said) > _SHOWN_LINES:
            cause += f"; and {len(said) - _SHOWN_LINES} lines more"
    return AgentError(ErrorCode.FILE_IO_FAILED, f"{doing}: {cause}")
