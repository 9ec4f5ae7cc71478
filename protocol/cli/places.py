"""Where `cp` copies from and to, as people write it, and docker's rules about it."""

from __future__ import annotations

from typing import Final

import attrs

from protocol.cli.connection import FAILED, CommandFailed

_VM: Final = "vm:"
_STREAM: Final = "-"
_USAGE: Final = 2


@attrs.frozen
class VmPath:
    """A path in the VM, as it was given."""

    path: str

    def __str__(self) -> str:
        return f"{_VM}{self.path}"


@attrs.frozen
class LocalPath:
    """A path of this machine, as it was given."""

    path: str

    def __str__(self) -> str:
        return self.path


@attrs.frozen
class Stream:
    """Standard input or output, as a tar stream."""

    def __str__(self) -> str:
        return _STREAM


Named = VmPath | LocalPath
Place = Named | Stream


def place(word: str) -> Place:
    """``vm:PATH``, ``-`` or a path here, which ``./`` tells from the others."""
    if word == _STREAM:
        return Stream()
    if word.startswith(_VM):
        path = word.removeprefix(_VM)
        if not path:
            raise CommandFailed(f"{word}: a path is expected behind it, as in vm:/etc", _USAGE)
        return VmPath(path)
    if not word:
        raise CommandFailed("an empty path is no path", _USAGE)
    return LocalPath(word)


def target(source: Named, kind: str, name: str, destination: Named, there: str | None) -> str:
    """Where a thing of this kind and name goes, by docker's rules; ``there`` is what
    ``destination`` is, if it is there.

    Raises CommandFailed, naming what it is not.
    """
    path = destination.path
    if kind == "directory":
        if there not in (None, "directory"):
            raise CommandFailed(f"{destination} is no directory, and {source} is one", FAILED)
        inside = there is not None and not says_contents(source.path)
        return _joined(path, name) if inside else path
    if says_directory(source.path):
        raise CommandFailed(f"{source} is no directory", FAILED)
    if there == "directory":
        return _joined(path, name)
    if says_directory(path):
        raise CommandFailed(f"{destination} is no directory", FAILED)
    return path


def says_directory(path: str) -> bool:
    """Whether a path can only mean a directory, as it is written."""
    return path.endswith(("/", "/.")) or path == "."


def says_contents(path: str) -> bool:
    """Whether what is in the directory is meant, and not the directory itself."""
    return path.endswith("/.") or path.strip("/") in ("", ".")


def _joined(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
