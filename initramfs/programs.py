"""Running the image's own programs while the image is built, without entering it.

The build needs the image's Python (bytecode and wheels belong to one version) and its mkfs.erofs
(distributions' own may be too old). Run through the tree's dynamic loader they see this machine's
files, network and settings, and need neither chroot nor mounts.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from initramfs.architecture import Architecture
from initramfs.errors import BuildError

PYTHON = "python3.13"


@dataclass(frozen=True)
class Programs:
    """The programs of a tree of the image."""

    root: Path
    architecture: Architecture

    def python(
        self,
        *arguments: str | Path,
        path: Sequence[Path] = (),
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
    ) -> None:
        """Run the tree's Python; `path` goes before its standard library."""
        env = {
            "PYTHONHOME": str(self.root / "usr"),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.run(f"usr/bin/{PYTHON}", *arguments, env=env, stdin=stdin, stdout=stdout)

    def run(
        self,
        program: str,
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        stdin: IO[bytes] | None = None,
        stdout: IO[bytes] | None = None,
    ) -> None:
        """Run a program of the tree and wait for it.

        Raises:
            BuildError: it failed; with the last line that it wrote on stderr.
        """
        loader = self.root / self.architecture.loader
        libraries = self.root / self.architecture.libraries
        ran = subprocess.run(
            [loader, "--library-path", libraries, self.root / program, *arguments],
            env={**os.environ, **(env or {})},
            stdin=stdin or subprocess.DEVNULL,
            stdout=stdout or subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if ran.returncode:
            said = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
            name = Path(program).name
            raise BuildError(f"the image's own {name} failed: {''.join(said)}")
