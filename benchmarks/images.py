"""The images that are pulled: made of Debian packages once, and kept as a registry has them."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from initramfs import debian
from initramfs.architecture import ARCHITECTURES, machine_architecture
from initramfs.demo import push_busybox
from initramfs.local_registry import LocalRegistry, local_registry
from initramfs.mirror import RELEASE, machine_mirror

MANY_FILES = "many-files"
"""A Debian root with python3: 162 MB in 7,300 entries, three layers, gzip."""
MANY_FILES_ZSTD = "many-files-zstd"
BIG_FILES = "big-files"
"""Five files of 100 MB in two layers, gzip: the contents of the other's files."""
FORTY_LAYERS = "forty-layers"
"""A Debian package a layer, gzip."""
FORTY_LAYERS_CHANGED = "forty-layers-changed"
"""The same, with another package as the last one."""
TWO_GIBIBYTES = "two-gibibytes"
"""Four layers of one file of 512 MiB, gzip."""

_GZIP_TAGS = (MANY_FILES, BIG_FILES, FORTY_LAYERS, FORTY_LAYERS_CHANGED, TWO_GIBIBYTES)
# A layer each, with the dependencies that the ones before do not bring.
_PACKAGES = (
    (*("base-files", "bash", "coreutils", "apt", "util-linux", "login"), "findutils", "grep"),
    ("python3", "python3-pip", "ca-certificates"),
    ("curl", "procps", "python3-setuptools", "python3-requests", "python3-yaml"),
)
_LAYERS = 40
_BIG_FILE_BYTES = 100_000_000
_HUGE_FILE_BYTES = 512 << 20
# The same packages make the same layers, whenever.
_TAR = ("tar", "--create", "--sort=name", "--numeric-owner", "--mtime=@1700000000")
_BLOCK = 1 << 20


def reference(registry: str, tag: str) -> str:
    """What an image is called in a registry."""
    return f"{registry}/benchmark:{tag}"


def smallest(registry: str) -> str:
    """What the image of busybox alone is called in it."""
    return f"{registry}/busybox:latest"


def registry_storage(cache: Path) -> Path:
    """What a registry with all images keeps, made in `cache` if it is not there, in minutes."""
    storage = cache / "benchmark-registry"
    if not storage.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            print("making the images to be pulled", flush=True)
            layout, made = Path(scratch) / "layout", Path(scratch) / "registry"
            _make(layout, Path(scratch))
            with local_registry(storage_dir=made) as registry:
                _push(layout, registry)
                push_busybox(Path(scratch) / "busybox", registry.address)
            made.replace(storage)
    return storage


def _make(layout: Path, scratch: Path) -> None:
    _run("umoci", "init", "--layout", str(layout))
    layers = _layers_of_packages(scratch)
    roots = []
    for number, archives in enumerate(layers):
        roots.append(_unpacked(archives, scratch / f"root{number}"))
    _add_image(layout, MANY_FILES, (_archived(root) for root in roots))

    blocks = itertools.cycle(_blocks(roots))
    for tag, sizes in (
        (BIG_FILES, ([_BIG_FILE_BYTES] * 3, [_BIG_FILE_BYTES] * 2)),
        (TWO_GIBIBYTES, [[_HUGE_FILE_BYTES]] * 4),
    ):
        folder = scratch / tag
        files = (_big_files(folder / str(n), layer, blocks) for n, layer in enumerate(sizes))
        _add_image(layout, tag, (_archived(root) for root in files))
        shutil.rmtree(folder)

    # Middling ones: neither some KiB of documentation nor an interpreter.
    by_size = sorted(itertools.chain(*layers), key=lambda archive: archive.stat().st_size)
    chosen = by_size[20 : 20 + _LAYERS + 1]
    tars = [
        _archived(_unpacked([archive], scratch / f"small{number}"))
        for number, archive in enumerate(chosen)
    ]
    _add_image(layout, FORTY_LAYERS, tars[:_LAYERS])
    _add_image(layout, FORTY_LAYERS_CHANGED, [*tars[: _LAYERS - 1], tars[_LAYERS]])


def _layers_of_packages(scratch: Path) -> list[list[Path]]:
    architecture = ARCHITECTURES[machine_architecture()]
    layers: list[list[Path]] = []
    wanted: list[str] = []
    known: set[str] = set()
    for number, names in enumerate(_PACKAGES):
        wanted += names
        folder = scratch / f"debs{number}"
        folder.mkdir()
        archives = debian.download(wanted, RELEASE, machine_mirror(), architecture, folder)
        layers.append([archive for archive in archives if archive.name not in known])
        known |= {archive.name for archive in archives}
    return layers


def _unpacked(archives: Iterable[Path], root: Path) -> Path:
    root.mkdir()
    debian.unpack(archives, root)
    return root


def _archived(root: Path) -> Path:
    """A directory's tar beside it; the directory stays."""
    archive = root.with_suffix(".tar")
    _run(*_TAR, f"--file={archive}", f"--directory={root}", ".")
    return archive


def _blocks(roots: Sequence[Path]) -> Iterator[bytes]:
    """The contents of all files, which compress as what is in images does."""
    for path in itertools.chain(*(sorted(root.rglob("*")) for root in roots)):
        if path.is_file() and not path.is_symlink():
            yield path.read_bytes()


def _big_files(root: Path, sizes: Sequence[int], blocks: Iterator[bytes]) -> Path:
    root.mkdir(parents=True)
    for number, size in enumerate(sizes):
        with (root / f"file{number}").open("wb") as file:
            _fill(file, size, blocks)
    return root


def _fill(file: BinaryIO, size: int, blocks: Iterator[bytes]) -> None:
    while size > 0:
        block = next(blocks)[:size]
        file.write(block)
        size -= len(block)


def _add_image(layout: Path, tag: str, tars: Iterable[Path]) -> None:
    image = f"{layout}:{tag}"
    _run("umoci", "new", "--image", image)
    for tar in tars:
        _run("umoci", "raw", "add-layer", "--image", image, str(tar))
    _run("umoci", "config", "--image", image, "--config.cmd=/bin/sh")


def _push(layout: Path, registry: LocalRegistry) -> None:
    """Put the images into a registry bit for bit, and one of them compressed anew on its way."""
    exactly = "--preserve-digests"
    # First: skopeo takes a blob that the registry has of the same layer, however compressed.
    anew = (MANY_FILES, MANY_FILES_ZSTD, "--dest-compress-format=zstd")
    for source, tag, how in (anew, *((tag, tag, exactly) for tag in _GZIP_TAGS)):
        _run(
            *("skopeo", "--insecure-policy", "copy", "--quiet", how, "--dest-tls-verify=false"),
            *(f"oci:{layout}:{source}", f"docker://{reference(registry.address, tag)}"),
        )


def _run(*argv: str) -> None:
    ran = subprocess.run(argv, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{argv[0]}: {(ran.stderr or ran.stdout).strip()[-500:]}")
