"""Real registries that want to know who asks: passwords by htpasswd, tokens by a token server."""

from collections.abc import Iterator, Mapping

import pytest

from initramfs.local_registry import LocalRegistry, local_registry
from protocol.values import RegistryAuth
from tests.support.certificates import PrivateCa
from tests.support.token_server import TokenServer, htpasswd, token_server

AUTH = RegistryAuth("user", "correct horse")
WRONG = RegistryAuth("user", "battery staple")


@pytest.fixture(scope="session")
def with_password(
    ca: PrivateCa, registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalRegistry]:
    """The images of `registry`, by HTTPS and for one user."""
    auth = htpasswd(tmp_path_factory.mktemp("htpasswd") / "htpasswd")
    yield from _served(ca, registry, auth)


@pytest.fixture
def tokens(ca: PrivateCa) -> Iterator[TokenServer]:
    with token_server(ca.issue("127.0.0.1").context(), ca.issue("signer")) as server:
        yield server


@pytest.fixture
def with_tokens(
    ca: PrivateCa, registry: LocalRegistry, tokens: TokenServer
) -> Iterator[LocalRegistry]:
    """The images of `registry`, by HTTPS and for those with a token."""
    yield from _served(ca, registry, tokens.registry_auth)


def _served(
    ca: PrivateCa, registry: LocalRegistry, auth: Mapping[str, object]
) -> Iterator[LocalRegistry]:
    served = ca.issue("127.0.0.1")
    with local_registry(
        certificate=served.certificate,
        key=served.key,
        storage_dir=registry.storage_dir,
        auth=auth,
    ) as server:
        yield server
