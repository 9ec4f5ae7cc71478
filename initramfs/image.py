"""The initramfs: busybox, the kernel's modules, init, and the root filesystem as EROFS images.

Nothing is unpacked at boot: init mounts the images and pages are read as they are used. See
docs/decisions/0002-erofs-root-in-the-initramfs.md.
"""

import shutil
import tempfile
import uuid
from collections.abc import Iterable
from pathlib import Path

from initramfs.cpio import write_cpio
from initramfs.programs import Programs

# Small files packed together: they are most of the tree, and Python reads hundreds of them.
_EROFS_OPTIONS = ("-zzstd,level=9", "-C65536", "-Eall-fragments,dedupe")


def write_initramfs(
    rootfs: Path, modules: Path, images: Iterable[Path], initramfs: Path, epoch: int
) -> None:
    """Write the uncompressed cpio for the kernel, with busybox and init from the root filesystem.

    `modules` holds the modules and their lists, `images` are what init mounts, by name.
    """
    with tempfile.TemporaryDirectory(dir=initramfs.parent) as scratch:
        early = Path(scratch) / "early"
        for folder in ("agent", "base", "bin", "dev", "memory", "proc", "root"):
            (early / folder).mkdir(parents=True)
        shutil.copyfile(rootfs / "usr/bin/busybox", early / "bin/busybox")
        (early / "bin/busybox").chmod(0o755)
        (early / "bin/sh").symlink_to("busybox")
        shutil.copyfile(rootfs / "init", early / "init")
        (early / "init").chmod(0o755)
        shutil.copytree(modules, early / "modules")
        for image in images:
            shutil.copyfile(image, early / image.name)
        partial = Path(scratch) / initramfs.name
        with partial.open("wb") as file:
            write_cpio(early, file, epoch)
        partial.replace(initramfs)


def write_erofs(programs: Programs, tree: Path, image: Path, epoch: int, key: str) -> None:
    """Write a tree as a compressed EROFS image, with the image's own mkfs.erofs.

    `key` changes with the contents. So does the image's id then, by which overlayfs tells that an
    upper directory was made above other ones.
    """
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"innkeep {image.name} {key}")
    options = [*_EROFS_OPTIONS, f"-T{epoch}", f"-U{name}", "--all-root", "--quiet"]
    programs.run("usr/bin/mkfs.erofs", *options, image, tree)
