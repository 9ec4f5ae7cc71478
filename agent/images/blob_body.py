"""A blob on its way from a registry.

Imported only where a registry is spoken to, since requests is slow to import.
"""

from __future__ import annotations

from collections.abc import Iterator

import requests
import urllib3.exceptions

from agent.images.registries import TimeLimits
from agent.images.registry_failure import FAILURES, failure_of

_BLOCK = 1 << 20


class BlobBody:
    """A blob's bytes from ``offset`` on: that which was asked for, or 0 of a registry without
    ranges.
    """

    def __init__(
        self, response: requests.Response, offset: int, host: str, limits: TimeLimits
    ) -> None:
        self.offset = offset
        self._limits = limits
        self._response = response
        self._host = host

    def blocks(self) -> Iterator[bytes]:
        """The bytes as they arrive, at most 1 MiB at a time, ending when the body does.

        A body that ends before its time just ends; the caller knows the blob's size.

        Raises:
            RegistryError: too little arrived for too long, or the connection broke.
        """
        while True:
            try:
                block = self._response.raw.read1(_BLOCK, decode_content=False)
            except urllib3.exceptions.IncompleteRead:
                return
            except FAILURES as error:
                raise failure_of(error, self._host, self._limits) from error
            if not block:
                return
            yield block
