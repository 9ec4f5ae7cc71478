"""Who resolves names, resolv.conf(5)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.errors import failing_as
from agent.network.uplink_config import Address
from protocol.errors import ErrorCode

RESOLV_CONF = Path("/etc/resolv.conf")


def resolv_conf(nameservers: Sequence[Address], search: Sequence[str] = ()) -> str:
    """The file's text."""
    lines = [f"search {' '.join(search)}"] if search else []
    return "".join(f"{line}\n" for line in (*lines, *(f"nameserver {n}" for n in nameservers)))


def use(text: str, path: Path = RESOLV_CONF) -> str | None:
    """Have names resolved as the text says, at once for all who look. Blocks.

    The text that was there before, or None where it was the same.

    Raises:
        AgentError: INTERNAL_ERROR: the file cannot be written.
    """
    with failing_as(ErrorCode.INTERNAL_ERROR, "name the name servers"):
        before = ""
        with suppress(FileNotFoundError):
            before = path.read_text(encoding="utf-8", errors="replace")
        if before == text:
            return None
        new = path.with_name(f"{path.name}.new")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o644)
        try:
            new.replace(path)
        except OSError:
            # Where something is mounted there, a name cannot move: as in containers of others.
            new.unlink()
            path.write_text(text, encoding="utf-8")
    return before
