"""How far the machine's agent gets to a URL, with what the image has of Python, TLS and CAs."""

from pathlib import Path

from protocol import decode_value, requests, responses
from protocol.client import AgentClient
from protocol.values import NetworkReport
from tests.support.certificates import PrivateCa
from tests.support.http_server import http_server


async def reported(client: AgentClient, url: str) -> NetworkReport:
    answer = await client.ask(requests.NetworkTest(url), responses.Ok)
    return decode_value(answer.data, NetworkReport)


async def test_a_server_is_reached_by_http(client: AgentClient) -> None:
    with http_server() as port:
        report = await reported(client, f"http://localhost:{port}/418")
    assert report.ok, report
    assert report.http.status == 418


async def test_a_server_that_the_systems_cas_do_not_vouch_for_is_not_reached_by_https(
    client: AgentClient, tmp_path: Path
) -> None:
    with http_server(PrivateCa(tmp_path).issue("127.0.0.1").context()) as port:
        report = await reported(client, f"https://127.0.0.1:{port}/")
    assert (report.ok, report.tcp.ok) == (False, True)
    assert "certificate verify failed" in str(report.http.error)


async def test_what_is_no_url_is_reported_and_no_error(client: AgentClient) -> None:
    report = await reported(client, "somewhere")
    assert report.dns.error == "url: expected http://HOST[:PORT]/PATH, or https"
