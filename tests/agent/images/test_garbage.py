"""Collections: what goes and what stays."""

from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.garbage import Stored, plan
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.overlay_record import OverlayRecord
from agent.images.tree_removal import remove_tree
from agent.linux.mount import mount, umount2
from protocol.errors import ErrorCode
from tests.agent.images.building import build, digest_of
from tests.agent.images.whole_storage import WholeStorage, tar_of


def files_of_loop_devices() -> list[str]:
    return [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]


def make(directory: Path) -> None:
    directory.mkdir()


# The plan

A, B, C, D = (digest_of(name.encode()) for name in "ABCD")


def test_nothing_is_garbage_that_is_claimed() -> None:
    stored = Stored({A: 1}, {A: 1}, {B: 2}, {C: 3}, {A})
    assert plan(stored, (), (), {A, B, C}) == Stored({}, {}, {}, {})
    assert plan(stored, (), (), set()) == stored


def test_an_overlay_needs_its_layers_whatever_images_there_are() -> None:
    stored = Stored({A: 1, B: 2}, {A: 1, B: 1}, {}, {C: 3, D: 4}, {A, B})
    record = OverlayRecord("a", A, ((A, C),))
    assert plan(stored, (), {record}, set()) == Stored({B: 2}, {B: 1}, {}, {D: 4}, {B})


def test_a_diff_id_that_is_needed_does_not_keep_a_blob_of_the_same_digest() -> None:
    record = OverlayRecord("a", A, ((B, C),))
    stored = Stored(blobs={C: 5}, layers={C: 3})
    assert plan(stored, (), {record}, set()) == Stored(blobs={C: 5})


# What goes and what stays


async def test_what_no_image_and_no_overlay_refers_to_is_removed(whole: WholeStorage) -> None:
    kept = whole.image("kept", "base", "kept")
    before = whole.files()
    whole.image("moved", "base", "old")
    whole.image("moved", "base", "new")
    with whole.store.blobs.open_partial(digest_of(b"never finished")) as partial:
        partial.append(b"a beginning")
    with_garbage = whole.files()
    new = whole.image("moved", "base", "new")
    collection = await whole.collect()
    gone = with_garbage - whole.files()
    old = digest_of(tar_of("old"))
    assert set(collection.garbage.layers) == {old}
    assert set(collection.garbage.partials) == {digest_of(b"never finished")}
    assert {f"layers/{old[7:]}", f"oci/unpacked/{old[7:]}", f"erofs/{old[7:]}.erofs"} < gone
    assert whole.files() > before
    assert sorted(whole.read(kept) + whole.read(new)) == ["base", "base", "kept", "new"]
    assert (await whole.collect()).garbage.total_bytes == 0


async def test_a_dry_run_counts_and_removes_nothing(whole: WholeStorage) -> None:
    image = whole.image("image", "one")
    files = whole.files()
    counted = await whole.collect(dry_run=True, purge_all=True)
    assert whole.files() == files
    assert whole.store.images() == [image]
    assert counted.images == (image.reference,)
    assert counted.garbage.total_bytes == whole.bytes_of(files)
    assert await whole.collect(purge_all=True) == counted


async def test_purging_forgets_all_images_and_the_store_works_on(whole: WholeStorage) -> None:
    image = whole.image("image", "one", "two", gzipped=True)
    await whole.collect(purge_all=True)
    assert whole.store.images() == []
    assert whole.files() == set()
    assert ContentStore(whole.path).images() == []
    again = whole.image("image", "one", "two", gzipped=True)
    assert again == image
    assert whole.read(again) == ["one", "two"]
    assert ContentStore(whole.path).images() == [image]


async def test_an_overlay_keeps_its_layers_mounted_or_not(whole: WholeStorage) -> None:
    mounted, other = whole.image("mounted", "base", "a"), whole.image("other", "base", "b")
    await whole.overlays.prepare(other, "not-mounted")
    whole.overlays.unmount_all()
    info = await whole.overlays.prepare(mounted, "mounted")
    whole.image("unused", "c")
    collection = await whole.collect(purge_all=True)
    assert set(collection.garbage.layers) == {digest_of(tar_of("c"))}
    assert (Path(info.rootfs_path) / "etc/a").read_bytes() == b"a" * 1000
    whole.overlays.unmount_all()
    whole.layers.unmount_all()
    for name, file in (("mounted", b"a"), ("not-mounted", b"b")):
        info = await whole.overlays.prepare(None, name)
        assert (Path(info.rootfs_path) / "etc" / file.decode()).read_bytes() == file * 1000
        await whole.overlays.cleanup(name)
    await whole.collect()
    assert whole.files() == set()


async def test_an_overlay_of_one_command_keeps_its_layers(whole: WholeStorage) -> None:
    image = whole.image("image", "one")
    async with whole.overlays.ephemeral(image) as info:
        assert (await whole.collect(purge_all=True)).garbage.layers == {}
        assert (Path(info.rootfs_path) / "etc/one").read_bytes() == b"one" * 1000
    await whole.collect()
    assert whole.files() == set()


async def test_a_layer_that_another_blob_has_too_stays_and_the_other_blob_goes(
    whole: WholeStorage,
) -> None:
    plain = whole.image("image", "one")
    gzipped = whole.image("image", "one", gzipped=True)
    collection = await whole.collect()
    assert collection.garbage.layers == {}
    assert plain.layers[0].digest in collection.garbage.blobs
    assert not whole.layers.directory(plain.layers[0].digest).exists()
    assert whole.read(gzipped) == ["one"]


async def test_a_layer_that_no_blob_is_known_of_is_removed(whole: WholeStorage) -> None:
    diff_id = build(whole.layers, tar_of("packed"))
    whole.layers.mount(digest_of(b"not a blob of ours"), diff_id)
    collection = await whole.collect()
    assert set(collection.garbage.layers) == {diff_id}
    assert whole.files() == set()


async def test_a_layer_that_a_process_is_in_stays_with_its_blob(whole: WholeStorage) -> None:
    busy = whole.image("busy", "busy")
    whole.image("idle", "idle")
    (layer,) = busy.layers
    with (whole.layers.directory(layer.digest) / "etc/busy").open() as file:
        collection = await whole.collect(purge_all=True)
        assert set(collection.garbage.layers) == {digest_of(tar_of("idle"))}
        assert file.read() == "busy" * 1000
        assert whole.read(busy) == ["busy"]
    await whole.collect()
    assert whole.files() == set()


async def test_what_is_none_of_ours_stays(whole: WholeStorage) -> None:
    others = [
        whole.path / "layers/some-directory/file",
        whole.path / f"layers/{'a' * 64}/file",
        whole.path / "erofs/notes.txt",
        whole.path / "oci/blobs/sha256/README",
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    await whole.collect(purge_all=True)
    assert all(path.exists() for path in others)
    for path in others[:2]:
        remove_tree(path.parent)


async def test_an_overlay_whose_record_is_damaged_stops_it_before_anything_is_lost(
    whole: WholeStorage,
) -> None:
    await whole.overlays.prepare(whole.image("image", "one"), "web")
    (whole.path / "overlays/web/overlay.json").write_text("{")
    files = whole.files()
    with pytest.raises(AgentError, match="the overlay's record is damaged") as raised:
        await whole.collect(purge_all=True)
    assert raised.value.code is ErrorCode.GC_FAILED
    assert "overlays/web/overlay.json; clean that overlay up first" in raised.value.message
    assert whole.files() == files
    assert len(whole.store.images()) == 1


async def test_a_storage_in_memory_is_left_no_loop_device(tmp_path: Path, mkfs_erofs: str) -> None:
    ram = tmp_path / "ram"
    make(ram)
    mount("tmpfs", ram, fstype="tmpfs")
    try:
        layers, claims = LayerStore(ram, mkfs_erofs), LayerClaims()
        whole = WholeStorage(ram, ContentStore(ram), layers, Overlays(ram, layers, claims), claims)
        image = whole.image("image", "one", "two")
        assert whole.read(image) == ["one", "two"]
        await whole.collect(purge_all=True)
        assert whole.files() == set()
    finally:
        umount2(ram)
    assert not [file for file in files_of_loop_devices() if str(ram) in file]


async def test_sizes_are_known_without_walking_through_any_layer(whole: WholeStorage) -> None:
    image = whole.image("image", "one", "two", gzipped=True)
    whole.layers.unmount_all()
    for layer in image.layers:
        whole.layers.remove(layer.diff_id)
    (again,) = ContentStore(whole.path).images()
    assert again.info().size == len(tar_of("one")) + len(tar_of("two"))
    counted = await whole.collect(dry_run=True, purge_all=True)
    assert counted.garbage.total_bytes == whole.bytes_of(whole.files())
