"""Pulls that go wrong: for a while, without a network, cut off, on a full disk."""

import errno
import json
import re
import threading

import pytest
import trio
import trio.testing

from agent.images.layer_fetcher import LAYERS_AT_ONCE
from agent.images.platform import local_platform
from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from protocol.values import RegistryAuth
from tests.agent.images.pulling import Pulling, blob, event, noise
from tests.support.layout import MANIFEST, gzip_layer, plain_layer
from tests.support.misbehaving_registry import (
    Exchange,
    MisbehavingRegistry,
    cut,
    misbehaving_registry,
    rangeless,
    short,
    silent,
    stalled,
    status,
)

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


async def test_what_was_fetched_is_kept_where_this_machine_is_to_blame(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = gzip_layer(noise("one").blob)
    server.add_image("latest", [layer])
    with pulling.store.blobs.open_partial(layer.digest) as partial:
        partial.append(layer.blob[:5000])
    pulling.restart()
    pulling.layers.failure = OSError(errno.EBUSY, "Device or resource busy")
    await pulling.refused(server.reference())
    pulling.layers.failure = None
    await pulling.pull(server.reference())
    ranges = [request.headers.get("Range") for request in server.requests_for(blob(layer))]
    assert ranges == ["bytes=5000-"]


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
