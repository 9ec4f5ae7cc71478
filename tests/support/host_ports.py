"""Listening where the agent finds its host's ports: unix sockets, `PREFIX_PORT`."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from attrs import frozen

Talk = Callable[[trio.SocketStream], Awaitable[None]]


@frozen
class HostPorts:
    """The host's ports for one machine, whose paths begin with `prefix`."""

    prefix: Path

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[trio.SocketListener]:
        """A listener for the block, for a test that accepts by itself."""
        path = trio.Path(f"{self.prefix}_{port}")
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen(1024)
        try:
            async with trio.SocketListener(listener) as accepting:
                yield accepting
        finally:
            with trio.CancelScope(shield=True):
                await path.unlink()

    @asynccontextmanager
    async def served(self, port: int, talk: Talk) -> AsyncIterator[None]:
        """Have `talk` see to every connection during the block; it is closed afterwards."""

        async def see_to(stream: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                async with stream:
                    await talk(stream)

        async with self.listening(port) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, see_to, [listener])
            yield
            nursery.cancel_scope.cancel()
