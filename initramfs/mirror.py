"""Where Debian's packages come from: this machine's own mirror, where it has one.

No mirror is named in this project. The sources are one-line apt entries for mmdebstrap; an empty
list lets it take its own default.
"""

import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

RELEASE = "trixie"
# Names under which a machine may follow a release without naming it.
_ALIASES = ("stable", "oldstable", "testing", "unstable", "sid", RELEASE)
_VARIABLE = "INNKEEP_DEBIAN_MIRROR"


@dataclass(frozen=True)
class Mirror:
    """The archives of one mirror: of the releases, and of their security updates."""

    archives: tuple[str, ...] = ()
    security: tuple[str, ...] = ()

    def sources(self, suite: str) -> tuple[str, ...]:
        """apt's entries for a release and its updates; sid has no updates."""
        entries = [f"deb {uri} {suite} main" for uri in self.archives]
        if suite != "sid":
            entries += [f"deb {uri} {suite}-updates main" for uri in self.archives]
            entries += [f"deb {uri} {suite}-security main" for uri in self.security]
        return tuple(entries)


def machine_mirror(environ: Mapping[str, str] = os.environ) -> Mirror:
    """The mirror that INNKEEP_DEBIAN_MIRROR names, else Debian's own sources on this machine.

    The variable holds the address of the archive, beside which `-security` is added for the
    other one, as Debian's own layout has it.
    """
    named = environ.get(_VARIABLE, "").rstrip("/")
    if named:
        return Mirror(archives=(named,), security=(f"{named}-security",))
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian":
        return Mirror()
    texts = [path.read_text(encoding="utf-8") for path in _source_files(Path("/etc/apt"))]
    entries = [entry for text in texts for entry in parse_sources(text)]
    return debian_mirror(entries, release.get("VERSION_CODENAME", RELEASE))


@dataclass(frozen=True)
class Source:
    """One archive and suite that apt is told to use."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str


def debian_mirror(entries: Iterable[Source], codename: str) -> Mirror:
    """Debian's own archives among the entries of a machine that runs the release `codename`."""
    archives: list[str] = []
    security: list[str] = []
    for entry in entries:
        release = re.sub(r"(-updates|-security|/updates)$", "", entry.suite)
        if release not in (codename, *_ALIASES) or "main" not in entry.components:
            continue
        if entry.signed_by and "debian-archive" not in entry.signed_by:
            continue
        if entry.uri.startswith("cdrom:"):
            continue
        uris = security if re.search(r"(-security|/updates)$", entry.suite) else archives
        if entry.uri not in uris:
            uris.append(entry.uri)
    return Mirror(tuple(archives), tuple(security))


def parse_sources(text: str) -> Iterator[Source]:
    """The enabled binary sources of one file, in apt's one-line or its deb822 form."""
    if re.search(r"^Types:", text, re.MULTILINE):
        yield from _parse_deb822(text)
        return
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s*([^#]*)", line)
        if match:
            options, uri, suite, components = match.groups()
            signed_by = re.search(r"signed-by=(\S+)", options or "")
            yield Source(
                uri.rstrip("/"),
                suite,
                tuple(components.split()),
                signed_by.group(1) if signed_by else "",
            )


def _parse_deb822(text: str) -> Iterator[Source]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n\s*\n", "\n".join(lines)):
        pairs = re.findall(r"^([A-Za-z-]+):((?:.*)(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        fields = {name.lower(): value.split() for name, value in pairs}
        if "deb" not in fields.get("types", []) or fields.get("enabled", ["yes"]) == ["no"]:
            continue
        for uri in fields.get("uris", []):
            for suite in fields.get("suites", []):
                yield Source(
                    uri.rstrip("/"),
                    suite,
                    tuple(fields.get("components", [])),
                    " ".join(fields.get("signed-by", [])),
                )


def _source_files(apt: Path) -> list[Path]:
    parts = apt / "sources.list.d"
    files = [apt / "sources.list", *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]
    return [path for path in files if path.is_file()]
