"""What a host and the agent say to each other: messages, framing and codec, without I/O.

    decoder.receive_data(received)
    while (payload := decoder.next_frame()) is not None:
        request = decode(payload, AgentRequest).body
    stream.send_all(encode_frame(encode(responses.Ok())))

The host's client is in ``protocol.client``, its command line in ``protocol.cli``; neither is
imported from here.
"""

from typing import TYPE_CHECKING

from protocol import requests, responses
from protocol.codec import (
    Envelope,
    decode,
    decode_value,
    encode,
    frame_in_pieces,
    request_id_of,
)
from protocol.constants import MAX_FRAME_SIZE, PROTOCOL_VERSION, Cid, Port
from protocol.errors import ErrorCode, FrameTooLarge, MalformedMessage, ProtocolError
from protocol.framing import FrameDecoder, encode_frame, frame_pieces
from protocol.requests import AgentRequest
from protocol.responses import AgentResponse

if TYPE_CHECKING:
    from protocol import workload
    from protocol.workload import GuestMessage, HostMessage

__all__ = [
    "MAX_FRAME_SIZE",
    "PROTOCOL_VERSION",
    "AgentRequest",
    "AgentResponse",
    "Cid",
    "Envelope",
    "ErrorCode",
    "FrameDecoder",
    "FrameTooLarge",
    "GuestMessage",
    "HostMessage",
    "MalformedMessage",
    "Port",
    "ProtocolError",
    "decode",
    "decode_value",
    "encode",
    "encode_frame",
    "frame_in_pieces",
    "frame_pieces",
    "request_id_of",
    "requests",
    "responses",
    "workload",
]


def __getattr__(name: str) -> object:
    # The workload protocol only when it is asked for: importing it takes the agent's start 5 ms.
    if name in ("workload", "HostMessage", "GuestMessage"):
        import importlib

        workload = importlib.import_module("protocol.workload")
        return workload if name == "workload" else getattr(workload, name)
    raise AttributeError(f"module 'protocol' has no attribute {name!r}")
