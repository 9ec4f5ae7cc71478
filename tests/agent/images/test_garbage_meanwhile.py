"""Collections while others pull, prepare overlays and collect, and their own sudden death."""

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
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.progress import PullProgress
from agent.images.puller import Puller
from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from protocol.values import OverlayInfo
from tests.agent.images.building import digest_of
from tests.agent.images.whole_storage import WholeStorage, tar_of
from tests.support.layout import gzip_layer
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry, stalled
from tests.support.rounds import rounds
from tests.support.tarballs import entry, tarball

PROJECT = Path(__file__).parents[3]


async def test_a_collection_waits_for_no_claim_and_removes_nothing_of_it(
    whole: WholeStorage,
) -> None:
    image = whole.image("image", "one", "two")
    (one, two) = image.layers
    async with whole.claims.held([one.digest, one.diff_id]):
        collection = await whole.collect(purge_all=True)
    assert set(collection.garbage.layers) == {two.diff_id}
    assert whole.layers.has(one.diff_id)


async def test_what_is_being_removed_is_claimed_only_once_it_is_gone(whole: WholeStorage) -> None:
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


async def test_a_collection_that_is_cancelled_keeps_nobody_waiting(whole: WholeStorage) -> None:
    whole.image("image", "one")
    with trio.CancelScope() as scope:
        scope.cancel()
        await whole.collect(purge_all=True)
    async with whole.claims.held([digest_of(b"any")]):
        pass
    await whole.collect(purge_all=True)
    assert whole.files() == set()


async def test_of_collections_at_once_one_removes_all_and_none_fails(whole: WholeStorage) -> None:
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


async def test_an_overlay_prepared_during_a_collection_is_whole_or_refused(
    whole: WholeStorage,
) -> None:
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
def puller(whole: WholeStorage, server: MisbehavingRegistry) -> Puller:
    settings = RegistrySettings(insecure=frozenset({server.address}))
    return Puller(whole.store, whole.layers, settings, whole.claims)


@pytest.mark.parametrize("purge_all", [False, True])
async def test_a_collection_takes_nothing_from_a_pull_that_is_extracting(
    whole: WholeStorage, server: MisbehavingRegistry, puller: Puller, purge_all: bool
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
    whole: WholeStorage, server: MisbehavingRegistry, puller: Puller
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
    whole: WholeStorage, server: MisbehavingRegistry, puller: Puller
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
        whole = WholeStorage(
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
        again = WholeStorage(
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
