"""Collections: what goes, what stays, and what happens meanwhile."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from agent.errors import AgentError
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, StoredImage
from agent.images.garbage import Collection, GarbageCollector, Stored, plan
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.overlay_record import OverlayRecord
from agent.images.progress import PullProgress
from agent.images.puller import Puller
from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from agent.images.tree_removal import remove_tree
from agent.linux.mount import mount, umount2
from protocol.errors import ErrorCode
from protocol.values import OverlayInfo
from tests.agent.images.building import build, digest_of, stored_image
from tests.support.layout import gzip_layer, plain_layer
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry, stalled
from tests.support.rounds import rounds
from tests.support.tarballs import directory, entry, tarball

PROJECT = Path(__file__).parents[3]


def files_of_loop_devices() -> list[str]:
    return [path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file")]


def make(directory: Path) -> None:
    directory.mkdir()


def tar_of(name: str) -> bytes:
    """A layer of its own, with a file of that name."""
    return tarball(directory("etc/"), entry(f"etc/{name}", name.encode() * 1000))


@attrs.frozen
class Storage:
    """A whole storage, with what collects garbage in it."""

    path: Path
    store: ContentStore
    layers: LayerStore
    overlays: Overlays
    claims: LayerClaims

    @property
    def garbage(self) -> GarbageCollector:
        return GarbageCollector(self.store, self.layers, self.overlays, self.claims)

    async def collect(self, **how: bool) -> Collection:
        return await self.garbage.collect(**how)

    def image(self, reference: str, *names: str, gzipped: bool = False) -> StoredImage:
        tars, pack = map(tar_of, names), gzip_layer if gzipped else plain_layer
        return stored_image(self.store, self.layers, reference, *tars, pack=pack)

    def files(self) -> set[str]:
        """Everything that a collection may take: blobs, records, partials, layers, mounts."""
        places = ("oci/blobs/sha256", "oci/unpacked", "oci/ingest", "erofs", "layers")
        return {
            f"{place}/{path.name}" for place in places for path in (self.path / place).iterdir()
        }

    def read(self, image: StoredImage) -> list[str]:
        """The files in the layers of an image, each read where it is mounted."""
        found = []
        for layer in image.layers:
            for path in (self.layers.directory(layer.digest) / "etc").iterdir():
                assert path.read_bytes() == path.name.encode() * 1000
                found.append(path.name)
        return found

    def bytes_of(self, files: set[str]) -> int:
        return sum(
            (self.path / file).stat().st_size for file in files if not file.startswith("layers/")
        )


@pytest.fixture
def whole(storage: Path, layers: LayerStore) -> Iterator[Storage]:
    claims = LayerClaims()
    overlays = Overlays(storage, layers, claims)
    yield Storage(storage, ContentStore(storage), layers, overlays, claims)
    overlays.unmount_all()


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


async def test_what_no_image_and_no_overlay_refers_to_is_removed(whole: Storage) -> None:
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


async def test_a_dry_run_counts_and_removes_nothing(whole: Storage) -> None:
    image = whole.image("image", "one")
    files = whole.files()
    counted = await whole.collect(dry_run=True, purge_all=True)
    assert whole.files() == files
    assert whole.store.images() == [image]
    assert counted.images == (image.reference,)
    assert counted.garbage.total_bytes == whole.bytes_of(files)
    assert await whole.collect(purge_all=True) == counted


async def test_purging_forgets_all_images_and_the_store_works_on(whole: Storage) -> None:
    image = whole.image("image", "one", "two", gzipped=True)
    await whole.collect(purge_all=True)
    assert whole.store.images() == []
    assert whole.files() == set()
    assert ContentStore(whole.path).images() == []
    again = whole.image("image", "one", "two", gzipped=True)
    assert again == image
    assert whole.read(again) == ["one", "two"]
    assert ContentStore(whole.path).images() == [image]


async def test_an_overlay_keeps_its_layers_mounted_or_not(whole: Storage) -> None:
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


async def test_an_overlay_of_one_command_keeps_its_layers(whole: Storage) -> None:
    image = whole.image("image", "one")
    async with whole.overlays.ephemeral(image) as info:
        assert (await whole.collect(purge_all=True)).garbage.layers == {}
        assert (Path(info.rootfs_path) / "etc/one").read_bytes() == b"one" * 1000
    await whole.collect()
    assert whole.files() == set()


async def test_a_layer_that_another_blob_has_too_stays_and_the_other_blob_goes(
    whole: Storage,
) -> None:
    plain = whole.image("image", "one")
    gzipped = whole.image("image", "one", gzipped=True)
    collection = await whole.collect()
    assert collection.garbage.layers == {}
    assert plain.layers[0].digest in collection.garbage.blobs
    assert not whole.layers.directory(plain.layers[0].digest).exists()
    assert whole.read(gzipped) == ["one"]


async def test_a_layer_that_no_blob_is_known_of_is_removed(whole: Storage) -> None:
    diff_id = build(whole.layers, tar_of("packed"))
    whole.layers.mount(digest_of(b"not a blob of ours"), diff_id)
    collection = await whole.collect()
    assert set(collection.garbage.layers) == {diff_id}
    assert whole.files() == set()


async def test_a_layer_that_a_process_is_in_stays_with_its_blob(whole: Storage) -> None:
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


async def test_what_is_none_of_ours_stays(whole: Storage) -> None:
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
    whole: Storage,
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
        whole = Storage(ram, ContentStore(ram), layers, Overlays(ram, layers, claims), claims)
        image = whole.image("image", "one", "two")
        assert whole.read(image) == ["one", "two"]
        await whole.collect(purge_all=True)
        assert whole.files() == set()
    finally:
        umount2(ram)
    assert not [file for file in files_of_loop_devices() if str(ram) in file]


async def test_sizes_are_known_without_walking_through_any_layer(whole: Storage) -> None:
    image = whole.image("image", "one", "two", gzipped=True)
    whole.layers.unmount_all()
    for layer in image.layers:
        whole.layers.remove(layer.diff_id)
    (again,) = ContentStore(whole.path).images()
    assert again.info().size == len(tar_of("one")) + len(tar_of("two"))
    counted = await whole.collect(dry_run=True, purge_all=True)
    assert counted.garbage.total_bytes == whole.bytes_of(whole.files())


# Meanwhile


async def test_a_collection_waits_for_no_claim_and_removes_nothing_of_it(whole: Storage) -> None:
    image = whole.image("image", "one", "two")
    (one, two) = image.layers
    async with whole.claims.held([one.digest, one.diff_id]):
        collection = await whole.collect(purge_all=True)
    assert set(collection.garbage.layers) == {two.diff_id}
    assert whole.layers.has(one.diff_id)


async def test_what_is_being_removed_is_claimed_only_once_it_is_gone(whole: Storage) -> None:
    condemned, other = digest_of(b"condemned"), digest_of(b"other")
    order = []

    async def claim(digest: str) -> None:
        async with whole.claims.held([digest]):
            order.append(digest)

    async with trio.open_nursery() as nursery, whole.claims.collecting():
        nursery.start_soon(claim, condemned)
        nursery.start_soon(claim, other)
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        whole.claims.condemn({condemned})
        await trio.testing.wait_all_tasks_blocked()
        assert order == [other]
    assert order == [other, condemned]


async def test_a_collection_that_is_cancelled_keeps_nobody_waiting(whole: Storage) -> None:
    whole.image("image", "one")
    with trio.CancelScope() as scope:
        scope.cancel()
        await whole.collect(purge_all=True)
    async with whole.claims.held([A]):
        pass
    await whole.collect(purge_all=True)
    assert whole.files() == set()


async def test_of_collections_at_once_one_removes_all_and_none_fails(whole: Storage) -> None:
    for n in range(8):
        whole.image(f"image{n}", "base", f"layer{n}")
    total = whole.bytes_of(whole.files())
    freed = []

    async def collect() -> None:
        freed.append((await whole.collect(purge_all=True)).garbage.total_bytes)

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(collect)
    assert sorted(freed) == [0, 0, 0, 0, total]


@attrs.define
class Preparations:
    """Overlays that are asked for, each after so many turns of the scheduler."""

    overlays: Overlays
    made: list[OverlayInfo] = attrs.field(factory=list)
    refusals: list[str] = attrs.field(factory=list)

    async def prepare(self, image: StoredImage, name: str, turns: int) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        try:
            self.made.append(await self.overlays.prepare(image, name))
        except AgentError as error:
            self.refusals.append(error.message)


async def test_an_overlay_prepared_during_a_collection_is_whole_or_refused(whole: Storage) -> None:
    made = refused = 0
    for n in range(rounds(quick=14, soak=500)):
        image = whole.image("image", "base", f"top{n}")
        preparations = Preparations(whole.overlays)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(preparations.prepare, image, "web", n % 5)
            nursery.start_soon(preparations.prepare, image, "too", n % 3)
            for _ in range(n % 7):
                await trio.lowlevel.checkpoint()
            await whole.collect(purge_all=True)
        for info in preparations.made:
            assert (Path(info.rootfs_path) / f"etc/top{n}").read_bytes() == b"top%d" % n * 1000
        whole.overlays.unmount_all()
        whole.layers.unmount_all()
        for info in preparations.made:
            assert await whole.overlays.prepare(None, Path(info.rootfs_path).parent.name) == info
            assert (Path(info.rootfs_path) / "etc/base").exists()
        assert all("is not in the store; pull" in message for message in preparations.refusals)
        made, refused = made + len(preparations.made), refused + len(preparations.refusals)
        for name in ("web", "too"):
            await whole.overlays.cleanup(name)
    # Both happen, or nothing was tried.
    assert made
    assert refused
    await whole.collect(purge_all=True)
    assert whole.files() == set()


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        yield registry


@attrs.define
class Pull:
    """A pull, and whether it is in the middle of its layers."""

    puller: Puller
    reference: str
    in_the_middle: trio.Event = attrs.field(factory=trio.Event)
    image: StoredImage | None = None

    async def run(self) -> None:
        reference = parse_reference(self.reference)
        self.image = await self.puller.pull(reference, None, None, self._note)

    async def _note(self, progress: PullProgress) -> None:
        if progress.percent:
            self.in_the_middle.set()


@pytest.fixture
def puller(whole: Storage, server: MisbehavingRegistry) -> Puller:
    settings = RegistrySettings(insecure=frozenset({server.address}))
    return Puller(whole.store, whole.layers, settings, whole.claims)


@pytest.mark.parametrize("purge_all", [False, True])
async def test_a_collection_takes_nothing_from_a_pull_that_is_extracting(
    whole: Storage, server: MisbehavingRegistry, puller: Puller, purge_all: bool
) -> None:
    done = gzip_layer(tar_of("done"))
    slow = gzip_layer(tarball(entry("etc/slow", os.urandom(300_000))))
    server.add_image("latest", [done, slow])
    server.misbehave(f"blobs/{slow.digest}", stalled(200_000))
    whole.image("unused", "unused")
    pull = Pull(puller, server.reference())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull.run)
        await pull.in_the_middle.wait()
        collection = await whole.collect(purge_all=purge_all)
        server.release()
    assert set(collection.garbage.layers) <= {digest_of(tar_of("unused"))}
    assert collection.garbage.partials == {}
    # Nothing was fetched twice.
    assert len(server.requests_for(f"blobs/{done.digest}")) == 1
    assert pull.image is not None
    assert whole.store.find(parse_reference(server.reference())) == pull.image
    for layer in pull.image.layers:
        assert list((whole.layers.directory(layer.digest) / "etc").iterdir())
    assert (await whole.collect(dry_run=True)).garbage.total_bytes == 0
    assert ContentStore(whole.path).find(parse_reference(server.reference())) == pull.image


async def test_a_purge_while_a_pull_asks_whether_its_tag_has_moved_takes_nothing_from_it(
    whole: Storage, server: MisbehavingRegistry, puller: Puller
) -> None:
    server.add_image("latest", [gzip_layer(tar_of("one"))])
    first = Pull(puller, server.reference())
    await first.run()
    asked = trio.Event()
    token = trio.lowlevel.current_trio_token()
    server.misbehave(
        "manifests/latest",
        lambda exchange: (token.run_sync_soon(asked.set), stalled()(exchange))[0],
    )
    again = Pull(puller, server.reference())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)
        await asked.wait()
        collection = await whole.collect(purge_all=True)
        assert collection.garbage.total_bytes == 0
        assert whole.store.images() == []
        server.release()
    assert again.image == first.image
    assert whole.store.images() == [first.image]


async def test_what_a_half_pull_left_is_removed(
    whole: Storage, server: MisbehavingRegistry, puller: Puller
) -> None:
    done, slow = gzip_layer(tar_of("done")), gzip_layer(tarball(entry("x", os.urandom(300_000))))
    server.add_image("latest", [done, slow])
    server.misbehave(f"blobs/{slow.digest}", stalled(200_000))
    pull = Pull(puller, server.reference())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pull.run)
        await pull.in_the_middle.wait()
        nursery.cancel_scope.cancel()
    assert f"oci/ingest/{slow.digest[7:]}" in whole.files()
    await whole.collect()
    assert whole.files() == set()


# Sudden death


COLLECT = """
import sys, trio
from pathlib import Path
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.garbage import GarbageCollector
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays

storage, claims = Path(sys.argv[1]), LayerClaims()
layers = LayerStore(storage)
overlays = Overlays(storage, layers, claims)
collector = GarbageCollector(ContentStore(storage), layers, overlays, claims)
async def main():
    await collector.collect(purge_all=True)
trio.run(main)
"""
MOMENTS = 10
REMOVING = "unlink,unlinkat,rmdir,umount2,rename"


def test_a_collection_that_is_killed_at_any_moment_leaves_a_store_that_works(
    storage: Path, layers: LayerStore
) -> None:
    for moment in itertools.count(1, step=rounds(quick=3, soak=1)):
        claims = LayerClaims()
        whole = Storage(
            storage, ContentStore(storage), layers, Overlays(storage, layers, claims), claims
        )
        whole.image("image", "base", "one", gzipped=True)
        pinned = whole.image("pinned", "base", "two")
        info = trio.run(whole.overlays.prepare, pinned, "web")
        inject = f"inject={REMOVING}:signal=KILL:when={moment}"
        result = subprocess.run(
            [
                "strace",
                "-f",
                "-o",
                "/dev/null",
                "-e",
                inject,
                sys.executable,
                "-c",
                COLLECT,
                storage,
            ],
            cwd=PROJECT,
            check=False,
        )
        again = Storage(
            storage, ContentStore(storage), layers, Overlays(storage, layers, claims), claims
        )
        for image in again.store.images():
            assert again.read(image)
        assert (Path(info.rootfs_path) / "etc/two").read_bytes() == b"two" * 1000
        # It can be pulled again, and the rest collected.
        assert again.read(again.image("image", "base", "one", gzipped=True)) == ["base", "one"]
        trio.run(again.overlays.cleanup, "web")
        trio.run(lambda: again.collect(purge_all=True))  # noqa: B023
        assert again.files() == set()
        if result.returncode == 0:
            break
    assert moment > MOMENTS
