"""The registry's side of a pull: what is asked, what is believed, what is said when it fails."""

import socket
import threading
from collections.abc import Iterator

import pytest

from agent.images.manifest import Descriptor
from agent.images.mirrored_registry import MirroredRegistry
from agent.images.reference import parse_reference
from agent.images.registries import RegistryError, RegistrySettings
from tests.agent.images.asking import bearer, client_of, read
from tests.support.layout import MANIFEST, gzip_layer
from tests.support.misbehaving_registry import (
    Fault,
    MisbehavingRegistry,
    endless,
    flipped,
    misbehaving_registry,
    redirect,
    silent,
    stalled,
    status,
)
from tests.support.trees import archive, numbered


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        registry.add_image("latest", [gzip_layer(archive(numbered(1)))])
        yield registry


# What is asked


def test_docker_io_is_asked_at_its_real_host(server: MisbehavingRegistry) -> None:
    with (
        MirroredRegistry(
            parse_reference("alpine"), RegistrySettings(), None, proxy=f"http://{server.address}"
        ) as client,
        pytest.raises(RegistryError),
    ):
        client.get_manifest("latest")
    assert [request.method for request in server.requests] == ["CONNECT"]
    assert server.requests[0].path == "registry-1.docker.io:443"


def test_a_proxy_is_used_except_for_the_hosts_that_no_proxy_lists(
    server: MisbehavingRegistry,
) -> None:
    with misbehaving_registry() as proxy:
        settings = {"proxy": f"http://{proxy.address}"}
        proxy.misbehave(f"http://{server.address}/v2/test/image/manifests/latest", status(404))
        with client_of(server, **settings) as client, pytest.raises(RegistryError, match="404"):
            client.get_manifest("latest")
        assert len(proxy.requests) == 1
        with client_of(server, **settings, no_proxy="x.example, 127.0.0.1") as client:
            client.get_manifest("latest")
        assert len(proxy.requests) == 1


def test_a_proxy_that_does_not_answer_is_named_without_its_password(
    server: MisbehavingRegistry,
) -> None:
    with (
        client_of(server, proxy="http://user:secret@127.0.0.1:1") as client,
        pytest.raises(RegistryError, match="connection to the proxy: Connection refused") as failed,
    ):
        client.get_manifest("latest")
    assert "secret" not in str(failed.value)


def test_the_environments_proxies_are_not_used(
    server: MisbehavingRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with client_of(server) as client:
        client.get_manifest("latest")


# What is said


@pytest.mark.parametrize(
    ("code", "transient"),
    [(400, False), (403, False), (404, False), (408, True), (429, True), (500, True), (503, True)],
)
def test_a_refusal_is_told_in_the_registrys_own_words(
    code: int, transient: bool, server: MisbehavingRegistry
) -> None:
    words = {"errors": [{"code": "SOME_CODE", "message": "two\n lines\x07", "detail": {}}]}
    server.misbehave("manifests/latest", status(code, words))
    with client_of(server) as client, pytest.raises(RegistryError) as failed:
        client.get_manifest("latest")
    assert f"{server.address} answered {code} " in str(failed.value)
    assert str(failed.value).endswith(": SOME_CODE: two lines")
    assert failed.value.transient is transient


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("soon", None), ("-5", None)],
)
def test_the_time_that_a_registry_asks_to_wait_is_passed_on(
    value: str, seconds: float | None, server: MisbehavingRegistry
) -> None:
    server.misbehave("manifests/latest", status(429, Retry_After=value))
    with client_of(server) as client, pytest.raises(RegistryError) as failed:
        client.get_manifest("latest")
    assert failed.value.retry_after_s == seconds


def test_a_registry_that_is_not_there_is_told_from_one_that_refuses() -> None:
    with misbehaving_registry() as gone:
        pass
    with client_of(gone) as client:
        with pytest.raises(RegistryError, match=f"{gone.address}: Connection refused") as failed:
            client.get_manifest("latest")
        assert failed.value.unreachable
        assert failed.value.transient


def test_a_registry_that_hangs_up_before_tls_is_there_may_be_asked_again() -> None:
    """As load balancers do while what is behind them restarts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.close()

        serving = threading.Thread(target=hang_up)
        serving.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        reference = parse_reference(f"{address}/image")
        with (
            MirroredRegistry(reference, RegistrySettings(), None) as client,
            pytest.raises(RegistryError, match=f"{address} hung up without an answer") as failed,
        ):
            client.get_manifest("latest")
        serving.join()
    assert failed.value.transient


def test_a_host_without_an_address_is_told() -> None:
    reference = parse_reference("registry.invalid/x")
    with (
        MirroredRegistry(reference, RegistrySettings(), None) as client,
        pytest.raises(RegistryError, match=r"cannot resolve registry\.invalid: ") as failed,
    ):
        client.get_manifest("latest")
    assert failed.value.unreachable


def test_redirects_in_a_circle_are_not_followed_for_ever(server: MisbehavingRegistry) -> None:
    path = "manifests/latest"
    again = redirect(f"http://{server.address}/v2/test/image/{path}")
    server.misbehave(path, *[again] * 20)
    with client_of(server) as client, pytest.raises(RegistryError, match="redirects without end"):
        client.get_manifest("latest")
    assert len(server.requests) == 11


# What is believed


def test_a_manifest_that_is_not_what_was_asked_for_is_refused(server: MisbehavingRegistry) -> None:
    digest = server.add_manifest("other", b'{"schemaVersion":2}', MANIFEST)
    server.misbehave(f"manifests/{digest}", flipped)
    with (
        client_of(server) as client,
        pytest.raises(RegistryError, match=f"digest is sha256:.*, not {digest}"),
    ):
        client.get_manifest(digest)


def test_a_manifest_that_is_not_what_the_registry_says_is_refused(
    server: MisbehavingRegistry,
) -> None:
    promised = "sha256:" + "1" * 64
    server.misbehave("manifests/latest", status(200, b"{}", Docker_Content_Digest=promised))
    with client_of(server) as client, pytest.raises(RegistryError, match=f"not {promised}"):
        client.get_manifest("latest")


def test_a_config_of_another_size_or_digest_is_refused(server: MisbehavingRegistry) -> None:
    found = server.add_blob(b"{}", "")
    digest = found["digest"]
    with client_of(server) as client:
        for size, why in ((3, "ended after 2 of 3 bytes"), (1, "goes on after")):
            with pytest.raises(RegistryError, match=why):
                client.get_document(Descriptor("", digest, size))
        server.misbehave(f"blobs/{digest}", flipped)
        with pytest.raises(RegistryError, match="the digest of what came for"):
            client.get_document(Descriptor("", digest, 2))
        assert client.get_document(Descriptor("", digest, 2)) == b"{}"


@pytest.mark.parametrize("path", ["manifests/latest", "/token"])
def test_a_document_without_end_is_not_read_to_its_end(
    path: str, server: MisbehavingRegistry
) -> None:
    if path == "/token":
        server.authorization, server.challenge = "Bearer a-token", bearer(server.address)
    server.misbehave(path, endless)
    with client_of(server) as client, pytest.raises(RegistryError, match="more than"):
        client.get_manifest("latest")


def test_a_manifest_larger_than_any_registry_takes_is_refused(server: MisbehavingRegistry) -> None:
    server.add_manifest("large", b" " * ((4 << 20) + 1), MANIFEST)
    with client_of(server) as client, pytest.raises(RegistryError, match="more than 4194304 bytes"):
        client.get_manifest("large")


# Blobs


def test_a_blob_is_read_from_anywhere(server: MisbehavingRegistry) -> None:
    data = bytes(range(256)) * 5000
    digest = server.add_blob(data, "")["digest"]
    with client_of(server) as client:
        assert read(client, digest) == data
        assert read(client, digest, 1_000_000) == data[1_000_000:]
        with client.open_blob(digest, len(data), len(data)) as body:
            assert body.offset == 0


def test_requests_after_each_other_share_a_connection(server: MisbehavingRegistry) -> None:
    digest = server.add_blob(b"x" * 100_000, "")["digest"]
    with client_of(server) as client:
        for _ in range(3):
            client.get_manifest("latest")
            read(client, digest)
    assert len({request.client for request in server.requests}) == 1


@pytest.mark.parametrize("fault", [silent, stalled(5)])
def test_what_waits_for_a_silent_registry_ends_at_once_when_aborted(
    fault: Fault, server: MisbehavingRegistry
) -> None:
    digest = server.add_blob(b"x" * 100, "")["digest"]
    server.misbehave(f"blobs/{digest}", fault)
    failures: list[RegistryError] = []
    received: list[bytes] = []

    def wait(client: MirroredRegistry) -> None:
        try:
            received.append(read(client, digest))
        except RegistryError as error:
            failures.append(error)

    with client_of(server) as client:
        waiting = threading.Thread(target=wait, args=(client,))
        waiting.start()
        assert server.stalled.wait(10)
        client.abort()
        waiting.join(5)
        assert not waiting.is_alive()
        assert failures or received == [b"x" * 5]
        with pytest.raises(RegistryError, match=r"abort|cancelled|hung up"):
            client.get_manifest("latest")
