"""A layer's tar on its way to mkfs.erofs, which reads some archives otherwise than tar does.

docs/decisions/0001-layers-are-erofs-images.md has the list: entries that vanish, times and modes
that change, whiteouts that hit their own layer, an endless loop at a missing end. Headers of the
shape that everybody reads alike pass as they are; every other entry is written anew in that shape,
and what it was stays in the archive beside it, as the content of an entry that mkfs.erofs passes
over. So the layer's own tar can be put together again, bit for bit.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator

from agent.images.layer_entries import enter, root
from agent.images.layer_tar import Hole, Piece
from agent.images.layer_tree import (
    MAX_ENTRIES,
    MAX_STEPS,
    WHITEOUT_PREFIX,
    Directory,
    LayerTree,
)
from agent.images.sparse import (
    MAX_EXTENTS,
    MAX_HOLE_BYTES,
    Expansion,
    Extent,
    LeadingMap,
    Record,
    SparseMap,
    gnu_extension,
    gnu_map,
    pax_sparse,
)
from agent.images.tar_header import (
    BLOCK,
    DIRECTORY,
    GNU_LONG_LINK,
    GNU_LONG_NAME,
    GNU_SPARSE,
    PAX_GLOBAL,
    PAX_RECORDS,
    REGULAR,
    SYMLINK,
    Header,
    TarError,
    apply_records,
    aside,
    decode,
    kind_of,
    parse_records,
    size_of,
    validate,
)

# A long name, or all records of an entry. Real ones have some hundred bytes, and no attribute can
# be longer than 64 KiB.
MAX_EXTENSION_BYTES = 1 << 20
# All that may come before an entry's content: headers, names, records, maps.
_MAX_KEPT_BYTES = 8 << 20

_NO_HEADER = bytes(BLOCK)

# The common kinds, with numbers of the usual widths, and nothing behind the names and devices: a
# prefix is rare, and in GNU headers access times stand there, which mkfs.erofs takes for one.
# Groups: name, mode, size, kind, link. mkfs.erofs checks the checksum.
_PLAIN = re.compile(
    rb"(.{100})"
    rb"(000[0-7]{4}\0|00[0-7]{4} \0)(?:[0-7]{7}\0|[0-7]{6} \0){2}([0-7]{11})[\0 ][0-7]{11}[\0 ]"
    rb".{8}([0125])(.{100})(?:ustar\x0000|ustar  \0).{80}\0{167}",
    re.DOTALL,
)
_PLAIN_KINDS = b"0125"
_NO_CONTENT = b"0" * 11

_LONGEST_SHOWN = 200

Written = tuple[bool, Piece]
"""A piece of the archive, and whether it is one of the layer's own tar."""
Handler = Callable[[bytes], Iterator[Written]]


class TarRewriter:
    """Bytes of a layer's tar in, an archive for mkfs.erofs out; ``tree`` is what it amounts to.

    Feed it the layer's tar in pieces of any size, then finish it. What it holds back is at most one
    header with its extensions. All of the layer's own tar comes out again, in its order, between
    what is made for mkfs.erofs. It is of no more use after an error.
    """

    def __init__(self, max_entries: int = MAX_ENTRIES, max_steps: int = MAX_STEPS) -> None:
        self.tree = LayerTree(max_entries, max_steps)
        self._entry = b""
        self._begun = False
        self._zeros = 0
        # What the next bytes are: content and rubbish pass, stored bytes are expanded, and anything
        # else is collected until there is enough of it for its handler.
        self._content = 0
        self._rubbish = 0
        self._stored = 0
        self._expansion: Expansion | None = None
        self._collected = bytearray()
        self._wanted = BLOCK
        self._handler: Handler | None = None  # none: it is a header
        self._kept = bytearray()
        """What was collected, and is still to be put aside."""
        # What came before an entry's own header.
        self._records: list[Record] = []
        self._long_name = b""
        self._long_link = b""
        self._hole_bytes = 0

    def feed(self, data: bytes | memoryview) -> Iterator[Written]:
        """The tar's next bytes in; the archive's next pieces out, to be used up.

        Raises:
            TarError: the layer cannot be built, naming the entry and the cause.
        """
        try:
            yield from self._feed(memoryview(data))
        except TarError as error:
            raise self._named(error) from None

    def finish(self) -> Iterator[Written]:
        """The end of the tar, which may come without its two blocks of zeros.

        Raises:
            TarError: it came in the middle of an entry.
        """
        if self._content or self._collected or (self._zeros < 2 and not self._is_between_entries):
            # mkfs.erofs would wait for the rest for ever, and use all of a CPU.
            raise self._named(TarError("the archive ends in the middle"))
        yield from self._begin()
        if self._zeros < 2:
            yield False, bytes((2 - self._zeros) * BLOCK)

    def _feed(self, view: memoryview) -> Iterator[Written]:
        yield from self._begin()
        start = position = 0  # between them is what passes as it is
        end = len(view)
        while position < end and self._zeros < 2:
            if self._content:
                taken = min(self._content, end - position)
                self._content -= taken
                position += taken
                continue
            if end - position >= BLOCK and self._passes(view[position : position + BLOCK]):
                position += BLOCK
                continue
            if start < position:
                yield True, view[start:position]
            if self._rubbish:
                taken = min(self._rubbish, end - position)
                self._rubbish -= taken
                yield True, view[position : position + taken]
            elif self._expansion is not None:
                taken = min(self._stored, end - position)
                yield from self._expand(self._expansion, view[position : position + taken])
            else:
                taken = min(self._wanted - len(self._collected), end - position)
                self._collected += view[position : position + taken]
                if len(self._collected) == self._wanted:
                    yield from self._handle(bytes(self._collected))
            start = position = position + taken
        # Nobody reads on behind the end, but it is part of the tar.
        if start < end:
            yield True, view[start:]

    def _begin(self) -> Iterator[Written]:
        if not self._begun:
            self._begun = True
            yield False, root()

    def _put_aside(self, following: int = 0) -> Iterator[Written]:
        """Write what was collected where mkfs.erofs passes over it, with so much rubbish behind."""
        kept, self._kept = bytes(self._kept), bytearray()
        self._rubbish = following
        if kept or following:
            yield False, aside(len(kept) + following)
            yield True, kept
            if not following:
                yield False, bytes(-len(kept) % BLOCK)

    @property
    def _is_between_entries(self) -> bool:
        """Whether nothing but an entry's own first header, or the end, can follow."""
        return not (
            self._rubbish
            or self._kept
            or self._expansion is not None
            or self._handler is not None
            or self._records
            or self._long_name
            or self._long_link
        )

    def _passes(self, block: bytes | memoryview) -> bool:
        """Whether a block is the header of a new name that needs no rewriting; then it counts."""
        found = _PLAIN.fullmatch(block) if block[156] in _PLAIN_KINDS else None
        if found is None or self._collected or self._zeros or not self._is_between_entries:
            return False
        path, mode, size, kind, link = found.groups()
        path = path.rstrip(b"\0")
        if kind == DIRECTORY:
            path = path.removesuffix(b"/")
        parent, _, name = path.rpartition(b"/")
        spelled = self.tree.spelled
        directory = spelled.get(parent)
        if directory is None or name in directory or name in (b"", b".", b"..") or b"\0" in path:
            return False
        if name.startswith(WHITEOUT_PREFIX) or (kind != REGULAR and size != _NO_CONTENT):
            return False
        if kind == REGULAR:
            directory[name] = stat.S_IFREG
            self._content = _padded(int(size, 8))
        elif kind == DIRECTORY:
            directory[name] = spelled[path] = Directory(directory, explicit=True)
        else:
            link = link.rstrip(b"\0")
            if not link or b"\0" in link:
                return False
            if kind == SYMLINK:
                if b"0777" not in mode:
                    return False
                directory[name] = link
            else:
                parent, _, target = link.rpartition(b"/")
                node = spelled[parent].get(target) if parent in spelled else None
                if not node or isinstance(node, Directory):
                    return False
                self.tree.search(spelled[parent])
                directory[name] = node
        self._entry = path
        self.tree.search(directory)
        self.tree.count_entry()
        return True

    def _handle(self, collected: bytes) -> Iterator[Written]:
        handler = self._handler or self._header
        self._collected.clear()
        self._wanted, self._handler = BLOCK, None
        return handler(collected)

    def _expect(self, size: int, handler: Handler) -> Iterator[Written]:
        self._wanted, self._handler = size, handler
        return iter(())

    def _keep(self, collected: bytes) -> None:
        self._kept += collected
        if len(self._kept) > _MAX_KEPT_BYTES:
            raise TarError("too many names and attributes follow it")

    def _header(self, block: bytes) -> Iterator[Written]:
        if self._passes(block):  # it came in two pieces
            return iter(((True, block),))
        if block == _NO_HEADER:
            if not self._is_between_entries:
                raise TarError("names and attributes follow it, but no entry that they are of")
            self._zeros += 1
            return iter(((True, block),))
        if self._zeros:
            raise TarError("a block of zeros follows it, but not the end of the archive")
        self._keep(block)
        kind = kind_of(block)
        if kind == PAX_GLOBAL:
            # As docker and containerd do: git writes its commit there, and nobody anything else.
            return self._put_aside(_padded(size_of(block)))
        if kind in (PAX_RECORDS, GNU_LONG_NAME, GNU_LONG_LINK):
            return self._extension(kind, size_of(block))
        return self._own_header(decode(block), block)

    def _extension(self, kind: bytes, size: int) -> Iterator[Written]:
        """The records or long name that precede an entry's own header."""

        def keep(body: bytes) -> Iterator[Written]:
            self._keep(body)
            body = body[:size]
            if kind == PAX_RECORDS:
                self._records += parse_records(body)
            elif kind == GNU_LONG_NAME:
                self._long_name = body.partition(b"\0")[0]
            else:
                self._long_link = body.partition(b"\0")[0]
            return iter(())

        if not 0 < size <= MAX_EXTENSION_BYTES:
            raise TarError(f"{size} bytes of names and attributes follow it")
        return self._expect(_padded(size), keep)

    def _own_header(self, header: Header, block: bytes) -> Iterator[Written]:
        records, self._records = self._records, []
        apply_records(header, records)
        header.path = self._long_name or header.path
        header.link = self._long_link or header.link
        self._long_name = self._long_link = b""
        sparse = pax_sparse(records) if header.kind == REGULAR else None
        if sparse is not None and sparse.name:
            header.path = sparse.name
        self._entry = header.path
        validate(header)
        if header.kind == GNU_SPARSE:
            extents, size, extended = gnu_map(block)
            return self._gnu_sparse(header, extents, size, extended=extended)
        if sparse is not None and sparse.map is None:
            return self._leading_map(header, LeadingMap(sparse.size))
        return self._admit(header, sparse.map if sparse is not None else None)

    def _gnu_sparse(
        self, header: Header, extents: list[Extent], size: int, *, extended: bool
    ) -> Iterator[Written]:
        def extension(block: bytes) -> Iterator[Written]:
            self._keep(block)
            more, extended = gnu_extension(block)
            extents.extend(more)
            return self._gnu_sparse(header, extents, size, extended=extended)

        if len(extents) > MAX_EXTENTS:
            raise TarError("its sparse map is too long")
        if extended:
            return self._expect(BLOCK, extension)
        return self._admit(header, SparseMap(size, tuple(extents)))

    def _leading_map(self, header: Header, leading: LeadingMap) -> Iterator[Written]:
        def next_block(block: bytes) -> Iterator[Written]:
            self._keep(block)
            header.size -= BLOCK
            sparse = leading.feed(block)
            if sparse is None:
                return self._leading_map(header, leading)
            return self._admit(header, sparse)

        if header.size < BLOCK:
            raise TarError("its sparse map is cut short")
        return self._expect(BLOCK, next_block)

    def _admit(self, header: Header, sparse: SparseMap | None) -> Iterator[Written]:
        """Write an entry, and see to the content that follows its header."""
        # Some programs state the size of what a hard link links to, though nothing follows.
        stored = header.size if header.kind in (REGULAR, GNU_SPARSE) else 0
        header.size = stored
        if sparse is not None:
            sparse.validate()
            if sparse.stored_bytes != stored:
                raise TarError(f"it has {stored} bytes, its sparse map {sparse.stored_bytes}")
            header.kind = REGULAR
            header.size = sparse.size
        headers = enter(self.tree, header)
        if header.size:
            yield from self._put_aside()
        for made in headers:
            yield False, made
        if not header.size:
            yield from self._put_aside(_padded(stored))
        elif sparse is None:
            self._content = _padded(stored)
        else:
            self._hole_bytes += sparse.hole_bytes
            if self._hole_bytes > MAX_HOLE_BYTES:
                limit = MAX_HOLE_BYTES >> 30
                raise TarError(f"with it, the layer's files have more than {limit} GiB of holes")
            self._expansion = Expansion(sparse)
            self._stored = stored
            yield from self._expand(self._expansion, memoryview(b""))

    def _expand(self, expansion: Expansion, stored: memoryview) -> Iterator[Written]:
        for piece in expansion.feed(stored):
            yield not isinstance(piece, Hole), piece
        self._stored -= len(stored)
        if self._stored == 0:
            for hole in expansion.finish():
                yield False, hole
            self._expansion = None
            if expansion.stored_padding:
                yield from self._expect(expansion.stored_padding, self._padding)

    def _padding(self, collected: bytes) -> Iterator[Written]:
        self._keep(collected)
        return self._put_aside()

    def _named(self, error: TarError) -> TarError:
        if not self._entry:
            return error
        name = repr(os.fsdecode(self._entry))
        if len(name) > _LONGEST_SHOWN:
            name = f"{name[:_LONGEST_SHOWN]}…"
        return TarError(f"entry {name}: {error}")


def _padded(size: int) -> int:
    return size + -size % BLOCK
