"""Pulls from real and from misbehaving registries, into a real content store."""

import errno
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from agent.errors import AgentError
from agent.images.layer_fetcher import LAYERS_AT_ONCE
from agent.images.platform import local_platform
from agent.images.registries import RegistrySettings
from initramfs.local_registry import LocalRegistry
from protocol.errors import ErrorCode
from protocol.values import PlannedLayer
from tests.agent.images.pulling import Pulling, blob, noise
from tests.support.commands import run
from tests.support.images import OTHER_ARCHITECTURE, Images, PushedImage
from tests.support.layout import LAYER, MANIFEST, LayerBlob, gzip_layer, plain_layer
from tests.support.misbehaving_registry import (
    Exchange,
    Fault,
    MisbehavingRegistry,
    flipped,
    longer,
    stalled,
    status,
)


def together(count: int) -> Fault:
    """Answer only once so many requests are there at the same time."""
    barrier = threading.Barrier(count)

    def fault(exchange: Exchange) -> None:
        barrier.wait(10)
        exchange.answer()

    return fault


# From a real registry


@pytest.mark.parametrize("name", ["busybox", "zstd", "docker_schema2", "whiteouts"])
async def test_a_pulled_image_is_the_pushed_one(
    name: str, pulling: Pulling, images: Images
) -> None:
    pushed: PushedImage = getattr(images, name)
    image = await pulling.pull(pushed.reference)
    assert image.reference == pushed.reference
    assert image.manifest_digest == pushed.manifest_digest
    assert image.info().digest == pushed.config_digest
    assert image.info().layers == pushed.layers
    assert image.info().size == sum(len(pulling.layers.tars[diff]) for diff in pushed.diff_ids)
    assert pulling.layers.mounted == list(zip(pushed.layers, pushed.diff_ids, strict=True))
    assert pulling.store.images() == [image]
    pulling.restart()
    assert pulling.store.images() == [image]
    inspected = run("skopeo", "inspect", f"oci:{pulling.directory}/oci:{image.reference}")
    assert json.loads(inspected)["Layers"] == list(pushed.layers)


async def test_sixty_layers_are_all_there_in_order(pulling: Pulling, images: Images) -> None:
    image = await pulling.pull(images.sixty_layers.reference)
    assert tuple(layer.digest for layer in image.layers) == images.sixty_layers.layers
    assert tuple(layer.diff_id for layer in image.layers) == images.sixty_layers.diff_ids


async def test_an_index_gives_this_machines_image_or_the_platforms_that_is_asked_for(
    pulling: Pulling, images: Images
) -> None:
    pushed = images.multi_platform
    own = await pulling.pull(pushed.reference)
    assert own.config_digest == pushed.config_digest
    other = await pulling.pull(pushed.reference, f"linux/{OTHER_ARCHITECTURE}")
    assert other.info().architecture == OTHER_ARCHITECTURE
    # The one that was pulled last has the name.
    assert pulling.store.images() == [other]
    assert await pulling.pull(pushed.reference) == own


async def test_a_tag_is_asked_for_once_and_everything_behind_it_by_its_digest(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    """So that all of an image is of one moment, also where its tag moves in the meantime."""
    layers = [noise("one"), noise("two")]
    digest = server.add_image("latest", layers)
    manifest = server.content("manifests/latest")
    entry = {"mediaType": MANIFEST, "digest": digest, "size": len(manifest)}
    server.add_index("latest", [entry | {"platform": {"os": "linux", "architecture": "amd64"}}])
    server.add_image("moved", [noise("three")])

    def move(exchange: Exchange) -> None:
        exchange.answer()
        server.add_manifest("latest", server.content("manifests/moved"), MANIFEST)

    server.misbehave("manifests/latest", move)
    image = await pulling.pull(server.reference(), "linux/amd64")
    assert [layer.digest for layer in image.layers] == [layer.digest for layer in layers]
    config = json.loads(manifest)["config"]["digest"]
    asked = ["manifests/latest", f"manifests/{digest}", f"blobs/{config}", *map(blob, layers)]
    assert sorted(request.path for request in server.requests) == sorted(asked)


async def test_a_platform_that_an_index_does_not_have_is_refused_with_those_it_has(
    pulling: Pulling, images: Images
) -> None:
    message = await pulling.refused(images.multi_platform.reference, "linux/s390x")
    assert message == "no manifest for linux/s390x; the index has linux/amd64, linux/arm64"


async def test_an_image_for_one_platform_is_refused_for_another_that_is_asked_for(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])
    message = await pulling.refused(server.reference(), "linux/arm64")
    assert message == "the image is for linux/amd64, not linux/arm64"
    assert (await pulling.pull(server.reference(), "linux/amd64")).info().architecture == "amd64"


async def test_an_unknown_tag_is_told_in_the_registrys_words(
    pulling: Pulling, registry: LocalRegistry, images: Images
) -> None:
    reference = f"{registry.address}/busybox:missing"
    assert images.busybox.reference.startswith(f"{registry.address}/busybox:")
    message = await pulling.refused(reference)
    assert message == (
        f"{registry.address} answered 404 Not Found: MANIFEST_UNKNOWN: manifest unknown"
    )


async def test_plain_http_without_the_configurations_leave_tells_how_to_give_it(
    tmp_path: Path, images: Images
) -> None:
    pulling = Pulling(tmp_path / "storage", RegistrySettings())
    message = await pulling.refused(images.busybox.reference)
    host = images.busybox.reference.partition("/")[0]
    assert message.endswith(f"add --insecure-registry {host}")


# What is fetched, and what is not


async def test_layers_that_are_in_the_store_are_not_fetched(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    base, first, second = noise("base"), noise("first"), noise("second")
    server.add_image("first", [base, first])
    server.add_image("second", [base, second])
    await pulling.pull(server.reference("first"))
    pulling.restart()
    await pulling.pull(server.reference("second"))
    assert len(server.requests_for(blob(base))) == 1


async def test_a_layer_that_an_image_has_twice_is_fetched_once(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("twice")
    server.add_image("latest", [layer, noise("other"), layer])
    image = await pulling.pull(server.reference())
    assert image.info().layer_count == 3
    assert image.info().size == 900_000
    assert len(server.requests_for(blob(layer))) == 1


async def test_a_tag_that_has_not_moved_costs_one_small_request(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])
    image = await pulling.pull(server.reference())
    before = len(server.requests)
    frames = len(pulling.frames)
    assert await pulling.pull(server.reference()) == image
    assert [request.method for request in server.requests[before:]] == ["HEAD"]
    assert len(pulling.frames) == frames


async def test_a_tag_that_moved_is_pulled_anew(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("old")])
    old = await pulling.pull(server.reference())
    server.add_image("latest", [noise("new")])
    new = await pulling.pull(server.reference())
    assert new.config_digest != old.config_digest
    assert pulling.store.images() == [new]


async def test_a_registry_that_answers_no_head_request_is_asked_for_the_manifest(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])
    image = await pulling.pull(server.reference())
    server.misbehave("manifests/latest", status(405))
    assert await pulling.pull(server.reference()) == image
    assert len(server.requests_for("manifests/latest")) == 2


async def test_a_digest_is_asked_for_once_and_never_again(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    digest = server.add_image("latest", [noise("one")])
    reference = f"{server.reference().rpartition(':')[0]}@{digest}"
    image = await pulling.pull(reference)
    assert image.reference == reference
    before = len(server.requests)
    assert await pulling.pull(reference) == image
    assert len(server.requests) == before


async def test_an_image_that_is_there_under_its_tag_is_named_by_its_digest_without_a_request(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    digest = server.add_image("latest", [noise("one")])
    tagged = await pulling.pull(server.reference())
    before = len(server.requests)
    reference = f"{server.reference().rpartition(':')[0]}@{digest}"
    image = await pulling.pull(reference)
    assert image == attrs.evolve(tagged, reference=reference)
    assert pulling.store.images() == [tagged, image]
    assert len(server.requests) == before


async def test_an_image_whose_layer_is_no_longer_built_is_rebuilt_from_the_blob(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = gzip_layer(noise("one").blob)
    server.add_image("latest", [layer])
    image = await pulling.pull(server.reference())
    pulling.layers.tars.clear()
    assert await pulling.pull(server.reference()) == image
    assert pulling.layers.has(layer.diff_id)
    assert len(server.requests_for(blob(layer))) == 1


@pytest.mark.parametrize("form", [plain_layer, gzip_layer])
async def test_a_blob_that_the_disk_has_damaged_is_fetched_again(
    form: Callable[[bytes], LayerBlob], pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = form(noise("one").blob)
    server.add_image("latest", [layer])
    await pulling.pull(server.reference())
    pulling.layers.tars.clear()
    path = pulling.store.blobs.path(layer.digest)
    path.write_bytes(b"x" * len(layer.blob))
    await pulling.pull(server.reference())
    assert path.read_bytes() == layer.blob


async def test_two_pulls_that_need_one_layer_fetch_it_once(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    base = noise("base")
    server.add_image("first", [base, noise("first")])
    server.add_image("second", [base, noise("second")])
    server.misbehave(blob(base), stalled(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulling.pull, server.reference("first"))
        await pulling.layers_until(lambda: pulling.layers.written.get(base.diff_id) == 1000)
        nursery.start_soon(pulling.pull, server.reference("second"))
        server.release()
    # The second request is the first pull's, for what the stalled answer did not give.
    asked = [request.headers.get("Range") for request in server.requests_for(blob(base))]
    assert asked == [None, "bytes=1000-"]
    assert len(pulling.store.images()) == 2


async def test_a_pull_takes_over_the_layer_of_one_that_is_cancelled(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("shared")
    server.add_image("first", [layer])
    server.add_image("second", [layer])
    server.misbehave(blob(layer), stalled(1000))
    async with trio.open_nursery() as nursery:
        cancelled = trio.CancelScope()

        async def first() -> None:
            with cancelled:
                await pulling.pull(server.reference("first"))

        nursery.start_soon(first)
        await pulling.layers_until(lambda: pulling.layers.written.get(layer.diff_id) == 1000)
        nursery.start_soon(pulling.pull, server.reference("second"))
        cancelled.cancel()
    assert [image.reference for image in pulling.store.images()] == [server.reference("second")]
    assert server.requests_for(blob(layer))[1].headers["Range"] == "bytes=1000-"


async def test_several_layers_are_fetched_at_once(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layers = [noise(str(n)) for n in range(LAYERS_AT_ONCE)]
    server.add_image("latest", layers)
    met = together(len(layers))
    for layer in layers:
        server.misbehave(blob(layer), met)
    await pulling.pull(server.reference())


async def test_a_blob_of_the_store_is_kept_where_it_cannot_be_rebuilt_for_now(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    image = await pulling.pull(server.reference())
    built = dict(pulling.layers.tars)
    for failure in (errno.ENOSPC, errno.ENOMEM):
        pulling.layers.tars.clear()
        pulling.layers.failure = OSError(failure, "says the machine")
        await pulling.refused(server.reference())
    pulling.layers.failure = None
    assert await pulling.pull(server.reference()) == image
    assert pulling.layers.tars == built
    assert len(server.requests_for(blob(layer))) == 1


# What would be fetched


async def test_a_plan_says_what_a_pull_would_fetch_and_fetches_nothing(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    base, begun, top = noise("base"), gzip_layer(noise("begun").blob), noise("top")
    server.add_image("base", [base])
    await pulling.pull(server.reference("base"))
    server.add_image("latest", [base, begun, top, top])
    with pulling.store.blobs.open_partial(begun.digest) as partial:
        partial.append(begun.blob[:100_000])
    before, frames = pulling.files(), len(pulling.frames)
    plan = await pulling.plan(server.reference())
    rest = len(begun.blob) - 100_000
    assert plan.reference == server.reference()
    assert plan.platform == str(local_platform())
    assert plan.layers == (
        PlannedLayer(base.digest, 300_000, 0),
        PlannedLayer(begun.digest, len(begun.blob), rest),
        PlannedLayer(top.digest, 300_000, 300_000),
    )
    assert plan.fetch_bytes == rest + 300_000
    # A plain layer is as large unpacked, a compressed one by a rule of thumb.
    assert plan.disk_bytes == plan.fetch_bytes + 3 * len(begun.blob) + 300_000
    assert plan.free_bytes > plan.disk_bytes
    assert not [request for request in server.requests if "blobs/" + top.digest in request.path]
    assert pulling.files() == before
    assert len(pulling.frames) == frames
    image = await pulling.pull(server.reference())
    assert plan.digest == image.config_digest
    again = await pulling.plan(server.reference())
    assert (again.fetch_bytes, again.disk_bytes) == (0, 0)


async def test_a_plan_for_an_image_that_is_not_there_fails_as_the_pull_would(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    with pytest.raises(AgentError, match="MANIFEST_UNKNOWN: not here") as failed:
        await pulling.plan(server.reference("missing"))
    assert failed.value.code is ErrorCode.PULL_FAILED


# What is not believed


Damage = Callable[[MisbehavingRegistry, LayerBlob], str]


def layer_flipped(server: MisbehavingRegistry, layer: LayerBlob) -> str:
    server.misbehave(blob(layer), flipped)
    return rf"layer {layer.digest}: its digest is sha256:\w{{64}}"


def layer_too_long(server: MisbehavingRegistry, layer: LayerBlob) -> str:
    server.misbehave(blob(layer), longer)
    return f"layer {layer.digest}: body goes on after the manifest's {len(layer.blob)} bytes"


def manifest_of_another_digest(server: MisbehavingRegistry, layer: LayerBlob) -> str:
    promised = "sha256:" + "0" * 64
    document = {"schemaVersion": 2, "mediaType": MANIFEST}
    server.misbehave("manifests/latest", status(200, document, Docker_Content_Digest=promised))
    return rf"the manifest's digest is sha256:\w{{64}}, not {promised}"


def config_flipped(server: MisbehavingRegistry, layer: LayerBlob) -> str:
    manifest = json.loads(server.content("manifests/latest"))
    server.misbehave(f"blobs/{manifest['config']['digest']}", flipped)
    return r"the digest of what came for sha256:\w{64} is sha256:\w{64}"


@pytest.mark.parametrize(
    "damage", [layer_flipped, layer_too_long, manifest_of_another_digest, config_flipped]
)
async def test_what_is_not_what_it_should_be_fails_the_pull_and_the_next_good_one_works(
    damage: Damage, pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    message = damage(server, layer)
    before = pulling.files()
    assert re.fullmatch(message, await pulling.refused(server.reference()))
    assert pulling.files() == before
    assert not pulling.layers.tars
    pulling.restart()
    assert pulling.store.images() == []
    assert (await pulling.pull(server.reference())).info().layers == (layer.digest,)


async def test_a_layer_that_is_not_its_diff_id_fails_the_pull_and_leaves_nothing(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer, other = noise("one"), noise("two")
    server.add_image("latest", [layer], diff_ids=[other.diff_id])
    message = await pulling.refused(server.reference())
    assert message == (
        f"layer {layer.digest}: {other.diff_id}: the layer's tar has the digest {layer.diff_id}"
    )
    assert not pulling.files()
    server.add_image("latest", [layer])
    await pulling.pull(server.reference())


async def test_a_layer_of_the_store_is_not_passed_off_as_another_of_the_store(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    one, two = noise("one"), noise("two")
    server.add_image("good", [one, two])
    good = await pulling.pull(server.reference("good"))
    server.add_image("bad", [one, two], diff_ids=[two.diff_id, one.diff_id])
    message = await pulling.refused(server.reference("bad"))
    assert message == (
        f"layer {one.digest} has the diff_id {one.diff_id}, and not the config's {two.diff_id}"
    )
    assert pulling.store.images() == [good]


async def test_an_image_with_fewer_diff_ids_than_layers_is_refused(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    one, two = noise("one"), noise("two")
    server.add_image("latest", [one, two], diff_ids=[one.diff_id])
    message = await pulling.refused(server.reference())
    assert message == "the config has 1 diff_ids for the manifest's 2 layers"


async def test_a_layer_in_another_compression_than_it_says_is_refused(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    zipped = gzip_layer(b"content")
    layer = LayerBlob(f"{LAYER}+zstd", zipped.blob, zipped.diff_id)
    server.add_image("latest", [layer])
    assert (await pulling.refused(server.reference())).startswith(f"layer {layer.digest}: ")


# The agent's start


def test_nothing_of_a_registry_is_imported_before_the_first_pull() -> None:
    script = (
        "import sys, agent.images.puller;"
        "print([name for name in ('oras', 'requests', 'urllib3') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
