"""Which of pybase64's implementations is used: that for the processor's vectors, or the plain one.

pybase64 takes the widest vectors that the processor says it has. One that is emulated (QEMU's TCG)
says so too, and takes two to four times as long for them as for the plain way; a real one takes a
third of that. Nothing tells a program which of both it is on, so it is measured.
"""

import binascii
import time
from collections.abc import Callable
from typing import Final

from pybase64 import _pybase64 as extension

_PLAIN: Final = 0
_TRIED: Final = bytes(24 * 1024)
_TRIES: Final = 5
_SHARE: Final = 3
"""Of the time that Python's own encoding takes: real vectors take a sixth or less, emulated ones
half or more, and the plain way a quarter on both. That is not tried itself, since pybase64 (1.5.1)
finds no way back from it to AVX-512."""


def choose_base64_path() -> str:
    """Use the plain way in all of the process from now on, if the other is no faster; its name.

    Takes 0.1 ms, emulated 1. Processor time is measured, and the least of several tries counts:
    what else the machine does makes no difference.
    """
    if _least_time_ns(extension.b64encode) > _least_time_ns(binascii.b2a_base64) / _SHARE:
        extension._set_simd_path(_PLAIN)
    return extension._get_simd_name(extension._get_simd_path())


def _least_time_ns(encode: Callable[[bytes], bytes]) -> int:
    taken = []
    for _ in range(_TRIES):
        begun = time.thread_time_ns()
        encode(_TRIED)
        taken.append(time.thread_time_ns() - begun)
    return min(taken)
