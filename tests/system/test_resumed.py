"""``resumed`` where the kernel is not the agent's own: nothing of it is touched, and it is said."""

import time

from protocol import decode_value, requests, responses
from protocol.client import AgentClient
from protocol.values import Resumption
from tests.support.execution import refusal


async def test_a_machine_of_namespaces_keeps_its_hands_off_the_kernel(client: AgentClient) -> None:
    pong = await client.ask(requests.Ping(), responses.Pong)
    assert "resumed-v1" in pong.capabilities
    # Were it believed, this machine's clock would stand there now.
    long_gone_ns = time.time_ns() - 3600 * 10**9
    answer = await client.ask(
        requests.Resumed(time_ns=long_gone_ns, entropy=bytes(64)), responses.Ok
    )
    assert time.time_ns() > long_gone_ns + 3599 * 10**9
    done = decode_value(answer.data, Resumption)
    assert not done.ok
    assert (done.clock.ok, done.clock.source, done.clock.step_ns) == (False, None, 0)
    assert (done.randomness.ok, done.randomness.credited_bytes) == (False, 0)
    for error in (done.clock.error, done.randomness.error):
        assert error == "the kernel is not this VM's own: left alone"
    assert (done.mounts.ok, done.mounts.checked) == (True, ("/storage",))
    assert done.network.ok


async def test_more_bytes_than_anybody_needs_are_refused(client: AgentClient) -> None:
    refused = await refusal(client, requests.Resumed(entropy=bytes(4097)))
    assert (refused.code, refused.message) == (
        "INVALID_REQUEST",
        "entropy: 4097 bytes are more than the 4096 allowed; 64 are plenty",
    )
