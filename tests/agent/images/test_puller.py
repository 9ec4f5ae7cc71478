"""Pulls from real and from misbehaving registries, into a real content store."""

import errno
import itertools
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from agent.errors import AgentError
from agent.images.layer_fetcher import LAYERS_AT_ONCE
from agent.images.platform import local_platform
from agent.images.progress import PullProgress
from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from initramfs.local_registry import LocalRegistry
from protocol.errors import ErrorCode
from protocol.values import PlannedLayer, RegistryAuth
from tests.agent.images.pulling import Pulling, blob, noise
from tests.support.commands import run
from tests.support.images import OTHER_ARCHITECTURE, Images, PushedImage
from tests.support.layout import LAYER, MANIFEST, LayerBlob, gzip_layer, plain_layer
from tests.support.misbehaving_registry import (
    Exchange,
    Fault,
    MisbehavingRegistry,
    cut,
    flipped,
    longer,
    misbehaving_registry,
    rangeless,
    short,
    silent,
    slow,
    stalled,
    status,
)


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        yield registry


@pytest.fixture
def pulling(tmp_path: Path, registry: LocalRegistry, server: MisbehavingRegistry) -> Pulling:
    insecure = frozenset({registry.address, server.address})
    return Pulling(tmp_path / "storage", RegistrySettings(insecure=insecure))


async def event(happened: threading.Event) -> None:
    assert await trio.to_thread.run_sync(happened.wait, 10)


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


# What goes wrong and passes


async def test_a_body_that_is_cut_short_is_continued_where_it_ended(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = gzip_layer(noise("one").blob)
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), cut(100_000))
    await pulling.pull(server.reference())
    asked = [request.headers.get("Range") for request in server.requests_for(blob(layer))]
    assert asked == [None, "bytes=100000-"]


async def test_a_connection_that_is_reset_is_made_again(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave("manifests/latest", cut(10, reset=True))
    server.misbehave(blob(layer), cut(1000, reset=True))
    await pulling.pull(server.reference())
    assert len(server.requests_for("manifests/latest")) == 2
    assert len(server.requests_for(blob(layer))) == 2


async def test_a_registry_without_ranges_may_send_everything_again(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = gzip_layer(noise("one").blob)
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), cut(100_000), rangeless)
    await pulling.pull(server.reference())
    asked = [request.headers.get("Range") for request in server.requests_for(blob(layer))]
    assert asked == [None, "bytes=100000-"]


async def test_a_registry_that_refuses_ranges_is_asked_without(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), cut(100_000), status(416))
    await pulling.pull(server.reference())
    assert len(server.requests_for(blob(layer))) == 3


async def test_a_busy_registry_is_asked_again_when_it_says_so(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave("manifests/latest", status(503, Retry_After="1"))
    server.misbehave(blob(layer), status(429, Retry_After="1"))
    begun = trio.current_time()
    await pulling.pull(server.reference())
    assert trio.current_time() - begun >= 2


async def test_a_registry_that_asks_for_more_patience_than_hosts_have_fails_the_pull(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])
    server.misbehave("manifests/latest", status(429, Retry_After="3600"))
    message = await pulling.refused(server.reference())
    assert (
        message == f"{server.address} answered 429 Too Many Requests, and asks to wait for 3600 s"
    )


async def test_four_attempts_are_made_and_no_more(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = plain_layer(b"x" * 100)
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), *[short(10)] * 9)
    message = await pulling.refused(server.reference())
    assert message == f"layer {layer.digest}: body ended after 10 of 100 bytes (4 attempts)"
    assert len(server.requests_for(blob(layer))) == 4


@pytest.mark.parametrize("code", [401, 403, 404])
async def test_what_is_refused_for_good_is_not_asked_for_again(
    code: int, pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), status(code, {"errors": [{"code": "NO", "message": "never"}]}))
    message = await pulling.refused(server.reference())
    assert message.startswith(f"layer {layer.digest}: {server.address} answered {code} ")
    assert "NO: never" in message
    assert len(server.requests_for(blob(layer))) == 1


async def test_an_image_of_a_registry_that_gives_tokens_to_anybody_is_pulled(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.authorization = "Bearer a-token"
    server.challenge = f'Bearer realm="http://{server.address}/token",service="s"'
    server.add_image("latest", [noise(str(n)) for n in range(4)])
    await pulling.pull(server.reference())


async def test_a_password_is_in_no_message_and_no_log(
    pulling: Pulling, server: MisbehavingRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    server.add_image("latest", [noise("one")])
    server.authorization, server.challenge = "Basic nobody", 'Basic realm="r"'
    auth = RegistryAuth("user", "very secret")
    with caplog.at_level("DEBUG"):
        message = await pulling.refused(server.reference(), auth=auth)
    assert message.endswith("who are you?: the credentials were refused")
    encoded = "dXNlcjp2ZXJ5IHNlY3JldA"
    assert any(encoded in str(request.headers) for request in server.requests)
    for secret in (auth.password, encoded):
        assert secret not in message + caplog.text


# Offline


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("gone", "Connection refused"),
        ("silent", "no answer within 2 s"),
        ("busy", "answered 503 Service Unavailable"),
    ],
)
async def test_an_image_of_the_store_is_taken_after_one_attempt_that_is_not_answered(
    trouble: str, cause: str, pulling: Pulling, server: MisbehavingRegistry
) -> None:
    if trouble == "gone":
        with misbehaving_registry() as gone:
            gone.add_image("latest", [noise("one")])
            pulling.registries = RegistrySettings(insecure=frozenset({gone.address}))
            pulling.restart()
            image = await pulling.pull(gone.reference())
    else:
        server.add_image("latest", [noise("one")])
        image = await pulling.pull(server.reference())
        server.misbehave("manifests/latest", *[silent if trouble == "silent" else status(503)] * 2)
    pulling.frames.clear()
    begun = trio.current_time()
    assert await pulling.pull(image.reference) == image
    assert trio.current_time() - begun < 5
    *before, frame = (frame for _, frame in pulling.frames)
    assert {frame.message for frame in before} <= {f"Resolving {image.reference}"}
    assert frame.message.startswith(f"{image.reference}: ")
    assert cause in frame.message
    assert frame.message.endswith("; taking the image in the store")
    asked = [request.method for request in server.requests_for("manifests/latest", "HEAD")]
    assert asked == ([] if trouble == "gone" else ["HEAD"])


@pytest.mark.parametrize("host", ["registry.invalid", "255.255.255.255:5000"])
async def test_an_image_of_the_store_is_taken_where_there_is_no_resolver_or_no_route(
    host: str, pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])
    image = await pulling.pull(server.reference())
    # As it would be called, had it been pulled while there was a way.
    reference = parse_reference(f"{host}/test/image")
    pulling.store.tag(
        reference,
        image.manifest_digest,
        resolved=image.manifest_digest,
        platform=str(local_platform()),
    )
    pulling.frames.clear()
    with trio.fail_after(4):
        found = await pulling.pull(str(reference))
    assert found.config_digest == image.config_digest
    frame = pulling.frames[-1][1]
    assert frame.message.startswith(f"{reference}: ")
    assert frame.message.endswith("; taking the image in the store")


async def test_an_image_of_the_store_is_not_taken_where_the_registry_refuses(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])
    await pulling.pull(server.reference())
    server.misbehave("manifests/latest", *[status(403)] * 2)
    assert "answered 403 Forbidden" in await pulling.refused(server.reference())


# Cut off


async def test_a_cancelled_pull_ends_at_once_and_the_next_one_continues_it(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    done, cut_off, waiting = noise("done"), gzip_layer(noise("cut off").blob), noise("waiting")
    server.add_image("latest", [done, cut_off, waiting])
    server.misbehave(blob(cut_off), stalled(100_000))
    server.misbehave(blob(waiting), silent)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulling.pull, server.reference())
        await pulling.layers_until(
            lambda: len(pulling.layers.tars) == 1 and pulling.layers.open_builds == 2
        )
        await pulling.layers_until(lambda: pulling.layers.written.get(cut_off.diff_id) == 100_000)
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begun < 5
    assert pulling.layers.open_builds == 0
    assert pulling.store.images() == []

    pulling.restart()
    await pulling.pull(server.reference())
    assert len(server.requests_for(blob(done))) == 1
    ranges = [request.headers.get("Range") for request in server.requests_for(blob(cut_off))]
    assert ranges == [None, "bytes=100000-"]


async def test_a_cancelled_pull_does_not_wait_for_a_layer_that_is_long_in_unpacking(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), stalled(1000))
    pulling.layers.busy_for_ever = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulling.pull, server.reference())
        await pulling.layers_until(lambda: bool(pulling.layers.written))
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begun < 5
    assert pulling.layers.open_builds == 0


async def test_pulls_do_not_wait_for_one_that_gets_nowhere(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    stuck = [noise(f"stuck {n}") for n in range(2 * LAYERS_AT_ONCE)]
    server.add_image("stuck", stuck)
    server.add_image("good", [noise("good")])
    for layer in stuck:
        server.misbehave(blob(layer), stalled(1000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulling.pull, server.reference("stuck"))
        await pulling.layers_until(lambda: len(pulling.layers.written) == LAYERS_AT_ONCE)
        with trio.fail_after(5):
            await pulling.pull(server.reference("good"))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("path", ["manifests/latest", "blob"])
async def test_a_pull_that_waits_to_try_again_is_cancelled_at_once(
    path: str, pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    asked = threading.Event()

    def busy(exchange: Exchange) -> None:
        status(503, Retry_After="50")(exchange)
        asked.set()

    server.misbehave(blob(layer) if path == "blob" else path, busy)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pulling.pull, server.reference())
        await event(asked)
        begun = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - begun < 5


@pytest.mark.parametrize("beginning", ["good", "bad", "too long"])
async def test_the_beginning_that_an_earlier_pull_left_is_used_if_it_is_one(
    beginning: str, pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = gzip_layer(noise("one").blob)
    server.add_image("latest", [layer])
    contents = {
        "good": layer.blob[:5000],
        # As after a power loss: the length, but not the contents.
        "bad": layer.blob[:2000] + bytes(3000),
        "too long": layer.blob + b"more",
    }
    with pulling.store.blobs.open_partial(layer.digest) as partial:
        partial.append(contents[beginning])
    pulling.restart()
    await pulling.pull(server.reference())
    ranges = [request.headers.get("Range") for request in server.requests_for(blob(layer))]
    assert ranges[-1] == ("bytes=5000-" if beginning == "good" else None)
    assert not [path for path in pulling.files() if path.startswith("ingest")]


# A full disk


async def test_an_image_that_does_not_fit_is_refused_before_a_byte_is_fetched(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    digest = server.add_image("latest", [layer])
    manifest = json.loads(server.content(f"manifests/{digest}"))
    manifest["layers"][0]["size"] = 1 << 60
    server.add_manifest("latest", json.dumps(manifest).encode(), MANIFEST)
    message = await pulling.refused(server.reference())
    found = re.fullmatch(
        r"the disk is too full: the layers need (\d+) bytes, (\d+) are free, "
        r"(\d+) bytes are missing",
        message,
    )
    assert found, message
    assert int(found[1]) == 1 << 60
    assert int(found[1]) - int(found[2]) == int(found[3])
    assert not server.requests_for(blob(layer))


async def test_a_disk_that_runs_full_is_told_and_left_as_it_was(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    base, done, last = noise("base"), noise("done"), noise("last")
    server.add_image("base", [base])
    await pulling.pull(server.reference("base"))
    before, built = pulling.files(), set(pulling.layers.tars)
    server.add_image("latest", [base, done, last])
    let_go = threading.Event()

    def late(exchange: Exchange) -> None:
        let_go.wait(10)
        exchange.answer()

    server.misbehave(blob(last), late)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def fill() -> None:
            await pulling.layers_until(lambda: pulling.layers.has(done.diff_id))
            pulling.layers.failure = OSError(errno.ENOSPC, "No space left on device")
            let_go.set()

        message = await pulling.refused(server.reference())
    assert message == "the disk is full, about 600000 more bytes are needed"
    assert pulling.files() == before
    assert set(pulling.layers.tars) == built
    pulling.layers.failure = None
    await pulling.pull(server.reference())


# Progress


async def test_progress_is_told_between_once_and_ten_times_a_second_and_only_rises(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layers = [noise(str(n), 400_000) for n in range(3)]
    server.add_image("latest", layers)
    server.misbehave(blob(layers[0]), slow(4_000, 0.02))
    server.misbehave(blob(layers[2]), slow(100_000, 0.5))
    await pulling.pull(server.reference())
    times = [time for time, _ in pulling.frames]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 1
    for start in times:
        assert sum(start <= time < start + 1 for time in times) <= 10

    numbers, percents = [], []
    for _, frame in pulling.frames:
        found = re.fullmatch(r"Pulling layer (\d)/3", frame.message)
        assert found, frame.message
        numbers.append(int(found[1]))
        percents.append(frame.percent)
        assert frame.layer in {layer.digest.removeprefix("sha256:") for layer in layers}
    assert numbers == sorted(numbers)
    assert numbers[0] == 1
    assert numbers[-1] == 3
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 5


async def test_that_a_registry_is_slow_to_say_what_an_image_is_is_told(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])

    def late(exchange: Exchange) -> None:
        exchange.registry.released.wait(1.8)
        exchange.answer()

    server.misbehave("manifests/latest", late)
    begun = trio.current_time()
    await pulling.pull(server.reference())
    times = [begun, *(time for time, _ in pulling.frames)]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 1
    resolving = [frame for _, frame in pulling.frames if frame.percent is None]
    assert {frame.message for frame in resolving} == {f"Resolving {server.reference()}"}
    assert pulling.frames[-1][1].percent == 100


async def test_a_listener_in_the_middle_of_a_frame_is_not_cut_off_by_the_end_of_the_work(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    """What is cut off there would leave half a frame on the wire."""
    layer = noise("one")
    server.add_image("latest", [layer])
    go_on = trio.Event()
    heard: list[PullProgress] = []

    async def slow_to_listen(frame: PullProgress) -> None:
        await go_on.wait()
        heard.append(frame)

    async with trio.open_nursery() as nursery:

        async def pull() -> None:
            await pulling.pull(server.reference(), on_progress=slow_to_listen)

        nursery.start_soon(pull)
        await pulling.layers_until(lambda: pulling.layers.has(layer.diff_id))
        await trio.testing.wait_all_tasks_blocked(0.1)
        go_on.set()
    assert [frame.percent for frame in heard] == [0, 100]


async def test_a_layer_that_is_refused_ends_the_pull_at_once_though_others_keep_it_waiting(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    stuck, missing = noise("stuck"), noise("missing")
    server.add_image("latest", [stuck, missing])
    server.misbehave(blob(stuck), stalled(100_000))

    def refused(exchange: Exchange) -> None:
        assert exchange.registry.stalled.wait(10)
        pulling.layers.wait_until(lambda: pulling.layers.written.get(stuck.diff_id) == 100_000)
        status(404)(exchange)

    server.misbehave(blob(missing), refused)
    with trio.move_on_after(5) as patience:
        message = await pulling.refused(server.reference())
    assert not patience.cancel_called
    assert message.startswith(f"layer {missing.digest}: {server.address} answered 404 ")
    await pulling.pull(server.reference())
    assert server.requests_for(blob(stuck))[-1].headers["Range"] == "bytes=100000-"


async def test_progress_goes_on_while_nothing_comes(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), stalled(150_000))
    with trio.move_on_after(2.5):
        await pulling.pull(server.reference())
    assert 3 <= len(pulling.frames) <= 10
    assert pulling.frames[-1][1].percent == 50


async def test_percent_does_not_fall_where_a_registry_begins_anew(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), cut(250_000), slow(10_000, 0.03))
    await pulling.pull(server.reference())
    percents = [frame.percent for _, frame in pulling.frames]
    assert percents == sorted(percents)


async def test_bytes_their_rate_and_the_time_left_are_told(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layers = [noise("one"), noise("two")]
    server.add_image("latest", layers)
    server.misbehave(blob(layers[0]), slow(30_000, 0.2))
    await pulling.pull(server.reference())
    frames = [frame for _, frame in pulling.frames]
    assert {frame.total_bytes for frame in frames} == {600_000}
    assert (frames[0].bytes_per_s, frames[0].seconds_left) == (None, None)
    done = [frame.done_bytes or 0 for frame in frames]
    assert done == sorted(done)
    assert (done[-1], frames[-1].seconds_left) == (600_000, 0)
    for frame in frames:
        if frame.bytes_per_s:
            left = 600_000 - (frame.done_bytes or 0)
            assert frame.seconds_left == math.ceil(left / frame.bytes_per_s)
    assert any(frame.seconds_left for frame in frames)


async def test_layers_that_are_there_count_as_pulled(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    base, top = noise("base"), noise("top")
    server.add_image("base", [base])
    server.add_image("latest", [base, top])
    await pulling.pull(server.reference("base"))
    pulling.frames.clear()
    await pulling.pull(server.reference())
    assert {frame.message for _, frame in pulling.frames} == {"Pulling layer 2/2"}


async def test_a_listener_that_is_gone_ends_the_pull(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), stalled(1000))

    async def gone(frame: PullProgress) -> None:
        await event(server.stalled)
        raise trio.BrokenResourceError("nobody listens")

    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError, match="nobody listens"):
        await pulling.pull(server.reference(), on_progress=gone)


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
