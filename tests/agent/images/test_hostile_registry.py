"""Registries that mean harm: each is one clear failure, in time, and the store is as it was."""

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from agent.images.manifest import LARGEST_CONFIG
from agent.images.mirrored_registry import MirroredRegistry
from agent.images.reference import parse_reference
from agent.images.registries import RegistryError, RegistrySettings, TimeLimits
from tests.agent.images.pulling import Pulling, blob, noise
from tests.support.layout import MANIFEST, gzip_layer
from tests.support.misbehaving_registry import (
    Exchange,
    Fault,
    MisbehavingRegistry,
    cut,
    dripping,
    endless,
    flooding,
    misbehaving_registry,
    redirect,
    status,
)

# As the real ones, but shorter.
LIMITS = TimeLimits(silence_s=5, window_s=0.3, window_bytes=100)
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        registry.add_image("latest", [noise("one")])
        yield registry


@pytest.fixture
def settings(server: MisbehavingRegistry) -> RegistrySettings:
    return RegistrySettings(insecure=frozenset({server.address}), limits=LIMITS)


@pytest.fixture
def client(server: MisbehavingRegistry, settings: RegistrySettings) -> Iterator[MirroredRegistry]:
    with MirroredRegistry(parse_reference(server.reference()), settings, None) as client:
        yield client


@pytest.fixture
def pulling(tmp_path: Path, settings: RegistrySettings) -> Pulling:
    return Pulling(tmp_path / "storage", settings)


def ask(client: MirroredRegistry, path: str) -> None:
    """Ask for a manifest, or for a blob and read it."""
    if not path.startswith("blobs/"):
        client.get_manifest("latest")
        return
    with client.open_blob(path.removeprefix("blobs/"), 300_000, 0) as body:
        for _ in body.blocks():
            pass


def refusal(client: MirroredRegistry, path: str) -> RegistryError:
    """How asking for it fails, within seconds."""
    begun = time.monotonic()
    with pytest.raises(RegistryError) as failed:
        ask(client, path)
    assert time.monotonic() - begun < 5
    assert "\n" not in str(failed.value)
    return failed.value


# Slow


@pytest.mark.parametrize("path", ["manifests/latest", blob(noise("one"))])
@pytest.mark.parametrize(
    "fault",
    [
        dripping(b""),
        dripping(OK + b"X-Header: "),
        dripping(OK, b"a:\r\n"),
        dripping(OK + b"Content-Length: 300000\r\n\r\n"),
        dripping(CHUNKED + b"5;"),
        dripping(CHUNKED, b"1\r\nx\r\n"),
        dripping(CHUNKED + b"0\r\n"),
    ],
    ids=["status", "header", "headers", "body", "chunk size", "chunks", "trailer"],
)
def test_a_byte_now_and_then_is_not_waited_for_for_ever(
    fault: Fault, path: str, client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    server.misbehave(path, fault)
    failure = refusal(client, path)
    assert str(failure).startswith(f"{server.address} is too slow: ")
    assert failure.transient
    assert failure.timed_out


def test_a_refusal_that_drips_is_not_waited_for_for_ever(
    client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    path = blob(noise("one"))
    server.misbehave(path, dripping(b"HTTP/1.1 404 Not Found\r\nContent-Length: 4000\r\n\r\n"))
    assert refusal(client, path).timed_out


def test_a_token_that_drips_is_not_waited_for_for_ever(
    client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    server.authorization = "Bearer a-token"
    server.challenge = f'Bearer realm="http://{server.address}/token"'
    server.misbehave("/token", dripping(OK + b"Content-Length: 4000\r\n\r\n"))
    assert refusal(client, "manifests/latest").timed_out


def test_what_comes_at_the_slowest_pace_that_is_allowed_is_waited_for(
    client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    digest = layer.digest

    def steady(exchange: Exchange) -> None:
        exchange.start(200, 10_000)
        for start in range(0, 10_000, 1000):
            exchange.write(exchange.body[start : start + 1000])
            exchange.registry.released.wait(0.05)

    server.misbehave(blob(layer), steady)
    with client.open_blob(digest, 10_000, 0) as body:
        assert b"".join(body.blocks()) == layer.blob[:10_000]


def test_many_small_answers_over_one_connection_are_not_taken_for_a_slow_one(
    settings: RegistrySettings, server: MisbehavingRegistry
) -> None:
    def late(exchange: Exchange) -> None:
        exchange.registry.released.wait(0.3)
        exchange.answer()

    server.misbehave("manifests/latest", *[late] * 5)
    limits = attrs.evolve(settings, limits=attrs.evolve(LIMITS, window_s=1.2))
    with MirroredRegistry(parse_reference(server.reference()), limits, None) as client:
        for _ in range(5):
            client.get_manifest("latest")
    assert len({request.client for request in server.requests}) == 1


async def test_a_pull_that_a_registry_drips_into_fails_and_keeps_what_came(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    layer = noise("one")
    drip = dripping(
        OK + b"Content-Length: 300000\r\n\r\n" + layer.blob[:5000], layer.blob[5000:5001]
    )
    server.misbehave(blob(layer), *[drip] * 4)
    with trio.fail_after(20):
        message = await pulling.refused(server.reference())
    assert f"{server.address} is too slow: " in message
    assert message.endswith("(4 attempts)")
    assert pulling.store.images() == []


# Without end


@pytest.mark.parametrize("path", ["manifests/latest", blob(noise("one"))])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "more than"),
        (flooding(OK, b"X-Header: value\r\n"), "does not speak HTTP: got more than 100 headers"),
        (flooding(OK, b"x" * 70_000), "does not speak HTTP: got more than 65536 bytes"),
        (flooding(b"x" * 70_000, b"x"), "does not speak HTTP"),
        (flooding(CHUNKED + b"0\r\n", b"X-Trailer: value\r\n"), "more than"),
        (flooding(CHUNKED + b"5;", b"x"), ""),
    ],
    ids=["interim answers", "headers", "header", "status", "trailers", "chunk size"],
)
def test_what_never_ends_is_not_read_for_ever(
    fault: Fault, said: str, path: str, client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    server.misbehave(path, fault)
    assert said in str(refusal(client, path))


async def test_a_layer_without_end_fails_the_pull_at_its_size(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    layer = noise("one")
    before = pulling.files()
    server.misbehave(blob(layer), endless)
    message = await pulling.refused(server.reference())
    assert message == f"layer {layer.digest}: body goes on after the manifest's 300000 bytes"
    assert pulling.files() == before


def test_a_small_answer_that_unpacks_to_a_large_one_is_not_unpacked_to_its_end(
    client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    bomb = gzip.compress(bytes(16 << 20))
    server.misbehave("manifests/latest", status(200, bomb, Content_Encoding="gzip"))
    assert "more than 8388608 bytes" in str(refusal(client, "manifests/latest"))


async def test_a_gigantic_configuration_is_refused_before_it_is_fetched(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    manifest = json.loads(server.content("manifests/latest"))
    manifest["config"]["size"] = LARGEST_CONFIG + 1
    server.add_manifest("latest", json.dumps(manifest).encode(), MANIFEST)
    message = await pulling.refused(server.reference())
    assert message == f"its config of {LARGEST_CONFIG + 1} bytes is above {LARGEST_CONFIG}"
    assert len(server.requests) == 1


# Deep


DEEP = b"[" * 1_000_000


@pytest.mark.parametrize("path", ["manifests/latest", "/token", "refusal", "config"])
async def test_json_that_is_nested_without_end_is_refused(
    path: str, server: MisbehavingRegistry, pulling: Pulling
) -> None:
    if path == "config":
        manifest = json.loads(server.content("manifests/latest"))
        manifest["config"] |= server.add_blob(DEEP, "") | {
            "mediaType": manifest["config"]["mediaType"]
        }
        server.add_manifest("latest", json.dumps(manifest).encode(), MANIFEST)
    elif path == "refusal":
        server.misbehave("manifests/latest", status(404, DEEP))
    elif path == "/token":
        server.authorization = "Bearer a-token"
        server.challenge = f'Bearer realm="http://{server.address}/token"'
        server.misbehave(path, status(200, DEEP))
    else:
        server.misbehave(path, status(200, DEEP))
    assert len(await pulling.refused(server.reference())) < 300
    assert pulling.files() == set()


# Astray


@pytest.mark.parametrize(
    "location",
    [
        "http://[",
        "http:///path",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:x/",
        "http://user:word@127.0.0.1:1/",
        "http://xn--\u00ff.example/",
        "http://a..b/",
        "http://" + "a" * 300 + "/",
        "\u00ff\u00fe",
    ],
)
def test_a_redirect_to_nowhere_is_a_failure_like_others(
    location: str, client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    server.misbehave("manifests/latest", redirect(location))
    failure = str(refusal(client, "manifests/latest"))
    assert len(failure) < 500
    assert "word" not in failure


@pytest.mark.parametrize(
    "challenge",
    [
        "",
        "Bearer",
        "Bearer realm",
        'Bearer realm=""',
        'Bearer realm="http://["',
        'Bearer realm="not a url"',
        'Bearer realm="file:///etc/passwd"',
        'Bearer realm="https://127.0.0.1:99999/"',
        'Bearer realm="https://' + "a" * 60_000 + '"',
        "Negotiate",
        "Basic",
    ],
)
def test_a_challenge_that_means_nothing_is_a_failure_like_others(
    challenge: str, client: MirroredRegistry, server: MisbehavingRegistry
) -> None:
    server.authorization, server.challenge = "Bearer a-token", challenge
    assert len(str(refusal(client, "manifests/latest"))) < 500


# Ranges


@pytest.mark.parametrize(
    "content_range",
    [
        "bytes 0-199999/300000",
        "bytes 100001-299999/300000",
        "bytes 99999-299999/300000",
        "bytes */300000",
        "bytes " + "9" * 5000 + "-9/9",
        "words 100000-299999/300000",
        "",
    ],
)
async def test_another_range_than_was_asked_for_is_not_taken_but_all_of_it(
    content_range: str, server: MisbehavingRegistry, pulling: Pulling
) -> None:
    layer = gzip_layer(noise("one").blob)
    server.add_image("latest", [layer])

    def wrong(exchange: Exchange) -> None:
        exchange.start(206, len(exchange.body) - 100_000, Content_Range=content_range)
        exchange.write(exchange.body[100_000:])

    server.misbehave(blob(layer), cut(100_000), wrong)
    await pulling.pull(server.reference())
    asked = [request.headers.get("Range") for request in server.requests_for(blob(layer))]
    assert asked == [None, "bytes=100000-", None]


async def test_a_range_where_all_was_asked_for_is_refused(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    layer = noise("one")
    server.misbehave(blob(layer), status(206, b"x" * 1000, Content_Range="bytes 5-1004/300000"))
    message = await pulling.refused(server.reference())
    assert message == (
        f"layer {layer.digest}: {server.address} answered with another range than asked for"
    )
    assert pulling.files() == set()


async def test_the_right_range_with_wrong_bytes_is_noticed_and_nothing_of_it_stays(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    layer = noise("one")

    def wrong(exchange: Exchange) -> None:
        exchange.start(206, 200_000, Content_Range="bytes 100000-299999/300000")
        exchange.write(bytes(200_000))

    server.misbehave(blob(layer), cut(100_000), wrong)
    message = await pulling.refused(server.reference())
    assert message.startswith(f"layer {layer.digest}: its digest is ")
    assert pulling.files() == set()
    await pulling.pull(server.reference())


async def test_a_part_where_all_was_asked_for_is_continued(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    layer = noise("one")

    def part(exchange: Exchange) -> None:
        exchange.start(206, 1000, Content_Range="bytes 0-999/300000")
        exchange.write(exchange.body[:1000])

    server.misbehave(blob(layer), part)
    await pulling.pull(server.reference())
    assert server.requests_for(blob(layer))[-1].headers["Range"] == "bytes=1000-"


def test_limits_that_no_test_shortens_are_those_that_are_promised() -> None:
    promised = {"connect_s": 10, "silence_s": 30, "window_s": 60, "window_bytes": 65536}
    assert attrs.asdict(RegistrySettings().limits).items() >= promised.items()
