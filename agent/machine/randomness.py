"""The kernel's random number generator, after a moment that others may have a copy of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs

from agent.errors import cause_of
from agent.linux import random_device
from protocol.values import Reseeding

RANDOM = Path("/dev/random")
HARDWARE = Path("/dev/hwrng")
# What the generator's own key has, twice.
_WANTED_BYTES = 64


@attrs.frozen
class Randomness:
    """Reseeds with what only the host can give: all that is in the VM may be in its copies, too.

    ``add`` counts the bytes as entropy, ``reseed`` makes them count at once; both are given, so
    that a kernel that is not ours is left alone.
    """

    random: Path = RANDOM
    hardware: Path = HARDWARE
    add: Callable[[int, bytes], None] = random_device.rndaddentropy
    reseed: Callable[[int], None] = random_device.rndreseedcrng

    def renew(self, told: bytes | None) -> Reseeding:
        """Reseed with ``told``, the host's bytes in a request, or else with those of a virtio-rng.

        Without either the generator takes what the kernel itself has gathered. Blocks for as long
        as the host takes to fill a virtio-rng's request.
        """
        try:
            source, data = self._bytes_of_host(told)
        except OSError as error:
            source, data = None, b""
            problem = f"read {self.hardware}: {cause_of(error)}"
        else:
            problem = "no bytes from the host: give `entropy`, or the VM a virtio-rng"
        try:
            descriptor = os.open(self.random, os.O_WRONLY | os.O_CLOEXEC)
            try:
                if data:
                    self.add(descriptor, data)
                self.reseed(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            failed = f"reseed {self.random}: {cause_of(error)}"
            return Reseeding(ok=False, source=source, credited_bytes=0, error=failed)
        if not data:
            return Reseeding(ok=False, source=None, credited_bytes=0, error=problem)
        return Reseeding(ok=True, source=source, credited_bytes=len(data))

    def _bytes_of_host(self, told: bytes | None) -> tuple[str | None, bytes]:
        if told:
            return "request", told
        if not self.hardware.exists():
            return None, b""
        descriptor = os.open(self.hardware, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return "hwrng", os.read(descriptor, _WANTED_BYTES)
        finally:
            os.close(descriptor)
