"""The kernel as QEMU's direct boot wants it, and the modules that the image loads."""

import lzma
import re
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from initramfs.errors import BuildError
from initramfs.programs import Programs

_SIGNED = b"~Module signature appended~\n"
_SIGNATURE_HEADER_SIZE = 12
_ZSTD = b"\x28\xb5\x2f\xfd"
_DECOMPRESS = """
import sys
from backports.zstd import ZstdFile
with ZstdFile(sys.stdin.buffer) as file:
    while block := file.read(1 << 20):
        sys.stdout.buffer.write(block)
"""


def payload(image: bytes) -> bytes:
    """The compressed ELF kernel inside an x86 bzImage.

    Started through its PVH entry, it saves the guest the decompression, which takes seconds
    without KVM. Offsets are those of the kernel's Documentation/arch/x86/boot.rst.

    Raises:
        BuildError: not a bzImage that has one, or not compressed with zstd.
    """
    if image[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", image, 0x206)[0] < 0x208:
        raise BuildError("the kernel is not an x86 bzImage")
    (setup_sectors,) = struct.unpack_from("<B", image, 0x1F1)
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    # The last four bytes are the length of what is compressed.
    compressed = image[start : start + length - 4]
    if not compressed.startswith(_ZSTD):
        raise BuildError("the kernel is not compressed with zstd")
    return compressed


def extract_kernel(package: Path, programs: Programs, path_of_zstd: Path, kernel: Path) -> None:
    """Write the ELF kernel of an unpacked kernel package to `kernel`.

    `path_of_zstd` is the folder of the image's wheels, whose zstd decompresses it.
    """
    (image,) = (package / "boot").glob("vmlinuz-*")
    with tempfile.TemporaryFile() as compressed, kernel.open("wb") as file:
        compressed.write(payload(image.read_bytes()))
        compressed.seek(0)
        programs.python("-c", _DECOMPRESS, path=[path_of_zstd], stdin=compressed, stdout=file)


def write_modules(package: Path, lists: Mapping[str, Iterable[str]], folder: Path) -> None:
    """Write the modules that the lists name, with all that they depend on, and the lists.

    A list becomes a file of its own, of file names in an order to load them; what an earlier list
    has loaded is not in a later one.

    Raises:
        BuildError: the package has no such module.
    """
    files = {
        path.name.partition(".")[0].replace("-", "_"): path
        for path in (package / "usr/lib/modules").glob("*/kernel/**/*.ko.xz")
    }
    written: set[str] = set()

    def write(name: str) -> Iterator[str]:
        if name in written:
            return
        written.add(name)
        if name not in files:
            raise BuildError(f"the kernel package has no module {name}")
        contents = unsigned(lzma.decompress(files[name].read_bytes()))
        for dependency in dependencies(contents):
            yield from write(dependency)
        (folder / f"{name}.ko").write_bytes(contents)
        yield f"{name}.ko"

    folder.mkdir()
    for title, names in lists.items():
        ordered = [file for name in names for file in write(name)]
        (folder / title).write_text("".join(f"{file}\n" for file in ordered), encoding="utf-8")


def unsigned(module: bytes) -> bytes:
    """The module without its signature, which takes longer to check than the rest to load.

    It comes from the same file as the kernel, so nothing is learnt by checking. The format is that
    of the kernel's include/linux/module_signature.h.
    """
    if not module.endswith(_SIGNED):
        return module
    (length,) = struct.unpack(">I", module[-len(_SIGNED) - 4 : -len(_SIGNED)])
    return module[: -len(_SIGNED) - _SIGNATURE_HEADER_SIZE - length]


def dependencies(module: bytes) -> list[str]:
    """What a module's own `depends=` says, as modinfo(8) shows it."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match.group(1).decode() if match else ""
    return [name.replace("-", "_") for name in names.split(",") if name]
