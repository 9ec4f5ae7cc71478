"""The token that opens the workload's ports, and how often it may be guessed."""

from __future__ import annotations

import hmac
import os
import string
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import trio

LEAST_BITS = 128
MOST_CHARACTERS = 1024

# A disk that holds nothing but a token is read no further.
_READ_BYTES = 4096
_HEX = frozenset(string.hexdigits)
_PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation)

IMAGE_FILES: Sequence[Path] = (
    Path("/etc/innkeep/token"),
    Path("/sys/firmware/qemu_fw_cfg/by_name/opt/innkeep/token/raw"),
)
"""Where a VM of the image may have it: from its initramfs, or from QEMU's fw_cfg. Containers have
neither: the one is not in their root, and over the other nothing is mounted but emptiness."""

_GUESSES = 10
_GUESSES_WITHIN_S = 60.0


class InvalidToken(ValueError):
    """A file that holds no token; the text says what is wrong with it, and nothing of it."""


@attrs.frozen(eq=False)
class Token:
    """A secret to compare with, kept as a digest under a key of its own.

    So nothing of the agent's can show it, and a comparison takes the same time whatever the
    presented text has in common with it, its length included.
    """

    _key: bytes = attrs.field(repr=False)
    _digest: bytes = attrs.field(repr=False)

    @classmethod
    def of(cls, text: str) -> Token:
        """The token that ``text`` is.

        Raises:
            InvalidToken: it is too short for 128 bits, too long, or not printable ASCII.
        """
        if not _PRINTABLE.issuperset(text):
            raise InvalidToken("a token is printable ASCII without spaces")
        # What it could hold at most: nobody can tell how it was chosen.
        bits = len(text) * (4 if _HEX.issuperset(text) else 6)
        if bits < LEAST_BITS:
            raise InvalidToken(
                f"a token has at least {LEAST_BITS} bits: 32 hexadecimal digits, or 22 characters"
            )
        if len(text) > MOST_CHARACTERS:
            raise InvalidToken(f"a token has at most {MOST_CHARACTERS} characters")
        key = os.urandom(32)
        return cls(key, hmac.digest(key, text.encode("ascii"), "sha256"))

    @classmethod
    def read(cls, path: Path) -> Token:
        """The token in a file or at the beginning of a disk, white space and NULs around it aside.

        Blocks.

        Raises:
            OSError: it cannot be read.
            InvalidToken: as ``of``.
        """
        with path.open("rb", buffering=0) as file:
            content = file.read(_READ_BYTES)
        try:
            text = content.strip(b" \t\r\n\0").decode("ascii")
        except UnicodeDecodeError:
            # Not chained: the cause holds the content.
            raise InvalidToken("a token is printable ASCII without spaces") from None
        return cls.of(text)

    def matches(self, presented: str) -> bool:
        """Whether this is it; in a time that tells nothing."""
        digest = hmac.digest(self._key, presented.encode("utf-8"), "sha256")
        return hmac.compare_digest(digest, self._digest)


@attrs.define(eq=False)
class Attempts:
    """Failures to authenticate, on all connections: after ten within a minute nothing is compared.

    What is refused without a comparison tells nothing, and does not count.
    """

    _clock: Callable[[], float] = trio.current_time
    _failures: deque[float] = attrs.field(factory=lambda: deque(maxlen=_GUESSES))

    def are_exhausted(self) -> bool:
        """Whether a further one has to be refused uncompared."""
        oldest_of_ten = self._failures[0] if len(self._failures) == _GUESSES else -float("inf")
        return self._clock() - oldest_of_ten < _GUESSES_WITHIN_S

    def count_failure(self) -> None:
        """One has failed just now."""
        self._failures.append(self._clock())
