"""``innkeep network-test``: a report for people, and for programs."""

import json
from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.values import HttpRequest, NameResolution, NetworkReport, TcpConnect
from tests.protocol.command_line import with_answers

URL = "http://example.org/"
REACHED = NetworkReport(
    ok=True,
    dns=NameResolution(True, 12, None, ("192.0.2.1", "2001:db8::1")),
    tcp=TcpConnect(True, 3, None, "192.0.2.1:80"),
    http=HttpRequest(True, 101, None, 404),
)
LOST = NetworkReport(
    ok=False,
    dns=NameResolution(True, 12, None, ("192.0.2.1",)),
    tcp=TcpConnect(False, 0, "Network is unreachable: 192.0.2.1:80"),
    http=HttpRequest(False, 0, "not tried"),
)


@pytest.mark.parametrize(
    ("report", "lines", "status"),
    [
        (
            REACHED,
            [
                "name        12 ms  192.0.2.1, 2001:db8::1",
                "connect      3 ms  192.0.2.1:80",
                "http       101 ms  status 404",
            ],
            0,
        ),
        (
            LOST,
            [
                "name        12 ms  192.0.2.1",
                "connect      0 ms  Network is unreachable: 192.0.2.1:80",
                "http         0 ms  not tried",
            ],
            1,
        ),
    ],
)
async def test_every_step_is_told_and_the_status_says_whether_all_went_well(
    tmp_path: Path, report: NetworkReport, lines: list[str], status: int
) -> None:
    answers = {requests.NetworkTest: [[responses.Ok(report)]]}
    result, asked = await with_answers(tmp_path / "agent.sock", answers, "network-test", URL)
    assert asked == [requests.NetworkTest(URL)]
    assert result.stdout.decode().splitlines() == lines
    assert result.returncode == status


async def test_programs_get_the_report_as_it_came(tmp_path: Path) -> None:
    answers = {requests.NetworkTest: [[responses.Ok(LOST)]]}
    result, _ = await with_answers(tmp_path / "agent.sock", answers, "--json", "network-test", URL)
    shown = json.loads(result.stdout)
    assert shown["tcp"]["error"] == LOST.tcp.error
    assert result.returncode == 1
