"""Who gets a pull's credentials, and what comes of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.images.registries import RegistryError
from tests.agent.images.asking import BASIC, bearer, client_of, read
from tests.support.layout import gzip_layer
from tests.support.misbehaving_registry import (
    MisbehavingRegistry,
    misbehaving_registry,
    redirect,
    status,
)
from tests.support.private_registries import AUTH
from tests.support.trees import archive, numbered


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        registry.add_image("latest", [gzip_layer(archive(numbered(1)))])
        yield registry


def test_a_token_is_got_for_anybody_where_the_registry_wants_one(
    server: MisbehavingRegistry,
) -> None:
    server.authorization = "Bearer a-token"
    server.challenge = bearer(server.address)
    with client_of(server) as client:
        client.get_manifest("latest")
        client.get_manifest("latest")
    paths = [request.path for request in server.requests]
    assert paths == [
        "manifests/latest",
        "/token?service=the+service&scope=repository%3Atest%2Fimage%3Apull",
        "manifests/latest",
        "manifests/latest",
    ]
    assert "Authorization" not in server.requests[1].headers


def test_an_expired_token_is_replaced(server: MisbehavingRegistry) -> None:
    server.authorization, server.token = "Bearer first", "first"
    server.challenge = bearer(server.address)
    with client_of(server, auth=AUTH) as client:
        client.get_manifest("latest")
        server.authorization, server.token = "Bearer second", "second"
        client.get_manifest("latest")
    asked = [request for request in server.requests if request.path.startswith("/token")]
    assert len(asked) == 2
    assert {request.headers["Authorization"] for request in asked} == {BASIC}


def test_credentials_are_given_to_a_registry_that_asks_for_them(
    server: MisbehavingRegistry,
) -> None:
    server.authorization, server.challenge = BASIC, 'Basic realm="registry"'
    with client_of(server, auth=AUTH) as client:
        client.get_manifest("latest")
    assert "Authorization" not in server.requests[0].headers


def test_credentials_of_the_agents_own_home_are_not_used(
    server: MisbehavingRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = server.address
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password geheim\n")
    (tmp_path / ".netrc").chmod(0o600)
    (tmp_path / ".docker").mkdir()
    auths = {"auths": {host: {"auth": "dXNlcjpnZWhlaW0="}}}
    (tmp_path / ".docker" / "config.json").write_text(json.dumps(auths))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ORAS_USER", "user")
    monkeypatch.setenv("ORAS_PASS", "geheim")
    server.authorization, server.challenge = BASIC, 'Basic realm="registry"'
    with client_of(server) as client, pytest.raises(RegistryError, match="it wants credentials"):
        client.get_manifest("latest")
    assert all("Authorization" not in request.headers for request in server.requests)


def test_credentials_are_not_given_to_a_redirects_target(server: MisbehavingRegistry) -> None:
    server.authorization, server.challenge = BASIC, 'Basic realm="registry"'
    with misbehaving_registry() as elsewhere, client_of(server, auth=AUTH) as client:
        digest = elsewhere.add_blob(b"content", "")["digest"]
        client.get_manifest("latest")
        target = f"http://{elsewhere.address}/v2/test/image/blobs/{digest}"
        server.authorization = None
        server.misbehave(f"blobs/{digest}", redirect(target), redirect(target))
        assert read(client, digest) == b"content"
        # Not even where it asks for them.
        elsewhere.authorization, elsewhere.challenge = BASIC, 'Basic realm="elsewhere"'
        with pytest.raises(RegistryError, match="401"):
            read(client, digest)
    assert server.requests[-1].headers["Authorization"] == BASIC
    assert all("Authorization" not in request.headers for request in elsewhere.requests)


def test_credentials_are_not_sent_over_plain_http_to_a_realm_elsewhere(
    server: MisbehavingRegistry,
) -> None:
    server.authorization = "Bearer a-token"
    server.challenge = bearer("localhost:1")
    with (
        client_of(server, auth=AUTH) as client,
        pytest.raises(RegistryError, match="localhost:1/token', not HTTPS"),
    ):
        client.get_manifest("latest")


def test_a_refused_token_is_told_in_the_token_servers_words(server: MisbehavingRegistry) -> None:
    server.authorization, server.challenge = "Bearer a-token", bearer(server.address)
    refused = status(401, {"errors": [{"code": "DENIED", "message": "wrong password"}]})
    server.misbehave("/token", refused)
    with (
        client_of(server, auth=AUTH) as client,
        pytest.raises(RegistryError, match="401 Unauthorized: DENIED: wrong password") as failed,
    ):
        client.get_manifest("latest")
    assert not failed.value.transient
    assert "the credentials were refused" in str(failed.value)
    assert AUTH.password not in str(failed.value)


def test_a_token_server_that_is_busy_may_be_asked_again(server: MisbehavingRegistry) -> None:
    server.authorization, server.challenge = "Bearer a-token", bearer(server.address)
    server.misbehave("/token", status(503))
    with client_of(server) as client:
        with pytest.raises(RegistryError, match="503") as failed:
            client.get_manifest("latest")
        assert failed.value.transient
        client.get_manifest("latest")


@pytest.mark.parametrize("answer", [b"[]", b"not json", b'{"token":5}', b'{"token":"a\\nb"}'])
def test_an_answer_without_a_token_is_refused(answer: bytes, server: MisbehavingRegistry) -> None:
    server.authorization, server.challenge = "Bearer a-token", bearer(server.address)
    server.misbehave("/token", status(200, answer))
    with client_of(server) as client, pytest.raises(RegistryError):
        client.get_manifest("latest")


def test_credentials_that_are_wanted_are_asked_for(server: MisbehavingRegistry) -> None:
    server.authorization, server.challenge = BASIC, 'Basic realm="registry"'
    with (
        client_of(server) as client,
        pytest.raises(RegistryError, match=r"who are you\?: it wants credentials$"),
    ):
        client.get_manifest("latest")
