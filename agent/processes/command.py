"""What to start, as a host asks for it: in the VM itself, or in a container of an image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

import attrs

from agent.errors import AgentError
from protocol.errors import ErrorCode
from protocol.values import ImageInfo

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

BASE_ENVIRONMENT: Mapping[str, str] = {"PATH": DEFAULT_PATH, "TERM": "xterm-256color"}
"""What every command has, next to its user's HOME."""


@attrs.frozen(kw_only=True)
class Confinement:
    """A directory that a program has as its root, and as whom it works there."""

    root: int
    """A descriptor of the directory, O_PATH is enough; open until the program has started."""
    namespace: int | None = None
    """One of the mount namespace that the directory is in, where that is not the agent's own."""
    read_only: bool = False
    with_mounts: bool = True
    """Whether what is mounted below the directory is there as well."""
    uid: int = 0
    gid: int = 0
    capabilities: tuple[int, ...] = ()
    """All that it has, as root or as anybody else."""


@attrs.frozen(kw_only=True)
class Command:
    """A command in the VM. ``environment`` is all of it, and may hold secrets."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = attrs.field(repr=False)
    directory: str = "/"
    confinement: Confinement | None = None
    """For programs of ours that deal with others' files."""

    @classmethod
    def from_request(
        cls,
        argv: Sequence[str],
        env: Iterable[tuple[str, str]] = (),
        workdir: str | None = None,
        *,
        defaults: Mapping[str, str] | None = None,
    ) -> Command:
        """The command that a host asks for: root's environment, and ``env`` over it.

        ``defaults`` are variables that it need not give. A relative ``workdir`` is taken from
        ``/``.

        Raises:
            AgentError: INVALID_REQUEST, for no command and for what no program can be given.
        """
        check_words(argv)
        return cls(
            argv=tuple(argv),
            environment=merged_environment(
                {**BASE_ENVIRONMENT, "HOME": "/root", **(defaults or {})}, env
            ),
            directory=checked_directory(workdir or "/"),
        )


@attrs.frozen
class Bind:
    """A directory, file or socket of the VM that a container has at ``destination``."""

    source: str
    destination: str
    read_only: bool = False
    gives_way: bool = False
    """Whether a request may have something else at ``destination``."""

    @property
    def mounting(self) -> str:
        """What fails where it cannot be mounted, in words."""
        return f"mount {self.source} at {self.destination} in the container"

    def is_displaced_by(self, others: Iterable[Bind]) -> bool:
        """Whether it gives way to one of ``others``: one that is at its destination, or a read-only
        one above, in which nobody can make a place for it."""
        return self.gives_way and any(
            other.destination == self.destination
            or (other.read_only and self.destination.startswith(f"{other.destination}/"))
            for other in others
        )


@attrs.frozen(kw_only=True)
class ContainerCommand:
    """A command in a container, with the image's defaults applied.

    ``environment`` lacks what every command has and HOME, which takes the container's own files
    to know. ``user`` is ``name``, ``uid``, ``name:group`` or ``uid:gid``; empty is root.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = attrs.field(repr=False)
    directory: str
    user: str
    binds: tuple[Bind, ...] = ()
    privileged: bool = False
    """For a container that is a machine of its own, with all capabilities."""

    @classmethod
    def from_request(
        cls,
        image_name: str,
        image: ImageInfo,
        argv: Sequence[str] = (),
        env: Iterable[tuple[str, str]] = (),
        *,
        workdir: str | None = None,
        user: str | None = None,
        binds: Iterable[Bind] = (),
        privileged: bool = False,
        defaults: Mapping[str, str] | None = None,
    ) -> ContainerCommand:
        """The command that a host asks for, where it leaves something open the image's.

        ``image_name`` is the image as the host spells it. An ``argv`` replaces the image's
        entrypoint together with its cmd. ``defaults`` are variables that neither of them need give.

        Raises:
            AgentError: INVALID_REQUEST, for no command at all and for what no program can be
                given.
        """
        words = tuple(argv) or (*image.entrypoint, *image.cmd)
        if not words:
            raise AgentError(
                ErrorCode.INVALID_REQUEST,
                f"no command given and image '{image_name}' defines no entrypoint or cmd",
            )
        check_words(words)
        # An entry without a name or a value is some builder's slip.
        of_image = dict(
            entry.split("=", 1) for entry in image.env if "=" in entry.removeprefix("=")
        )
        return cls(
            argv=words,
            environment=merged_environment({**(defaults or {}), **of_image}, env),
            directory=checked_directory(workdir or image.workdir or "/"),
            user=user or image.user or "",
            binds=tuple(binds),
            privileged=privileged,
        )


def check_words(argv: Sequence[str]) -> None:
    """Raise INVALID_REQUEST for words that cannot be a program's arguments."""
    if not argv:
        raise AgentError(ErrorCode.INVALID_REQUEST, "command: expected at least one word")
    if any("\0" in word for word in argv):
        raise AgentError(ErrorCode.INVALID_REQUEST, "command: a word holds a NUL byte")


def merged_environment(
    defaults: Mapping[str, str], env: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """``env`` over ``defaults``; of several entries of a name the last one holds.

    Raises:
        AgentError: INVALID_REQUEST, for what environ(7) cannot hold; it names no value.
    """
    environment = dict(defaults)
    for name, value in env:
        if not name or "=" in name or "\0" in name:
            raise AgentError(
                ErrorCode.INVALID_REQUEST, f"env: not the name of a variable: {name!r}"
            )
        if "\0" in value:
            raise AgentError(
                ErrorCode.INVALID_REQUEST, f"env: {name}: a value cannot hold a NUL byte"
            )
        environment[name] = value
    return environment


def checked_directory(workdir: str) -> str:
    """``workdir`` as an absolute path. Raises INVALID_REQUEST for one with a NUL byte."""
    if "\0" in workdir:
        raise AgentError(ErrorCode.INVALID_REQUEST, "workdir: the path holds a NUL byte")
    return str(PurePosixPath("/", workdir))
