"""A tar, through the rewriter."""

from agent.images.layer_tar import Hole, Piece
from agent.images.layer_tree import MAX_STEPS
from agent.images.tar_header import ASIDE, size_of
from agent.images.tar_rewriter import TarRewriter


def content_of(piece: Piece) -> bytes:
    """A piece's bytes, those of a hole, too."""
    return bytes(piece.length) if isinstance(piece, Hole) else bytes(piece)


def rewritten(
    archive: bytes, step: int = 1 << 20, *, max_entries: int = 1000, max_steps: int = MAX_STEPS
) -> bytes:
    """What mkfs.erofs makes its image of, for an archive that comes in pieces of `step` bytes: what
    is put aside is left out.

    Holds what the rewriter says of its pieces against the archive.
    """
    rewriter = TarRewriter(max_entries, max_steps)
    pieces = []
    for start in range(0, len(archive), step):
        chunk = archive[start : start + step]
        pieces += [(own, content_of(piece)) for own, piece in rewriter.feed(chunk)]
    pieces += [(own, content_of(piece)) for own, piece in rewriter.finish()]
    assert b"".join(piece for own, piece in pieces if own) == archive
    out = bytearray()
    aside = 0
    for own, piece in pieces:
        if aside:
            aside -= len(piece)
        elif not own and piece[156:157] == ASIDE:
            aside = size_of(piece) + -size_of(piece) % 512
        else:
            out += piece
    assert aside == 0
    return bytes(out)
