"""The VM's name server: it has the host answer every query, who may refuse what he likes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import attrs
import trio

from agent.errors import cause_of
from agent.network.bounded import serve_bounded
from agent.network.dns_message import failure, is_answer, is_query, shortened, udp_limit
from agent.network.dns_stream import DnsStream
from agent.network.host import Host
from protocol.constants import Port

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
PORT = 53

# Resolvers wait 5 s for an answer before they ask again.
LIMIT_S = 4.0

# Descriptors: one for each query that the host is asked, of the 1024 that the agent may have.
_ASKED_AT_ONCE = 128
# Memory: some kilobytes for each that waits. What comes beyond that waits in the socket's buffer,
# which has room for about as many.
_DATAGRAMS_AT_ONCE = 2048
_DATAGRAM_BUFFER_BYTES = 4 << 20
_CONNECTIONS_AT_ONCE = 32
_PIPELINED_AT_ONCE = 32
# RFC 7766 section 6.2.3: seconds.
_IDLE_S = 10.0
_SEND_S = 10.0

_QUERY_BYTES = 65535
# asm-generic/socket.h: as SO_RCVBUF, but root may have more than the limit.
_SO_RCVBUFFORCE = 33


@attrs.frozen
class Sockets:
    """Where queries come in."""

    udp: socket.socket
    tcp: socket.socket


@contextmanager
def listening(address: str = ADDRESS) -> Iterator[Sockets]:
    """Sockets for ``serve``, closed after the block.

    Raises:
        OSError: EADDRINUSE and the like.
    """
    with ExitStack() as stack:
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.setblocking(False)
        with suppress(PermissionError):
            udp.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BUFFER_BYTES)
        udp.bind((address, PORT))
        tcp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tcp.bind((address, PORT))
        tcp.listen(128)
        yield Sockets(udp, tcp)


async def serve(sockets: Sockets, host: Host) -> None:
    """Answer queries until cancelled, with what the host says or else with SERVFAIL."""
    server = _Server(host)
    listener = trio.SocketListener(trio.socket.from_stdlib_socket(sockets.tcp))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_datagrams, sockets.udp)
        nursery.start_soon(
            serve_bounded, "dns filter", listener, _CONNECTIONS_AT_ONCE, server.converse
        )


class _Server:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._asking = trio.Semaphore(_ASKED_AT_ONCE)
        self._host_answers = True

    async def serve_datagrams(self, udp: socket.socket) -> None:
        slots = trio.Semaphore(_DATAGRAMS_AT_ONCE)

        async def answer(query: bytes, client: tuple[str, int]) -> None:
            try:
                reply = await self.answer(query)
                try:
                    reply = shortened(reply, udp_limit(query))
                except ValueError:
                    reply = failure(query)
                await _send_datagram(udp, reply, client)
            except Exception:
                log.exception("dns filter: a query failed")
            finally:
                slots.release()

        async with trio.open_nursery() as nursery:
            while True:
                try:
                    slots.acquire_nowait()
                except trio.WouldBlock:
                    await slots.acquire()
                try:
                    # All that have come, before the first of them gets a turn: the socket's
                    # buffer is for what comes meanwhile.
                    query, client = udp.recvfrom(_QUERY_BYTES)
                except OSError as error:
                    slots.release()
                    if not isinstance(error, BlockingIOError):
                        log.error("dns filter: receive: %s", cause_of(error))
                    await trio.lowlevel.wait_readable(udp)
                    continue
                if is_query(query):
                    nursery.start_soon(answer, query, client)
                else:
                    slots.release()

    async def converse(self, stream: trio.SocketStream) -> None:
        """See to one connection: queries at will, answers as they come (RFC 7766)."""
        messages = DnsStream(stream)
        slots = trio.Semaphore(_PIPELINED_AT_ONCE)
        turn = trio.Lock()
        async with trio.open_nursery() as nursery:

            async def answer(query: bytes) -> None:
                reply = await self.answer(query)
                try:
                    with trio.fail_after(_SEND_S):
                        async with turn:
                            await messages.send(reply)
                except (trio.BrokenResourceError, trio.TooSlowError):
                    nursery.cancel_scope.cancel()
                slots.release()

            while True:
                await slots.acquire()
                query = None
                with trio.move_on_after(_IDLE_S), suppress(trio.BrokenResourceError):
                    query = await messages.receive()
                if query is None or not is_query(query):
                    break
                nursery.start_soon(answer, query)

    async def answer(self, query: bytes) -> bytes:
        """The host's answer, or SERVFAIL."""
        cause = f"no answer within {LIMIT_S:.0f} s"
        with trio.move_on_after(LIMIT_S):
            try:
                async with self._asking, await self._host.connect(Port.DNS_FILTER) as stream:
                    messages = DnsStream(stream)
                    await messages.send(query)
                    answer = await messages.receive()
                if answer is not None and is_answer(answer, query):
                    self._note(None)
                    return answer
                cause = "no answer to the query" if answer else "it hung up"
            except OSError as error:
                cause = cause_of(error)
            except trio.BrokenResourceError:
                cause = "it hung up"
        self._note(cause)
        return failure(query)

    def _note(self, cause: str | None) -> None:
        """Log that the host stopped answering, or answers again; not each query."""
        if self._host_answers is not (cause is None):
            self._host_answers = cause is None
            if cause is None:
                log.info("dns filter: the host answers")
            else:
                log.warning("dns filter: the host's port %d: %s", Port.DNS_FILTER, cause)


async def _send_datagram(udp: socket.socket, reply: bytes, client: tuple[str, int]) -> None:
    with suppress(OSError):  # the client is gone
        try:
            udp.sendto(reply, client)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(udp)
            udp.sendto(reply, client)
