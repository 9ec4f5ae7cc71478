"""A host that does one thing after the other, and stops in the middle where it is told to."""

import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from protocol import AgentRequest, AgentResponse, FrameDecoder, decode, encode, encode_frame
from protocol.address import UnixAddress, parse_address

PATIENCE_S = 30


class BlockingClient:
    """One connection to an agent on a unix socket. Leaving the block hangs up."""

    def __init__(self, address: str) -> None:
        place = parse_address(address)
        assert isinstance(place, UnixAddress)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(str(Path(place.path)))
        self._decoder = FrameDecoder()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.socket.close()

    def send(self, request: AgentRequest, share: float = 1.0) -> None:
        """Send a request, or the first part of it."""
        frame = encode_frame(encode(request))
        self.socket.sendall(frame[: round(share * len(frame))])

    def receive(self) -> AgentResponse | None:
        """The next answer, or None: the agent has closed the connection."""
        while (payload := self._decoder.next_frame()) is None:
            try:
                data = self.socket.recv(64 * 1024)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._decoder.receive_data(data)
        answer: AgentResponse = decode(payload, AgentResponse).body
        return answer

    def ask(self, request: AgentRequest) -> AgentResponse | None:
        """Send a request, and take one answer."""
        self.send(request)
        return self.receive()

    def hang_up(self) -> None:
        """Leave, and wait until the agent is done with that."""
        self.socket.shutdown(socket.SHUT_RDWR)
        while self.receive() is not None:
            pass
