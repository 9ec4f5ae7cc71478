"""A unix socket in front of another, which counts what passes, and may cut it short."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import attrs
import trio

_BLOCK = 64 * 1024


@attrs.define
class Relay:
    """Passes bytes on until so many have gone one way or the other; then it hangs up on both."""

    address: str
    most_bytes: int | None
    to_agent_bytes: int = 0
    from_agent_bytes: int = 0


@asynccontextmanager
async def relayed(
    directory: Path, address: str, most_bytes: int | None = None
) -> AsyncIterator[Relay]:
    """A relay to the agent at `unix:PATH`, for the block."""
    path = directory / f"relay-{secrets.token_hex(4)}.sock"
    relay = Relay(f"unix:{path}", most_bytes)

    async def serve(host: trio.SocketStream) -> None:
        path = address.removeprefix("unix:")
        async with (
            host,
            await trio.open_unix_socket(path) as agent,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(_pass, relay, "to_agent_bytes", host, agent, nursery)
            nursery.start_soon(_pass, relay, "from_agent_bytes", agent, host, nursery)

    listening = trio.socket.socket(trio.socket.AF_UNIX)
    await listening.bind(str(path))
    listening.listen(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listening)])
        yield relay
        nursery.cancel_scope.cancel()


async def _pass(
    relay: Relay,
    counter: str,
    source: trio.SocketStream,
    target: trio.SocketStream,
    both: trio.Nursery,
) -> None:
    try:
        while data := await source.receive_some(_BLOCK):
            count = getattr(relay, counter) + len(data)
            setattr(relay, counter, count)
            if relay.most_bytes is not None and count > relay.most_bytes:
                break
            await target.send_all(data)
    except trio.BrokenResourceError:
        pass
    both.cancel_scope.cancel()
