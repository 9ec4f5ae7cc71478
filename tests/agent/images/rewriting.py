"""A tar, through the rewriter."""

from agent.images.tar_rewriter import TarRewriter


def rewritten(archive: bytes, step: int = 1 << 20, *, max_entries: int = 1000) -> bytes:
    """What mkfs.erofs gets for an archive that comes in pieces of `step` bytes."""
    rewriter = TarRewriter(max_entries)
    out = bytearray()
    for start in range(0, len(archive), step):
        for piece in rewriter.feed(archive[start : start + step]):
            out += piece
    for piece in rewriter.finish():
        out += piece
    return bytes(out)
