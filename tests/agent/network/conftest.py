"""A host whose ports are unix sockets, as the agent finds them outside a VM."""

from pathlib import Path

import pytest

from agent.network.host import Host
from tests.support.host_ports import HostPorts


@pytest.fixture
def ports(tmp_path: Path) -> HostPorts:
    """The host's side."""
    return HostPorts(tmp_path / "host")


@pytest.fixture
def host(ports: HostPorts) -> Host:
    """The agent's side."""
    return Host(ports.prefix)
