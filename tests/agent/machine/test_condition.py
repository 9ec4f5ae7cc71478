"""The network, mounts and versions, beside what other programs say of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.machine import network
from agent.machine.mounts import mounts
from agent.machine.versions import KnownVersions
from protocol.machine import MountPoint

# In a network namespace of its own: a link with addresses and gateways, and one that is down.
LINKS = """\
ip link set lo up
ip link add name wired type veth peer name far; ip link add name spare type veth peer name away
ip link set far up; ip link set wired up mtu 1400
ip address add 192.0.2.5/24 dev wired; ip address add 2001:db8::5/64 dev wired nodad
ip route add default via 192.0.2.1 metric 7; ip route add 198.51.100.0/25 dev wired
ip -6 route add default via 2001:db8::1 dev wired metric 9
mount -t sysfs sysfs /sys
exec "$@"
"""
TOLD = """\
import json, attrs
from agent.machine import network
print(json.dumps([attrs.asdict(each) for each in (*network.interfaces(), *network.routes())]))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, object]]:
    script = ["unshare", "--net", "--mount", "sh", "-ec", LINKS, "sh", sys.executable, "-c", TOLD]
    ran = subprocess.run(script, stdout=subprocess.PIPE, check=True)
    both = [each for each in json.loads(ran.stdout) if each.get("interface") != "far"]
    return {each.get("name") or each["destination"]: each for each in both}


def test_interfaces_have_their_state_and_all_their_addresses(
    told: dict[str, dict[str, object]],
) -> None:
    addresses = told["wired"].pop("addresses")
    assert isinstance(addresses, list)
    assert addresses[:2] == ["192.0.2.5/24", "2001:db8::5/64"]
    assert told["wired"].pop("mac") != ""
    assert told["wired"] == {"name": "wired", "up": True, "carrier": True, "mtu": 1400}
    assert (told["spare"]["up"], told["spare"]["carrier"], told["spare"]["addresses"]) == (
        False,
        False,
        [],
    )
    assert told["lo"]["addresses"] == ["127.0.0.1/8", "::1/128"]


@pytest.mark.parametrize(
    ("destination", "gateway", "metric"),
    [
        ("0.0.0.0/0", "192.0.2.1", 7),
        ("192.0.2.0/24", None, 0),
        ("198.51.100.0/25", None, 0),
        ("2001:db8::/64", None, 256),
        ("::/0", "2001:db8::1", 9),
    ],
)
def test_routes_have_their_gateway_and_metric(
    told: dict[str, dict[str, object]], destination: str, gateway: str | None, metric: int
) -> None:
    assert told[destination] == {
        "destination": destination,
        "gateway": gateway,
        "interface": "wired",
        "metric": metric,
    }


def test_resolv_conf_is_told_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert network.resolv_conf(path) is None
    path.write_bytes(b"nameserver 192.0.2.53\n# \xff\n")
    assert network.resolv_conf(path) == "nameserver 192.0.2.53\n# �\n"


def test_mounts_are_told_without_what_may_be_secret_in_their_options(tmp_path: Path) -> None:
    lines = [
        "25 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard",
        "26 25 0:9 / /mnt/a\\040b ro - cifs //server/share ro,user=me,password=hunter2,vers=3.0",
        f"27 25 0:10 / /merged rw - overlay overlay rw,lowerdir={'/layer:' * 100}",
    ]
    (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in lines))
    root, share, overlay = mounts(tmp_path / "mountinfo").points
    assert root == MountPoint(
        path="/", source="/dev/vda", kind="ext4", options="rw,relatime,rw,discard"
    )
    assert share.options == "ro,ro,user=me,password=<hidden>,vers=3.0"
    assert overlay.options.endswith("…")
    assert len(overlay.options) < 300


def test_of_many_mounts_the_first_are_told_and_how_many_are_not(tmp_path: Path) -> None:
    line = "25 1 254:0 / / rw - ext4 /dev/vda rw\n"
    (tmp_path / "mountinfo").write_text(line * 1000)
    told = mounts(tmp_path / "mountinfo")
    assert len(told.points) + told.left_out == 1000
    assert len(told.points) == 256


def test_outside_the_image_programs_are_asked_for_their_versions(tmp_path: Path) -> None:
    crun = tmp_path / "crun"
    crun.write_text(f'#!/bin/sh\necho x >>{tmp_path}/asked; echo "crun version 1.21"; echo more\n')
    crun.chmod(0o755)
    known = KnownVersions(str(crun), str(tmp_path / "none"), None)
    for _ in range(2):
        versions, causes = known.read()
        assert (versions.crun, versions.erofs_utils, versions.image) == ("1.21", None, None)
        assert causes["erofs_utils"].startswith("No such file or directory")
        assert causes["image"] == "the agent runs outside its image"
    assert (tmp_path / "asked").read_text() == "x\n"


def test_in_the_image_its_build_has_written_them_down(tmp_path: Path) -> None:
    (tmp_path / "versions").write_text("image abc\ncrun 1.21-1\nerofs-utils 1.8.6-1\n")
    versions, causes = KnownVersions("none", "none", tmp_path / "versions").read()
    assert (versions.image, versions.crun, versions.erofs_utils) == ("abc", "1.21-1", "1.8.6-1")
    assert causes == {}
