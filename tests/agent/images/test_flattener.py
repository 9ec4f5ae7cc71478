"""Layers flattened into one directory are what the kernel's overlayfs shows of them."""

import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from agent.errors import AgentError
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.flattener import LayerFlattener
from agent.images.garbage import GarbageCollector
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.tree_removal import remove_tree
from agent.linux.mount import mount, umount2
from protocol.errors import ErrorCode
from tests.agent.images.building import build, image_of, stored_image
from tests.support import trees
from tests.support.commands import run
from tests.support.rounds import rounds
from tests.support.tarballs import directory, entry, tarball
from tests.support.tree import Tree, describe, differences
from tests.support.watch import until

OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


@pytest.fixture
def store(storage: Path) -> ContentStore:
    return ContentStore(storage)


@pytest.fixture
def claims() -> LayerClaims:
    return LayerClaims()


@pytest.fixture
def flattener(store: ContentStore, layers: LayerStore, claims: LayerClaims) -> LayerFlattener:
    return LayerFlattener(store.blobs, layers, claims)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "flat/rootfs"


async def flat(flattener: LayerFlattener, out: Path, *lowerdirs: Path | str) -> Tree:
    """What becomes of directories, topmost first."""
    await flattener.flatten([str(path) for path in lowerdirs], str(out))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return describe(out)


async def refusal(flattener: LayerFlattener, out: Path | str, *lowerdirs: Path | str) -> str:
    with pytest.raises(AgentError) as raised:
        await flattener.flatten([str(path) for path in lowerdirs], str(out))
    assert raised.value.code is ErrorCode.OVERLAY_FAILED
    return raised.value.message


@contextmanager
def merged(place: Path, *lowerdirs: Path) -> Iterator[Path]:
    """The kernel's view of the same."""
    place.mkdir()
    options = "lowerdir=" + ":".join(map(str, lowerdirs))
    mount("overlay", place, fstype="overlay", data=options)
    try:
        yield place
    finally:
        umount2(place)


def make(path: Path) -> None:
    path.mkdir(parents=True)


def is_there(path: Path) -> bool:
    return path.exists()


def mounted(layers: LayerStore, builder: trees.Builder) -> Path:
    diff_id = build(layers, trees.archive(builder))
    return layers.mount(diff_id, diff_id)


async def test_whiteouts_and_opaque_directories_are_the_kernels(
    flattener: LayerFlattener, layers: LayerStore, out: Path, tmp_path: Path
) -> None:
    builders = (trees.after_whiteouts, trees.whiteouts, trees.before_whiteouts, trees.busybox)
    lowerdirs = [mounted(layers, builder) for builder in builders]
    with merged(tmp_path / "merged", *lowerdirs) as kernels:
        assert differences(describe(kernels), await flat(flattener, out, *lowerdirs)) == []


NAMES = ("a", "b", "c")


def grow(chance: random.Random, directory: Path, depth: int) -> None:
    """Fill a layer's directory with anything that means something to overlayfs."""
    for name in NAMES:
        path = directory / name
        match chance.choice(("nothing", "nothing", "file", "link", "whiteout", "directory")):
            case "file":
                path.write_text(f"{chance.random()}")
                path.chmod(chance.choice((0o644, 0o4755)))
            case "link":
                path.symlink_to(chance.choice(NAMES))
            case "whiteout":
                os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))
            case "directory" if depth:
                path.mkdir()
                grow(chance, path, depth - 1)
                path.chmod(chance.choice((0o755, 0o1777)))
                if chance.random() < 0.3:
                    os.setxattr(path, "trusted.overlay.opaque", b"y")
        if os.path.lexists(path):
            seconds = chance.randrange(10**9)
            os.utime(path, (seconds, seconds), follow_symlinks=False)


async def test_whatever_layers_there_are_it_is_what_the_kernel_shows(
    flattener: LayerFlattener, tmp_path: Path
) -> None:
    for seed in range(rounds(quick=60, soak=5000)):
        chance = random.Random(seed)
        place = tmp_path / f"{seed}"
        lowerdirs = [place / f"layer{n}" for n in range(chance.randint(2, 5))]
        for lowerdir in lowerdirs:
            make(lowerdir)
            grow(chance, lowerdir, depth=3)
        # The kernel wants two, of which ours skips those that are empty.
        (lowerdirs[-1] / "bottom").touch()
        (lowerdirs[0] / "top").touch()
        with merged(place / "merged", *lowerdirs) as kernels:
            # It lists whiteouts in a directory that one layer alone has; they cannot be found.
            expected = describe(kernels, passed_over=lambda path: not os.path.lexists(path))
        actual = await flat(flattener, place / "flat/out", *lowerdirs)
        assert differences(expected, actual) == [], seed
        remove_tree(place)


async def test_links_attributes_modes_owners_times_devices_and_names_are_kept(
    flattener: LayerFlattener, layers: LayerStore, out: Path, tmp_path: Path
) -> None:
    lowerdirs = [mounted(layers, trees.odd_entries), mounted(layers, trees.busybox)]
    with merged(tmp_path / "merged", *lowerdirs) as kernels:
        assert differences(describe(kernels), await flat(flattener, out, *lowerdirs)) == []
    assert (out / "a/original").stat().st_nlink == 3


async def test_what_containers_have_changed_is_part_of_it(
    flattener: LayerFlattener, layers: LayerStore, overlays: Overlays, out: Path
) -> None:
    image = image_of(layers, trees.archive(trees.busybox), trees.archive(trees.before_whiteouts))
    info = await overlays.prepare(image, "web")
    script = """
        rm -r gone kept/one link replaced opaque turns-into-directory
        mkdir gone opaque turns-into-directory; echo new >gone/new; echo file >replaced
        mkdir -p a/b/c; mkfifo a/b/fifo; chown 12:34 a/b; echo >a/one; ln a/one a/two
        chmod 4711 bin/busybox; setfattr -n user.x -v y emptied; touch -d @5 a/b a
    """
    run("sh", "-ec", f"cd {info.rootfs_path}; {script}")
    below = [layers.directory(layer.digest) for layer in reversed(image.layers)]
    expected = describe(Path(info.rootfs_path))
    assert differences(expected, await flat(flattener, out, info.upper_path, *below)) == []


@pytest.mark.parametrize("attribute", OPAQUE)
async def test_opaque_is_opaque_in_either_namespace(
    flattener: LayerFlattener, out: Path, tmp_path: Path, attribute: str
) -> None:
    top, below = tmp_path / "top", tmp_path / "below"
    (top / "d/new").mkdir(parents=True)
    (below / "d/old/deep").mkdir(parents=True)
    (below / "beside").touch()
    os.setxattr(top / "d", attribute, b"y")
    tree = await flat(flattener, out, top, below)
    assert sorted(tree) == [".", "beside", "d", "d/new"]
    # What only overlayfs needs is not in what needs no overlayfs.
    assert tree["d"].xattrs == {}


async def test_an_opaque_layer_hides_all_below_it(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    top, below = tmp_path / "top", tmp_path / "below"
    (below / "old").mkdir(parents=True)
    top.mkdir()
    os.setxattr(top, "trusted.overlay.opaque", b"y")
    assert sorted(await flat(flattener, out, top, below)) == ["."]


async def test_whiteouts_that_are_files_are_whiteouts(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    top, below = tmp_path / "top", tmp_path / "below"
    for place in (top, below):
        place.mkdir()
    for name in ("gone", "empty"):
        (below / name).write_text("below")
        (top / name).touch()
    os.setxattr(top, "user.overlay.opaque", b"x")
    os.setxattr(top / "gone", "user.overlay.whiteout", b"y")
    tree = await flat(flattener, out, top, below)
    assert sorted(tree) == [".", "empty"]
    assert tree["empty"].size == 0


async def test_attributes_of_an_overlay_inside_are_what_they_are_above(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    top = tmp_path / "top"
    (top / "inner").mkdir(parents=True)
    os.setxattr(top / "inner", "trusted.overlay.overlay.opaque", b"y")
    os.setxattr(top / "inner", "trusted.overlay.origin", b"z")
    tree = await flat(flattener, out, top)
    assert tree["inner"].xattrs == {"trusted.overlay.opaque": b"y"}


async def test_a_default_acl_is_not_given_to_what_has_none(
    flattener: LayerFlattener, layers: LayerStore, out: Path
) -> None:
    layer = mounted(layers, trees.odd_entries)
    tree = await flat(flattener, out, layer)
    assert "system.posix_acl_default" in tree["attributes"].xattrs
    assert tree["attributes/user"].mode == "0644"
    assert set(tree["attributes/user"].xattrs) == {"user.long", "user.größe"}


async def test_what_a_layer_has_no_entry_for_is_as_the_layers_below_say(
    flattener: LayerFlattener, store: ContentStore, layers: LayerStore, out: Path
) -> None:
    base = tarball(directory("./", 0o750, uid=5), directory("tmp/", 0o1777, mtime=12))
    image = stored_image(store, layers, "image", base, tarball(entry("tmp/x"), entry("new/y")))
    lowerdirs = [layers.directory(layer.digest) for layer in reversed(image.layers)]
    tree = await flat(flattener, out, *lowerdirs)
    assert (tree["."].mode, tree["."].uid) == ("0750", 5)
    assert (tree["tmp"].mode, tree["tmp"].mtime_ns) == ("1777", 12 * 10**9)
    assert tree["new"].mode == "0755"


async def test_a_layer_whose_root_is_opaque_hides_all_below_it(
    flattener: LayerFlattener, store: ContentStore, layers: LayerStore, out: Path
) -> None:
    tars = [tarball(entry("old")), tarball(entry(".wh..wh..opq"), entry("only"))]
    image = stored_image(store, layers, "image", *tars)
    lowerdirs = [layers.directory(layer.digest) for layer in reversed(image.layers)]
    assert sorted(await flat(flattener, out, *lowerdirs)) == [".", "only"]


async def test_missing_and_empty_entries_are_skipped(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir(mode=0o700)
    layer = tmp_path / "layer"
    layer.mkdir()
    layer.chmod(0o751)
    (layer / "file").write_text("there")
    tree = await flat(flattener, out, "", tmp_path / "empty", tmp_path / "missing", layer)
    assert sorted(tree) == [".", "file"]
    assert tree["."].mode == "0751"


@pytest.mark.parametrize("lowerdirs", [[], [""], ["/nowhere"]])
async def test_nothing_becomes_an_empty_directory(
    flattener: LayerFlattener, out: Path, lowerdirs: list[str]
) -> None:
    assert sorted(await flat(flattener, out, *lowerdirs)) == ["."]


async def test_an_empty_output_is_taken_and_a_full_one_refused(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "file").touch()
    make(out)
    assert sorted(await flat(flattener, out, layer)) == [".", "file"]
    (out / "precious").touch()
    message = await refusal(flattener, out, layer)
    assert message == f"flatten layers into {out}: it is there, and not empty"
    assert (out / "precious").exists()


async def test_an_output_that_cannot_be_is_refused_with_the_reason(
    flattener: LayerFlattener, tmp_path: Path
) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    file = tmp_path / "file"
    file.touch()
    assert "Not a directory" in await refusal(flattener, file, layer)
    assert f"it is in {layer}, which is one of them" in await refusal(
        flattener, layer / "out", layer
    )
    for path in ("", "a\0b"):
        with pytest.raises(AgentError) as raised:
            await flattener.flatten([str(layer)], path)
        assert raised.value.code is ErrorCode.INVALID_REQUEST
    assert list(layer.iterdir()) == []


async def test_a_mount_is_filled_and_not_replaced(
    flattener: LayerFlattener, layers: LayerStore, tmp_path: Path
) -> None:
    lowerdirs = [str(mounted(layers, trees.whiteouts)), str(mounted(layers, trees.busybox))]
    await flattener.flatten(lowerdirs, str(tmp_path / "elsewhere"))
    place = tmp_path / "mounted"
    make(place)
    mount("tmpfs", place, fstype="tmpfs")
    try:
        # What a crash has left is no reason to refuse it.
        make(place / ".mounted.flattening/half")
        await flattener.flatten(lowerdirs, str(place))
        assert differences(describe(tmp_path / "elsewhere"), describe(place)) == []
        assert "it is there, and not empty" in await refusal(flattener, place, *lowerdirs)
    finally:
        umount2(place)


async def test_an_output_may_be_reached_through_a_link(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    make(out)
    (tmp_path / "link").symlink_to(out)
    await flattener.flatten([], str(tmp_path / "link"))
    await flattener.flatten([], f"{tmp_path}/link/../beside/new")
    assert is_there(out.parent / "beside/new")
    assert (tmp_path / "link").is_symlink()


async def test_no_collection_takes_a_layer_that_is_being_flattened(
    flattener: LayerFlattener,
    store: ContentStore,
    layers: LayerStore,
    claims: LayerClaims,
    storage: Path,
    out: Path,
) -> None:
    image = stored_image(store, layers, "image", trees.archive(trees.busybox))
    (layer,) = image.layers
    collector = GarbageCollector(store, layers, Overlays(storage, layers, claims), claims)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flattener.flatten, [str(layers.directory(layer.digest))], str(out))
        await until(out.parent.exists, out.parent.parent)
        await collector.collect(purge_all=True)
    assert is_there(out / "bin/busybox")
    await collector.collect()
    assert layers.sizes() == {}


def as_redirect(layer: Path) -> None:
    (layer / "d").mkdir()
    os.setxattr(layer / "d", "trusted.overlay.redirect", b"/other")


def as_metacopy(layer: Path) -> None:
    (layer / "d").touch()
    os.setxattr(layer / "d", "trusted.overlay.metacopy", b"")


@pytest.mark.parametrize("spoil", [as_redirect, as_metacopy])
async def test_what_only_overlayfs_could_follow_is_refused_and_named(
    flattener: LayerFlattener, out: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "a").write_text("copied before")
    spoil(layer)
    word = "redirect" if spoil is as_redirect else "metacopy"
    assert f"{layer}/d: it has overlayfs's {word}" in await refusal(flattener, out, layer)
    assert list(out.parent.iterdir()) == []


async def test_a_disk_that_is_full_is_told_and_leaves_nothing(
    flattener: LayerFlattener, tmp_path: Path
) -> None:
    layer, small = tmp_path / "layer", tmp_path / "small"
    for place in (layer, small):
        place.mkdir()
    (layer / "large").write_bytes(bytes(os.urandom(1 << 20)) * 3)
    mount("tmpfs", small, fstype="tmpfs", data="size=1m")
    try:
        message = await refusal(flattener, small / "out", layer)
        assert message.endswith(f"{layer}/large: No space left on device")
        assert list(small.iterdir()) == []
    finally:
        umount2(small)


async def test_holes_stay_holes(flattener: LayerFlattener, out: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    trees.sparse_files(layer)
    tree = await flat(flattener, out, layer)
    assert differences(describe(layer), tree) == []
    for name in ("head", "middle", "tail", "nothing", "many"):
        assert (out / name).stat().st_blocks <= (layer / name).stat().st_blocks


async def test_links_of_a_layer_lead_nowhere(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    outside, top, below = (tmp_path / name for name in ("outside", "top", "below"))
    for place in (outside, top, below / "d"):
        place.mkdir(parents=True)
    (outside / "secret").touch()
    (below / "d/file").touch()
    (top / "d").symlink_to(outside)
    tree = await flat(flattener, out, top, below)
    assert sorted(tree) == [".", "d"]
    assert tree["d"].kind == "symlink"


async def test_one_that_is_cancelled_leaves_nothing_and_can_be_repeated(
    flattener: LayerFlattener, layers: LayerStore, out: Path
) -> None:
    layer = mounted(layers, trees.odd_entries)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flattener.flatten, [str(layer)], str(out))
            await trio.lowlevel.checkpoint()
            scope.cancel()
    assert not is_there(out)
    assert await flat(flattener, out, layer)


async def test_what_a_crash_left_is_replaced(
    flattener: LayerFlattener, out: Path, tmp_path: Path
) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "file").touch()
    left = out.parent / f".{out.name}.flattening/half"
    left.mkdir(parents=True)
    assert sorted(await flat(flattener, out, layer)) == [".", "file"]


async def test_of_two_at_once_for_one_output_one_is_refused(
    flattener: LayerFlattener, layers: LayerStore, out: Path
) -> None:
    layer = str(mounted(layers, trees.busybox))
    messages = []

    async def attempt() -> None:
        try:
            await flattener.flatten([layer], str(out))
        except AgentError as error:
            messages.append(error.message)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt)
        nursery.start_soon(attempt)
    assert messages == [f"flatten layers into {out}: another request is doing that already"]
    assert is_there(out / "bin/busybox")
