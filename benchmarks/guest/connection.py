"""A host's end of a connection, as cheap as Python has it: blocking, frames encoded beforehand."""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self

from protocol import AgentRequest, encode, encode_frame

AGENT = "/run/host/agent.sock"
LONGEST_ANSWER = 4096
LENGTH = struct.Struct(">I")

# Longer than anything that is waited for here: what hangs is to be told, not waited for. The kernel
# keeps this time, at no cost to what is measured.
_PATIENCE = struct.pack("ll", 60, 0)

STARTED = b'{"status":"started"}'
EXITED = b'{"status":"exited","exit_code":'
COMPLETED = b'{"status":"completed","exit_code":'


class UnexpectedAnswer(Exception):
    """The agent said something else; its words are the text."""


def frame(message: AgentRequest) -> bytes:
    """A message as it goes over the wire."""
    return encode_frame(encode(message))


class Connection:
    """One connection to the agent, or to a reference that listens at ``path``."""

    def __init__(self, path: str = AGENT) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self.socket.setsockopt(socket.SOL_SOCKET, option, _PATIENCE)
        try:
            self.socket.connect(path)
        except BaseException:
            self.socket.close()
            raise

    @property
    def peer_pid(self) -> int:
        """The process that listens there."""
        size = struct.calcsize("3i")
        credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid: int = struct.unpack("3i", credentials)[0]
        return pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    def ask(self, request: bytes) -> bytes:
        """Send a frame; the next payload that comes."""
        self.socket.sendall(request)
        return self.receive()

    def receive(self) -> bytes:
        """The next payload. Of a short answer; for data see ``receive_into``."""
        return bytes(self.receive_into(memoryview(bytearray(LONGEST_ANSWER))))

    def receive_into(self, buffer: memoryview) -> memoryview:
        """The next payload, in ``buffer``, which is large enough; nothing after it is read."""
        self._fill(buffer[: LENGTH.size])
        payload = buffer[: LENGTH.unpack_from(buffer)[0]]
        self._fill(payload)
        return payload

    def _fill(self, buffer: memoryview) -> None:
        filled = 0
        while filled < len(buffer):
            got = self.socket.recv_into(buffer[filled:], flags=socket.MSG_WAITALL)
            if not got:
                raise UnexpectedAnswer("the other end hung up")
            filled += got

    def complete(self, request: bytes, status: int = 0) -> None:
        """Have a plain command run to its end, which must be this."""
        check(self.ask(request), COMPLETED + b"%d" % status)

    def attend(self, request: bytes, status: int = 0) -> None:
        """Have an interactive command without output run to its end, which must be this."""
        check(self.ask(request), STARTED)
        check(self.receive(), EXITED + b"%d" % status)


def check(answer: bytes, beginning: bytes) -> None:
    """Raise UnexpectedAnswer unless an answer begins so."""
    if not answer.startswith(beginning):
        raise UnexpectedAnswer(answer[:200].decode(errors="replace"))
