"""Platforms, and which manifest of an index is for one.

Names follow Go's GOOS and GOARCH; normalisation and the order of preference follow containerd,
https://github.com/containerd/platforms.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import attrs

_WORD = re.compile(r"[a-z0-9_.-]+")

# Other names of an architecture (uname's among them) -> GOARCH and variant.
_ARCHITECTURES: dict[str, tuple[str, str | None]] = {
    "x86_64": ("amd64", None),
    "x86-64": ("amd64", None),
    "i386": ("386", None),
    "i486": ("386", None),
    "i586": ("386", None),
    "i686": ("386", None),
    "aarch64": ("arm64", None),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv5l": ("arm", "v5"),
    "armv6l": ("arm", "v6"),
    "armv7l": ("arm", "v7"),
    "armv8l": ("arm", "v8"),
}
# What an architecture means where no variant is given; the same thing is said in two ways.
_DEFAULT_VARIANTS = {"arm": "v7", "arm64": "v8", "amd64": "v1"}
# A machine of one variant runs the programs of these too, best first.
_OLDER_VARIANTS = {
    "arm": ("v8", "v7", "v6", "v5"),
    "arm64": ("v9", "v8"),
    "amd64": ("v4", "v3", "v2", "v1"),
}


class InvalidPlatform(ValueError):
    """The text is no platform; the message quotes it."""


class NoSuchPlatform(ValueError):
    """An index has nothing for a platform; the message lists what it has."""


@attrs.frozen
class Platform:
    """An operating system and an architecture; ``variant`` only where it says something."""

    os: str
    architecture: str
    variant: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @property
    def runs(self) -> tuple[str, ...]:
        """The variants whose programs a machine of this platform runs, best first."""
        own = self.variant or _DEFAULT_VARIANTS.get(self.architecture, "")
        older = _OLDER_VARIANTS.get(self.architecture, ())
        return older[older.index(own) :] if own in older else (own,)

    @property
    def needs(self) -> str:
        """The variant that programs of this platform are made for; "" where there is none."""
        return self.variant or _DEFAULT_VARIANTS.get(self.architecture, "")


def normalize(os: str, architecture: str, variant: str | None) -> Platform:
    """The one spelling of a platform: aarch64 is arm64, and arm64/v8 is arm64."""
    architecture, implied = _ARCHITECTURES.get(architecture, (architecture, None))
    variant = variant or implied
    # arm/v7 stays as it is: plain "arm" was v6 for long.
    if architecture != "arm" and variant == _DEFAULT_VARIANTS.get(architecture):
        variant = None
    return Platform(os, architecture, variant)


def parse_platform(text: str) -> Platform:
    """The platform that ``os/architecture[/variant]`` spells. Raises InvalidPlatform."""
    words = text.lower().split("/")
    if len(words) not in (2, 3) or not all(map(_WORD.fullmatch, words)):
        raise InvalidPlatform(
            f"{text[:100]!r} is not a platform: expected os/architecture or "
            "os/architecture/variant, such as linux/arm64"
        )
    return normalize(words[0], words[1], words[2] if len(words) == 3 else None)


def local_platform() -> Platform:
    """The platform of the kernel that this process runs on."""
    return normalize("linux", os.uname().machine, None)


def choose(offered: Sequence[Platform | None], wanted: Platform) -> int:
    """The position of the best of the platforms that an index offers; the first of equals.

    None is an entry that says nothing of its platform: taken only where it is the whole index.

    Raises:
        NoSuchPlatform: none fits.
    """
    if len(offered) == 1 and offered[0] is None:
        return 0
    variants = wanted.runs
    fitting = [
        (variants.index(platform.needs), position)
        for position, platform in enumerate(offered)
        if platform is not None
        and (platform.os, platform.architecture) == (wanted.os, wanted.architecture)
        and platform.needs in variants
    ]
    if not fitting:
        known = sorted({str(platform) for platform in offered if _is_named(platform)})
        have = ", ".join(known[:20]) or "none that says for which platform it is"
        raise NoSuchPlatform(f"no manifest for {wanted}; the index has {have}")
    return min(fitting)[1]


def _is_named(platform: Platform | None) -> bool:
    # Attestations stand in an index as unknown/unknown.
    return platform is not None and platform.os != "unknown"
