"""Where a registry's images may be had: its mirrors, in order, and then the registry itself.

They are configured as containerd's are, in a directory that has one for each registry:

    DIR/docker.io/hosts.toml                DIR/registry.example:5000/hosts.toml
    DIR/_default/hosts.toml                 for registries that have no directory of their own

https://github.com/containerd/containerd/blob/main/docs/hosts.md is the format, docker's
certificate files for a directory without a hosts.toml included. Files are read for each pull, so
a change needs no restart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs

from agent.images.proxy import proxy_url
from agent.images.reference import DOCKER_HUB
from agent.images.registries import RegistrySettings

DEFAULT = "_default"
_FILE = "hosts.toml"
# Docker's names for its registry are not the name of its host.
_HOSTS = dict.fromkeys((DOCKER_HUB, f"index.{DOCKER_HUB}"), f"registry-1.{DOCKER_HUB}")

_KEYS = (
    "capabilities",
    "ca",
    "client",
    "skip_verify",
    "header",
    "override_path",
    "dial_timeout",
    "proxy",
)
_TOP_KEYS = ("server", "host", *_KEYS)
_CAPABILITIES = ("pull", "resolve", "push")
# As Go writes them: 1m30s, 500ms.
_DURATION = re.compile(r"(?:\d+(?:\.\d*)?(?:ms|s|m|h))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d*)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
_CREDENTIALS = re.compile(r"//[^/]*@")
_PORTS = {"https": ":443", "http": ":80"}


class HostsError(ValueError):
    """A registry's configuration is of no use; the text names the file, the key and the cause."""


@attrs.frozen
class Endpoint:
    """A registry's own host, or a mirror of it.

    ``url`` is what paths of the distribution API are put behind: ``https://host/v2``. The host
    alone gets ``headers`` and ``client_certificates`` ((certificate, key) files; the key may be in
    the certificate's), and only there ``ca_files`` are trusted, or everybody with
    ``skip_verify``. ``proxy`` takes the place of a pull's own.
    """

    url: str
    can_pull: bool = True
    can_resolve: bool = True
    ca_files: tuple[Path, ...] = ()
    client_certificates: tuple[tuple[Path, Path | None], ...] = ()
    skip_verify: bool = False
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    dial_timeout_s: float | None = None
    proxy: str | None = attrs.field(default=None, repr=False)

    @property
    def host(self) -> str:
        """``HOST[:PORT]``"""
        return urlsplit(self.url).netloc

    @property
    def is_plain(self) -> bool:
        """Whether it is spoken to by plain HTTP."""
        return self.url.startswith("http:")


def real_host(registry: str) -> str:
    """The host behind a registry's name in references."""
    return _HOSTS.get(registry, registry).lower()


def endpoints_of(registry: str, settings: RegistrySettings) -> tuple[Endpoint, ...]:
    """Who to ask for a registry's images, one after the other; never empty.

    Raises:
        HostsError: the registry's file in ``settings.hosts_dir`` is of no use.
    """
    scheme = "http" if registry in settings.insecure else "https"
    own = Endpoint(f"{scheme}://{real_host(registry)}/v2")
    directory = settings.hosts_dir and _directory_of(registry, settings.hosts_dir)
    return _read_directory(directory, own) if directory else (own,)


def problems(hosts_dir: Path) -> Iterator[HostsError]:
    """What is wrong in the whole of a configuration: one error a directory, if any."""
    if not hosts_dir.is_dir():
        return
    for directory in sorted(hosts_dir.iterdir()):
        if directory.is_dir():
            try:
                _read_directory(directory, Endpoint("https://registry.invalid/v2"))
            except HostsError as error:
                yield error


def _directory_of(registry: str, hosts_dir: Path) -> Path | None:
    host, colon, port = registry.rpartition(":")
    # containerd's name for systems without colons in names comes first there, too.
    names = [f"{host}_{port}_"] if colon else []
    found = (hosts_dir / name for name in [*names, registry, DEFAULT])
    return next((directory for directory in found if directory.is_dir()), None)


def _read_directory(directory: Path, own: Endpoint) -> tuple[Endpoint, ...]:
    path = directory / _FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return (_with_certificate_files(directory, own),)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise HostsError(f"{path}: {cause}") from error
    import tomllib  # costs some milliseconds, which most machines need not spend

    try:
        document = tomllib.loads(text)
        return tuple(_endpoints(document, own, directory))
    except tomllib.TOMLDecodeError as error:
        raise HostsError(f"{path} is not TOML: {error}") from error
    except ValueError as error:
        raise HostsError(f"{path}: {error}") from error


def _with_certificate_files(directory: Path, own: Endpoint) -> Endpoint:
    """https://docs.docker.com/engine/security/certificates/"""
    clients = [(path, path.with_suffix(".key")) for path in sorted(directory.glob("*.cert"))]
    return attrs.evolve(
        own, ca_files=tuple(sorted(directory.glob("*.crt"))), client_certificates=tuple(clients)
    )


def _endpoints(document: Mapping[str, Any], own: Endpoint, directory: Path) -> Iterator[Endpoint]:
    _check_keys(document, _TOP_KEYS)
    hosts = _typed(document, "host", dict, {})
    for url, table in hosts.items():
        try:
            if not isinstance(table, dict):
                raise ValueError("expected a table")
            _check_keys(table, _KEYS)
            yield _endpoint(url, table, directory)
        except ValueError as error:
            shown = _CREDENTIALS.sub("//", url)
            raise ValueError(f'host."{shown}": {error}') from error
    yield _endpoint(_typed(document, "server", str, ""), document, directory, own)


def _endpoint(
    url: str, table: Mapping[str, Any], directory: Path, own: Endpoint | None = None
) -> Endpoint:
    capabilities = _texts(table, "capabilities") or _CAPABILITIES
    for capability in capabilities:
        if capability.lower() not in _CAPABILITIES:
            raise ValueError(
                f"unknown capability {capability!r}, expected some of {', '.join(_CAPABILITIES)}"
            )
    known = {capability.lower() for capability in capabilities}
    return Endpoint(
        url=own.url if own and not url else _base(url, _typed(table, "override_path", bool, False)),
        can_pull="pull" in known,
        can_resolve="resolve" in known,
        ca_files=tuple(directory / path for path in _texts(table, "ca")),
        client_certificates=tuple(_certificates(table, directory)),
        skip_verify=_typed(table, "skip_verify", bool, False),
        headers={
            name: ", ".join(_texts(_typed(table, "header", dict, {}), name))
            for name in table.get("header", {})
        },
        dial_timeout_s=_seconds(table),
        proxy=proxy_url(table["proxy"]) if _typed(table, "proxy", str, None) else None,
    )


def _base(url: str, override_path: bool) -> str:
    """https://github.com/containerd/containerd/blob/main/docs/hosts.md#override_path-field"""
    parts = urlsplit(url if "://" in url else f"https://{url}")
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not a URL of the form https://HOST or http://HOST")
    if "@" in parts.netloc:
        raise ValueError('credentials have no place in a URL; say them in [host."…".header]')
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} has something behind its path")
    host = real_host(parts.netloc.removesuffix(_PORTS[parts.scheme]))
    path = parts.path.rstrip("/")
    if not override_path and not path.endswith("/v2"):
        path += "/v2"
    return f"{parts.scheme}://{host}{path}"


def _certificates(table: Mapping[str, Any], directory: Path) -> Iterator[tuple[Path, Path | None]]:
    value = table.get("client", [])
    for item in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        pair = [item, ""] if isinstance(item, str) else item
        if not isinstance(pair, list) or len(pair) != 2 or not _are_texts(pair):
            raise ValueError("client: expected a file, files, or pairs of certificate and key")
        yield directory / pair[0], directory / pair[1] if pair[1] else None


def _seconds(table: Mapping[str, Any]) -> float | None:
    text = _typed(table, "dial_timeout", str, "")
    if not text:
        return None
    seconds = sum(float(n) * _SECONDS[unit] for n, unit in _DURATION_PART.findall(text))
    if not _DURATION.fullmatch(text) or seconds <= 0:
        raise ValueError(f"dial_timeout: expected a time like 500ms or 2s, not {text!r}")
    return seconds


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}, expected some of {', '.join(known)}")


def _texts(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not _are_texts(texts):
        raise ValueError(f"{key}: expected a string or an array of strings")
    return tuple(texts)


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _typed(table: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if value is not default and not isinstance(value, kind):
        names = {str: "a string", bool: "true or false", dict: "a table"}
        raise ValueError(f"{key}: expected {names[kind]}")
    return value
