"""A private CA, and what it issues, as the PEM files that servers and clients want."""

import ssl
from datetime import datetime
from pathlib import Path

import pytest
import trustme
from attrs import frozen


@frozen
class Certificate:
    """A certificate with its chain, and its key."""

    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """For a server."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key)
        return context


class PrivateCa:
    """Issues certificates into a directory; `path` is its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._ca = trustme.CA()
        self._issued = 0
        self.path = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.path))

    def issue(self, *hosts: str, not_after: datetime | None = None) -> Certificate:
        """A certificate of those hosts; for a client any will do."""
        self._issued += 1
        issued = self._ca.issue_cert(*hosts, not_after=not_after)
        paths = Certificate(
            self._directory / f"certificate-{self._issued}.pem",
            self._directory / f"key-{self._issued}.pem",
        )
        for position, part in enumerate(issued.cert_chain_pems):
            part.write_to_path(str(paths.certificate), append=position > 0)
        issued.private_key_pem.write_to_path(str(paths.key))
        return paths


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> PrivateCa:
    """One that no system knows."""
    return PrivateCa(tmp_path_factory.mktemp("ca"))
