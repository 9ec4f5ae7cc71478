"""The lock file: exactly which Debian packages an image is made of."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from initramfs.errors import BuildError
from initramfs.sections import parse_sections

FOLDER = Path(__file__).parent
SECTIONS = ("image", "kernel", "build", "sid")


@dataclass(frozen=True, order=True)
class Package:
    """A Debian package at one version. `architecture` is the package's own, so also `all`."""

    name: str
    version: str
    architecture: str
    sha256: str

    @property
    def file_name(self) -> str:
        """As apt names what it downloads: the colon of an epoch is escaped."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


@dataclass(frozen=True)
class Lock:
    """The packages by section, and the time that every file of the image carries.

    `epoch` is in seconds since 1970, as SOURCE_DATE_EPOCH.
    """

    epoch: int
    sections: dict[str, tuple[Package, ...]]

    def __getitem__(self, section: str) -> tuple[Package, ...]:
        return self.sections[section]


def lock_path(architecture: str) -> Path:
    """Where the lock of an architecture is kept."""
    return FOLDER / f"packages.{architecture}.lock"


def read_lock(architecture: str) -> Lock:
    """The lock of an architecture.

    Raises:
        BuildError: there is none, or it is not what `format_lock` writes.
    """
    path = lock_path(architecture)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BuildError(
            f"no image is locked for {architecture}: {path.name} is missing"
        ) from error
    try:
        return parse_lock(text)
    except (ValueError, KeyError) as error:
        raise BuildError(f"{path} is damaged ({error}): run `make lock`") from error


def parse_lock(text: str) -> Lock:
    """The inverse of `format_lock`. Raises ValueError or KeyError for anything else."""
    sections = parse_sections(text)
    (epoch,) = (int(line.removeprefix("epoch ")) for line in sections[""])
    packages = {name: tuple(Package(*line.split()) for line in sections[name]) for name in SECTIONS}
    if any(len(package.sha256) != 64 for kind in packages.values() for package in kind):
        raise ValueError("a line without a sha256")
    return Lock(epoch, packages)


def format_lock(lock: Lock) -> str:
    """The lock file's text: one line a package, sorted, so that changes read well."""
    lines = [
        "# Written by `make lock` from packages.txt: name, version, architecture, sha256.",
        f"epoch {lock.epoch}",
    ]
    for name in SECTIONS:
        lines += ["", f"[{name}]", *_columns(sorted(lock[name]))]
    return "\n".join(lines) + "\n"


def renew(old: Lock | None, new: Lock) -> Lock:
    """The new lock, with the old one's time where no package changed."""
    if old is not None and old.sections == new.sections:
        return replace(new, epoch=old.epoch)
    return new


def _columns(packages: Iterable[Package]) -> list[str]:
    return [f"{it.name} {it.version} {it.architecture} {it.sha256}" for it in packages]
