"""Layers become EROFS images that hold what their tars say, or nothing."""

import errno
import gzip
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.images.erofs import Marks
from agent.images.layer import LayerStore
from agent.images.layer_build import LayerError
from agent.images.mkfs_erofs import MkfsErofs, MkfsError
from agent.linux.mount import mount, umount2
from tests.agent.images.building import PLAIN, build, digest_of
from tests.support import trees
from tests.support.rounds import rounds
from tests.support.tarballs import directory, entry, hard_link, symlink, tarball, with_field
from tests.support.tree import Tree, describe, differences

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def mounted(layers: LayerStore, tar: bytes) -> Path:
    diff_id = build(layers, tar)
    return layers.mount(diff_id, diff_id)


def extracted(tar: bytes, directory: Path, *more: str) -> Tree:
    """What GNU tar makes of an archive."""
    directory.mkdir()
    options = [*more, "--xattrs", "--xattrs-include=*", "--numeric-owner", "-p"]
    subprocess.run(["tar", "-x", *options, "-C", directory], input=tar, check=True)
    return describe(directory)


SPARSE = {
    "sparse, old GNU": lambda: trees.archive(trees.sparse_files, "--sparse", gnu=True),
    "sparse, PAX 0.0": lambda: trees.archive(
        trees.sparse_files, "--sparse", "--sparse-version=0.0"
    ),
    "sparse, PAX 0.1": lambda: trees.archive(
        trees.sparse_files, "--sparse", "--sparse-version=0.1"
    ),
    "sparse, PAX 1.0": lambda: trees.archive(
        trees.sparse_files, "--sparse", "--sparse-version=1.0"
    ),
}
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a small system": lambda: trees.archive(trees.busybox),
    "hard links, modes, devices, attributes, names": lambda: trees.archive(trees.odd_entries),
    "the old GNU format": lambda: trees.archive(trees.busybox, gnu=True),
    **SPARSE,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_a_mounted_layer_is_what_tar_extracts(
    name: str, layers: LayerStore, tmp_path: Path
) -> None:
    archive = ARCHIVES[name]()
    expected = extracted(archive, tmp_path / "extracted")
    assert differences(expected, describe(mounted(layers, archive))) == []


def test_the_shapes_that_mkfs_erofs_reads_wrongly_are_read_right(
    layers: LayerStore, tmp_path: Path
) -> None:
    archive = tarball(
        with_field(directory("d/", mtime=7), 124, b"00000000005\0"),
        entry("d/a", b"x", pax_headers={"mtime": "1700000000.5"}),
        with_field(hard_link("d/h", "d/a"), 124, b"00000000001\0"),
        with_field(entry("old", b"V7"), 156, b"\0"),
        entry("f", b"a file first"),
        directory("f/", mtime=9),
        entry("f/in", b"it"),
        directory("g/", mtime=9),
        entry("g/in", b"it"),
        entry("g", b"a directory first"),
        entry("twice", b"one"),
        entry("twice", b"two"),
    )
    expected = extracted(archive, tmp_path / "extracted", "--recursive-unlink")
    actual = describe(mounted(layers, archive))
    del expected["."], actual["."]  # which has no entry
    assert differences(expected, actual) == []
    assert actual["d/a"].mtime_ns == 1_700_000_000_500_000_000


def test_an_empty_archive_is_an_empty_layer(layers: LayerStore) -> None:
    for archive in (b"", bytes(512), tarball()):
        root = mounted(layers, archive)
        assert list(root.iterdir()) == []
        assert stat.S_IMODE(root.stat().st_mode) == 0o755


def test_as_many_attributes_as_are_allowed_fit(layers: LayerStore) -> None:
    names = [f"user.{number}" for number in range(31)]
    records = {f"SCHILY.xattr.{name}": "v" * 1000 for name in names}
    root = mounted(layers, tarball(entry("a", pax_headers=records)))
    assert sorted(os.listxattr(root / "a")) == sorted(names)


def test_a_whiteout_removes_a_name_of_any_length(layers: LayerStore) -> None:
    name = "n" * 255
    root = mounted(layers, tarball(directory("a"), entry(f"a/.wh.{name}")))
    status = (root / "a" / name).lstat()
    assert (stat.S_IFMT(status.st_mode), status.st_rdev) == (stat.S_IFCHR, 0)


def test_whiteouts_are_overlayfs_s(layers: LayerStore) -> None:
    root = mounted(
        layers,
        tarball(
            entry(".wh.gone"),
            directory("opaque/"),
            entry("opaque/.wh..wh..opq"),
            entry("opaque/new"),
            entry(".wh.anew"),
            directory("anew/"),
        ),
    )
    gone = (root / "gone").lstat()
    assert (stat.S_ISCHR(gone.st_mode), gone.st_rdev) == (True, 0)
    assert os.getxattr(root / "opaque", "trusted.overlay.opaque") == b"y"
    assert os.getxattr(root / "anew", "trusted.overlay.opaque") == b"y"
    assert sorted(path.name for path in root.rglob("*")) == ["anew", "gone", "new", "opaque"]


def test_directories_without_an_entry_are_marked(layers: LayerStore) -> None:
    diff_id = build(layers, tarball(entry("a/b/c"), directory("a/b/d/"), entry(".wh..wh..opq")))
    assert layers.marks(diff_id) == Marks(frozenset((b"", b"a", b"a/b")), opaque_root=True)
    plain = build(layers, tarball(directory("./"), directory("a/")))
    assert layers.marks(plain) == Marks()


@pytest.mark.parametrize(
    ("suffix", "compress"), [("+gzip", gzip.compress), ("+zstd", zstd.compress)]
)
def test_a_compressed_blob_makes_the_same_layer(
    suffix: str, compress: Callable[[bytes], bytes], layers: LayerStore, storage: Path
) -> None:
    archive = trees.archive(trees.busybox)
    diff_id = build(layers, archive)
    image = storage / "erofs" / f"{diff_id.removeprefix('sha256:')}.erofs"
    made = image.read_bytes()
    build(layers, archive, compress(archive[:9999]) + compress(archive[9999:]), PLAIN + suffix)
    assert image.read_bytes() == made


def nothing_is_left(layers: LayerStore, storage: Path) -> bool:
    return layers.sizes() == {} and list((storage / "erofs").iterdir()) == []


BAD = {
    "sha256:0": (tarball(entry("a")), None, PLAIN, "the layer's tar has the digest sha256:"),
    "cut": (entry("a", b"x" * 5000)[:3000], None, PLAIN, "entry 'a': the archive ends in the mid"),
    "link": (tarball(hard_link("a", "b")), None, PLAIN, "entry 'a': it is a hard link to 'b'"),
    "below": (tarball(entry("a"), entry("a/b")), None, PLAIN, "entry 'a/b': it lies below 'a'"),
    "magic": (tarball(), tarball(), PLAIN + "+gzip", "but it is neither gzip nor zstd"),
    "type": (tarball(), tarball(), "text/html", "of media type 'text/html' are not supported"),
    "gzip": (tarball(), gzip.compress(tarball())[:-4], PLAIN + "+gzip", "ends too early"),
    "rubbish": (tarball(), gzip.compress(tarball()) + b"x" * 99, PLAIN + "+gzip", "is damaged"),
    "no tar": (b"hello" * 500, None, PLAIN, "no tar header follows"),
    "checksum": (
        tarball(entry("a")[:148] + b"0000000\0" + entry("a")[156:]),
        None,
        PLAIN,
        "mkfs.erofs: chksum mismatch",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_layer_is_refused_by_name_and_leaves_nothing(
    name: str, layers: LayerStore, storage: Path
) -> None:
    tar, blob, media_type, cause = BAD[name]
    diff_id = f"sha256:{'0' * 64}" if name == "sha256:0" else digest_of(tar)
    with pytest.raises(LayerError) as raised:
        build(layers, tar, blob, media_type, diff_id)
    assert str(raised.value).startswith(f"{diff_id}: ")
    assert cause in str(raised.value)
    assert nothing_is_left(layers, storage)
    assert not layers.has(diff_id)


def large() -> list[bytes]:
    """Entries of a layer of which a second thread does half."""
    return [entry(f"file{n}", bytes([n]) * (3 << 20)) for n in range(5)]


def test_a_large_layer_holds_what_its_tar_says(layers: LayerStore, tmp_path: Path) -> None:
    tar = tarball(directory("."), *large())
    found = describe(mounted(layers, tar))
    assert differences(found, extracted(tar, tmp_path / "extracted")) == []


def test_a_directory_of_very_many_files_holds_them_all(layers: LayerStore) -> None:
    count = rounds(10_000, 100_000)
    tar = tarball(directory("photos"), *(entry(f"photos/{n:06}.jpeg") for n in range(count)))
    names = [path.name for path in (mounted(layers, tar) / "photos").iterdir()]
    assert sorted(names) == [f"{n:06}.jpeg" for n in range(count)]


def test_two_large_layers_at_once_hold_what_their_tars_say(layers: LayerStore) -> None:
    tars = [tarball(*large()), tarball(*reversed(large()))]
    threads = [threading.Thread(target=build, args=(layers, tar)) for tar in tars]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(layers.has(digest_of(tar)) for tar in tars)


def test_what_is_wrong_late_in_a_large_layer_is_told(layers: LayerStore, storage: Path) -> None:
    lost = tarball(*large(), hard_link("lost", "nowhere"))
    with pytest.raises(LayerError, match="entry 'lost': it is a hard link to 'nowhere'"):
        build(layers, lost)
    with pytest.raises(LayerError, match="the layer's tar has the digest sha256:"):
        build(layers, tarball(*large()), diff_id=digest_of(b""))
    with pytest.raises(LayerError, match="the archive ends in the middle"):
        build(layers, b"".join(large())[:-1000])
    assert nothing_is_left(layers, storage)


def test_a_build_that_is_given_up_leaves_nothing(layers: LayerStore, storage: Path) -> None:
    with layers.building(digest_of(b""), PLAIN) as under_way:
        under_way.write(entry("a", bytes(1 << 20)))
    with pytest.raises(ZeroDivisionError), layers.building(digest_of(b""), PLAIN) as under_way:
        under_way.write(entry("a", b"x" * (1 // len(b""))))
    assert nothing_is_left(layers, storage)


def test_a_build_that_never_ends_can_be_interrupted(layers: LayerStore, storage: Path) -> None:
    failures: list[LayerError] = []
    with layers.building(digest_of(b""), PLAIN) as under_way:

        def write_for_ever() -> None:
            try:
                while True:
                    under_way.write(entry("a", bytes(1 << 20)))
            except LayerError as error:
                failures.append(error)

        writer = threading.Thread(target=write_for_ever)
        writer.start()
        under_way.interrupt()
        writer.join(10)
        assert not writer.is_alive()
    assert "it was interrupted" in str(failures[0])
    assert nothing_is_left(layers, storage)


def test_a_mkfs_erofs_that_takes_long_can_be_interrupted(storage: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    store = LayerStore(storage, program(tmp_path, f"echo >{tmp_path}/begun; exec sleep 1000"))
    failures: list[LayerError] = []
    with store.building(digest_of(b""), PLAIN) as under_way:

        def finish() -> None:
            try:
                under_way.finish()
            except LayerError as error:
                failures.append(error)

        finisher = threading.Thread(target=finish)
        finisher.start()
        (tmp_path / "begun").read_text()
        under_way.interrupt()
        finisher.join(10)
        assert not finisher.is_alive()
    assert "mkfs.erofs ended by SIGKILL" in str(failures[0])
    assert nothing_is_left(store, storage)


def test_a_blob_that_unpacks_to_too_much_is_refused(layers: LayerStore, storage: Path) -> None:
    bomb = gzip.compress(tarball(entry("zeros", bytes(20 << 20))))
    with (
        pytest.raises(LayerError, match="it unpacks to more than 1048576 bytes"),
        layers.building(digest_of(b""), PLAIN + "+gzip", max_bytes=1 << 20) as under_way,
    ):
        under_way.write(bomb)
    assert nothing_is_left(layers, storage)


def test_what_a_crash_left_is_removed_at_the_next_start(
    storage: Path, layers: LayerStore, mkfs_erofs: str
) -> None:
    diff_id = build(layers, tarball(entry("a")))
    for name in ("0123.partial", "4567.tar", "89ab.erofs"):
        (storage / "erofs" / name).write_bytes(b"half a layer")
    again = LayerStore(storage, mkfs_erofs)
    assert {path.suffix for path in (storage / "erofs").iterdir()} == {".tar", ".erofs"}
    assert len(list((storage / "erofs").iterdir())) == 2
    assert again.has(diff_id)


def program(directory: Path, script: str) -> str:
    """A program to be run as mkfs.erofs; its last argument is the image."""
    path = directory / "mkfs.erofs"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_an_image_that_lacks_an_entry_is_not_taken(
    storage: Path, tmp_path: Path, mkfs_erofs: str
) -> None:
    # A mkfs.erofs that loses one entry, as 1.8.6 does with shapes that it does not know.
    short = f"{tmp_path}/short.tar"
    forgetful = program(
        tmp_path, f'tar --delete --file=- d/lost >{short}; {mkfs_erofs} "$@" <{short}'
    )
    store = LayerStore(storage, forgetful)
    archive = tarball(directory("./"), directory("d/"), entry("d/kept"), entry("d/lost", b"x"))
    with pytest.raises(LayerError, match=r"'d/lost' is not in the image that mkfs\.erofs made"):
        build(store, archive)
    assert nothing_is_left(store, storage)


def test_an_image_whose_entry_has_another_type_is_not_taken(
    storage: Path, tmp_path: Path, mkfs_erofs: str
) -> None:
    other = program(tmp_path, f'cat >/dev/null; {mkfs_erofs} "$@" <{tmp_path}/other.tar')
    (tmp_path / "other.tar").write_bytes(tarball(directory("a/")))
    store = LayerStore(storage, other)
    with pytest.raises(LayerError, match="'a' is of another type in the image"):
        build(store, tarball(entry("a")))


def test_a_missing_program_is_named_with_the_package(storage: Path) -> None:
    store = LayerStore(storage, "/nowhere/mkfs.erofs")
    with pytest.raises(LayerError, match=r"/nowhere/mkfs\.erofs is missing: install erofs-utils"):
        build(store, tarball())


def test_a_program_that_is_too_old_is_named_with_the_version(storage: Path, tmp_path: Path) -> None:
    # What Debian 12's 1.5 says.
    old = program(tmp_path, "echo \"mkfs.erofs: unrecognized option '--tar=i'\" >&2; exit 1")
    store = LayerStore(storage, old)
    with pytest.raises(LayerError, match=f"{old} is too old: install erofs-utils 1.8.6 or newer"):
        build(store, tarball())


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A storage directory in memory, of 2 MiB."""
    directory = tmp_path / "memory"
    directory.mkdir()
    mount("memory", directory, fstype="tmpfs", data="size=2m")
    yield directory
    umount2(directory)


def test_a_full_disk_is_told_as_one(memory: Path, mkfs_erofs: str) -> None:
    store = LayerStore(memory, mkfs_erofs)
    with pytest.raises(LayerError, match="No space left on device") as raised:
        build(store, tarball(entry("big", bytes(8 << 20))))
    assert root_cause(raised.value) == errno.ENOSPC
    assert nothing_is_left(store, memory)


def root_cause(error: BaseException) -> int | None:
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, OSError)
    return error.errno


def test_on_a_file_system_that_erofs_cannot_read_from_a_loop_device_is_between(
    memory: Path, mkfs_erofs: str
) -> None:
    # tmpfs is one on all kernels; before 6.12 all file systems are.
    store = LayerStore(memory, mkfs_erofs)
    root = mounted(store, tarball(entry("a", b"x")))
    assert (root / "a").read_bytes() == b"x"
    assert sorted(path.suffix for path in backing_files(memory)) == [".erofs", ".tar"]
    store.unmount_all()
    assert backing_files(memory) == []


def backing_files(directory: Path) -> list[Path]:
    """The files in a directory that are behind loop devices."""
    found = []
    for said in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(FileNotFoundError):  # somebody else's, gone just now
            found.append(Path(said.read_text().rstrip()))
    return [path for path in found if path.is_relative_to(directory)]


def test_mkfs_erofs_has_a_limit_of_memory(tmp_path: Path, mkfs_erofs: str) -> None:
    with (tmp_path / "tar").open("wb") as tar:
        for number in range(1000):
            tar.write(directory(f"{number}/"))
            tar.write(b"".join(entry(f"{number}/{name}") for name in range(100)))
        tar.write(tarball())
    mkfs = MkfsErofs(mkfs_erofs, tmp_path / "tar", tmp_path / "image", memory_bytes=32 << 20)
    try:
        with pytest.raises(MkfsError, match="Cannot allocate memory") as raised:
            mkfs.finish()
    finally:
        mkfs.close()
    assert root_cause(raised.value) == errno.ENOMEM


def test_a_layer_is_mounted_once_and_stays_so_over_a_restart(
    storage: Path, layers: LayerStore, mkfs_erofs: str
) -> None:
    diff_id = build(layers, tarball(entry("a", b"x")))
    directory = layers.mount(digest_of(b"blob"), diff_id)
    assert directory == storage / "layers" / digest_of(b"blob").removeprefix("sha256:")
    device = directory.stat().st_dev
    assert layers.mount(digest_of(b"blob"), diff_id) == directory
    assert LayerStore(storage, mkfs_erofs).mount(digest_of(b"blob"), diff_id) == directory
    assert directory.stat().st_dev == device
    mounts = Path("/proc/self/mountinfo").read_text()
    assert mounts.count(f" {directory} ") == 1


def test_a_layer_is_read_only_and_its_programs_have_no_privilege_there(layers: LayerStore) -> None:
    directory = mounted(layers, tarball(entry("a", b"x", mode=0o4755)))
    flags = os.statvfs(directory).f_flag
    assert flags & os.ST_RDONLY
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    with pytest.raises(OSError, match="Read-only"):
        (directory / "b").touch()


def test_one_layer_that_cannot_be_mounted_does_not_stop_the_others(layers: LayerStore) -> None:
    there = build(layers, tarball(entry("a")))
    missing = digest_of(b"missing")
    failures = layers.mount_all([(missing, missing), (there, there)])
    assert list(failures) == [missing]
    assert isinstance(failures[missing], FileNotFoundError)
    assert (layers.directory(there) / "a").exists()


def test_unmounting_leaves_the_layer_in_the_store(layers: LayerStore, storage: Path) -> None:
    diff_id = build(layers, tarball(entry("a")))
    layers.mount(diff_id, diff_id)
    layers.unmount(diff_id)
    layers.unmount(diff_id)
    assert list((storage / "layers").iterdir()) == []
    assert layers.has(diff_id)


def test_a_layer_in_use_is_not_unmounted_but_all_others_are(layers: LayerStore) -> None:
    busy, free = (build(layers, tarball(entry(name))) for name in ("busy", "free"))
    for diff_id in (busy, free):
        layers.mount(diff_id, diff_id)
    with (layers.directory(busy) / "busy").open(), pytest.raises(OSError, match="busy"):
        layers.unmount_all()
    assert not layers.directory(free).exists()
    assert (layers.directory(busy) / "busy").exists()


def test_a_removed_layer_is_gone_and_its_mount_lives_on(layers: LayerStore, storage: Path) -> None:
    diff_id = build(layers, tarball(entry("a", bytes(10_000))))
    directory = layers.mount(diff_id, diff_id)
    size = sum(path.stat().st_size for path in (storage / "erofs").iterdir())
    assert layers.remove(diff_id) == size > 10_000
    assert not layers.has(diff_id)
    assert layers.sizes() == {}
    assert (directory / "a").stat().st_size == 10_000


def test_digests_that_are_none_never_become_paths(layers: LayerStore) -> None:
    for digest in ("sha256:../../etc", "md5:0", "", f"sha256:{'A' * 64}"):
        with pytest.raises(ValueError, match="is not a sha256 digest"):
            layers.has(digest)


def test_two_hundred_layers_are_mounted(layers: LayerStore) -> None:
    diff_id = build(layers, trees.archive(trees.numbered(1)))
    pairs = [(digest_of(b"%d" % number), diff_id) for number in range(200)]
    assert layers.mount_all(pairs) == {}
    assert all((layers.directory(digest) / "layers/001").exists() for digest, _ in pairs)


def test_a_link_of_a_layer_leads_nowhere_else(layers: LayerStore, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    archive = tarball(symlink("out", str(tmp_path / "outside")), entry("out/file", b"x"))
    root = mounted(layers, archive)
    assert list((tmp_path / "outside").iterdir()) == []
    assert (root / str(tmp_path / "outside").lstrip("/") / "file").read_bytes() == b"x"
