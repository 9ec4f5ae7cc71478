"""Large images, each built from Debian's packages by another program; kept in build/.

What is kept is an image as an OCI layout, and the tree that `umoci unpack` makes of it. They are
built anew when a recipe changes.
"""

import fcntl
import hashlib
import inspect
import io
import os
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from initramfs.debian import carried_settings
from initramfs.mirror import RELEASE, machine_mirror
from tests.support import trees
from tests.support.commands import run
from tests.support.layout import LayerBlob, Layout, gzip_layer
from tests.support.rounds import rounds
from tests.support.tree import Tree, describe

CACHE = Path(__file__).parents[2] / "build" / "test-images"
PACKAGES = CACHE.with_name("cache") / "debs"
TAG = "image"

# Programs with setuid bits (passwd, mount, sudo), with capabilities (fping), of other groups than
# root (dbus), and hard links (perl).
_INCLUDED = "fping,libcap2-bin,dbus,sudo"

# What a Dockerfile does to an image, and more: packages removed, files replaced, directories made
# again, attributes and owners of all kinds.
_CONTAINERFILE = r"""
FROM oci:{base}:{tag}
RUN dpkg --purge --force-all fping && rm -rf /usr/share/doc /var/lib/apt
RUN useradd --create-home --uid 3000000 --user-group somebody \
    && install -d -o somebody -g mail -m 3770 /srv/shared \
    && cp /usr/bin/true /srv/shared/raw && setcap cap_net_raw,cap_net_admin+eip /srv/shared/raw \
    && chmod 6711 /usr/bin/true && ln /usr/bin/true /srv/shared/linked \
    && mkdir -p /opt/a/b && ln /srv/shared/linked /opt/a/b/linked && mkfifo -m 622 /opt/a/fifo
RUN mkdir -p '/srv/names/ trailing. ' "/srv/names/$(printf 'new\nline')" \
    && touch "/srv/names/$(printf 'latin-\351')" /srv/names/... "/srv/names/$(printf %0255d 0)" \
    && ln -s "$(printf 'to\na new line')" /srv/names/link && ln -s /nowhere/at/all /srv/dangling
RUN rm -rf /usr/share/perl5 && mkdir -m 711 /usr/share/perl5 && echo new >/usr/share/perl5/new \
    && rm -rf /usr/share/man && echo 'a file now' >/usr/share/man \
    && rm /usr/bin/false && mkdir /usr/bin/false && echo x >/usr/bin/false/inside
RUN chmod 0700 /srv/shared/linked && touch -d '1969-12-31 12:00:00.25 UTC' /srv/old \
    && touch -d '2106-02-07 06:28:16.999999999 UTC' /srv/late && rm /opt/a/b/linked
"""


@frozen
class DebianImage:
    """An image as `layout:TAG`; `tree` reads what umoci unpacks from it."""

    layout: Path

    def tree(self) -> Tree:
        with self.layout.with_name("tree").open("rb") as file:
            tree: Tree = pickle.load(file)
        return tree


Recipe = Callable[[Path, Path], None]


def by_mmdebstrap(layout: Path, scratch: Path) -> None:
    """One layer, the very tar that mmdebstrap writes."""
    archive = scratch / "root.tar"
    run(
        "mmdebstrap",
        "--mode=root",
        "--skip=chroot/mount,check/qemu",
        "--variant=minbase",
        f"--include={_INCLUDED}",
        *carried_settings(),
        RELEASE,
        archive,
        *machine_mirror().sources(RELEASE),
    )
    _write(layout, [gzip_layer(archive.read_bytes())])


def by_buildah(layout: Path, scratch: Path) -> None:
    """A Dockerfile on top of mmdebstrap's, a layer for each line."""
    file = scratch / "Containerfile"
    base = debian_image(by_mmdebstrap).layout
    file.write_text(_CONTAINERFILE.format(base=base, tag=TAG))
    buildah = [
        "buildah",
        "--storage-driver=vfs",
        f"--root={scratch / 'store'}",
        f"--runroot={scratch / 'run'}",
    ]
    isolated = ["--isolation=chroot", "--layers", "--format=oci", "--network=host"]
    run(*buildah, "build", *isolated, "--tag=built", f"--file={file}", scratch)
    run(*buildah, "push", "--quiet", "built", f"oci:{layout}:{TAG}")


def by_umoci(layout: Path, scratch: Path) -> None:
    """The image's own packages unpacked, odd entries above, some of both removed again."""
    image, bundle = f"{layout}:{TAG}", scratch / "bundle"
    rootfs = bundle / "rootfs"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", image)
    run("umoci", "unpack", "--image", image, bundle)
    for package in _packages():
        run("dpkg-deb", "--extract", package, rootfs)
    run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
    odd = rootfs / "odd"
    odd.mkdir()
    trees.odd_entries(odd)
    for path in ("usr/share/doc", "usr/lib/python3.13/asyncio"):
        shutil.rmtree(rootfs / path)
    run("setfacl", "-R", "-m", "u:1234:rwX,d:g:4321:rx", rootfs / "etc")
    run("setcap", "cap_chown,cap_dac_override+p", rootfs / "usr/bin/crun")
    os.link(rootfs / "usr/bin/crun", odd / "crun")
    run("umoci", "repack", "--refresh-bundle", "--image", image, bundle)
    (rootfs / "usr/lib/python3.13/asyncio").mkdir(mode=0o2750)
    shutil.rmtree(odd / "a")
    (odd / "names" / ("n" * 255)).unlink()
    os.setxattr(odd / "attributes/user", "user.later", b"changed")
    os.link(odd / "b/hard", rootfs / "etc/hard")
    run("umoci", "repack", "--image", image, bundle)


def by_package(layout: Path, scratch: Path) -> None:
    """A layer for each package, as distroless images have it: the archives as Debian packs them."""
    del scratch
    tars = (run("dpkg-deb", "--fsys-tarfile", package) for package in _packages())
    _write(layout, [gzip_layer(tar) for tar in tars])


def of_many_files(layout: Path, scratch: Path) -> None:
    """30,000 files."""
    del scratch
    _write_copies(layout, 30_000)


def of_very_many_files(layout: Path, scratch: Path) -> None:
    """300,000 files, for which umoci takes minutes."""
    del scratch
    _write_copies(layout, 300_000)


def _write_copies(layout: Path, files: int) -> None:
    """Systems side by side, every fourth made of links to the one before it."""
    names = [entry for entry in _entries() if entry.isreg() or entry.isdir() or entry.issym()]
    # umoci forgets the time of a directory below which one appears without an entry of its own.
    names.sort(key=lambda entry: entry.name != ".")
    count = sum(entry.isreg() for entry in names)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for parent in (".", "srv"):
            directory = tarfile.TarInfo(parent)
            directory.type, directory.mode, directory.mtime = tarfile.DIRTYPE, 0o755, 1_600_000_000
            tar.addfile(directory)
        for number in range(-(-files // count)):
            for entry in names:
                _add_copy(tar, entry, number)
    _write(layout, [gzip_layer(archive.getvalue())])


def _add_copy(tar: tarfile.TarFile, entry: tarfile.TarInfo, number: int) -> None:
    name = entry.name.removeprefix(".").removeprefix("/")
    copy = tarfile.TarInfo(f"srv/{number:03}/{name}".rstrip("/"))
    copy.type, copy.mode, copy.linkname = entry.type, entry.mode, entry.linkname
    copy.uid, copy.gid, copy.mtime = entry.uid, entry.gid, entry.mtime + number / 8
    if entry.isreg() and number % 4 == 3:
        copy.type = tarfile.LNKTYPE
        copy.linkname = f"srv/{number - 1:03}/{name}"
    content = copy.name.encode() if copy.isreg() else b""
    copy.size = len(content)
    tar.addfile(copy, io.BytesIO(content))


def _entries() -> list[tarfile.TarInfo]:
    """What a Debian system consists of."""
    image = debian_image(by_mmdebstrap)
    layer = max((image.layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    with tarfile.open(layer) as tar:
        return tar.getmembers()


def _packages() -> list[Path]:
    """The packages that the VM's image is made of, but for its kernel."""
    found = sorted(PACKAGES.glob("*.deb"))
    assert found, f"{PACKAGES} is empty: run `make image` first"
    return [package for package in found if not package.name.startswith("linux-image")]


def _write(directory: Path, layers: list[LayerBlob]) -> None:
    layout = Layout(directory)
    layout.tag(TAG, layout.add_manifest(layers, {"Cmd": ["/usr/bin/true"]}))


RECIPES: dict[str, Recipe] = {
    "mmdebstrap": by_mmdebstrap,
    "buildah": by_buildah,
    "umoci": by_umoci,
    "package": by_package,
    "many": of_many_files,
    **({"very-many": of_very_many_files} if rounds(0, 1) else {}),
}


def debian_image(recipe: Recipe) -> DebianImage:
    """An image, built unless it is there; takes up to a minute then."""
    parts = (recipe, _write_copies, _add_copy, trees)
    text = _CONTAINERFILE + "".join(map(inspect.getsource, parts))
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = recipe.__name__.replace("_", "-")
    directory = CACHE / f"{name}-{key}"
    with _locked(CACHE / f"{name}.lock"):
        if not directory.exists():
            for stale in CACHE.glob(f"{name}-*"):
                shutil.rmtree(stale)
            _build(recipe, directory)
    return DebianImage(directory / "layout")


def _build(recipe: Recipe, directory: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="building-", dir=CACHE) as building:
        made = Path(building)
        scratch = made / "scratch"
        for path in (made / "made", scratch):
            path.mkdir()
        recipe(made / "made/layout", scratch)
        bundle = made / "bundle"
        run("umoci", "unpack", "--image", f"{made / 'made/layout'}:{TAG}", bundle)
        with (made / "made/tree").open("wb") as file:
            pickle.dump(describe(bundle / "rootfs"), file)
        (made / "made").rename(directory)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
