"""Interfaces, set up for real in a network namespace made for the test."""

import subprocess
import sys

from agent.network.links import Order

PROCESS = f"{sys.executable} -c 'from agent.network.links import main; main()'"
LINK = "ip link add eth0 index 2 type veth peer name host index 3 && ip link set host up"


def in_a_network_of_its_own(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["unshare", "--net", "sh", "-ec", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ".", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )


def carried_out(*orders: Order, before: str = LINK, look: str = "true") -> list[str]:
    """What the process answers to each order, and what the commands of `look` say then."""
    lines = "".join(f"set {order.line()}\n" for order in orders)
    done = in_a_network_of_its_own(f"{before}\n{PROCESS} <<'END'\n{lines}END\n{look}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_interface_gets_what_it_is_to_have_and_again_changes_nothing() -> None:
    order = Order(
        mac="02:00:00:00:00:07",
        mtu="1400",
        addresses=("10.0.2.15/24", "fd00::15/64"),
        gateways=("10.0.2.2", "fd00::2"),
        routes=("10.7.0.0/16,10.0.2.7", "10.8.0.0/16,0.0.0.0"),
    )
    look = (
        "ip -brief link show eth0; ip -brief address show eth0; ip route; ip -6 route show default"
    )
    first, second, link, addresses, *routes = carried_out(order, order, look=look)
    assert first == second == "eth0"
    assert link.split()[:3] == ["eth0@host", "UP", "02:00:00:00:00:07"]
    assert addresses.split()[2:4] == ["10.0.2.15/24", "fd00::15/64"]
    assert [route.strip() for route in routes] == [
        "default via 10.0.2.2 dev eth0 proto static onlink",
        "10.0.2.0/24 dev eth0 proto kernel scope link src 10.0.2.15",
        "10.7.0.0/16 via 10.0.2.7 dev eth0 proto static onlink",
        "10.8.0.0/16 dev eth0 proto static scope link",
        "default via fd00::2 dev eth0 proto static metric 1024 onlink pref medium",
    ]


def test_what_a_lease_gave_is_taken_back_with_it_and_ends_by_itself() -> None:
    lease = Order(addresses=("10.0.2.15/24",), lifetime_s="600")
    moved = Order(addresses=("10.0.2.16/24",), lost=("10.0.2.15/24", "10.0.2.99/24"))
    look = "ip -4 address show eth0 | grep -e inet -e valid"
    answer, address, valid = carried_out(lease, look=look)
    assert (answer, address.split()[1]) == ("eth0", "10.0.2.15/24")
    assert valid.split()[0] == "valid_lft"
    assert 0 < int(valid.split()[1].removesuffix("sec")) <= 600
    *answers, address, valid = carried_out(lease, moved, look=look)
    assert answers == ["eth0", "eth0"]
    assert (address.split()[1], valid.split()[1]) == ("10.0.2.16/24", "forever")


def test_routes_that_are_gone_are_taken_away_and_no_others() -> None:
    mine, theirs = "10.7.0.0/16,10.0.2.7", "10.8.0.0/16,0.0.0.0"
    first = Order(addresses=("10.0.2.15/24",), routes=(mine, theirs, "0.0.0.0/0,10.0.2.2"))
    # One that has another gateway by now is not the one that is gone.
    other = first._replace(routes=("0.0.0.0/0,10.0.2.3",), gone=(theirs, "0.0.0.0/0,10.0.2.2"))
    *answers, default, network, kept = carried_out(first, other, other, look="ip route")
    assert answers == ["eth0"] * 3
    assert "default via 10.0.2.3 dev eth0" in default
    assert network.startswith("10.0.2.0/24 ")
    assert kept.startswith("10.7.0.0/16 via 10.0.2.7 ")


def test_the_interface_is_the_one_of_the_address_that_was_named_or_the_first() -> None:
    two = "ip link add eth0 type veth peer name eth1"
    named = f"{two}; ip link set eth1 address 02:00:00:00:00:09"
    assert carried_out(Order(mac="02:00:00:00:00:09"), before=named) == ["eth1"]
    first = "ip -brief link | grep 02:00:00:00:00:08"
    answer, link = carried_out(Order(mac="02:00:00:00:00:08"), before=two, look=first)
    assert link.startswith(f"{answer}@")


def test_what_the_kernel_refuses_is_told_and_the_rest_is_done() -> None:
    order = Order(mtu="70000", addresses=("10.0.2.15/24",), gateways=("10.0.2.2",))
    answer, address = carried_out(order, look="ip -4 -brief address show eth0")
    name, problem = answer.split("\t")
    assert (name, problem.partition(": (")[0]) == ("eth0", "eth0: mtu 70000")
    assert address.split()[2] == "10.0.2.15/24"


def test_a_vm_without_an_interface_is_told_so() -> None:
    assert carried_out(Order(), before="true") == ["\tthe VM has no network interface"]


def test_an_order_is_the_same_behind_its_line() -> None:
    order = Order(
        "02:00:00:00:00:07", "1400", "9", ("1/2", "::/3"), ("4",), ("5/6,7",), ("8/9",), ("0/0,1",)
    )
    assert Order.of_line(order.line()) == order
    assert Order.of_line(Order().line()) == Order()


def test_the_process_that_sets_it_up_imports_nothing_that_it_has_no_use_for() -> None:
    """An emulated machine that shares a busy processor takes a minute for all of it."""
    script = "import sys; from agent.network.links import main; main(); print(*sys.modules)"
    done = in_a_network_of_its_own(f"echo 'set ' | {sys.executable} -c '{script}'")
    assert done.returncode == 0, done.stderr
    imported = done.stdout.split()
    assert "pyroute2.iproute.linux" in imported
    assert not {"protocol", "trio", "attr", "pyroute2.ndb", "pyroute2.conntrack"} & set(imported)
