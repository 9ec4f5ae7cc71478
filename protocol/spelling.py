"""What a misspelt name may have been meant for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FLAG = "--"
# Of difflib's ratios: the least that is near at all, and how far behind the nearest.
_NEAR, _BEHIND = 0.6, 0.15


def near(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean A or B?)`` for those of ``known`` that come near, or nothing.

    What all begin with, ``prefix``, makes nothing near.
    """
    # Not needed where everything is spelt right.
    from difflib import SequenceMatcher

    def ratio(other: str) -> float:
        here, there = (each.removeprefix(prefix) for each in (name, other))
        return SequenceMatcher(None, here, there).ratio()

    ratios = {other: ratio(other) for other in known}
    least = max(_NEAR, max(ratios.values(), default=0) - _BEHIND)
    found = [
        other for other in sorted(ratios, key=lambda o: (-ratios[o], o)) if ratios[other] >= least
    ]
    return f" (did you mean {' or '.join(found[:3])}?)" if found else ""


def misspelt_flag(argv: Sequence[str], known: Iterable[str]) -> str | None:
    """What to say of the first ``--flag`` of a command line that is none of ``known``."""
    flags = {*known, _FLAG}
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith(_FLAG) and flag not in flags:
            return f"unrecognized argument {flag}{near(flag, flags - {_FLAG}, _FLAG)}"
    return None
