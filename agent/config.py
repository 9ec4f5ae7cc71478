"""What the agent is told at its start, from the boot's words and the command line.

The only module that knows the names of environment variables. In the image the configuration is
the kernel's command line (``innkeep.key=value``), or the same words in ``INNKEEP_CMDLINE`` where
the kernel is not ours (``boot.py --machine namespaces``). Outside the image it is the arguments.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs

from agent.bootwords import DEFAULT_LISTEN, kernel_words
from agent.workload_config import WORKLOAD_KEYS, WorkloadConfig

T = TypeVar("T")

DEFAULT_HOSTS_DIR = Path("/etc/innkeep/certs.d")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class ConfigError(ValueError):
    """A word or an argument that means nothing; the text names it and what was expected."""


@attrs.frozen
class Uplink:
    """The VM's own address on its one network interface, as the boot configuration gives it."""

    address: ipaddress.IPv4Interface | ipaddress.IPv6Interface
    gateway: ipaddress.IPv4Address | ipaddress.IPv6Address | None
    nameservers: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...]


@attrs.frozen(kw_only=True)
class AgentConfig:
    """Where the agent listens, keeps and finds things.

    ``storage_device`` is the only block device that the agent ever formats, checks or mounts.
    """

    listen: str
    in_image: bool
    """Whether the VM is ours: disks, links and power are touched only then."""
    storage_dir: Path = Path("/storage")
    storage_device: str | None = None
    storage_in_memory: bool = False
    run_dir: Path = Path("/run/innkeep")
    insecure_registries: frozenset[str] = frozenset()
    registry_ca_files: Mapping[str, Path] = attrs.field(factory=dict)
    hosts_dir: Path | None = None
    """Mirrors of registries, as containerd has them."""
    vsock_peers: frozenset[int] = frozenset()
    host_sockets: Path | None = None
    """Where the host's ports are unix sockets, PREFIX_PORT; else they are vsock's."""
    ssh_agent: bool = False
    """Whether the host's SSH agent is forwarded."""
    ready_marker: str = ".smolvm-ready"
    """The file in a shared root that tells of the VM's readiness."""
    dns_filter: bool = False
    """Whether names are resolved by the host alone."""
    uplink: Uplink | None = None
    workload_memory: int | Literal["max"] | None = None
    """Bytes for all workloads together; this and the next two: by the VM's size where None."""
    workload_pids: int | Literal["max"] | None = None
    command_pids: int | Literal["max"] | None = None
    mkfs_erofs: str = "mkfs.erofs"
    crun: str = "crun"
    catatonit: str = "/usr/bin/catatonit"
    """The first process of containers that stay."""
    workload: WorkloadConfig = attrs.field(factory=WorkloadConfig)
    log_level: str = "INFO"
    unknown_words: tuple[str, ...] = ()
    """Words of the boot configuration that nobody reads: most likely misspelt."""

    @classmethod
    def from_boot(
        cls, cmdline: str, environ: Mapping[str, str], argv: Sequence[str]
    ) -> AgentConfig:
        """The configuration from the kernel's command line, the environment and the arguments.

        Arguments, where there are any, say everything: then this is not our image, whatever the
        machine's own kernel was told.

        Raises:
            ConfigError: a value that is not what its key takes.
            SystemExit: ``--help``, or arguments that do not parse; argparse has said why.
        """
        tools: dict[str, Any] = {
            "mkfs_erofs": environ.get("INNKEEP_MKFS_EROFS", "mkfs.erofs"),
            "crun": environ.get("INNKEEP_CRUN", "crun"),
            "catatonit": environ.get("INNKEEP_CATATONIT", "/usr/bin/catatonit"),
            "log_level": _one_of(LOG_LEVELS, "INNKEEP_LOG", environ.get("INNKEEP_LOG", "INFO")),
            "ready_marker": environ.get("SMOLVM_READY_MARKER") or ".smolvm-ready",
            # As the smolvm launcher has it, whose guests are configured by environment alone.
            "ssh_agent": _switch("SMOLVM_SSH_AGENT", environ.get("SMOLVM_SSH_AGENT") or "0"),
            "dns_filter": _switch("SMOLVM_DNS_FILTER", environ.get("SMOLVM_DNS_FILTER") or "0"),
        }
        if argv:
            return cls(in_image=False, **{**tools, **_from_arguments(argv)})
        words = kernel_words(environ.get("INNKEEP_CMDLINE", cmdline))
        return cls(in_image=True, **{**tools, **_from_words(words)})


def _from_words(words: Mapping[str, str]) -> dict[str, Any]:
    known = {*_WORDS, *_MORE_WORDS, *_WORDS_OF_INIT, *(f"workload.{key}" for key in WORKLOAD_KEYS)}
    settings: dict[str, Any] = {
        "listen": DEFAULT_LISTEN,
        "hosts_dir": DEFAULT_HOSTS_DIR,
        "unknown_words": tuple(sorted(words.keys() - known)),
    }
    for key, (name, read) in _WORDS.items():
        if key in words:
            settings[name] = read(f"innkeep.{key}", words[key])
    storage = words.get("storage", "memory")
    if storage.startswith("/"):
        settings["storage_device"] = storage
    elif storage == "memory":
        settings["storage_in_memory"] = True
    elif storage != "dir":
        raise ConfigError(f"innkeep.storage={storage}: expected a device, 'memory' or 'dir'")
    settings["workload"] = _workload(
        "innkeep.workload.",
        {key: words[f"workload.{key}"] for key in WORKLOAD_KEYS if f"workload.{key}" in words},
    )
    if "ip" in words:
        settings["uplink"] = Uplink(
            address=_read("innkeep.ip", words["ip"], ipaddress.ip_interface),
            gateway=_read("innkeep.gateway", words["gateway"], ipaddress.ip_address)
            if "gateway" in words
            else None,
            nameservers=tuple(
                _read("innkeep.dns", server, ipaddress.ip_address)
                for server in words.get("dns", "").split(",")
                if server
            ),
        )
    return settings


def _from_arguments(argv: Sequence[str]) -> dict[str, Any]:
    # Never needed in the image, where its import would delay the first answer.
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m agent",
        description="innkeep's agent, served outside its image: disks, links and power are left "
        "alone, and mounts stay in a mount namespace of its own.",
    )
    parser.add_argument(
        "--listen", required=True, metavar="ADDRESS", help="unix:PATH or vsock:PORT"
    )
    parser.add_argument(
        "--storage", required=True, metavar="DIR", type=Path, help="images and overlays"
    )
    parser.add_argument(
        "--run-dir", required=True, metavar="DIR", type=Path, help="bundles, logs, sockets"
    )
    parser.add_argument(
        "--insecure-registry",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="a registry to speak plain HTTP to; may be repeated",
    )
    parser.add_argument(
        "--registry-ca",
        action="append",
        default=[],
        metavar="HOST:PORT=FILE",
        help="a private CA's certificates for one registry; may be repeated",
    )
    parser.add_argument(
        "--hosts-dir",
        metavar="DIR",
        type=Path,
        help="mirrors of registries, in containerd's format: DIR/HOST[:PORT]/hosts.toml",
    )
    parser.add_argument(
        "--host-sockets",
        metavar="PREFIX",
        type=Path,
        help="the host's ports are unix sockets: port N is PREFIX_N (else they are vsock's)",
    )
    parser.add_argument(
        "--ssh-agent",
        action="store_true",
        help="forward the host's SSH agent, at its port 6001, to /tmp/ssh-agent.sock",
    )
    parser.add_argument(
        "--dns-filter",
        action="store_true",
        help="serve DNS at 127.0.0.1:53, with what the host's port 6002 answers",
    )
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"as innkeep.workload.KEY of a boot ({', '.join(WORKLOAD_KEYS)}); may be repeated",
    )
    parsed = parser.parse_args(argv)
    workload = dict(text.partition("=")[::2] for text in parsed.workload)
    return {
        "host_sockets": parsed.host_sockets and parsed.host_sockets.absolute(),
        **({"ssh_agent": True} if parsed.ssh_agent else {}),
        **({"dns_filter": True} if parsed.dns_filter else {}),
        "workload": _workload("--workload ", workload),
        "listen": parsed.listen,
        "storage_dir": parsed.storage.absolute(),
        "run_dir": parsed.run_dir.absolute(),
        "insecure_registries": _registries(
            "--insecure-registry", ",".join(parsed.insecure_registry)
        ),
        "registry_ca_files": _ca_files("--registry-ca", ",".join(parsed.registry_ca)),
        "hosts_dir": parsed.hosts_dir and parsed.hosts_dir.absolute(),
    }


def _read(name: str, text: str, read: Callable[[str], T]) -> T:
    try:
        return read(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text}: {error}") from error


def _registries(name: str, text: str) -> frozenset[str]:
    hosts = frozenset(host for host in text.split(",") if host)
    for host in hosts:
        if "/" in host:
            raise ConfigError(f"{name}={host}: expected HOST:PORT, without a scheme or a path")
    return hosts


def _ca_files(name: str, text: str) -> dict[str, Path]:
    files = {}
    for pair in filter(None, text.split(",")):
        host, separator, path = pair.partition("=")
        if not (host and separator and path):
            raise ConfigError(f"{name}={pair}: expected HOST:PORT=FILE")
        files[host] = Path(path)
    return files


def _absolute_path(name: str, text: str) -> Path:
    if not text.startswith("/"):
        raise ConfigError(f"{name}={text}: expected a path that begins with /")
    return Path(text)


def _workload(prefix: str, words: Mapping[str, str]) -> WorkloadConfig:
    try:
        return WorkloadConfig.read(prefix, words)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _cids(name: str, text: str) -> frozenset[int]:
    return frozenset(_read(name, cid, int) for cid in text.split(",") if cid)


def _memory(name: str, text: str) -> int | Literal["max"]:
    if text == "max":
        return "max"
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not _is_positive(number):
        raise ConfigError(f"{name}={text}: expected a size like 512M (K, M or G), or 'max'")
    return int(number) * _UNITS[unit]


def _processes(name: str, text: str) -> int | Literal["max"]:
    if text == "max":
        return "max"
    if not _is_positive(text):
        raise ConfigError(f"{name}={text}: expected a number of processes above 0, or 'max'")
    return int(text)


def _switch(name: str, text: str) -> bool:
    if text not in ("0", "1"):
        raise ConfigError(f"{name}={text}: expected 0 or 1")
    return text == "1"


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdecimal() and int(text) > 0


def _one_of(choices: tuple[str, ...], name: str, text: str) -> str:
    if text.upper() not in choices:
        raise ConfigError(f"{name}={text}: expected one of {', '.join(choices)}")
    return text.upper()


_UNITS: Mapping[str, int] = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

_MORE_WORDS = frozenset({"storage", "ip", "gateway", "dns"})
_WORDS_OF_INIT = frozenset({"hostname"})
# Each further word of the boot configuration: the field it sets, and what reads its value.
_WORDS: Mapping[str, tuple[str, Callable[[str, str], object]]] = {
    "listen": ("listen", lambda _, text: text),
    "insecure_registry": ("insecure_registries", _registries),
    "registry_ca": ("registry_ca_files", _ca_files),
    "hosts_dir": ("hosts_dir", _absolute_path),
    "vsock_peers": ("vsock_peers", _cids),
    "host_sockets": ("host_sockets", _absolute_path),
    "ssh_agent": ("ssh_agent", _switch),
    "dns_filter": ("dns_filter", _switch),
    "workload_memory": ("workload_memory", _memory),
    "workload_pids": ("workload_pids", _processes),
    "command_pids": ("command_pids", _processes),
    "log": ("log_level", lambda name, text: _one_of(LOG_LEVELS, name, text)),
}
