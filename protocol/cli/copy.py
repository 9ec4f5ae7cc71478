"""What ``cp`` does: files and directories between here and the VM, with docker's rules."""

from __future__ import annotations

import stat
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from protocol import requests, responses
from protocol.cli.connection import FAILED, CommandFailed, Settings, converse
from protocol.cli.download import Download
from protocol.cli.output import print_error
from protocol.cli.places import (
    Place,
    Stream,
    VmPath,
    place,
    says_contents,
    says_directory,
    target,
)
from protocol.cli.progress import byte_bar
from protocol.cli.unpacking import UnsafeEntry
from protocol.cli.upload import Upload
from protocol.client import AgentClient, AgentRefused
from protocol.errors import ErrorCode
from protocol.values import FileInfo

_NEEDED: Final = frozenset({"file-resume-v1", "file-mtime-v1", "file-tree-v1", "tar-stream-v1"})
_KINDS: Final = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}
_WORDS: Final = {
    "fifo": "a fifo",
    "socket": "a socket",
    "block": "a block device",
    "char": "a character device",
    "symlink": "a link whose target is not UTF-8",
}
_USAGE: Final = 2


@attrs.frozen(kw_only=True)
class Options:
    """How to copy: whose root the VM's paths are of, and what is kept and followed."""

    overlay: str | None = None
    archive: bool = False
    follow_link: bool = False
    quiet: bool = False


def copy(settings: Settings, source: str, destination: str, options: Options) -> None:
    """Copy one file or directory; a tar stream where one side is ``-``.

    Raises CommandFailed, or one of AGENT_ERRORS.
    """
    here, there = place(source), place(destination)
    if isinstance(here, VmPath) == isinstance(there, VmPath):
        raise CommandFailed(
            "exactly one of SOURCE and DESTINATION is in the VM, written vm:PATH", _USAGE
        )

    async def conversation(client: AgentClient) -> None:
        await _check_capabilities(client)
        with byte_bar(_title(here), quiet=options.quiet) as bar:
            upload = Upload(
                client=client, overlay=options.overlay, with_owners=options.archive, bar=bar
            )
            download = Download(
                client=client, overlay=options.overlay, with_owners=options.archive, bar=bar
            )
            if isinstance(there, VmPath):
                await _copy_in(upload, download, here, there, options)
            else:
                assert isinstance(here, VmPath)
                await _copy_out(download, here, there, options)

    try:
        converse(settings, conversation)
    except BrokenPipeError:
        raise
    except (UnsafeEntry, tarfile.TarError) as error:
        raise CommandFailed(f"{source}: {error}", FAILED) from error
    except OSError as error:
        about = f"{error.filename}: " if error.filename is not None else ""
        raise CommandFailed(f"{about}{error.strerror or error}", FAILED) from error


async def _check_capabilities(client: AgentClient) -> None:
    pong = await client.ask(requests.Ping(), responses.Pong)
    missing = sorted(_NEEDED.difference(pong.capabilities))
    if missing:
        raise CommandFailed(
            f"the agent is too old for copying: it lacks {', '.join(missing)}", FAILED
        )


async def _copy_in(
    upload: Upload, look: Download, source: Place, destination: VmPath, options: Options
) -> None:
    there = await _stat(look, destination.path)
    there_is = None if there is None else there.kind
    if isinstance(source, Stream):
        if there_is != "directory":
            raise CommandFailed(f"{destination} is no directory", FAILED)
        if sys.stdin is None or sys.stdin.isatty():
            raise CommandFailed("a terminal gives no tar stream", _USAGE)
        _remark(await upload.standard_input(sys.stdin.fileno(), destination.path))
        return
    path = Path(source.path)
    follow = options.follow_link or says_directory(source.path)
    kind = _kind(path, follow=follow)
    if kind is None:
        raise CommandFailed(f"{source} does not exist", FAILED)
    where = target(source, kind, _name(path), destination, there_is)
    if kind == "file":
        await upload.file(path, where)
    elif kind == "directory":
        _remark(await upload.tree(upload.source(path, ".", follow=follow), where))
    elif kind == "symlink":
        parent, _, name = where.rpartition("/")
        _remark(await upload.tree(upload.source(path, name, follow=False), parent or "/"))
    else:
        raise CommandFailed(f"{source} is {kind}, which is not copied", FAILED)


async def _copy_out(
    download: Download, source: VmPath, destination: Place, options: Options
) -> None:
    follow = options.follow_link or says_directory(source.path)
    info = await _stat(download, source.path, follow=follow)
    if info is None:
        raise CommandFailed(f"{source} does not exist", FAILED)
    name = PurePosixPath(source.path).name
    if isinstance(destination, Stream):
        if sys.stdout is None or sys.stdout.isatty():
            raise CommandFailed("a tar stream is nothing for a terminal", _USAGE)
        top = "." if says_contents(source.path) or not name else name
        await download.standard_output(source.path, top, sys.stdout.fileno())
        return
    there = _kind(Path(destination.path), follow=True)
    where = Path(target(source, info.kind, name, destination, there))
    if info.kind == "directory":
        failed: list[str] = []
        await download.tree(source.path, where, failed.append)
        _remark(failed)
        if failed:
            raise CommandFailed(f"not all of {source} was copied: {len(failed)} left out", FAILED)
    elif _kind(where, follow=False) == "directory":
        raise CommandFailed(f"{where} is a directory, and {source} is none", FAILED)
    elif info.kind == "file":
        await download.file(source.path, info, where)
    elif info.kind == "symlink" and info.target is not None and not info.escaped:
        _make_link(where, info.target)
    else:
        raise CommandFailed(f"{source} is {_WORDS[info.kind]}, which is not copied", FAILED)


def _kind(path: Path, *, follow: bool) -> str | None:
    """What is at a path here, in the agent's words; None for nothing."""
    try:
        mode = path.stat().st_mode if follow else path.lstat().st_mode
    except FileNotFoundError:
        return None
    return _KINDS.get(stat.S_IFMT(mode), "a device, fifo or socket")


def _make_link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


async def _stat(look: Download, path: str, *, follow: bool = True) -> FileInfo | None:
    """What is there, or None; a link that leads nowhere is nothing, when followed."""
    try:
        return await look.stat(path, follow=follow)
    except AgentRefused as error:
        if error.code != ErrorCode.NOT_FOUND:
            raise
        return None


def _remark(lines: list[str]) -> None:
    for line in lines:
        print_error(line)


def _title(source: Place) -> str:
    return PurePosixPath(str(source)).name or str(source)


def _name(path: Path) -> str:
    return path.resolve().name if path.name in ("", "..") else path.name
