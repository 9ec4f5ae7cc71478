"""Programs of the machine that tests use: run to their end, failing with what they said."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

# Program -> the Debian package to install where it is missing.
PACKAGES = {
    "busybox": "busybox-static",
    "crun": "crun",
    "dig": "bind9-dnsutils",
    "dnsmasq": "dnsmasq-base",
    "findmnt": "util-linux",
    "setfattr": "attr",
    "ssh-add": "openssh-client",
    "ssh-agent": "openssh-client",
    "ssh-keygen": "openssh-client",
    "skopeo": "skopeo",
    "tar": "tar",
    "umoci": "umoci",
    "unshare": "util-linux",
    "zstd": "zstd",
}


class CommandError(Exception):
    """A program is missing, or ended with another status than 0."""


def find_program(name: str) -> str:
    """The path of `name`; raises CommandError naming the package to install."""
    path = shutil.which(name)
    if path is None:
        raise CommandError(f"{name} is missing: apt-get install {PACKAGES.get(name, name)}")
    return path


def run(
    *argv: str | Path,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    env: Mapping[str, str] | None = None,
) -> bytes:
    """Run a program with an empty (or the given) stdin; its stdout. Raises CommandError."""
    program = find_program(str(argv[0]))
    completed = subprocess.run(
        [program, *map(str, argv[1:])],
        input=stdin if stdin is not None else b"",
        capture_output=True,
        check=False,
        cwd=cwd,
        env=env,
    )
    if completed.returncode != 0:
        said = (completed.stderr or completed.stdout).decode(errors="replace").strip()
        raise CommandError(f"{' '.join(map(str, argv))}: status {completed.returncode}: {said}")
    return completed.stdout
