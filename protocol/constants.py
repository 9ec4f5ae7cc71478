"""Versions, sizes and addresses that both ends must agree on."""

from enum import IntEnum
from typing import Final

PROTOCOL_VERSION: Final = 1

AGENT_VERSION: Final = "0.1.0"
"""innkeep's own version, as in pyproject.toml."""

MAX_FRAME_SIZE: Final = 32 * 1024 * 1024
"""Bytes of the largest payload, its four length bytes not counted."""

LAYER_CHUNK_SIZE: Final = 16 * 1024 * 1024
"""Bytes of data in the largest chunk of an exported layer, before base64."""

FILE_WRITE_SINGLE_SHOT_MAX: Final = 1024 * 1024
"""Bytes up to which a host sends a file in one ``file_write``."""

FILE_WRITE_CHUNK_SIZE: Final = FILE_WRITE_SINGLE_SHOT_MAX
"""Bytes of data in one ``file_write_chunk``, before base64."""

FILE_TRANSFER_MAX_TOTAL: Final = 4 * 1024 * 1024 * 1024
"""Bytes of the largest streamed upload."""

VSOCK_SEND_SIZE: Final = 32 * 1024
"""Bytes of the largest single send on vsock: more breaks the stream in vhost-device-vsock."""


class Port(IntEnum):
    """vsock ports; the first three are served in the guest, the others by the host."""

    WORKLOAD_CONTROL = 5000
    WORKLOAD_LOGS = 5001
    AGENT_CONTROL = 6000
    SSH_AGENT = 6001
    DNS_FILTER = 6002


class Cid(IntEnum):
    """vsock context ids, see vsock(7)."""

    HOST = 2
    GUEST = 3
    ANY = 0xFFFFFFFF
