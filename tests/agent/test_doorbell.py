"""Where the VM's readiness is told by a file, and how."""

import math
from pathlib import Path

import pytest

from agent.doorbell import shared_roots, write_marker
from agent.errors import AgentError
from agent.gate import Gate
from agent.uptime import started_s, uptime_s
from protocol.errors import ErrorCode

DISK = "25 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"
SHARE = "25 1 0:21 / / rw,relatime - virtiofs root rw"
LAYER = "30 25 0:30 / / rw,relatime - overlay root rw,lowerdir=/oldroot"
OLD_ROOT = "31 30 0:21 / /oldroot rw master:1 propagate_from:2 - virtiofs root rw"
ELSEWHERE = "32 30 0:40 / /mnt/virtiofs/a\\040b rw - virtiofs a\\040b rw"


@pytest.mark.parametrize(
    ("mounts", "roots"),
    [
        ([DISK, ELSEWHERE], []),
        ([SHARE], ["/"]),
        ([LAYER, OLD_ROOT], ["/oldroot"]),
        # What lies above counts.
        ([SHARE, LAYER], []),
        ([], []),
    ],
)
def test_the_roots_that_are_shares_are_found(mounts: list[str], roots: list[str]) -> None:
    assert shared_roots(mounts) == [Path(root) for root in roots]


def test_the_file_has_milliseconds_and_takes_an_earlier_ones_place(tmp_path: Path) -> None:
    marker = tmp_path / ".smolvm-ready"
    marker.write_text("left from an earlier boot, and longer")
    write_marker(marker, 1.2349)
    assert marker.read_text() == "1234"
    assert list(tmp_path.iterdir()) == [marker]


def test_a_gate_knows_when_it_was_decided_the_first_time() -> None:
    gate: Gate[int] = Gate()
    assert math.isnan(gate.decided_s)
    before = uptime_s()
    gate.fail(AgentError(ErrorCode.MOUNT_FAILED, "no disk"))
    decided_s = gate.decided_s
    gate.open(1)
    assert before <= decided_s == gate.decided_s <= uptime_s()


def test_this_process_began_before_now() -> None:
    assert 0 < started_s() < uptime_s()
