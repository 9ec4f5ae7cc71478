"""Clients of a misbehaving registry, and what it may want of them."""

from agent.images.mirrored_registry import MirroredRegistry
from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from protocol.values import RegistryAuth
from tests.support.misbehaving_registry import MisbehavingRegistry

BASIC = "Basic dXNlcjpjb3JyZWN0IGhvcnNl"
"""What AUTH comes to."""


def client_of(
    server: MisbehavingRegistry,
    *,
    auth: RegistryAuth | None = None,
    proxy: str | None = None,
    no_proxy: str | None = None,
) -> MirroredRegistry:
    settings = RegistrySettings(insecure=frozenset({server.address}))
    reference = parse_reference(server.reference())
    return MirroredRegistry(reference, settings, auth, proxy=proxy, no_proxy=no_proxy)


def read(client: MirroredRegistry, digest: str, offset: int = 0) -> bytes:
    with client.open_blob(digest, 10_000_000, offset) as body:
        assert body.offset == offset
        return b"".join(body.blocks())


def bearer(address: str) -> str:
    return (
        f'Bearer realm="http://{address}/token",service="the service",'
        'scope="repository:test/image:pull"'
    )
