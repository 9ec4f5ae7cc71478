"""The host's end of the workload protocol, over any trio stream."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Self

import trio

from protocol import codec, workload
from protocol.address import beside, parse_address
from protocol.constants import PROTOCOL_VERSION, Port
from protocol.stream import ConnectionFailed, FrameStream, open_stream
from protocol.workload import GuestMessage, HostMessage


class AuthenticationFailed(Exception):
    """The agent did not let us in; the text names it, and not the token."""


class WorkloadClient:
    """One connection to the workload's control (port 5000) or to its log (port 5001).

    ``authenticate`` comes first. Then any task may ``send``, and one may ``receive``: messages of
    many requests come mixed, each with the ``request_id`` that it belongs to. On the log's port
    there is only to receive.

    Methods raise ConnectionFailed when the agent is gone, and ProtocolError for frames or messages
    that are none. The connection is closed when a send is cancelled, since its position is lost
    then; the agent ends what it ran by ``exec``. ``name`` is what errors call the other end;
    ``send_size`` limits the bytes of one send. Closing the client closes the stream.
    """

    def __init__(
        self, stream: trio.abc.Stream, *, name: str = "the agent", send_size: int | None = None
    ) -> None:
        self._frames = FrameStream(stream, name, send_size)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Hang up; the workload goes on."""
        await self._frames.aclose()

    async def authenticate(self, token: str, *, follow: bool = True) -> None:
        """Show the token. Raises AuthenticationFailed.

        Without ``follow`` the log ends with what is there now, and the agent hangs up.
        """
        # Who is refused before it was asked has something to read all the same.
        with suppress(ConnectionFailed):
            await self.send(workload.Auth(token, PROTOCOL_VERSION, follow))
        answer = await self.receive()
        if not isinstance(answer, workload.AuthOk):
            raise AuthenticationFailed(
                f"{self._frames.name}: the agent did not accept the token: it is not the VM's, the "
                "VM has none, or ten wrong ones came within the last minute"
            )

    async def send(self, message: HostMessage) -> None:
        """Send a message, whole; what it brings about comes by ``receive``."""
        await self._frames.send(self._frames.pieces(codec.encode(message)))

    async def receive(self) -> GuestMessage:
        """The next message. Safe to cancel."""
        message: GuestMessage = codec.decode(await self._frames.receive(), GuestMessage).body
        return message


@asynccontextmanager
async def open_workload_client(
    address: str,
    token: str,
    port: Port = Port.WORKLOAD_CONTROL,
    *,
    follow: bool = True,
) -> AsyncIterator[WorkloadClient]:
    """A client that the agent has let in; ``address`` is the agent's own, as for ``open_client``.

    Closes the connection on leaving. Raises InvalidAddress, ConnectionFailed or
    AuthenticationFailed.
    """
    place = beside(parse_address(address), port)
    stream, send_size = await open_stream(place)
    async with WorkloadClient(stream, name=str(place), send_size=send_size) as client:
        await client.authenticate(token, follow=follow)
        yield client
