"""The VM's interface, set up for real in a network namespace made for the test."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import ipaddress, pathlib, sys
from agent.network.links import bring_up, use_nameservers
for _ in range(2):
    bring_up(ipaddress.ip_interface("10.0.2.15/24"), ipaddress.ip_address("10.0.2.2"))
    use_nameservers([ipaddress.ip_address("10.0.2.3")], pathlib.Path(sys.argv[1]))
"""


def in_a_network_of_its_own(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["unshare", "--net", "sh", "-ec", script], capture_output=True, text=True, check=False
    )


def test_an_interface_gets_its_address_route_and_name_server_and_again_changes_nothing(
    tmp_path: Path,
) -> None:
    script = tmp_path / "configure.py"
    script.write_text(SCRIPT)
    done = in_a_network_of_its_own(
        "ip link add eth0 index 2 type veth peer name host index 3 && ip link set host up && "
        f"PYTHONPATH=. {sys.executable} {script} {tmp_path}/resolv.conf && "
        "ip -4 -brief address show eth0 && ip route"
    )
    assert done.returncode == 0, done.stderr
    address, *routes = done.stdout.splitlines()
    assert address.split()[0].startswith("eth0")
    assert address.split()[2] == "10.0.2.15/24"
    assert any(route.startswith("default via 10.0.2.2 dev eth0") for route in routes)
    assert (tmp_path / "resolv.conf").read_text() == "nameserver 10.0.2.3\n"


def test_a_vm_without_an_interface_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "configure.py"
    script.write_text(SCRIPT)
    done = in_a_network_of_its_own(f"PYTHONPATH=. {sys.executable} {script} {tmp_path}/resolv.conf")
    assert "configure the network with 10.0.2.15/24: " in done.stderr
    assert "the VM has no network interface" in done.stderr


def test_the_process_that_sets_it_up_imports_nothing_that_it_has_no_use_for() -> None:
    """An emulated machine that shares a busy processor takes a minute for all of it."""
    script = (
        f"PYTHONPATH=. {sys.executable} -c 'import sys; from agent.network import links; "
        'links._configure(None, ""); print(*sys.modules)\''
    )
    done = in_a_network_of_its_own(script)
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert "pyroute2.iproute.linux" in imported
    assert not {"protocol", "trio", "attr", "pyroute2.ndb", "pyroute2.conntrack"} & set(imported)
