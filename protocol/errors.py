"""What goes wrong between the two ends: codes on the wire, exceptions in the codec."""

from enum import StrEnum


class ErrorCode(StrEnum):
    """The ``code`` of an ``error`` answer."""

    INVALID_REQUEST = "INVALID_REQUEST"
    NOT_FOUND = "NOT_FOUND"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    PULL_FAILED = "PULL_FAILED"
    QUERY_FAILED = "QUERY_FAILED"
    RUN_FAILED = "RUN_FAILED"
    EXEC_FAILED = "EXEC_FAILED"
    SPAWN_FAILED = "SPAWN_FAILED"
    MOUNT_FAILED = "MOUNT_FAILED"
    FILE_IO_FAILED = "FILE_IO_FAILED"
    OVERLAY_FAILED = "OVERLAY_FAILED"
    CLEANUP_FAILED = "CLEANUP_FAILED"
    FORMAT_FAILED = "FORMAT_FAILED"
    STATUS_FAILED = "STATUS_FAILED"
    LIST_FAILED = "LIST_FAILED"
    GC_FAILED = "GC_FAILED"
    CREATE_FAILED = "CREATE_FAILED"
    START_FAILED = "START_FAILED"
    STOP_FAILED = "STOP_FAILED"
    DELETE_FAILED = "DELETE_FAILED"
    EXPORT_FAILED = "EXPORT_FAILED"
    SERIALIZATION_ERROR = "SERIALIZATION_ERROR"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    WAIT_FAILED = "WAIT_FAILED"


class ProtocolError(Exception):
    """Bytes or a message that the protocol does not allow.

    Its text is fit for the other end: it names the field and what was expected, and never
    repeats a value that could be secret.
    """


class FrameTooLarge(ProtocolError):
    """A frame above ``MAX_FRAME_SIZE``; on receipt the stream's position is lost."""


class MalformedMessage(ProtocolError):
    """A whole frame that holds no message of the expected kind; the next frame may be good."""
