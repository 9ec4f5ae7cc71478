"""How single fields differ from attrs' defaults: left out of JSON, or hidden in a repr.

Messages are logged by their repr, so that is where secrets are hidden, once for every log.
"""

from collections.abc import Iterable, Mapping
from typing import Final

OMITTED: Final[Mapping[str, bool]] = {"omitted": True}
"""Metadata of a field that is left out when it holds its default (``skip_serializing_if``)."""


def hidden(value: object) -> str:
    """Nothing but whether there is a value."""
    return "None" if value is None else "<hidden>"


def length_only(value: str | bytes | None) -> str:
    """The length of a payload, in its own units."""
    if value is None:
        return "None"
    return f"<{len(value)} {'bytes' if isinstance(value, bytes) else 'characters'}>"


def names_only(env: Iterable[tuple[str, str]]) -> str:
    """Environment variables without their values."""
    return f"({', '.join(f'{name}=<hidden>' for name, _ in env)})"


def assignments_hidden(env: Iterable[str]) -> str:
    """The same for an image's ``NAME=value`` strings."""
    return names_only((entry.partition("=")[0], "") for entry in env)


def without_credentials(url: str | None) -> str:
    """A URL from its host on: what stands before an ``@`` may be a password."""
    if url is None or "@" not in url:
        return repr(url)
    return repr(f"<hidden>@{url.rpartition('@')[2]}")


def printable(text: str) -> str:
    """Text for people, with what UTF-8 cannot carry escaped.

    A file name that is no UTF-8 reaches an error message as lone surrogates (PEP 383); the
    message must arrive all the same.
    """
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
