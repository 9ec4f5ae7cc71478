"""What a layer holds, by name: where each entry of its tar ends up, and what it takes the place of.

A tar is a list of changes, and paths in it may run through symbolic links, `..` and directories
that have no entry. The tree follows it entry by entry, so that every entry can be written to
mkfs.erofs under its final name, and knows in the end which names the layer's image must have.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

import attrs

from agent.images.tar_header import TarError

# 0.7 KiB each while a layer is built, here and in mkfs.erofs.
MAX_ENTRIES = 1_000_000

# mkfs.erofs finds a name by going through the list of its directory, and a new one by going through
# all of it: 200,000 in one directory take it 2e10 steps and 100 s, a million would take it hours.
MAX_STEPS = 25_000_000_000

# limits.h: what the kernel looks up; mkfs.erofs has room for no more either.
_NAME_MAX = 255
_PATH_MAX = 4095
# path_resolution(7): where the kernel says ELOOP
_MAX_SYMLINKS = 40

# What a whiteout's name begins with, the name that it removes being the rest.
WHITEOUT_PREFIX = b".wh."
WHITEOUT = 0
"""The node of a name that the layer removes from those below it."""


class Directory(dict[bytes, "Node"]):
    """A directory's names. ``explicit``: it has an entry; ``opaque``: hides what is below it.

    ``distance`` is about how many names mkfs.erofs goes through from the root to find it.
    """

    __slots__ = ("distance", "explicit", "opaque")

    def __init__(
        self, parent: Directory | None = None, *, explicit: bool = False, opaque: bool = False
    ) -> None:
        self.explicit = explicit
        self.opaque = opaque
        self.distance: int = 0 if parent is None else parent.distance + len(parent)


# A directory, a symbolic link's target, or the S_IFMT of anything else (WHITEOUT among them).
Node = Directory | bytes | int


@attrs.define
class Place:
    """Where an entry goes: ``name`` in ``directory``, whose path is ``parent`` (`b""`: the root).

    ``name`` is empty for the root itself. ``implied`` are the directories that had to be made for
    it, with their paths, uppermost first.
    """

    directory: Directory
    parent: bytes
    name: bytes
    implied: Sequence[tuple[bytes, Directory]] = ()

    @property
    def path(self) -> bytes:
        return _joined(self.parent, self.name)

    def sibling(self, name: bytes) -> Place:
        """The place of another name in the same directory."""
        return Place(self.directory, self.parent, name)


class LayerTree:
    """The names of one layer, as the entries so far make them."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_steps: int = MAX_STEPS) -> None:
        self.root = Directory()
        self.spelled = {b"": self.root}
        """Directories by the spellings that mkfs.erofs resolves as we do: without links."""
        self._count = 0
        self._max_entries = max_entries
        self._steps = 0
        self._max_steps = max_steps
        self._searched = self.root

    def place(self, path: bytes) -> Place:
        """Where an entry of that path goes, making the directories above it.

        Raises:
            TarError: nowhere: a directory of its path is something else.
        """
        spelling, _, name = path.rstrip(b"/").rpartition(b"/")
        directory = self.spelled.get(spelling)
        if directory is not None and name not in (b"", b".", b".."):
            place = Place(directory, _unspelled(spelling), name)
        else:
            place = self._walk(path, create=True)
            if _unspelled(spelling) == place.parent:
                self.spelled[spelling] = place.directory
        self.search(place.directory)
        length = len(place.name.removeprefix(WHITEOUT_PREFIX))
        if length > _NAME_MAX or len(place.parent) + len(place.name) >= _PATH_MAX:
            raise TarError("its name is too long")
        return place

    def put(self, place: Place, node: Node) -> None:
        """Give a place's name to an entry, instead of what had it."""
        self.clear(place)
        if place.name not in place.directory:
            self.count_entry()
        place.directory[place.name] = node

    def clear(self, place: Place) -> None:
        """Make a place's name free if a directory has it, with all that is in it."""
        if isinstance(place.directory.get(place.name), Directory):
            del place.directory[place.name]
            self.spelled = {b"": self.root}

    def find(self, path: bytes) -> tuple[Place, Node | None]:
        """What an entry of this layer has at a path; None for nothing."""
        try:
            place = self._walk(path, create=False)
        except TarError:
            return Place(self.root, b"", b""), None
        self.search(place.directory)
        node = place.directory.get(place.name) if place.name else self.root
        return place, None if node == WHITEOUT else node

    def search(self, directory: Directory) -> None:
        """mkfs.erofs looks a name up there; raises TarError when it would never come to an end."""
        self._steps += len(directory)
        if directory is not self._searched:
            # One that was used just now is the first of its list.
            self._steps += directory.distance
            self._searched = directory
        if self._steps > self._max_steps:
            path, largest = max(self.directories(), key=lambda found: len(found[1]))
            raise TarError(
                f"too many names are in one directory, {len(largest):,} in "
                f"{os.fsdecode(path or b'/')!r} so far: mkfs.erofs would search them for hours. "
                "Spread them over several directories, or over several layers"
            )

    def count_entry(self) -> None:
        """One more name; raises TarError when they are too many."""
        self._count += 1
        if self._count > self._max_entries:
            raise TarError(f"the layer has more than {self._max_entries:,} entries")

    def directories(self) -> Iterator[tuple[bytes, Directory]]:
        """All directories with their paths, `b""` being the root; parents before children."""
        waiting = [(b"", self.root)]
        while waiting:
            path, directory = waiting.pop()
            yield path, directory
            prefix = path + b"/" if path else b""
            waiting += (
                (prefix + name, node)
                for name, node in directory.items()
                if isinstance(node, Directory)
            )

    def implied(self) -> frozenset[bytes]:
        """The paths of the directories that have no entry."""
        return frozenset(path for path, node in self.directories() if not node.explicit)

    def compare(self, root_fd: int) -> None:
        """Hold the tree against a mounted file system, whose root ``root_fd`` is.

        Every directory is read through the kernel and must have exactly the names that it has
        here, each of the right type. Counting would not do: mkfs.erofs numbers inodes as it
        meets entries, so that its own figure says nothing of what can be found again.

        Raises:
            TarError: a name is missing, or there is one too many, or it is something else.
            OSError: the file system cannot be read.
        """
        for path, directory in self.directories():
            fd = os.open(path or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
            try:
                with os.scandir(fd) as entries:
                    found = {os.fsencode(entry.name): entry for entry in entries}
            finally:
                os.close(fd)
            if found.keys() != directory.keys():
                name = min(found.keys() ^ directory.keys())
                wrong = "is not in" if name in directory else "is too many in"
                raise TarError(f"{_shown(path, name)} {wrong} the image that mkfs.erofs made")
            for name, node in directory.items():
                if not _is_like(found[name], node):
                    raise TarError(
                        f"{_shown(path, name)} is of another type in the image that mkfs.erofs made"
                    )

    def _walk(self, path: bytes, *, create: bool) -> Place:
        """Resolve all but the last component inside the root, links and `..` included."""
        waiting = _components(path)
        trail: list[tuple[bytes, Directory]] = [(b"", self.root)]
        implied: list[tuple[bytes, Directory]] = []
        links = 0
        while waiting:
            name = waiting.pop()
            parent, directory = trail[-1]
            if name == b"..":
                # Above the root is the root: no entry leaves the layer.
                if len(trail) > 1:
                    trail.pop()
                continue
            if not waiting:
                return Place(directory, parent, name, implied)
            node = directory.get(name)
            if isinstance(node, bytes):
                links += 1
                if links > _MAX_SYMLINKS:
                    raise TarError("its path has too many symbolic links")
                if node.startswith(b"/"):
                    del trail[1:]
                waiting += _components(node)
                continue
            if node is None or node == WHITEOUT:
                if not create:
                    raise TarError("there is no such directory")
                if len(name) > _NAME_MAX:
                    raise TarError("its name is too long")
                # What stood there in a layer below is gone, also if it was a directory.
                made = directory[name] = Directory(directory, opaque=node == WHITEOUT)
                self.count_entry()
                implied.append((_joined(parent, name), made))
                node = made
            elif not isinstance(node, Directory):
                shown = os.fsdecode(_joined(parent, name))
                raise TarError(f"it lies below {shown!r}, which is no directory")
            trail.append((_joined(parent, name), node))
        # The path was the root's or ended in `..`: it is a directory that is there.
        path, _ = trail.pop()
        if not trail:
            return Place(self.root, b"", b"", implied)
        parent, directory = trail[-1]
        return Place(directory, parent, path.rpartition(b"/")[2], implied)


def _components(path: bytes) -> list[bytes]:
    """The names in a path, the last one first."""
    return [part for part in reversed(path.split(b"/")) if part not in (b"", b".")]


def _joined(parent: bytes, name: bytes) -> bytes:
    return parent + b"/" + name if parent else name


def _unspelled(spelling: bytes) -> bytes:
    """A directory's path, if it is spelled in one of the ways `./a/b`, `/a/b` and `a/b`."""
    if spelling == b".":
        return b""
    return spelling[2:] if spelling.startswith(b"./") else spelling.removeprefix(b"/")


def _is_like(entry: os.DirEntry[str], node: Node) -> bool:
    if isinstance(node, Directory):
        return entry.is_dir(follow_symlinks=False)
    if isinstance(node, bytes):
        return entry.is_symlink()
    if node == stat.S_IFREG:
        return entry.is_file(follow_symlinks=False)
    return not (entry.is_dir(follow_symlinks=False) or entry.is_symlink() or entry.is_file())


def _shown(path: bytes, name: bytes) -> str:
    return repr(os.fsdecode(_joined(path, name)))
