"""What is mounted where, as the agent sees it: proc_pid_mountinfo(5)."""

from __future__ import annotations

from pathlib import Path

from protocol.machine import MountPoint, Mounts

_MOST_POINTS = 256
# An overlay of 120 layers names them all.
_MOST_CHARACTERS = 240
# Of shares and network file systems: what may stand for a password.
_SECRETS = ("pass", "password", "secret", "credentials", "token", "key")


def mounts(path: Path = Path("/proc/self/mountinfo")) -> Mounts:
    """The first 256, in the order in which they were made. Raises OSError."""
    lines = path.read_text(errors="replace").splitlines()
    points = tuple(map(_point, lines[:_MOST_POINTS]))
    return Mounts(points=points, left_out=len(lines) - len(points))


def _point(line: str) -> MountPoint:
    fields = line.split(" ")
    # Optional fields end in a hyphen.
    kind, source, more = fields[fields.index("-", 6) + 1 :][:3]
    options = ",".join(map(_without_secret, f"{fields[5]},{more}".split(",")))
    return MountPoint(path=_cut(fields[4]), source=_cut(source), kind=kind, options=_cut(options))


def _without_secret(option: str) -> str:
    name, separator, _ = option.partition("=")
    is_secret = separator and any(word in name.lower() for word in _SECRETS)
    return f"{name}=<hidden>" if is_secret else option


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"
