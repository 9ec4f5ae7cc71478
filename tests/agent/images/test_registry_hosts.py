"""containerd's hosts.toml: what it says about who to ask, and what is said about mistakes in it."""

from pathlib import Path

import attrs
import pytest

from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from agent.images.registry_hosts import Endpoint, HostsError, endpoints_of, problems


def write(directory: Path, registry: str, text: str) -> Path:
    """Configure a registry; its file."""
    path = directory / registry / "hosts.toml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def asked(directory: Path, registry: str, **settings: object) -> tuple[Endpoint, ...]:
    defaults = RegistrySettings(hosts_dir=directory)
    return endpoints_of(registry, attrs.evolve(defaults, **settings))


def urls(directory: Path, registry: str) -> list[str]:
    return [endpoint.url for endpoint in asked(directory, registry)]


def test_a_registry_without_configuration_is_asked_itself(tmp_path: Path) -> None:
    assert urls(tmp_path, "r.example:5000") == ["https://r.example:5000/v2"]
    assert urls(tmp_path / "missing", "docker.io") == ["https://registry-1.docker.io/v2"]
    insecure = RegistrySettings(insecure=frozenset({"r.example"}))
    assert endpoints_of("r.example", insecure) == (Endpoint("http://r.example/v2"),)


def test_mirrors_come_first_in_the_order_of_the_file_and_the_registry_last(tmp_path: Path) -> None:
    write(
        tmp_path,
        "docker.io",
        """
        server = "https://docker.io"
        [host."https://z.example"]
        [host."http://127.0.0.1:4001"]
        [host."a.example/hub"]
        """,
    )
    assert urls(tmp_path, parse_reference("alpine").registry) == [
        "https://z.example/v2",
        "http://127.0.0.1:4001/v2",
        "https://a.example/hub/v2",
        "https://registry-1.docker.io/v2",
    ]
    assert urls(tmp_path, "quay.io") == ["https://quay.io/v2"]


def test_a_file_without_a_server_falls_back_to_the_registry_itself(tmp_path: Path) -> None:
    write(tmp_path, "r.example:5000", '[host."https://mirror.example"]')
    assert urls(tmp_path, "r.example:5000")[-1] == "https://r.example:5000/v2"


def test_the_default_is_for_registries_without_a_directory_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "_default", '[host."https://all.example"]')
    write(tmp_path, "r.example", "")
    assert urls(tmp_path, "ghcr.io") == ["https://all.example/v2", "https://ghcr.io/v2"]
    assert urls(tmp_path, "r.example") == ["https://r.example/v2"]


def test_a_port_may_be_written_without_a_colon_as_containerd_has_it(tmp_path: Path) -> None:
    write(tmp_path, "r.example:5000", '[host."https://second.example"]')
    write(tmp_path, "r.example_5000_", '[host."https://first.example"]')
    assert urls(tmp_path, "r.example:5000")[0] == "https://first.example/v2"


def test_a_server_takes_the_place_of_the_registry(tmp_path: Path) -> None:
    write(tmp_path, "_default", 'server = "https://only.example"')
    assert urls(tmp_path, "ghcr.io") == ["https://only.example/v2"]


@pytest.mark.parametrize(
    ("url", "override", "base"),
    [
        ("https://m.example/", "false", "https://m.example/v2"),
        ("https://m.example:443", "false", "https://m.example/v2"),
        ("https://m.example/v2", "false", "https://m.example/v2"),
        ("https://m.example/v2/cache/", "false", "https://m.example/v2/cache/v2"),
        ("https://m.example/v2/cache", "true", "https://m.example/v2/cache"),
        ("http://[::1]:5000", "false", "http://[::1]:5000/v2"),
    ],
)
def test_the_apis_root_is_v2_below_a_url_unless_the_path_is_overridden(
    url: str, override: str, base: str, tmp_path: Path
) -> None:
    write(tmp_path, "r.example", f'[host."{url}"]\noverride_path = {override}')
    assert urls(tmp_path, "r.example")[0] == base


def test_a_hosts_settings_are_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        "r.example",
        """
        capabilities = ["pull"]
        ca = ["registry.pem"]
        [host."https://m.example"]
          capabilities = ["pull", "resolve", "push"]
          ca = "mirror.pem"
          client = [["a.cert", "/keys/a.key"], ["b.pem", ""]]
          skip_verify = true
          dial_timeout = "1m1.5s"
          proxy = "http://proxy.example:3128"
          [host."https://m.example".header]
            X-Dragonfly-Registry = ["https://index.docker.io"]
            x-several = ["a", "b"]
        """,
    )
    mirror, own = asked(tmp_path, "r.example")
    directory = tmp_path / "r.example"
    assert mirror == Endpoint(
        "https://m.example/v2",
        ca_files=(directory / "mirror.pem",),
        client_certificates=(
            (directory / "a.cert", Path("/keys/a.key")),
            (directory / "b.pem", None),
        ),
        skip_verify=True,
        headers={"X-Dragonfly-Registry": "https://index.docker.io", "x-several": "a, b"},
        dial_timeout_s=61.5,
        proxy="http://proxy.example:3128",
    )
    assert own == Endpoint(
        "https://r.example/v2", can_resolve=False, ca_files=(directory / "registry.pem",)
    )


def test_dockers_certificate_files_do_where_there_is_no_file(tmp_path: Path) -> None:
    directory = tmp_path / "r.example"
    directory.mkdir()
    for name in ("own.crt", "client.cert", "client.key"):
        (directory / name).touch()
    [own] = asked(tmp_path, "r.example")
    assert own.ca_files == (directory / "own.crt",)
    assert own.client_certificates == ((directory / "client.cert", directory / "client.key"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server = x", "is not TOML: Invalid value (at line 1, column 10)"),
        ("serve = 'x'", "unknown key 'serve', expected some of server, host, capabilities, "),
        ("[host.'https://m']\nskip-verify = true", """host."https://m": unknown key 'skip-ver"""),
        ("[host.'https://m']\ncapabilities = ['pul']", "unknown capability 'pul', expected some"),
        ("capabilities = [1]", "capabilities: expected a string or an array of strings"),
        ("skip_verify = 'yes'", "skip_verify: expected true or false"),
        ("host = 'x'", "host: expected a table"),
        ("[host]\nx = 1", 'host."x": expected a table'),
        ("client = [['a']]", "client: expected a file, files, or pairs of certificate and key"),
        ("client = 5", "client: expected a file"),
        ("dial_timeout = '5'", "dial_timeout: expected a time like 500ms or 2s, not '5'"),
        ("dial_timeout = '0s'", "dial_timeout: expected a time"),
        ("[header]\nx = 1", "x: expected a string or an array"),
        ("server = 'ftp://m'", "'ftp://m' is not a URL of the form https://HOST or http://HOST"),
        ("server = 'https://'", "is not a URL of the form"),
        ("server = 'https://user:secret@m'", "credentials have no place in a URL"),
        ("[host.'https://user:secret@m']", "credentials have no place in a URL"),
        ("server = 'https://m/?x=1'", "has something behind its path"),
        ("server = 'https://[m'", "Invalid IPv6 URL"),
    ],
)
def test_a_mistake_is_told_with_file_and_key(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path, "r.example", text)
    with pytest.raises(HostsError) as failed:
        asked(tmp_path, "r.example")
    assert str(failed.value).startswith(f"{path}")
    assert said in str(failed.value)
    assert "secret" not in str(failed.value)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = write(tmp_path, "r.example", "")
    path.write_bytes(b"\xff")
    with pytest.raises(HostsError, match=r"hosts\.toml: it is not UTF-8"):
        asked(tmp_path, "r.example")


def test_one_bad_file_leaves_the_others_in_force(tmp_path: Path) -> None:
    bad = write(tmp_path, "bad.example", "x = 1")
    write(tmp_path, "good.example", '[host."https://m.example"]')
    assert urls(tmp_path, "good.example")[0] == "https://m.example/v2"
    [problem] = problems(tmp_path)
    assert str(problem).startswith(f"{bad}: unknown key 'x'")
    assert list(problems(tmp_path / "missing")) == []
