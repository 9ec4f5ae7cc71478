"""Pulls through a real proxy, as `proxy` and `no_proxy` ask for it."""

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import trio

from agent.images.registries import RegistrySettings
from initramfs.local_registry import LocalRegistry, local_registry
from protocol.values import RegistryAuth
from tests.agent.images.pulling import Pulling, noise
from tests.support.certificates import PrivateCa
from tests.support.images import Images
from tests.support.layout import Layout, gzip_layer
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry, silent
from tests.support.proxy import Proxy, http_proxy
from tests.support.registry import push

AUTH = RegistryAuth("user", "correct horse")


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with http_proxy() as server:
        yield server


@pytest.fixture
def secure(ca: PrivateCa) -> Iterator[MisbehavingRegistry]:
    context = ca.issue("127.0.0.1", "registry.example").context()
    with misbehaving_registry(tls=context) as server:
        server.add_image("latest", [noise("one")])
        yield server


def pulling_with(directory: Path, **settings: object) -> Pulling:
    return Pulling(directory / "storage", attrs.evolve(RegistrySettings(), **settings))


async def test_plain_http_is_forwarded(
    tmp_path: Path, proxy: Proxy, registry: LocalRegistry, images: Images
) -> None:
    pulling = pulling_with(tmp_path, insecure=frozenset({registry.address}))
    image = await pulling.pull(images.busybox.reference, proxy=f"http://{proxy.address}")
    assert image.config_digest == images.busybox.config_digest
    assert len(proxy.requests) == 2 + len(images.busybox.layers)
    assert proxy.requests[0].startswith(f"GET http://{registry.address}/v2/busybox/manifests/")


async def test_https_passes_through_a_tunnel_that_the_proxy_cannot_look_into(
    tmp_path: Path, proxy: Proxy, ca: PrivateCa, secure: MisbehavingRegistry
) -> None:
    """By a name that only the proxy can resolve; with credentials, which are the registry's."""
    port = secure.address.rpartition(":")[2]
    name = f"registry.example:{port}"
    proxy.resolve[name] = secure.address
    secure.authorization = "Basic dXNlcjpjb3JyZWN0IGhvcnNl"
    secure.challenge = 'Basic realm="r"'
    pulling = pulling_with(tmp_path, ca_files={name: ca.path})
    await pulling.pull(f"{name}/test/image", proxy=proxy.address, auth=AUTH)
    assert set(proxy.requests) == {f"CONNECT {name}"}
    assert secure.requests


async def test_docker_io_is_asked_at_its_real_host_for_what_is_in_library(
    tmp_path: Path, proxy: Proxy, ca: PrivateCa
) -> None:
    """A real registry in the place of docker.io's, which only the proxy knows a way to."""
    host = "registry-1.docker.io"
    served = ca.issue(host)
    layout = Layout(tmp_path / "layout")
    layout.tag("1.0", layout.add_manifest([gzip_layer(b"not a tar")], {}))
    with (
        local_registry() as plain,
        local_registry(
            certificate=served.certificate, key=served.key, storage_dir=plain.storage_dir
        ) as hub,
    ):
        push(plain, layout.directory, "1.0", "library/busybox")
        proxy.resolve[f"{host}:443"] = hub.address
        pulling = pulling_with(tmp_path, ca_files={"docker.io": ca.path})
        image = await pulling.pull("busybox:1.0", proxy=proxy.address)
        assert image.reference == "docker.io/library/busybox:1.0"
        assert set(proxy.requests) == {f"CONNECT {host}:443"}
        assert "GET /v2/library/busybox/manifests/1.0 HTTP/1.1" in hub.access_log.read_text()


async def test_a_proxy_gets_its_own_credentials_and_the_registry_none_of_them(
    tmp_path: Path, proxy: Proxy, ca: PrivateCa, secure: MisbehavingRegistry
) -> None:
    proxy.credentials = "agent:pass word"
    pulling = pulling_with(tmp_path, ca_files={secure.address: ca.path})
    await pulling.pull(secure.reference(), proxy=f"http://agent:pass%20word@{proxy.address}")
    assert not any("Proxy-Authorization" in request.headers for request in secure.requests)


async def test_a_proxy_that_refuses_is_told_without_its_password(
    tmp_path: Path, proxy: Proxy, ca: PrivateCa, secure: MisbehavingRegistry
) -> None:
    proxy.credentials = "agent:another"
    pulling = pulling_with(tmp_path, ca_files={secure.address: ca.path})
    message = await pulling.refused(
        secure.reference(), proxy=f"http://agent:geheim@{proxy.address}"
    )
    assert message == "the proxy answered 407 Proxy Authentication Required"
    assert len(proxy.requests) == 1


async def test_a_proxy_that_cannot_reach_the_registry_is_asked_again(
    tmp_path: Path, proxy: Proxy, ca: PrivateCa
) -> None:
    pulling = pulling_with(tmp_path)
    message = await pulling.refused("127.0.0.1:1/test/image", proxy=f"http://{proxy.address}")
    assert message == "the proxy answered 503 Service Unavailable (4 attempts)"


async def test_a_proxy_may_be_spoken_to_by_https(
    tmp_path: Path, ca: PrivateCa, secure: MisbehavingRegistry
) -> None:
    with http_proxy(ca.issue("127.0.0.1").context()) as proxy:
        pulling = pulling_with(tmp_path, ca_files={secure.address: ca.path})
        url = f"https://{proxy.address}"
        message = await pulling.refused(secure.reference(), proxy=url)
        assert "is not trusted" in message
        trusted = dict.fromkeys((secure.address, proxy.address), ca.path)
        pulling = pulling_with(tmp_path, ca_files=trusted)
        await pulling.pull(secure.reference(), proxy=url)
        assert f"CONNECT {secure.address}" in proxy.requests


async def test_a_pull_through_an_https_proxy_is_cancelled_at_once(
    tmp_path: Path, ca: PrivateCa, secure: MisbehavingRegistry
) -> None:
    secure.misbehave("manifests/latest", silent)
    with http_proxy(ca.issue("127.0.0.1").context()) as proxy:
        trusted = dict.fromkeys((secure.address, proxy.address), ca.path)
        pulling = pulling_with(tmp_path, ca_files=trusted)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:

                async def pull() -> None:
                    await pulling.pull(secure.reference(), proxy=f"https://{proxy.address}")

                nursery.start_soon(pull)
                assert await trio.to_thread.run_sync(secure.stalled.wait, 10)
                nursery.cancel_scope.cancel()


@pytest.mark.parametrize("no_proxy", ["127.0.0.1", "127.0.0.0/8", "x.example, *"])
async def test_hosts_that_no_proxy_lists_are_reached_directly(
    no_proxy: str, tmp_path: Path, proxy: Proxy, registry: LocalRegistry, images: Images
) -> None:
    pulling = pulling_with(tmp_path, insecure=frozenset({registry.address}))
    how = {"proxy": "http://127.0.0.1:1", "no_proxy": no_proxy}
    await pulling.pull(images.busybox.reference, **how)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://user:geheim@",
        "http://user:geheim@host:99999",
        "http://user:ge%zzheim@127.0.0.1:1",
        "http://user:geheim@[::1",
        "socks5://user:geheim@127.0.0.1:1",
        "ftp://user:geheim@127.0.0.1:1",
        "http://user:geheim@a..b",
        "nonsense geheim",
    ],
)
async def test_a_proxy_that_means_nothing_is_a_failure_without_its_password(
    url: str, tmp_path: Path, registry: LocalRegistry, images: Images
) -> None:
    pulling = pulling_with(tmp_path, insecure=frozenset({registry.address}))
    message = await pulling.refused(images.busybox.reference, proxy=url)
    assert "proxy" in message
    assert "heim" not in message


async def test_a_mirrors_own_proxy_takes_the_place_of_the_pulls(
    tmp_path: Path, proxy: Proxy, registry: LocalRegistry, images: Images
) -> None:
    path = tmp_path / "certs.d" / "_default" / "hosts.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f'[host."http://{registry.address}"]\nproxy = "http://{proxy.address}"\n')
    pulling = pulling_with(tmp_path, hosts_dir=tmp_path / "certs.d")
    name = images.busybox.reference.partition("/")[2]
    how = {"proxy": "http://127.0.0.1:1", "no_proxy": "*"}
    await pulling.pull(f"registry.invalid/{name}", **how)
    assert proxy.requests
