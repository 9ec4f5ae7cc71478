"""Which programs the agent works with."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import attrs

from agent.errors import cause_of
from agent.linux.programs import path_of
from protocol.constants import AGENT_VERSION, PROTOCOL_VERSION
from protocol.machine import Versions

IMAGE_VERSIONS = Path("/usr/lib/innkeep/versions")
"""Of the image, written by its build: a name and a version a line, ``image`` is its own."""
_LIMIT_S = 5


@attrs.define
class KnownVersions:
    """They are found out when first asked for, and stay the same."""

    _crun: str
    _mkfs_erofs: str
    _image_versions: Path | None
    _told: dict[str, str] = attrs.field(factory=dict)

    def read(self) -> tuple[Versions, Mapping[str, str]]:
        """What is known, and of the rest the cause why it is not, by field. Blocks: outside the
        image programs are asked."""
        causes: dict[str, str] = {}
        of_image = self._of_image(causes)
        return (
            Versions(
                agent=AGENT_VERSION,
                protocol=PROTOCOL_VERSION,
                python=platform.python_version(),
                kernel=platform.release(),
                crun=of_image.get("crun") or self._asked("crun", self._crun, causes),
                erofs_utils=of_image.get("erofs-utils")
                or self._asked("erofs_utils", self._mkfs_erofs, causes),
                image=of_image.get("image"),
            ),
            causes,
        )

    def _of_image(self, causes: dict[str, str]) -> Mapping[str, str]:
        if self._image_versions is None:
            causes["image"] = "the agent runs outside its image"
            return {}
        try:
            lines = self._image_versions.read_text(encoding="ascii").splitlines()
        except OSError as error:
            causes["image"] = cause_of(error)
            return {}
        return dict(line.split(" ", 1) for line in lines)

    def _asked(self, field: str, program: str, causes: dict[str, str]) -> str | None:
        """By its own words: ``crun version 1.21``, ``mkfs.erofs (erofs-utils) 1.8.6``."""
        if field not in self._told:
            try:
                said = subprocess.run(
                    [program, "--version"],
                    executable=path_of(program),
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    check=True,
                    timeout=_LIMIT_S,
                ).stdout
            except (OSError, subprocess.SubprocessError) as error:
                causes[field] = cause_of(error)
                return None
            first = said.decode(errors="replace").partition("\n")[0]
            words = [word for word in first.split() if word[:1].isdigit()]
            self._told[field] = words[0] if words else first
        return self._told[field]
