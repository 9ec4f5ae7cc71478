"""The image's own programs, run on this machine: Debian 12's mkfs.erofs cannot read tars."""

import os
import shlex
from pathlib import Path

import pytest

# The rootfs tree of the image; elsewhere than where `make image` puts it, if this is set.
ROOTFS = Path(os.environ.get("INNKEEP_ROOTFS", Path(__file__).parents[2] / "build" / "rootfs"))


def image_program(rootfs: Path, name: str, directory: Path) -> Path:
    """A script in `directory` that runs a program of the rootfs with the rootfs's own libraries.

    Fails the test, saying how to make the rootfs, where it is not there.
    """
    program = rootfs / "usr/bin" / name
    loaders = sorted(rootfs.glob("usr/lib/*-linux-gnu/ld-linux-*.so*"))
    if not (program.exists() and loaders):
        pytest.fail(f"{program} is missing: run `make image` first", pytrace=False)
    libraries = loaders[0].parent
    words = [str(loaders[0]), "--library-path", str(libraries), str(program)]
    script = directory / name
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="session")
def mkfs_erofs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image's mkfs.erofs, as a path to run."""
    return str(image_program(ROOTFS.absolute(), "mkfs.erofs", tmp_path_factory.mktemp("tools")))
