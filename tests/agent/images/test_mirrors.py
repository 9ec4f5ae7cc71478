"""Pulls by way of mirrors: who is asked for what, and what is done about those that fail."""

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from agent.images.registries import RegistrySettings, TimeLimits
from initramfs.local_registry import LocalRegistry, local_registry
from protocol.values import RegistryAuth
from tests.agent.images.pulling import Pulling, blob, noise
from tests.support.certificates import PrivateCa
from tests.support.images import Images
from tests.support.misbehaving_registry import (
    Fault,
    MisbehavingRegistry,
    cut,
    flipped,
    longer,
    misbehaving_registry,
    redirect,
    silent,
    stalled,
    status,
)

AUTH = RegistryAuth("user", "correct horse")


@attrs.frozen
class Fleet:
    """A registry with two mirrors, of which the second and the registry have an image."""

    registry: MisbehavingRegistry
    first: MisbehavingRegistry
    second: MisbehavingRegistry
    hosts_dir: Path
    pulling: Pulling

    def configure(self, text: str, registry: str | None = None) -> None:
        """Write hosts.toml; `{first}`, `{second}` and `{registry}` are their addresses."""
        path = self.hosts_dir / (registry or self.registry.address) / "hosts.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in ("first", "second", "registry"):
            text = text.replace(f"{{{name}}}", getattr(self, name).address)
        path.write_text(text)


BOTH = """
[host."http://{first}"]
[host."http://{second}"]
"""
ONE = '[host."http://{second}"]'


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with (
        misbehaving_registry() as registry,
        misbehaving_registry() as first,
        misbehaving_registry() as second,
    ):
        hosts_dir = tmp_path / "certs.d"
        settings = RegistrySettings(
            insecure=frozenset({registry.address}),
            hosts_dir=hosts_dir,
            limits=TimeLimits(silence_s=1),
        )
        fleet = Fleet(registry, first, second, hosts_dir, Pulling(tmp_path / "storage", settings))
        layers = [noise("one"), noise("two")]
        for server in (registry, second):
            server.add_image("latest", layers)
        fleet.configure(BOTH)
        yield fleet


def methods(server: MisbehavingRegistry) -> list[tuple[str, str]]:
    return [(request.method, request.path.partition("/")[0]) for request in server.requests]


async def test_mirrors_are_asked_in_order_and_the_registry_is_not_where_one_has_it_all(
    fleet: Fleet,
) -> None:
    image = await fleet.pulling.pull(fleet.registry.reference())
    assert image.reference == fleet.registry.reference()
    assert len(fleet.first.requests) == 4  # manifest, config and two layers
    assert len(fleet.second.requests) == 4
    assert not fleet.registry.requests
    assert await fleet.pulling.pull(image.reference) == image
    assert not fleet.registry.requests


async def test_a_mirror_is_told_whose_image_it_is_to_be(fleet: Fleet) -> None:
    fleet.second.forget_all()
    await fleet.pulling.pull(fleet.registry.reference())
    assert {request.ns for request in fleet.second.requests} == {fleet.registry.address}
    assert {request.ns for request in fleet.registry.requests} == {None}


async def test_the_default_mirror_serves_docker_io(fleet: Fleet) -> None:
    """Never asked at docker.io, which this machine has no way to."""
    fleet.configure(ONE, "_default")
    image = await fleet.pulling.pull("docker.io/test/image")
    assert image.reference == "docker.io/test/image:latest"
    assert {request.ns for request in fleet.second.requests} == {"docker.io"}


async def test_a_pull_through_cache_that_is_a_real_registry_serves(
    tmp_path: Path, registry: LocalRegistry, images: Images
) -> None:
    with local_registry(upstream=f"http://{registry.address}") as cache:
        path = tmp_path / "certs.d" / "_default" / "hosts.toml"
        path.parent.mkdir(parents=True)
        path.write_text(f'[host."http://{cache.address}"]')
        settings = RegistrySettings(hosts_dir=tmp_path / "certs.d")
        pulling = Pulling(tmp_path / "storage", settings)
        name = images.multi_platform.reference.partition("/")[2]
        image = await pulling.pull(f"registry.invalid/{name}")
        assert image.config_digest == images.multi_platform.config_digest
        assert '"innkeep"' in cache.access_log.read_text()


@pytest.mark.parametrize(
    "fault",
    [
        status(500),
        status(403),
        status(429, Retry_After="3600"),
        cut(10),
        flipped,
        silent,
        redirect("http://127.0.0.1:1/"),
        status(200, b"<html>Welcome to our network"),
    ],
    ids=["500", "403", "429", "cut", "flipped", "silent", "redirect", "page"],
)
async def test_the_registry_itself_is_asked_at_once_where_a_mirror_fails(
    fault: Fault, fleet: Fleet
) -> None:
    fleet.configure(ONE)
    fleet.second.misbehave("manifests/latest", fault)
    with trio.fail_after(8):
        await fleet.pulling.pull(fleet.registry.reference())
    assert ("GET", "manifests") in methods(fleet.registry)


async def test_a_mirror_that_does_not_listen_costs_nothing(fleet: Fleet) -> None:
    with misbehaving_registry() as gone:
        pass
    fleet.configure(f'[host."http://{gone.address}"]')
    with trio.fail_after(5):
        await fleet.pulling.pull(fleet.registry.reference())


async def test_a_mirror_that_keeps_a_pull_waiting_is_not_asked_again(fleet: Fleet) -> None:
    fleet.configure(ONE)
    fleet.second.misbehave("manifests/latest", silent)
    await fleet.pulling.pull(fleet.registry.reference())
    assert len(fleet.second.requests) == 1


async def test_a_mirror_that_lacks_one_blob_still_gives_the_other(fleet: Fleet) -> None:
    fleet.configure(ONE)
    fleet.second.misbehave(blob(noise("one")), status(404))
    await fleet.pulling.pull(fleet.registry.reference())
    assert methods(fleet.registry) == [("GET", "blobs")]


async def test_a_blob_that_a_mirror_breaks_off_is_continued_by_the_registry(
    fleet: Fleet,
) -> None:
    """At once, and without counting as one of the registry's attempts."""
    fleet.configure(ONE)
    layer = noise("one")
    fleet.second.misbehave(blob(layer), cut(100_000))
    fleet.registry.misbehave(blob(layer), *[status(503, Retry_After="0")] * 3)
    await fleet.pulling.pull(fleet.registry.reference())
    assert len(fleet.second.requests_for(blob(layer))) == 1
    asked = fleet.registry.requests_for(blob(layer))
    assert [request.headers.get("Range") for request in asked] == ["bytes=100000-"] * 4


async def test_a_blob_that_a_mirror_stops_sending_is_continued_by_the_registry(
    fleet: Fleet,
) -> None:
    fleet.configure(ONE)
    layer = noise("one")
    fleet.second.misbehave(blob(layer), stalled(100_000))
    with trio.fail_after(10):
        await fleet.pulling.pull(fleet.registry.reference())
    [asked] = fleet.registry.requests_for(blob(layer))
    assert asked.headers["Range"] == "bytes=100000-"


@pytest.mark.parametrize("fault", [flipped, longer])
async def test_a_blob_that_a_mirror_falsifies_comes_from_the_registry(
    fault: Fault, fleet: Fleet
) -> None:
    fleet.configure(ONE)
    layer = noise("two")
    fleet.second.misbehave(blob(layer), *[fault] * 2)
    image = await fleet.pulling.pull(fleet.registry.reference())
    assert fleet.pulling.store.blobs.is_intact(layer.digest)
    assert image.info().layer_count == 2
    assert len(fleet.second.requests_for(blob(layer))) == 1
    assert len(fleet.registry.requests_for(blob(layer))) == 1


async def test_a_falsified_blob_that_the_registry_has_no_better_fails_the_pull(
    fleet: Fleet,
) -> None:
    fleet.configure(ONE)
    layer = noise("two")
    for server in (fleet.second, fleet.registry):
        server.misbehave(blob(layer), flipped)
    message = await fleet.pulling.refused(fleet.registry.reference())
    assert message.startswith(f"layer {layer.digest}: its digest is ")
    assert not [path for path in fleet.pulling.files() if layer.digest[7:] in path]


async def test_a_tag_is_resolved_only_by_a_mirror_that_may(fleet: Fleet) -> None:
    fleet.configure('[host."http://{second}"]\ncapabilities = ["pull"]')
    fleet.second.add_image("latest", [noise("another image")])
    image = await fleet.pulling.pull(fleet.registry.reference())
    assert image.info().layers == (noise("one").digest, noise("two").digest)
    assert methods(fleet.registry) == [("GET", "manifests")]
    assert {kind for _, kind in methods(fleet.second)} == {"blobs"}
    assert await fleet.pulling.pull(image.reference) == image
    assert methods(fleet.registry)[1:] == [("HEAD", "manifests")]


async def test_a_digest_is_pulled_from_a_mirror_that_may_not_resolve_tags(fleet: Fleet) -> None:
    fleet.configure('[host."http://{second}"]\ncapabilities = ["pull"]')
    digest = fleet.registry.add_image("latest", [noise("one"), noise("two")])
    await fleet.pulling.pull(f"{fleet.registry.reference().rpartition(':')[0]}@{digest}")
    assert not fleet.registry.requests


async def test_nobody_to_resolve_a_tag_is_told(fleet: Fleet) -> None:
    fleet.configure('capabilities = ["pull"]')
    message = await fleet.pulling.refused(fleet.registry.reference())
    assert message.endswith("has the capability 'resolve', which a tag takes")


async def test_a_server_takes_the_registrys_place_and_it_is_never_asked(fleet: Fleet) -> None:
    fleet.configure('server = "http://{first}"')
    assert "404" in await fleet.pulling.refused(fleet.registry.reference())
    assert not fleet.registry.requests


async def test_what_mirrors_said_is_told_where_the_registry_fails_too(fleet: Fleet) -> None:
    fleet.registry.misbehave("manifests/latest", status(403))
    fleet.second.misbehave("manifests/latest", status(401))
    message = await fleet.pulling.refused(fleet.registry.reference())
    first, second = fleet.first.address, fleet.second.address
    assert message.startswith(f"{fleet.registry.address} answered 403 Forbidden (mirrors: {first}")
    assert f"{first} answered 404 Not Found: MANIFEST_UNKNOWN: not here; {second}: " in message


async def test_a_mirror_is_asked_again_where_the_registry_is_out_of_reach(fleet: Fleet) -> None:
    fleet.configure(ONE, "registry.invalid")
    fleet.second.misbehave("manifests/latest", status(503))
    await fleet.pulling.pull("registry.invalid/test/image")


@pytest.mark.parametrize("challenge", ['Basic realm="r"', "bearer"])
async def test_credentials_are_never_sent_to_a_mirror(challenge: str, fleet: Fleet) -> None:
    fleet.configure(ONE)
    for server in (fleet.registry, fleet.second):
        server.authorization = "Bearer a-token"
        server.challenge = f'Bearer realm="http://{server.address}/token"'
    if challenge != "bearer":
        fleet.registry.authorization = "Basic dXNlcjpjb3JyZWN0IGhvcnNl"
        fleet.registry.challenge = fleet.second.challenge = challenge
    await fleet.pulling.pull(fleet.registry.reference(), auth=AUTH)
    sent = [request.headers.get("Authorization", "") for request in fleet.second.requests]
    assert fleet.second.requests
    assert not [value for value in sent if value.startswith("Basic")]
    if challenge == "bearer":
        # Its own token, which anybody gets.
        assert "Bearer a-token" in sent
        assert not fleet.registry.requests
    else:
        assert any("Basic" in str(request.headers) for request in fleet.registry.requests)


async def test_credentials_go_to_the_registry_also_where_its_file_names_it(fleet: Fleet) -> None:
    fleet.configure('server = "http://{registry}"')
    fleet.registry.authorization = "Basic dXNlcjpjb3JyZWN0IGhvcnNl"
    fleet.registry.challenge = 'Basic realm="r"'
    await fleet.pulling.pull(fleet.registry.reference(), auth=AUTH)


async def test_a_mirrors_headers_are_for_it_alone(fleet: Fleet) -> None:
    fleet.configure(
        """
        [host."http://{second}"]
          [host."http://{second}".header]
            X-Tenant = "ours"
            Authorization = "Basic bWlycm9y"
        """
    )
    layer = noise("one")
    elsewhere = f"http://{fleet.first.address}/v2/test/image/{blob(layer)}"
    fleet.first.add_blob(layer.blob, "")
    fleet.second.misbehave(blob(layer), redirect(elsewhere))
    await fleet.pulling.pull(fleet.registry.reference())
    assert not fleet.registry.requests
    for request in fleet.second.requests:
        assert request.headers["X-Tenant"] == "ours"
        assert request.headers["Authorization"] == "Basic bWlycm9y"
    [redirected] = fleet.first.requests
    assert not {"X-Tenant", "Authorization"} & redirected.headers.keys()


async def test_a_bad_file_fails_the_pull_that_needs_it_and_no_other(fleet: Fleet) -> None:
    fleet.configure("capabilites = []")
    message = await fleet.pulling.refused(fleet.registry.reference())
    path = fleet.hosts_dir / fleet.registry.address / "hosts.toml"
    assert message.startswith(f"{path}: unknown key 'capabilites'")
    fleet.configure(ONE, "other.example")
    await fleet.pulling.pull("other.example/test/image")
    fleet.configure("")
    await fleet.pulling.pull(fleet.registry.reference())


async def test_an_image_of_the_store_is_taken_where_neither_mirror_nor_registry_answers(
    fleet: Fleet,
) -> None:
    fleet.configure(ONE)
    image = await fleet.pulling.pull(fleet.registry.reference())
    for server in (fleet.second, fleet.registry):
        server.misbehave("manifests/latest", *[silent] * 2)
    fleet.pulling.frames.clear()
    with trio.fail_after(4):
        assert await fleet.pulling.pull(image.reference) == image
    assert fleet.pulling.frames[-1][1].message.endswith("taking the image in the store")


# TLS


@pytest.fixture
def secure(ca: PrivateCa) -> Iterator[MisbehavingRegistry]:
    context = ca.issue("127.0.0.1").context()
    with misbehaving_registry(tls=context) as server:
        server.add_image("latest", [noise("one")])
        yield server


async def test_a_mirror_with_a_private_ca_is_trusted_by_its_entry_alone(
    fleet: Fleet, secure: MisbehavingRegistry, ca: PrivateCa
) -> None:
    host = f'[host."https://{secure.address}"]\n'
    path = fleet.hosts_dir / fleet.registry.address / "ca.pem"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ca.path.read_bytes())
    fleet.registry.forget_all()
    fleet.configure(host)
    message = await fleet.pulling.refused(fleet.registry.reference())
    assert f"{secure.address} is not trusted: " in message
    fleet.configure(host + 'ca = "ca.pem"')
    await fleet.pulling.pull(fleet.registry.reference())


async def test_a_mirror_may_be_trusted_without_verification(
    fleet: Fleet, secure: MisbehavingRegistry
) -> None:
    fleet.configure(f'[host."https://{secure.address}"]\nskip_verify = true')
    fleet.registry.forget_all()
    await fleet.pulling.pull(fleet.registry.reference())
    # What it leads to is not.
    fleet.registry.add_image("other", [noise("two")])
    context = PrivateCa(fleet.hosts_dir).issue("127.0.0.1").context()
    with misbehaving_registry(tls=context) as untrusted:
        target = f"https://{untrusted.address}/v2/test/image/manifests/latest"
        secure.misbehave("manifests/other", redirect(target))
        await fleet.pulling.pull(fleet.registry.reference("other"))
        assert not untrusted.requests


async def test_a_mirror_that_wants_a_certificate_gets_the_clients(
    fleet: Fleet, ca: PrivateCa
) -> None:
    client = ca.issue("client.example")
    context = ca.issue("127.0.0.1").context()
    context.verify_mode = context.verify_mode.CERT_REQUIRED
    context.load_verify_locations(ca.path)
    fleet.registry.forget_all()
    with misbehaving_registry(tls=context) as strict:
        strict.add_image("latest", [noise("one")])
        host = f'[host."https://{strict.address}"]\nca = "{ca.path}"\n'
        fleet.configure(host)
        assert strict.address in await fleet.pulling.refused(fleet.registry.reference())
        fleet.configure(host + f'client = [["{client.certificate}", "{client.key}"]]')
        await fleet.pulling.pull(fleet.registry.reference())
        fleet.configure(host + f'client = "{client.key}"')
        message = await fleet.pulling.refused(fleet.registry.reference("other"))
        assert f"client certificate {client.key} for {strict.address}: " in message
