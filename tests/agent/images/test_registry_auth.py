"""Real registries that want to know who asks: passwords by htpasswd, tokens by a token server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.images.registries import RegistrySettings
from initramfs.local_registry import LocalRegistry
from tests.agent.images.pulling import Pulling, blob, noise
from tests.support.certificates import PrivateCa
from tests.support.images import Images
from tests.support.misbehaving_registry import (
    Exchange,
    MisbehavingRegistry,
    cut,
    misbehaving_registry,
)
from tests.support.private_registries import AUTH, WRONG
from tests.support.token_server import TokenServer


def pulling_from(directory: Path, ca: PrivateCa, *hosts: str) -> Pulling:
    return Pulling(directory, RegistrySettings(ca_files=dict.fromkeys(hosts, ca.path)))


def at(registry: LocalRegistry, images: Images) -> str:
    """The reference of an image at another registry with the same contents."""
    return f"{registry.address}/{images.multi_platform.reference.partition('/')[2]}"


async def test_a_password_is_given_to_a_registry_that_asks_for_it(
    tmp_path: Path, ca: PrivateCa, with_password: LocalRegistry, images: Images
) -> None:
    reference = at(with_password, images)
    pulling = pulling_from(tmp_path, ca, with_password.address)
    image = await pulling.pull(reference, auth=AUTH)
    assert image.config_digest == images.multi_platform.config_digest
    assert await pulling.pull(reference, auth=AUTH) == image


async def test_a_wrong_password_is_told_in_the_registrys_words(
    tmp_path: Path, ca: PrivateCa, with_password: LocalRegistry, images: Images
) -> None:
    pulling = pulling_from(tmp_path, ca, with_password.address)
    message = await pulling.refused(at(with_password, images), auth=WRONG)
    assert message == (
        f"{with_password.address} answered 401 Unauthorized: "
        "UNAUTHORIZED: authentication required: the credentials were refused"
    )
    message = await pulling.refused(at(with_password, images))
    assert message.endswith("UNAUTHORIZED: authentication required: it wants credentials")
    assert pulling.files() == set()


@pytest.mark.parametrize("who", ["anybody", "user"])
async def test_a_token_is_got_of_the_server_that_a_real_registry_names(
    who: str,
    tmp_path: Path,
    ca: PrivateCa,
    with_tokens: LocalRegistry,
    tokens: TokenServer,
    images: Images,
) -> None:
    if who == "user":
        tokens.credentials = f"{AUTH.username}:{AUTH.password}"
    pulling = pulling_from(tmp_path, ca, with_tokens.address, tokens.address)
    image = await pulling.pull(at(with_tokens, images), auth=AUTH if who == "user" else None)
    assert image.config_digest == images.multi_platform.config_digest
    # One for the whole pull, and for nothing but pulling this image.
    [query] = tokens.queries
    name = images.multi_platform.reference.partition("/")[2].partition(":")[0]
    assert query == {"service": ["registry"], "scope": [f"repository:{name}:pull"]}


async def test_a_token_that_expires_while_a_tag_stays_is_replaced(
    tmp_path: Path,
    ca: PrivateCa,
    with_tokens: LocalRegistry,
    tokens: TokenServer,
    images: Images,
) -> None:
    """docker-registry takes one for a minute more, so this one was never good."""
    tokens.valid_s = -120
    pulling = pulling_from(tmp_path, ca, with_tokens.address, tokens.address)
    message = await pulling.refused(at(with_tokens, images))
    assert message.startswith(f"{with_tokens.address} answered 401 Unauthorized: ")
    assert len(tokens.queries) == 1
    tokens.valid_s = 300
    await pulling.pull(at(with_tokens, images))
    assert len(tokens.queries) == 2


async def test_a_refusal_of_the_token_server_is_told_in_its_words(
    tmp_path: Path,
    ca: PrivateCa,
    with_tokens: LocalRegistry,
    tokens: TokenServer,
    images: Images,
) -> None:
    tokens.credentials = f"{AUTH.username}:{AUTH.password}"
    pulling = pulling_from(tmp_path, ca, with_tokens.address, tokens.address)
    message = await pulling.refused(at(with_tokens, images), auth=WRONG)
    assert message == (
        f"{tokens.address} answered 401 Unauthorized: "
        "UNAUTHORIZED: incorrect username or password: the credentials were refused"
    )


async def test_a_token_server_that_is_not_trusted_gets_no_password(
    tmp_path: Path,
    ca: PrivateCa,
    with_tokens: LocalRegistry,
    tokens: TokenServer,
    images: Images,
) -> None:
    pulling = pulling_from(tmp_path, ca, with_tokens.address)
    message = await pulling.refused(at(with_tokens, images), auth=AUTH)
    assert f"{tokens.address} is not trusted: " in message
    assert not tokens.queries


# What a real registry does not do at will


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        registry.challenge = f'Bearer realm="http://{registry.address}/token"'
        registry.add_image("latest", [noise("one"), noise("two")])
        yield registry


@pytest.fixture
def pulling(tmp_path: Path, server: MisbehavingRegistry) -> Pulling:
    return Pulling(tmp_path, RegistrySettings(insecure=frozenset({server.address})))


async def test_a_token_that_expires_in_the_middle_of_a_layer_is_replaced(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    server.authorization, server.token = "Bearer first", "first"
    layer = noise("one")
    # Alone: another layer's download could ask for the new token first.
    server.add_image("single", [layer])

    def expire(exchange: Exchange) -> None:
        server.authorization, server.token = "Bearer second", "second"
        cut(100_000)(exchange)

    server.misbehave(blob(layer), expire)
    await pulling.pull(server.reference("single"), auth=AUTH)
    tried = [
        (request.headers["Authorization"], request.headers.get("Range"))
        for request in server.requests_for(blob(layer))
    ]
    assert tried == [
        ("Bearer first", None),
        ("Bearer first", "bytes=100000-"),
        ("Bearer second", "bytes=100000-"),
    ]


async def test_a_token_that_is_never_good_is_asked_for_once_a_request(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    server.authorization, server.token = "Bearer other", "one"
    message = await pulling.refused(server.reference())
    assert message.endswith("UNAUTHORIZED: who are you?: it wants credentials")
    assert len(server.requests) == 3


async def test_a_registry_that_names_no_scope_is_asked_for_the_repositorys(
    server: MisbehavingRegistry, pulling: Pulling
) -> None:
    server.authorization = "Bearer a-token"
    await pulling.pull(server.reference())
    [asked] = [request.path for request in server.requests if "/token" in request.path]
    assert asked == "/token?scope=repository%3Atest%2Fimage%3Apull"
