"""What the agent is told at its start: by the boot's words, its environment, or its arguments.

The only module that is given the environment. In the image the configuration is the kernel's
command line (``innkeep.key=value``), or the same words in ``INNKEEP_CMDLINE`` where the kernel is
not ours (``boot.py --machine namespaces``), and behind that the environment. Outside the image it
is the arguments, and behind these the environment. All spellings are in agent/settings.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from agent import config_values as values
from agent.bootwords import DEFAULT_LISTEN, kernel_words
from agent.config_values import ConfigError
from agent.launcher_network import from_launcher
from agent.network.uplink_config import UplinkConfig
from agent.settings import SETTINGS, Given, from_environment, from_words, misspelt
from agent.workload_config import WorkloadConfig
from protocol.values import Mount

HOST_TIME = "SMOLVM_HOST_TIME_NS"
DEFAULT_HOSTS_DIR = Path("/etc/innkeep/certs.d")


@attrs.frozen(kw_only=True)
class AgentConfig:
    """Where the agent listens, keeps and finds things.

    ``storage_device`` is the only block device that the agent ever formats, checks or mounts.
    """

    listen: str
    in_image: bool
    """Whether the VM is ours: disks, links and power are touched only then."""
    owns_kernel: bool = False
    """Whether the kernel is ours, too, its clock and its random numbers: not in namespaces."""
    host_time_ns: int | None = None
    """The host's time when it started the VM, where it has said so."""
    storage_dir: Path = Path("/storage")
    storage_device: str | None = None
    storage_in_memory: bool = False
    root_error: str | None = None
    """Why changes to the VM's root are not kept on the disk that is there for them."""
    root_disks: tuple[Path, ...] = ()
    """Where init has disks mounted that the VM's root is on."""
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
    uplink: UplinkConfig | None = None
    """None: the VM's network is as it should be already."""
    uplink_error: str | None = None
    """Why it cannot be what it was to be."""
    workload_memory: int | Literal["max"] | None = None
    """Bytes for all workloads together; this and the next two: by the VM's size where None."""
    workload_pids: int | Literal["max"] | None = None
    command_pids: int | Literal["max"] | None = None
    boot_mounts: tuple[Mount, ...] = ()
    """Shares that the VM itself has mounted, and every container with it."""
    packed_layers: Mount | None = None
    """The share whose layers are the image, where there is one."""
    mkfs_erofs: str = "mkfs.erofs"
    crun: str = "crun"
    catatonit: str = "/usr/bin/catatonit"
    """The first process of containers that stay."""
    workload: WorkloadConfig = attrs.field(factory=WorkloadConfig)
    log_level: str = "INFO"
    problems: tuple[str, ...] = ()
    """What is wrong with the configuration, a sentence each: hosts are told with every pong."""
    refusal: str | None = None
    """Why it cannot be gone by: nothing else of it is here then, and work is refused with this."""

    @classmethod
    def from_boot(
        cls, cmdline: str, environ: Mapping[str, str], argv: Sequence[str]
    ) -> AgentConfig:
        """The configuration from the kernel's command line, the environment and the arguments.

        Arguments, where there are any, mean that this is not our image, whatever the machine's own
        kernel was told. In the image nothing is raised, for the agent is how a host learns of it.

        Raises:
            ConfigError: a value that is not what its setting takes.
            SystemExit: ``--help``, or arguments that do not parse; argparse has said why.
        """
        if argv:
            return cls._from_arguments(environ, argv)
        words = kernel_words(environ.get("INNKEEP_CMDLINE", cmdline))
        problems = misspelt(words, environ)
        given = {**from_launcher(environ), **from_environment(environ), **from_words(words)}
        listen = given["listen"].text if "listen" in given else DEFAULT_LISTEN
        try:
            settings = {"hosts_dir": DEFAULT_HOSTS_DIR, **_fields(given), **_storage(given)}
            settings.update(workload=_workload(given), **_network(given))
            problems += filter(None, [settings.get("uplink_error")])
            settings["boot_mounts"] = values.boot_mounts(environ)
            settings["ready_marker"] = environ.get("SMOLVM_READY_MARKER") or ".smolvm-ready"
            if launched := environ.get(HOST_TIME):
                settings["host_time_ns"] = values.time_ns(HOST_TIME, launched)
        except ConfigError as error:
            # Not gone by in part: what is missing may be what keeps a workload from the world.
            refusal = f"boot configuration: {error}"
            settings = {"storage_in_memory": True, "refusal": refusal}
            problems.append(str(error))
        # Of init, which has done it already.
        settings["root_error"] = environ.get("INNKEEP_ROOT_ERROR")
        settings["root_disks"] = tuple(map(Path, environ.get("INNKEEP_ROOT_DISKS", "").split()))
        settings.update(listen=listen, in_image=True, problems=tuple(problems))
        return cls(owns_kernel="INNKEEP_CMDLINE" not in environ, **settings)

    @classmethod
    def _from_arguments(cls, environ: Mapping[str, str], argv: Sequence[str]) -> AgentConfig:
        # Never needed in the image, where its import would delay the first answer.
        from agent.arguments import from_arguments

        outside = {setting.key for setting in SETTINGS if setting.flag and not setting.required}
        found = from_environment(environ)
        given = {
            **{key: found[key] for key in found if key in outside or key.startswith("workload.")},
            **from_arguments(argv),
        }
        return cls(
            in_image=False,
            storage_dir=Path(given["storage"].text),
            run_dir=Path(given["run_dir"].text),
            workload=_workload(given),
            problems=tuple(misspelt((), environ)),
            **_fields(given),
        )


def _fields(given: Mapping[str, Given]) -> dict[str, Any]:
    """The settings that are a field each."""
    return {
        setting.field: setting.read(given[setting.key].name, given[setting.key].text)
        for setting in SETTINGS
        if setting.field is not None and setting.key in given
    }


def _storage(given: Mapping[str, Given]) -> dict[str, Any]:
    storage = given.get("storage", Given("innkeep.storage", "memory"))
    root = given.get("root")
    if root is not None and root.text == storage.text:
        raise ConfigError(f"{root.name}={root.text}: that is the storage disk, expected another")
    if storage.text.startswith("/"):
        return {"storage_device": storage.text}
    if storage.text == "memory":
        return {"storage_in_memory": True}
    if storage.text == "dir":
        return {}
    raise ConfigError(f"{storage.name}={storage.text}: expected a device, 'memory' or 'dir'")


def _workload(given: Mapping[str, Given]) -> WorkloadConfig:
    found = {key.removeprefix("workload."): given[key] for key in given if "." in key}
    settings = {}
    for key, each in found.items():
        try:
            settings.update(WorkloadConfig.read(each.name, key, each.text))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return WorkloadConfig(**settings)


def _network(given: Mapping[str, Given]) -> dict[str, Any]:
    """The uplink; or why there is none, which is no more than a VM without a network."""
    found = [key for key in ("ip", *_OF_UPLINK) if key in given]
    if not found:
        return {}
    try:
        settings = {
            field: read(given[key].name, given[key].text)
            for key, (field, read) in _OF_UPLINK.items()
            if key in given
        }
        if "ip" in given:
            dhcp, addresses = values.interfaces(given["ip"].name, given["ip"].text)
            settings.update(dhcp=dhcp, addresses=addresses)
        return {"uplink": UplinkConfig(**settings)}
    except ConfigError as error:
        return {"uplink_error": str(error)}
    except ValueError as error:
        # It is at odds with itself.
        return {"uplink_error": f"{', '.join(given[key].name for key in found)}: {error}"}


_OF_UPLINK: Mapping[str, tuple[str, Callable[[str, str], Any]]] = {
    "gateway": ("gateways", values.addresses),
    "dns": ("nameservers", values.addresses),
    "mac": ("mac", values.mac),
    "mtu": ("mtu", values.mtu),
}
