"""Everything that the agent can be told at its start, and how it is spelt.

A setting is ``innkeep.KEY=`` on the kernel's command line, ``INNKEEP_KEY=`` in the environment and
``--KEY`` among the arguments, each where it makes sense; docs/operating.md has them as a table,
and a test holds that against this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs

from agent import config_values as values
from agent.bootwords import PREFIX, VARIABLE_PREFIX, variable_of
from agent.workload_config import WORKLOAD_KEYS
from protocol.spelling import near


@attrs.frozen(kw_only=True)
class Setting:
    """One of them.

    ``field`` is the AgentConfig's, and ``read`` makes its value of a text; a setting without them
    is put together with others. ``flag`` is the argument, without one it is for the image only;
    ``metavar`` stands for its value, and a flag without one takes none. ``launcher`` is what the
    smolvm launcher calls it. ``for_init``: the image's init reads the word.
    """

    key: str
    meaning: str
    default: str = "none"
    field: str | None = None
    read: Callable[[str, str], object] = values.text
    flag: str | None = None
    metavar: str | None = None
    is_path: bool = False
    """Whether an argument may be relative to the current directory."""
    is_list: bool = False
    """Whether an argument may be repeated, to the same effect as commas."""
    required: bool = False
    """Whether there is no doing without the argument."""
    launcher: str | None = None
    in_image: bool = True
    """Whether it is a word and a variable, too."""

    @property
    def word(self) -> str:
        return PREFIX + self.key

    @property
    def variable(self) -> str:
        return variable_of(self.key)


def _workload(key: str, meaning: str, default: str = "none") -> Setting:
    # As an argument it is --workload KEY=VALUE.
    return Setting(key=f"workload.{key}", meaning=meaning, default=default)


SETTINGS: tuple[Setting, ...] = (
    Setting(
        key="listen",
        field="listen",
        flag="--listen",
        metavar="ADDRESS",
        required=True,
        meaning="where to serve: `vsock:PORT` or `unix:PATH`",
        default="`vsock:6000`",
    ),
    Setting(
        key="storage",
        flag="--storage",
        metavar="DIR",
        is_path=True,
        required=True,
        meaning="where images and overlays are: the disk, by its device; `memory`; `dir`: "
        "/storage is there already. As an argument a directory",
        default="`memory`",
    ),
    Setting(
        key="root",
        meaning="the disk that keeps the changes to the VM's root, by its device, see below; read "
        "by init",
        default="memory",
    ),
    Setting(
        key="run_dir",
        flag="--run-dir",
        metavar="DIR",
        is_path=True,
        required=True,
        in_image=False,
        meaning="bundles, logs and sockets",
        default="`/run/innkeep`",
    ),
    Setting(
        key="insecure_registry",
        field="insecure_registries",
        read=values.registries,
        flag="--insecure-registry",
        metavar="HOST:PORT",
        is_list=True,
        meaning="registries to speak plain HTTP to, comma-separated",
    ),
    Setting(
        key="registry_ca",
        field="registry_ca_files",
        read=values.ca_files,
        flag="--registry-ca",
        metavar="HOST:PORT=FILE",
        is_list=True,
        meaning="a private CA's certificates for a registry, comma-separated",
    ),
    Setting(
        key="hosts_dir",
        field="hosts_dir",
        read=values.absolute_path,
        flag="--hosts-dir",
        metavar="DIR",
        is_path=True,
        meaning="where mirrors of registries are configured, see below",
        default="`/etc/innkeep/certs.d`",
    ),
    Setting(
        key="ip",
        meaning="the addresses of the VM's network interface, each with its prefix length, IPv4 "
        "and IPv6, comma-separated; `dhcp`: one is a DHCP server's. See below",
    ),
    Setting(key="gateway", meaning="the default routes', one of a family, comma-separated"),
    Setting(key="dns", meaning="name servers, comma-separated"),
    Setting(key="mac", meaning="the interface is the one with this address", default="the first"),
    Setting(key="mtu", meaning="the interface's, in bytes", default="the interface's own"),
    Setting(
        key="hostname",
        launcher="SMOLVM_MACHINE_NAME",
        meaning="the VM's name; read by init",
        default="`innkeep`",
    ),
    Setting(
        key="log",
        field="log_level",
        read=values.log_level,
        flag="--log",
        metavar="LEVEL",
        meaning="`debug`, `info`, `warning` or `error`",
        default="`info`",
    ),
    Setting(
        key="ssh_agent",
        field="ssh_agent",
        read=values.switch,
        flag="--ssh-agent",
        launcher="SMOLVM_SSH_AGENT",
        meaning="`1`: forward the host's SSH agent, see below",
        default="`0`",
    ),
    Setting(
        key="dns_filter",
        field="dns_filter",
        read=values.switch,
        flag="--dns-filter",
        launcher="SMOLVM_DNS_FILTER",
        meaning="`1`: have the host resolve all names, see below",
        default="`0`",
    ),
    Setting(
        key="host_sockets",
        field="host_sockets",
        read=values.absolute_path,
        flag="--host-sockets",
        metavar="PREFIX",
        is_path=True,
        meaning="where there is no vsock: port N of the host is the unix socket at this path "
        "with `_N` behind it",
        default="vsock's",
    ),
    Setting(
        key="workload_memory",
        field="workload_memory",
        read=values.memory,
        meaning="memory for all commands and containers together: a size with K, M or G, or `max`",
        default="by the VM's size, see below",
    ),
    Setting(
        key="workload_pids",
        field="workload_pids",
        read=values.processes,
        meaning="processes and threads for all of them together, or `max`",
        default="by the VM's size, see below",
    ),
    Setting(
        key="command_pids",
        field="command_pids",
        read=values.processes,
        meaning="the same for each command or container, or `max`",
        default="half of that",
    ),
    _workload(
        "token_file", "the file, or the disk, with the token of the workload's ports", "see below"
    ),
    _workload(
        "image",
        "the image whose container the workload and `exec` run in; without one they run in the "
        "VM itself",
    ),
    _workload("overlay", "that container's `persistent_overlay_id`", "`workload`"),
    _workload(
        "command",
        "the workload to start at boot: words between commas, %-encoded where they hold commas "
        "or spaces; empty: the image's own",
    ),
    _workload(
        "restart",
        "`never`, `on-failure` or `always`: when that is started again",
        "`never`",
    ),
    _workload("log_size", "how much of the workload's output is kept, 64K to 1G", "`4M`"),
    Setting(
        key="vsock_peers",
        field="vsock_peers",
        read=values.cids,
        meaning="further CIDs to serve on vsock, comma-separated, for tests: a container with "
        "such a CID is root in the VM",
    ),
    Setting(
        key="packed_layers",
        field="packed_layers",
        read=values.packed_layers,
        launcher="SMOLVM_PACKED_LAYERS",
        meaning="`TAG:PATH`: the virtiofs share with the layers of the one image that there is, "
        "see below",
    ),
    Setting(
        key="mkfs_erofs",
        field="mkfs_erofs",
        flag="--mkfs-erofs",
        metavar="PROGRAM",
        meaning="erofs-utils' program, 1.8.6 or later",
        default="`mkfs.erofs`",
    ),
    Setting(
        key="crun",
        field="crun",
        flag="--crun",
        metavar="PROGRAM",
        meaning="what containers are run with",
        default="`crun`",
    ),
    Setting(
        key="catatonit",
        field="catatonit",
        flag="--catatonit",
        metavar="PROGRAM",
        meaning="the first process of containers that stay",
        default="`/usr/bin/catatonit`",
    ),
)
assert {s.key for s in SETTINGS if s.key.startswith("workload.")} == {
    f"workload.{key}" for key in WORKLOAD_KEYS
}

# What init tells the agent, and what the client, the image's build and the tests are told.
_VARIABLES_OF_OTHERS = frozenset(
    f"{VARIABLE_PREFIX}{name}"
    for name in (
        *("CMDLINE", "ROOT_DISKS", "ROOT_ERROR"),
        *("CONNECT", "DEBIAN_MIRROR", "ROUNDS", "SEED", "TOKEN_FILE"),
    )
)


@attrs.frozen
class Given:
    """A setting's text, and the name that it was given under."""

    name: str
    text: str


def from_words(words: Mapping[str, str]) -> dict[str, Given]:
    """The settings that a kernel's command line holds, by key."""
    return {
        setting.key: Given(setting.word, words[setting.key])
        for setting in SETTINGS
        if setting.in_image and setting.key in words
    }


def from_environment(environ: Mapping[str, str]) -> dict[str, Given]:
    """The settings of the environment, by key; an empty variable is none."""
    return {
        setting.key: Given(name, text)
        for setting in SETTINGS
        if setting.in_image
        for name in (setting.launcher, setting.variable)
        if name and (text := environ.get(name))
    }


def misspelt(words: Iterable[str], environ: Iterable[str]) -> list[str]:
    """What to say of words (without their prefix) and variables of ours that name no setting.

    Those of the smolvm launcher are its own: a newer one may have more.
    """
    known = {setting.word: setting.variable for setting in SETTINGS if setting.in_image}
    said = [
        f"{PREFIX}{key}: there is no such setting{near(PREFIX + key, known, PREFIX)}"
        for key in sorted(words)
        if PREFIX + key not in known
    ]
    variables = {*known.values(), *_VARIABLES_OF_OTHERS}
    said += [
        f"{name}: there is no such setting{near(name, known.values(), VARIABLE_PREFIX)}"
        for name in sorted(environ)
        if name.startswith(VARIABLE_PREFIX) and name not in variables
    ]
    return said
