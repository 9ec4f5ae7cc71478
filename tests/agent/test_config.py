"""What the agent makes of the words that it is started with."""

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import pytest

from agent.bootwords import kernel_words, listen_argument
from agent.config import AgentConfig
from agent.config_values import ConfigError
from agent.network.uplink_config import UplinkConfig
from agent.settings import SETTINGS, Setting
from agent.workload_config import WorkloadConfig
from protocol.values import Mount

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"
ARGUMENTS = ["--listen", "unix:/tmp/a", "--storage", "/tmp/s", "--run-dir", "/tmp/r"]


def test_the_kernels_command_line_configures_the_agent_of_a_vm() -> None:
    config = AgentConfig.from_boot(
        "console=ttyS0 quiet innkeep.storage=/dev/vda innkeep.insecure_registry=10.0.2.2:5000,r:80 "
        "innkeep.ip=10.0.2.15/24 innkeep.gateway=10.0.2.2 innkeep.dns=10.0.2.3 "
        "innkeep.vsock_peers=1",
        {},
        [],
    )
    assert config.in_image
    assert config.listen == "vsock:6000"
    assert config.storage_device == "/dev/vda"
    assert config.insecure_registries == {"10.0.2.2:5000", "r:80"}
    assert config.vsock_peers == {1}
    assert config.uplink == UplinkConfig(
        addresses=(ipaddress.ip_interface("10.0.2.15/24"),),
        gateways=(ipaddress.ip_address("10.0.2.2"),),
        nameservers=(ipaddress.ip_address("10.0.2.3"),),
    )


def test_in_namespaces_the_same_words_come_from_the_environment() -> None:
    words = "innkeep.listen=unix:/run/host/a innkeep.storage=dir"
    config = AgentConfig.from_boot("innkeep.storage=/dev/sda", {"INNKEEP_CMDLINE": words}, [])
    assert config.listen == "unix:/run/host/a"
    assert config.storage_device is None
    assert not config.storage_in_memory


def test_init_tells_why_the_root_is_in_memory_and_that_is_no_setting() -> None:
    said = "mount /dev/vdb: it holds swap"
    environ = {"INNKEEP_ROOT_ERROR": said}
    config = AgentConfig.from_boot("innkeep.root=/dev/vdb", environ, [])
    assert (config.root_error, config.problems) == (said, ())


def test_the_smolvm_launcher_counts_the_mounts_that_it_names() -> None:
    environ = {
        "SMOLVM_MOUNT_COUNT": "2",
        "SMOLVM_MOUNT_0": "smolvm0:/srv/data:ro",
        "SMOLVM_MOUNT_1": "smolvm1:/srv/a:b:rw",
        "SMOLVM_MOUNT_2": "not counted",
    }
    assert AgentConfig.from_boot("", environ, []).boot_mounts == (
        Mount("smolvm0", "/srv/data", read_only=True),
        Mount("smolvm1", "/srv/a:b", read_only=False),
    )


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"SMOLVM_MOUNT_COUNT": "-1"}, "SMOLVM_MOUNT_COUNT=-1: expected a number"),
        (
            {"SMOLVM_MOUNT_COUNT": "1"},
            "SMOLVM_MOUNT_0: it is missing, of 1 that there are (SMOLVM_MOUNT_COUNT)",
        ),
        *(
            (
                {"SMOLVM_MOUNT_COUNT": "1", "SMOLVM_MOUNT_0": text},
                f"SMOLVM_MOUNT_0={text}: expected TAG:PATH:ro or TAG:PATH:rw",
            )
            for text in ("", "tag", "tag:/path", "tag:path:ro", ":/path:ro", "tag:/path:rx")
        ),
    ],
)
def test_a_mount_of_the_launcher_that_is_none_is_named(
    environ: Mapping[str, str], says: str
) -> None:
    assert AgentConfig.from_boot("", environ, []).problems == (says,)


def test_the_smolvm_launcher_names_the_share_of_packed_layers() -> None:
    for environ, cmdline in (
        ({"SMOLVM_PACKED_LAYERS": "smolvm_layers:/packed_layers"}, ""),
        ({}, "innkeep.packed_layers=smolvm_layers:/packed_layers"),
    ):
        config = AgentConfig.from_boot(cmdline, environ, [])
        assert config.packed_layers == Mount("smolvm_layers", "/packed_layers", read_only=True)
    assert AgentConfig.from_boot("", {}, []).packed_layers is None


@pytest.mark.parametrize("text", ["tag", "tag:path", ":/path", "/path"])
def test_a_share_of_packed_layers_that_is_none_is_named(text: str) -> None:
    config = AgentConfig.from_boot("", {"SMOLVM_PACKED_LAYERS": text}, [])
    says = f"SMOLVM_PACKED_LAYERS={text}: expected TAG:PATH"
    assert (config.problems, config.packed_layers) == ((says,), None)


def test_init_tells_which_disks_the_root_is_on() -> None:
    config = AgentConfig.from_boot("", {"INNKEEP_ROOT_DISKS": " /mnt/root /oldroot"}, [])
    assert config.root_disks == (Path("/mnt/root"), Path("/oldroot"))
    assert AgentConfig.from_boot("", {}, []).root_disks == ()


def test_without_a_named_disk_storage_lives_in_memory() -> None:
    config = AgentConfig.from_boot("quiet", {}, [])
    assert config.storage_device is None
    assert config.storage_in_memory


def test_arguments_mean_that_the_machine_is_not_ours_whatever_its_kernel_was_told() -> None:
    config = AgentConfig.from_boot("innkeep.storage=/dev/vda innkeep.ip=10.0.0.1/8", {}, ARGUMENTS)
    assert not config.in_image
    assert config.storage_device is None
    assert config.uplink is None
    assert config.storage_dir == Path("/tmp/s")
    assert config.run_dir == Path("/tmp/r")


def test_registries_may_be_repeated_as_arguments() -> None:
    config = AgentConfig.from_boot(
        "",
        {},
        [
            *ARGUMENTS,
            "--insecure-registry=a:1",
            "--insecure-registry",
            "b:2",
            "--registry-ca=c:3=/etc/ca.pem",
        ],
    )
    assert config.hosts_dir is None
    assert config.insecure_registries == {"a:1", "b:2"}
    assert config.registry_ca_files == {"c:3": Path("/etc/ca.pem")}


def test_mirrors_are_found_where_containerd_has_them_below_our_own_name_or_elsewhere() -> None:
    assert AgentConfig.from_boot("quiet", {}, []).hosts_dir == Path("/etc/innkeep/certs.d")
    config = AgentConfig.from_boot("innkeep.hosts_dir=/storage/certs.d", {}, [])
    assert config.hosts_dir == Path("/storage/certs.d")
    config = AgentConfig.from_boot("", {}, [*ARGUMENTS, "--hosts-dir=/etc/containerd/certs.d"])
    assert config.hosts_dir == Path("/etc/containerd/certs.d")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("innkeep.hosts_dir=certs.d", "expected a path that begins with /"),
        (
            "innkeep.storage=/dev/vda innkeep.root=/dev/vda",
            "innkeep.root=/dev/vda: that is the storage disk, expected another",
        ),
        ("innkeep.storage=vda", "innkeep.storage=vda: expected a device, 'memory' or 'dir'"),
        ("innkeep.vsock_peers=host", "innkeep.vsock_peers=host: "),
        ("innkeep.insecure_registry=http://r", "expected HOST:PORT, without a scheme"),
        ("innkeep.registry_ca=r:5000", "expected HOST:PORT=FILE"),
        ("innkeep.log=loud", "expected one of DEBUG, INFO"),
        ("innkeep.workload_memory=512", "innkeep.workload_memory=512: expected a size like 512M"),
        ("innkeep.workload_memory=-1M", "expected a size like 512M (K, M or G), or 'max'"),
        ("innkeep.workload_memory=1.5G", "expected a size"),
        ("innkeep.workload_memory=0M", "expected a size"),
        ("innkeep.workload_memory=M", "expected a size"),
        ("innkeep.workload_memory=", "expected a size"),
        ("innkeep.workload_pids=many", "innkeep.workload_pids=many: expected a number of proces"),
        ("innkeep.workload_pids=0", "expected a number of processes above 0, or 'max'"),
        ("innkeep.command_pids=1k", "innkeep.command_pids=1k: expected a number of processes"),
        ("innkeep.ssh_agent=yes", "innkeep.ssh_agent=yes: expected 0 or 1"),
        (
            "innkeep.host_sockets=v.sock",
            "innkeep.host_sockets=v.sock: expected a path that begins with /",
        ),
        ("innkeep.command_pids=\u00b2", "expected a number of processes"),
    ],
)
def test_a_word_that_means_nothing_is_named_with_what_was_expected(
    word: str, expected: str
) -> None:
    config = AgentConfig.from_boot(f"innkeep.vsock_peers=1 innkeep.listen=vsock:1 {word}", {}, [])
    assert expected in "".join(config.problems)
    # Told by the agent, which does nothing else.
    assert config.refusal == f"boot configuration: {config.problems[0]}"
    assert config == AgentConfig(
        listen="vsock:1",
        in_image=True,
        owns_kernel=True,
        storage_in_memory=True,
        problems=config.problems,
        refusal=config.refusal,
    )


def test_limits_are_left_to_the_machine_where_no_word_sets_them() -> None:
    config = AgentConfig.from_boot("innkeep.storage=memory", {}, [])
    assert config.workload_memory is config.workload_pids is config.command_pids is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512K", 512 << 10), ("300M", 300 << 20), ("2G", 2 << 30), ("max", "max")],
)
def test_the_memory_of_workloads_is_a_size(text: str, expected: int | str) -> None:
    config = AgentConfig.from_boot(f"innkeep.workload_memory={text}", {}, [])
    assert config.workload_memory == expected


def test_processes_are_counted_for_all_workloads_and_for_each_command() -> None:
    config = AgentConfig.from_boot("innkeep.workload_pids=max innkeep.command_pids=64", {}, [])
    assert config.workload_pids == "max"
    assert config.command_pids == 64


@pytest.mark.parametrize("name", ["ssh_agent", "dns_filter"])
def test_a_bridge_is_there_when_a_word_an_argument_or_the_launcher_says_so(name: str) -> None:
    variable = f"SMOLVM_{name.upper()}"
    argument = f"--{name.replace('_', '-')}"

    def configured(
        words: str = "", environ: Mapping[str, str] | None = None, argv: Sequence[str] = ()
    ) -> bool:
        value = getattr(AgentConfig.from_boot(words, environ or {}, argv), name)
        assert isinstance(value, bool)
        return value

    assert not configured()
    assert configured(f"innkeep.{name}=1")
    assert configured(environ={variable: "1"})
    assert not configured(f"innkeep.{name}=0", {variable: "1"})
    assert not configured(environ={variable: ""})
    assert not configured(argv=ARGUMENTS)
    assert configured(argv=[*ARGUMENTS, argument])
    assert configured(environ={variable: "1"}, argv=ARGUMENTS)
    assert configured(environ={f"INNKEEP_{name.upper()}": "1", variable: "0"})
    assert not configured(f"innkeep.{name}=0", {f"INNKEEP_{name.upper()}": "1"})
    with pytest.raises(ConfigError, match=f"{variable}=yes: expected 0 or 1"):
        configured(environ={variable: "yes"}, argv=ARGUMENTS)


def test_the_launcher_may_name_the_file_that_tells_of_readiness() -> None:
    assert AgentConfig.from_boot("", {}, []).ready_marker == ".smolvm-ready"
    environ = {"SMOLVM_READY_MARKER": "run/ready"}
    assert AgentConfig.from_boot("", environ, []).ready_marker == "run/ready"


def test_the_hosts_ports_are_vsocks_unless_a_path_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert AgentConfig.from_boot("", {}, []).host_sockets is None
    words = "innkeep.host_sockets=/run/host/agent.sock"
    assert AgentConfig.from_boot(words, {}, []).host_sockets == Path("/run/host/agent.sock")
    monkeypatch.chdir(tmp_path)
    config = AgentConfig.from_boot("", {}, [*ARGUMENTS, "--host-sockets=v.sock"])
    assert config.host_sockets == tmp_path / "v.sock"


def test_a_missing_argument_ends_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        AgentConfig.from_boot("", {}, ["--listen", "unix:/tmp/a"])
    assert end.value.code == 2
    assert "--storage" in capsys.readouterr().err


def test_what_names_no_setting_is_an_error_that_lists_the_near_ones() -> None:
    environ = {
        "INNKEEP_LGO": "info",
        "SMOLVM_NEWER": "1",
        "INNKEEP_CONNECT": "unix:/a",
        "HOME": "/",
    }
    config = AgentConfig.from_boot(
        "quiet innkeep.stroage=/dev/vda innkeep.hostname=a innkeep.log=debug innkeep.zzz",
        environ,
        [],
    )
    assert config.problems == (
        "innkeep.stroage: there is no such setting (did you mean innkeep.storage?)",
        "innkeep.zzz: there is no such setting",
        "INNKEEP_LGO: there is no such setting (did you mean INNKEEP_LOG?)",
    )
    # The rest is gone by: an older image cannot know what a newer word would have meant.
    assert config.refusal is None
    assert config.log_level == "DEBUG"


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--host-dir=/a", "unrecognized argument --host-dir (did you mean --hosts-dir?)"),
        ("--ssh", "unrecognized argument --ssh"),
        ("--frobnicate", "error: unrecognized argument --frobnicate\n"),
    ],
)
def test_an_argument_that_there_is_not_ends_with_the_near_ones(
    capsys: pytest.CaptureFixture[str], argument: str, said: str
) -> None:
    with pytest.raises(SystemExit) as end:
        AgentConfig.from_boot("", {}, [*ARGUMENTS, argument])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cmdline", "environ", "argv", "level"),
    [
        ("", {}, [], "INFO"),
        ("", {"INNKEEP_LOG": "error"}, [], "ERROR"),
        ("innkeep.log=debug", {"INNKEEP_LOG": "error"}, [], "DEBUG"),
        ("innkeep.log=debug", {"INNKEEP_LOG": ""}, ARGUMENTS, "INFO"),
        ("innkeep.log=debug", {"INNKEEP_LOG": "error"}, ARGUMENTS, "ERROR"),
        ("", {"INNKEEP_LOG": "error"}, [*ARGUMENTS, "--log=warning"], "WARNING"),
    ],
)
def test_arguments_come_before_words_and_words_before_the_environment(
    cmdline: str, environ: Mapping[str, str], argv: Sequence[str], level: str
) -> None:
    assert AgentConfig.from_boot(cmdline, environ, argv).log_level == level


def test_the_environment_alone_configures_a_vm() -> None:
    environ = {
        "INNKEEP_STORAGE": "/dev/vda",
        "INNKEEP_INSECURE_REGISTRY": "r:80,s:81",
        "INNKEEP_WORKLOAD_COMMAND": "sleep,5",
        "INNKEEP_CRUN": "/bin/crun",
    }
    config = AgentConfig.from_boot("quiet", environ, [])
    assert config.problems == ()
    assert config.storage_device == "/dev/vda"
    assert config.insecure_registries == {"r:80", "s:81"}
    assert config.workload.command == ("sleep", "5")
    assert config.crun == "/bin/crun"


def test_the_table_of_settings_is_the_codes_own() -> None:
    """Every row of docs/operating.md is a setting, spelt so, and every setting is there."""
    text = OPERATING.read_text(encoding="utf-8")
    table = text.partition("| word | variable | argument | meaning | default |\n")[2]
    rows = table.partition("\n\n")[0].splitlines()[1:]
    assert rows == [row(setting) for setting in SETTINGS]


def row(setting: Setting) -> str:
    argument = "--workload" if setting.key.startswith("workload.") else setting.flag
    value = "KEY=VALUE" if argument == "--workload" else setting.metavar
    cells = [
        f"`{setting.word}=`" if setting.in_image else "",
        f"`{setting.variable}`" if setting.in_image else "",
        f"`{argument}{f' {value}' if value else ''}`" if argument else "",
        setting.meaning,
        setting.default,
    ]
    if setting.launcher:
        cells[1] += f", `{setting.launcher}`"
    return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"


LAUNCHED = {
    "SMOLVM_NETWORK_BACKEND": "virtio-net",
    "SMOLVM_NETWORK_GUEST_IP": "10.0.2.15",
    "SMOLVM_NETWORK_GATEWAY": "10.0.2.2",
    "SMOLVM_NETWORK_PREFIX_LEN": "24",
    "SMOLVM_NETWORK_GUEST_MAC": "02:53:4D:00:00:02",
    "SMOLVM_NETWORK_DNS": "10.0.2.2",
}
LAUNCHED_6 = {
    "SMOLVM_NETWORK_GUEST_IP6": "fd53:4d00::2",
    "SMOLVM_NETWORK_GATEWAY6": "fd53:4d00::1",
    "SMOLVM_NETWORK_PREFIX_LEN6": "64",
}


def test_the_launcher_describes_the_network_in_its_own_words() -> None:
    def of(environ: Mapping[str, str], words: str = "") -> UplinkConfig | None:
        config = AgentConfig.from_boot(words, environ, [])
        assert config.problems == ()
        return config.uplink

    four = UplinkConfig(
        addresses=(ipaddress.ip_interface("10.0.2.15/24"),),
        gateways=(ipaddress.ip_address("10.0.2.2"),),
        nameservers=(ipaddress.ip_address("10.0.2.2"),),
        mac="02:53:4d:00:00:02",
    )
    assert of(LAUNCHED) == four
    assert of({**LAUNCHED, **LAUNCHED_6}) == attrs.evolve(
        four,
        addresses=(*four.addresses, ipaddress.ip_interface("fd53:4d00::2/64")),
        gateways=(*four.gateways, ipaddress.ip_address("fd53:4d00::1")),
    )
    assert of({**LAUNCHED, "SMOLVM_NETWORK_BACKEND": "tsi"}) is None
    assert of({**LAUNCHED, "SMOLVM_NETWORK_BACKEND": ""}) is None
    only_names = UplinkConfig(nameservers=four.nameservers)
    assert of({**LAUNCHED, "SMOLVM_NETWORK_SETUP": "preconfigured"}) == only_names
    assert of(LAUNCHED, "innkeep.dns=10.0.2.3") == attrs.evolve(
        four, nameservers=(ipaddress.ip_address("10.0.2.3"),)
    )


@pytest.mark.parametrize(
    ("words", "uplink"),
    [
        ("innkeep.ip=dhcp", UplinkConfig(dhcp=True)),
        (
            "innkeep.ip=dhcp,fd00::2/64 innkeep.mtu=1400",
            UplinkConfig(dhcp=True, addresses=(ipaddress.ip_interface("fd00::2/64"),), mtu=1400),
        ),
        (
            "innkeep.dns=10.0.2.3,fd00::3",
            UplinkConfig(
                nameservers=(ipaddress.ip_address("10.0.2.3"), ipaddress.ip_address("fd00::3"))
            ),
        ),
        ("innkeep.ip= innkeep.gateway=", UplinkConfig()),
    ],
)
def test_the_network_is_said_in_a_few_words(words: str, uplink: UplinkConfig) -> None:
    assert AgentConfig.from_boot(words, {}, []).uplink == uplink


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("innkeep.ip=10.0.2.15", "innkeep.ip=10.0.2.15: expected an address like 10.0.2.15/24"),
        ("innkeep.ip=10.0.2/24", "innkeep.ip=10.0.2/24: "),
        ("innkeep.ip=dhcp innkeep.gateway=gw", "innkeep.gateway=gw: "),
        ("innkeep.ip=10.0.2.15/24 innkeep.gateway=fd00::1", "no address of its family"),
        ("innkeep.ip=10.0.2.15/24 innkeep.gateway=10.0.2.2,10.0.2.3", "two gateways of one family"),
        ("innkeep.ip=fd00::2/64 innkeep.mtu=1000", "IPv6 needs an MTU of 1280 bytes, 1000 is less"),
        ("innkeep.mtu=67", "innkeep.mtu=67: expected a number of bytes from 68 to 65535"),
        ("innkeep.mac=01:00:5e:00:00:01", "expected the address of one like 52:54:00:12:34:56"),
        ("innkeep.mac=eth0", "innkeep.mac=eth0: expected the address of one"),
    ],
)
def test_a_network_that_cannot_be_is_none_and_everything_else_is_there(
    words: str, expected: str
) -> None:
    config = AgentConfig.from_boot(f"{words} innkeep.storage=dir", {}, [])
    (problem,) = config.problems
    assert expected in problem
    assert (config.uplink, config.uplink_error, config.refusal) == (None, problem, None)
    assert not config.storage_in_memory


def test_no_two_settings_are_spelt_alike() -> None:
    for name in ("word", "variable", "flag"):
        names = [found for setting in SETTINGS if (found := getattr(setting, name))]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_the_field_of_a_setting_is_one_of_the_configurations(setting: Setting) -> None:
    assert setting.field is None or setting.field in attrs.fields_dict(AgentConfig)


def test_the_last_of_a_key_wins_and_quotes_fall_away() -> None:
    assert kernel_words('innkeep.a=1 innkeep.b="x" a=2 innkeep.a=3') == {"a": "3", "b": "x"}


@pytest.mark.parametrize(
    ("argv", "address"),
    [
        (["--listen", "unix:/a"], "unix:/a"),
        (["--storage", "/s", "--listen=unix:/b"], "unix:/b"),
        (["--listen"], None),
        ([], None),
    ],
)
def test_the_address_to_listen_on_is_found_without_a_parser(
    argv: list[str], address: str | None
) -> None:
    assert listen_argument(argv) == address


def test_words_of_the_workload_are_read() -> None:
    config = AgentConfig.from_boot(
        "innkeep.workload.image=alpine innkeep.workload.overlay=web "
        "innkeep.workload.command=sh,-c,echo%20a%2Cb innkeep.workload.restart=on-failure "
        "innkeep.workload.log_size=1M innkeep.workload.token_file=/dev/vdb",
        {},
        [],
    )
    assert config.problems == ()
    assert config.workload == WorkloadConfig(
        token_file=Path("/dev/vdb"),
        image="alpine",
        overlay="web",
        command=("sh", "-c", "echo a,b"),
        restart="on-failure",
        log_bytes=1 << 20,
    )
    empty = AgentConfig.from_boot("innkeep.workload.command=", {}, [])
    assert empty.workload == WorkloadConfig(command=())
    assert AgentConfig.from_boot("", {}, []).workload == WorkloadConfig()


def test_arguments_name_the_workload_as_words_do() -> None:
    arguments = ["--workload", "token_file=/t", "--workload", "command=sleep,5"]
    config = AgentConfig.from_boot("", {}, [*ARGUMENTS, *arguments])
    assert config.workload == WorkloadConfig(token_file=Path("/t"), command=("sleep", "5"))


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("innkeep.workload.restart=sometimes", "never, on-failure, always"),
        ("innkeep.workload.log_size=1K", "64K to 1G"),
        ("innkeep.workload.log_size=max", "64K to 1G"),
        ("innkeep.workload.image=", "innkeep.workload.image"),
    ],
)
def test_a_wrong_word_of_the_workload_is_named(word: str, complaint: str) -> None:
    assert complaint in str(AgentConfig.from_boot(word, {}, []).refusal)
    key, _, value = word.removeprefix("innkeep.workload.").partition("=")
    with pytest.raises(ConfigError, match=complaint.removeprefix("innkeep.workload.")):
        AgentConfig.from_boot("", {}, [*ARGUMENTS, "--workload", f"{key}={value}"])


def test_a_misspelt_word_of_the_workload_is_unknown_or_refused() -> None:
    config = AgentConfig.from_boot("innkeep.workload.comand=true", {}, [])
    assert config.problems == (
        "innkeep.workload.comand: there is no such setting "
        "(did you mean innkeep.workload.command?)",
    )
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        AgentConfig.from_boot("", {}, [*ARGUMENTS, "--workload", "comand=true"])


@pytest.mark.parametrize(
    ("environ", "owns_kernel"),
    [({}, True), ({"INNKEEP_CMDLINE": "innkeep.storage=dir"}, False)],
)
def test_the_kernel_is_ours_only_where_it_has_told_us_itself(
    environ: Mapping[str, str], owns_kernel: bool
) -> None:
    assert AgentConfig.from_boot("", environ, []).owns_kernel is owns_kernel
    assert not AgentConfig.from_boot("", environ, ARGUMENTS).owns_kernel


def test_the_launchers_time_is_nanoseconds_or_an_error() -> None:
    told = AgentConfig.from_boot("", {"SMOLVM_HOST_TIME_NS": "1800000000000000000"}, [])
    assert told.host_time_ns == 1_800_000_000_000_000_000
    assert AgentConfig.from_boot("", {}, []).host_time_ns is None
    for text in ("-1", "1.8e18", "9223372036854775808", "now"):
        config = AgentConfig.from_boot("", {"SMOLVM_HOST_TIME_NS": text}, [])
        error = f"SMOLVM_HOST_TIME_NS={text}: expected nanoseconds since 1970"
        assert config.problems == (error,)
        assert config.host_time_ns is None
