"""The image, with the token of the workload's ports in its initramfs."""

from pathlib import Path

from initramfs.cpio import write_cpio
from tests.support.machine import PROJECT


def image_with_token(directory: Path, token: str) -> Path:
    """Made below `directory`; the path is for `--image`."""
    build = PROJECT / "build"
    image, more = directory / "image", directory / "more"
    image.mkdir()
    more.mkdir()
    for file in build.iterdir():
        if file.name != "initramfs.cpio":
            (image / file.name).symlink_to(file)
    (more / "token").write_text(token)
    with (image / "initramfs.cpio").open("wb") as archive:
        archive.write((build / "initramfs.cpio").read_bytes())
        # Each archive begins at a multiple of four (the kernel's buffer-format.rst).
        archive.write(bytes(-archive.tell() % 4))
        write_cpio(more, archive, 0)
    return image
