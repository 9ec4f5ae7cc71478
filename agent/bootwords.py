"""The words that the agent was started with, before anything heavy is imported.

Nothing is imported here: what listens must listen within milliseconds (agent/__main__.py).
"""

from __future__ import annotations

DEFAULT_LISTEN = "vsock:6000"
PREFIX = "innkeep."
VARIABLE_PREFIX = "INNKEEP_"


def variable_of(key: str) -> str:
    """What a setting is called in the environment."""
    return VARIABLE_PREFIX + key.upper().replace(".", "_")


def kernel_words(cmdline: str) -> dict[str, str]:
    """``innkeep.key=value`` words of a kernel command line; the last of a key wins.

    A value may be quoted as the kernel does it, with double quotes around it.
    """
    words = {}
    for word in cmdline.split():
        if word.startswith(PREFIX):
            key, _, value = word[len(PREFIX) :].partition("=")
            words[key] = value.strip('"')
    return words


def listen_argument(argv: list[str]) -> str | None:
    """The value of ``--listen``, the last one winning; None where it is not given."""
    value = None
    for position, word in enumerate(argv):
        if word == "--listen" and position + 1 < len(argv):
            value = argv[position + 1]
        elif word.startswith("--listen="):
            value = word[len("--listen=") :]
    return value
