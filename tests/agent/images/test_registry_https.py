"""Whom HTTPS is spoken with, and who may have plain HTTP."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from agent.images.mirrored_registry import MirroredRegistry
from agent.images.reference import Reference, parse_reference
from agent.images.registries import RegistryError, RegistrySettings
from initramfs.local_registry import LocalRegistry, local_registry
from tests.support.certificates import PrivateCa
from tests.support.layout import Layout, digest_of, gzip_layer
from tests.support.misbehaving_registry import MisbehavingRegistry, misbehaving_registry, redirect
from tests.support.registry import push
from tests.support.trees import archive, numbered


@pytest.fixture
def server() -> Iterator[MisbehavingRegistry]:
    with misbehaving_registry() as registry:
        registry.add_image("latest", [gzip_layer(archive(numbered(1)))])
        yield registry


@pytest.fixture(scope="module")
def https(ca: PrivateCa) -> Iterator[LocalRegistry]:
    served = ca.issue("127.0.0.1")
    with local_registry(certificate=served.certificate, key=served.key) as registry:
        yield registry


def pushed(registry: LocalRegistry, directory: Path) -> Reference:
    layout = Layout(directory / "layout")
    layout.tag("latest", layout.add_manifest([gzip_layer(archive(numbered(1)))], {}))
    return parse_reference(push(registry, layout.directory, "latest", "some/image"))


def test_a_registry_with_a_private_ca_is_trusted_where_the_configuration_names_it(
    https: LocalRegistry, ca: PrivateCa, tmp_path: Path
) -> None:
    reference = pushed(https, tmp_path)
    settings = RegistrySettings(ca_files={reference.registry: ca.path})
    with MirroredRegistry(reference, settings, None) as client:
        data, _ = client.get_manifest("latest")
        assert client.head_manifest("latest") == digest_of(data)


def test_a_registry_with_a_private_ca_is_not_trusted_otherwise(
    https: LocalRegistry, ca: PrivateCa, tmp_path: Path
) -> None:
    reference = pushed(https, tmp_path)
    others = RegistrySettings(ca_files={"registry.example": ca.path})
    with (
        MirroredRegistry(reference, others, None) as client,
        pytest.raises(RegistryError, match=f"--registry-ca {reference.registry}=FILE") as failed,
    ):
        client.get_manifest("latest")
    assert "is not trusted" in str(failed.value)
    assert not failed.value.transient


def test_a_certificate_that_is_out_of_date_is_told_with_the_machines_own_time(
    ca: PrivateCa,
) -> None:
    """More often than not it is the clock that is wrong."""
    yesterday = datetime.now(UTC) - timedelta(days=1)
    context = ca.issue("127.0.0.1", not_after=yesterday).context()
    with misbehaving_registry(tls=context) as server:
        settings = RegistrySettings(ca_files={server.address: ca.path})
        reference = parse_reference(server.reference())
        clock = (
            r"certificate has expired; this machine's clock says 20\d\d-\d\d-\d\d \d\d:\d\d UTC$"
        )
        with (
            MirroredRegistry(reference, settings, None) as client,
            pytest.raises(RegistryError, match=clock),
        ):
            client.get_manifest("latest")


def test_a_certificate_of_another_host_is_refused(ca: PrivateCa) -> None:
    with misbehaving_registry(tls=ca.issue("other.example").context()) as server:
        settings = RegistrySettings(ca_files={server.address: ca.path})
        reference = parse_reference(server.reference())
        with (
            MirroredRegistry(reference, settings, None) as client,
            pytest.raises(RegistryError, match=r"is not trusted: .* '127\.0\.0\.1'"),
        ):
            client.get_manifest("latest")
    assert not server.requests


def test_a_ca_file_that_is_not_there_is_named(https: LocalRegistry, tmp_path: Path) -> None:
    reference = pushed(https, tmp_path)
    missing = tmp_path / "missing.pem"
    settings = RegistrySettings(ca_files={reference.registry: missing})
    with (
        MirroredRegistry(reference, settings, None) as client,
        pytest.raises(RegistryError, match=f"CA file {missing} .*No such file"),
    ):
        client.get_manifest("latest")


def test_plain_http_is_spoken_only_to_registries_that_the_configuration_names(
    server: MisbehavingRegistry,
) -> None:
    reference = parse_reference(server.reference())
    with (
        MirroredRegistry(reference, RegistrySettings(), None) as client,
        pytest.raises(RegistryError, match=f"add --insecure-registry {server.address}") as failed,
    ):
        client.get_manifest("latest")
    assert not failed.value.transient
    assert not server.requests


def test_https_is_never_left_for_plain_http_by_a_redirect(
    ca: PrivateCa, server: MisbehavingRegistry
) -> None:
    with misbehaving_registry(tls=ca.issue("127.0.0.1").context()) as secure:
        secure.misbehave("manifests/latest", redirect(f"http://{server.address}/v2/x"))
        settings = RegistrySettings(ca_files={secure.address: ca.path})
        with (
            MirroredRegistry(parse_reference(secure.reference()), settings, None) as client,
            pytest.raises(RegistryError, match="which is not HTTPS"),
        ):
            client.get_manifest("latest")
    assert not server.requests
