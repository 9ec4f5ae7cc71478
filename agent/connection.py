"""One peer's byte stream as frames: received one at a time, sent whole."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Generator
from contextlib import closing, suppress

import outcome
import trio

from protocol.constants import VSOCK_SEND_SIZE
from protocol.framing import FrameDecoder, frame_header, frame_pieces

# Below malloc's threshold for mapping fresh pages: a larger buffer would cost every ping two
# system calls and its page faults.
READ_BYTES = 64 * 1024

# A unix socket takes more only when three quarters of its buffer are free again, which the default
# of 208 KiB has a frame of a file wait for eight times over.
BULK_BYTES = 1024 * 1024
_SO_SNDBUFFORCE = 32  # socket(7): above net.core.wmem_max, which Python has no name for

# A frame in pieces of that size, which the peer's credit may let go one or two at a time, is for a
# thread: there a wait costs a switch, and in the loop a turn of everything, which without KVM takes
# longer than the piece.
THREADED_BYTES = 256 * 1024


class PeerGone(Exception):
    """The connection broke while it was read from or sent to: nobody is left to answer."""


class Connection:
    """Frames over a connected socket, which it makes blocking, and which the caller closes.

    The socket is used directly: a frame that fits the buffers costs one system call each way.
    Only one task may receive, and only one may send, at a time. Calls say themselves that they do
    not wait, so that those in a thread can.
    """

    def __init__(self, peer: socket.socket, piece_bytes: int | None = None) -> None:
        """``piece_bytes`` is the most that one call may send; on vsock that is known."""
        peer.setblocking(True)
        self.socket = peer
        self._decoder = FrameDecoder()
        if peer.family == socket.AF_VSOCK:
            piece_bytes = VSOCK_SEND_SIZE
        self.piece_bytes = piece_bytes
        """The most that one call may send, where that is limited."""
        self.on_stall: Callable[[], None] | None = None
        """Called whenever a send has to wait for the peer."""
        self.is_torn = False
        """Whether a send was cancelled: half a frame may be out."""

    def limit_frames(self, most_bytes: int) -> None:
        """Take no longer ones than that, instead of up to MAX_FRAME_SIZE."""
        self._decoder.most_bytes = most_bytes

    def widen(self) -> None:
        """Let a frame of a megabyte be on its way at once; for those who send many."""
        if self.socket.family == socket.AF_UNIX:
            with suppress(OSError):  # without the privilege it goes in smaller steps
                self.socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BULK_BYTES)

    async def receive(self) -> bytes | None:
        """The next frame's payload, or None at the end of the peer's requests.

        Safe to cancel: bytes that were read stay in the decoder. An end in mid-frame is an end.

        Raises:
            FrameTooLarge: the peer announced more than MAX_FRAME_SIZE; its position is lost.
            PeerGone: the connection broke.
        """
        while True:
            payload = self._decoder.next_frame()
            if payload is not None:
                return payload
            if not await self._fill():
                return None

    def is_amid_frame(self) -> bool:
        """Whether a part of a frame has arrived that ``receive`` has not given."""
        return self._decoder.is_amid_frame()

    async def hear_out(self, most_s: float, most_bytes: int) -> None:
        """Say no more, and read what the peer still sends, to nobody; but not for long.

        What was sent last is not lost then to the reset that closing on unread bytes causes.
        """
        with trio.move_on_after(most_s), suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
            heard = 0
            while heard < most_bytes:
                await trio.lowlevel.wait_readable(self.socket)
                data = self.socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
                if not data:
                    return
                heard += len(data)

    def is_writable(self) -> bool:
        """Whether the peer would take something at this moment."""
        room = select.poll()
        room.register(self.socket, select.POLLOUT)
        return bool(room.poll(0))

    def receive_pending(self) -> bytes | None:
        """As ``receive``, but only from what has arrived already; None when there is no more."""
        while True:
            payload = self._decoder.next_frame()
            if payload is not None:
                return payload
            try:
                data = self.socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
            except OSError:
                return None
            if not data:
                return None
            self._decoder.receive_data(data)

    async def send(self, payload: bytes) -> None:
        """Send one frame. Not safe to cancel: a cancelled send leaves half a frame behind, so
        whoever cancels one must close the connection, which ``is_torn`` then.

        Raises:
            FrameTooLarge: the payload is above MAX_FRAME_SIZE; nothing was sent.
            PeerGone: the connection broke.
        """
        try:
            await self._send(payload)
        except trio.Cancelled:
            self.is_torn = True
            raise

    async def _send(self, payload: bytes) -> None:
        if self.piece_bytes is not None:
            pieces = frame_pieces(payload, self.piece_bytes)
            if len(payload) >= THREADED_BYTES:
                await self.send_in_thread(piece for piece in pieces)
            else:
                for piece in pieces:
                    await self._send_all(piece)
            return
        # In one system call, and without a copy.
        header = frame_header(payload)
        try:
            sent = self.socket.sendmsg((header, payload), (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise PeerGone(str(error)) from error
        if sent < len(header):
            await self._send_all(header[sent:])
            sent = len(header)
        if sent < len(header) + len(payload):
            await self._send_all(memoryview(payload)[sent - len(header) :])

    async def send_in_thread(self, pieces: Generator[bytes | memoryview]) -> None:
        """Send frames that come in pieces, which are made and sent in a thread, and waited for.

        As ``send``; cancelled, it ends the connection, and then the thread, which may wait for the
        peer. ``pieces`` is closed.

        Raises:
            PeerGone: the connection broke.
            Exception: what the making of a piece raises.
        """
        ended = False

        def send() -> None:
            with closing(pieces):
                for piece in pieces:
                    try:
                        self.socket.sendall(piece)
                    except OSError as error:
                        raise PeerGone(str(error)) from error

        async def shut_when_cancelled() -> None:
            try:
                await trio.sleep_forever()
            finally:
                if not ended:
                    self.is_torn = True
                    with suppress(OSError):
                        self.socket.shutdown(socket.SHUT_RDWR)

        if self.on_stall is not None:
            self.on_stall()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(shut_when_cancelled)
            result = await trio.to_thread.run_sync(
                outcome.capture, send, limiter=trio.CapacityLimiter(1)
            )
            ended = True
            nursery.cancel_scope.cancel()
        result.unwrap()

    async def _send_all(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self.socket.send(left, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                if self.on_stall is not None:
                    self.on_stall()
                await trio.lowlevel.wait_writable(self.socket)
            except OSError as error:
                raise PeerGone(str(error)) from error

    async def _fill(self) -> bool:
        """Take what arrives next into the decoder; False at the end of the stream."""
        waited = False
        while True:
            try:
                data = self.socket.recv(READ_BYTES, socket.MSG_DONTWAIT)
                break
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.socket)
                waited = True
            except OSError as error:
                raise PeerGone(str(error)) from error
        self._decoder.receive_data(data)
        if not waited:
            # A peer that sends without pause must not keep the loop to itself. Only now that the
            # decoder has the bytes: a hang-up cancels here, and they may hold a shutdown.
            await trio.lowlevel.checkpoint()
        return bool(data)
