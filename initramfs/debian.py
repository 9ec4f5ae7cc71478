"""Debian packages: resolved and fetched with mmdebstrap and apt, unpacked with dpkg-deb."""

import hashlib
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from initramfs.architecture import Architecture
from initramfs.errors import BuildError
from initramfs.lock import Lock, Package
from initramfs.mirror import RELEASE, Mirror

# The settings of this machine's apt that decide whether a mirror can be reached and is believed.
_CARRIED_SETTINGS = re.compile(r'^(Acquire::(?:http|https|Check)\S*) "(.+)";$', re.MULTILINE)


def resolve(
    wanted: Mapping[str, Sequence[str]], mirror: Mirror, architecture: Architecture, cache: Path
) -> Lock:
    """Today's versions of what `packages.txt` names, with the image's dependencies.

    The packages themselves stay in `cache`.

    Raises:
        BuildError: the mirror cannot be read, or has no such package.
    """
    kernel, *_ = wanted["kernel"]
    kernel = kernel.replace("@ARCHITECTURE@", architecture.name)
    # The newest kernel has a package of its own, named by what the flavour's package depends on.
    newest = f"apt-cache depends {kernel} | sed -n 's/.*Depends: \\(linux-image-.*\\)/\\1/p'"
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folders = {name: Path(scratch) / name for name in ("image", "kernel", "build", "sid")}
        for folder in folders.values():
            folder.mkdir()
        script = "\n".join(
            (
                f'cp "$1"/var/cache/apt/archives/*.deb {shlex.quote(str(folders["image"]))}',
                f"cd {shlex.quote(str(folders['kernel']))} && apt-get download $({newest})",
                f"cd {shlex.quote(str(folders['build']))}"
                f" && apt-get download {shlex.join(wanted['build'])}",
            )
        )
        _mmdebstrap(mirror, RELEASE, architecture, script, include=wanted["image"])
        script = (
            f"cd {shlex.quote(str(folders['sid']))} && apt-get download {shlex.join(wanted['sid'])}"
        )
        _mmdebstrap(mirror, "sid", architecture, script)
        unwanted = frozenset(wanted["without"])
        sections = {
            name: tuple(
                package
                for package in sorted(map(_describe, folder.glob("*.deb")))
                if name != "image" or package.name not in unwanted
            )
            for name, folder in folders.items()
        }
        _check_unwanted(unwanted, folders["image"])
        for name, folder in folders.items():
            for package in sections[name]:
                (folder / package.file_name).replace(cache / package.file_name)
    return Lock(epoch=int(time.time()), sections=sections)


def fetch(
    packages: Iterable[Package], suite: str, mirror: Mirror, architecture: Architecture, cache: Path
) -> list[Path]:
    """The packages' files, downloaded into `cache` where they are not there yet.

    Raises:
        BuildError: the mirror cannot be read, no longer has a version, or has other bytes for it.
    """
    packages = list(packages)
    missing = [it for it in packages if not _is_intact(cache / it.file_name, it.sha256)]
    if missing:
        # Not on stdout, where boot.py says one thing only.
        print(f"downloading {len(missing)} Debian packages", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            words = shlex.join(f"{it.name}={it.version}" for it in missing)
            script = (
                f"cd {shlex.quote(scratch)} && apt-get download {words} || {{"
                f' for word in {words}; do apt-cache show "$word" >/dev/null 2>&1'
                ' || echo "GONE $word"; done; exit 1; }'
            )
            _mmdebstrap(mirror, suite, architecture, script)
            for package in missing:
                path = Path(scratch) / package.file_name
                if not _is_intact(path, package.sha256):
                    raise BuildError(
                        f"{package.name} {package.version}: the mirror's file is not the locked one"
                    )
                path.replace(cache / package.file_name)
    return [cache / package.file_name for package in packages]


def download(
    names: Sequence[str], suite: str, mirror: Mirror, architecture: Architecture, folder: Path
) -> list[Path]:
    """Today's versions of packages and of all that they depend on, in `folder`, by name.

    Raises:
        BuildError: the mirror cannot be read, or has no such package.
    """
    script = f'cp "$1"/var/cache/apt/archives/*.deb {shlex.quote(str(folder))}'
    _mmdebstrap(mirror, suite, architecture, script, include=names)
    return sorted(folder.glob("*.deb"))


def unpack(archives: Iterable[Path], root: Path) -> None:
    """Unpack packages over one another, without running their scripts.

    `/bin`, `/lib` and so on are links into `/usr` from the start, as on every Debian today.
    """
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    for archive in archives:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE
        ) as contents:
            options = ["--keep-directory-symlink", "--preserve-permissions", "--numeric-owner"]
            unpacked = subprocess.run(
                ["tar", "--extract", *options, "--directory", root],
                stdin=contents.stdout,
                check=False,
            )
        if contents.returncode or unpacked.returncode:
            raise BuildError(f"{archive.name} cannot be unpacked")


def carried_settings() -> list[str]:
    """mmdebstrap's options to reach and believe the mirror as this machine's own apt does."""
    dumped = subprocess.run(["apt-config", "dump"], stdout=subprocess.PIPE, text=True, check=True)
    found = _CARRIED_SETTINGS.findall(dumped.stdout)
    return [f'--aptopt={name} "{value}"' for name, value in found]


def _mmdebstrap(
    mirror: Mirror,
    suite: str,
    architecture: Architecture,
    script: str,
    include: Sequence[str] = (),
) -> None:
    """Run a shell script where apt-get and apt-cache know the suite, `$1` being apt's root."""
    hook = f'export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"\nset -e\n{script}\n'
    command = [
        "mmdebstrap",
        # Nothing is chrooted into, so nothing needs to be mounted, which containers may forbid.
        "--mode=root",
        "--skip=chroot/mount,check/qemu",
        "--variant=extract",
        f"--architectures={architecture.name}",
        # The packages land in a folder that apt's own user may not write to.
        '--aptopt=APT::Sandbox::User "root"',
        *carried_settings(),
        *([f"--include={','.join(include)}"] if include else []),
        f"--extract-hook={hook}",
        suite,
        "/dev/null",
        *mirror.sources(suite),
    ]
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if ran.returncode:
        raise BuildError(_failure(ran.stdout, suite))


def _failure(output: str, suite: str) -> str:
    gone = re.findall(r"^GONE (\S+)$", output, re.MULTILINE)
    if gone:
        return f"the mirror no longer has {', '.join(gone)}: run `make lock` for today's versions"
    causes = re.findall(r"^(?:E|Err|W)[:\d]* .*$", output, re.MULTILINE) or output.splitlines()[-1:]
    return f"Debian's packages of {suite} cannot be had: {'; '.join(causes)}"


def _describe(archive: Path) -> Package:
    shown = subprocess.run(
        ["dpkg-deb", "--show", "--showformat=${Package} ${Version} ${Architecture}", archive],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    name, version, architecture = shown.stdout.split()
    return Package(name, version, architecture, _sha256(archive))


def _check_unwanted(unwanted: frozenset[str], folder: Path) -> None:
    """A package that is left out must be one that would have come: else a line is stale."""
    there = {archive.name.partition("_")[0] for archive in folder.glob("*.deb")}
    if stale := sorted(unwanted - there):
        raise BuildError(f"packages.txt leaves out what nothing depends on: {', '.join(stale)}")


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
