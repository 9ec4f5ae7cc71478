"""The names of overlays that stay."""

from __future__ import annotations

import re

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_PERSISTENT = "persistent-"


class InvalidWorkloadId(ValueError):
    """Not a name that an overlay may have; the text says which are."""


def check_workload_id(text: str) -> str:
    """The id, if it is one: also that of a persistent overlay, which is longer by its prefix.

    Raises:
        InvalidWorkloadId: it is none.
    """
    if not _is_id(text):
        _check(text.removeprefix(_PERSISTENT))
    return text


def persistent_workload_id(persistent_overlay_id: str) -> str:
    """The workload that `run` means by its ``persistent_overlay_id``.

    Raises:
        InvalidWorkloadId: it cannot mean any.
    """
    _check(persistent_overlay_id)
    return _PERSISTENT + persistent_overlay_id


def persistent_overlay_id(workload: str) -> str:
    """The ``persistent_overlay_id`` that means this workload."""
    return workload.removeprefix(_PERSISTENT)


def _check(text: str) -> None:
    if not _is_id(text):
        raise InvalidWorkloadId(
            f"{text[:200]!r} is not an overlay's id, which is 1 to 128 of A-Z a-z 0-9 . _ - and "
            "neither . nor .."
        )


def _is_id(text: str) -> bool:
    return bool(_ID.fullmatch(text)) and text not in (".", "..")
