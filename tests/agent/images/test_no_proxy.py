"""Hosts that are reached without the proxy."""

import pytest

from agent.images.proxy import bypasses_proxy


@pytest.mark.parametrize(
    ("url", "no_proxy", "bypassed"),
    [
        ("https://registry.example/v2/", "", False),
        ("https://registry.example/v2/", "*", True),
        ("https://registry.example/v2/", "other.example, registry.example", True),
        ("https://Registry.Example/v2/", "REGISTRY.example", True),
        ("https://registry.example/v2/", "example", True),
        ("https://registry.example/v2/", ".example", True),
        ("https://registry.example/v2/", "*.example", True),
        ("https://example/v2/", ".example", False),
        ("https://notexample/v2/", "example", False),
        ("https://registry.example/v2/", "registry.example:443", True),
        ("https://registry.example/v2/", "registry.example:5000", False),
        ("http://registry.example:5000/v2/", "registry.example:5000", True),
        ("http://10.1.2.3:5000/v2/", "10.1.2.3", True),
        ("http://10.1.2.3:5000/v2/", "10.1.2.3:5000", True),
        ("http://10.1.2.3/v2/", "10.0.0.0/8", True),
        ("http://11.1.2.3/v2/", "10.0.0.0/8", False),
        ("http://registry.example/v2/", "10.0.0.0/8,not/a/network", False),
        ("http://[fd00::1]:5000/v2/", "fd00::1", True),
        ("http://[fd00::1]:5000/v2/", "[fd00::1]:5000", True),
        ("http://[fd00::1]/v2/", "fd00::/16", True),
        ("http://110.1.2.3/v2/", "10.1.2.3", False),
    ],
)
def test_no_proxy_is_read_as_docker_reads_it(url: str, no_proxy: str, bypassed: bool) -> None:
    assert bypasses_proxy(url, no_proxy) is bypassed
