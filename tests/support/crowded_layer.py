"""A layer of very many empty files: a few megabytes to fetch, and hundreds of tar headers."""

import hashlib
import sys

from tests.support.layout import LAYER, LayerBlob
from tests.support.tarballs import entry

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_BLANK = entry("000000/000000")
_NAME = slice(0, 13)
_CHECKSUM = slice(148, 156)


def crowded_layer(directories: int, files: int) -> LayerBlob:
    """So many directories, none of which has an entry, of so many files each."""
    header = bytearray(_BLANK)
    header[_NAME] = bytes(13)
    header[_CHECKSUM] = b" " * 8
    rest = sum(header)
    compressor = zstd.ZstdCompressor(level=1)
    diff_id = hashlib.sha256()
    blob = bytearray()

    def write(tar: bytes) -> None:
        diff_id.update(tar)
        blob.extend(compressor.compress(tar))

    for directory in range(directories):
        # tarfile would take 50 times as long.
        headers = bytearray()
        for file in range(files):
            header[_NAME] = name = b"%06d/%06d" % (directory, file)
            header[_CHECKSUM] = b"%06o\0 " % (rest + sum(name))
            headers += header
        write(headers)
    write(bytes(1024))
    blob += compressor.flush()
    return LayerBlob(f"{LAYER}+zstd", bytes(blob), f"sha256:{diff_id.hexdigest()}")
