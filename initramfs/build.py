"""Build the image: `python -m initramfs.build [--arch NAME] [--output DIR] [--lock]`.

Into the output folder: `vmlinux`, `initramfs.cpio`, `manifest.json`, and `rootfs/`, the same root
filesystem as a tree. What Debian and the package index gave is kept in its `cache/`, so a second
build downloads nothing, and one where only the agent changed starts from there. Needs root, and
from Debian mmdebstrap; nothing is mounted and nothing is chrooted into.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from initramfs import debian, kernel, lock, tree
from initramfs.architecture import ARCHITECTURES, Architecture, machine_architecture
from initramfs.errors import BuildError
from initramfs.image import write_erofs, write_initramfs
from initramfs.lock import Lock
from initramfs.mirror import RELEASE, machine_mirror
from initramfs.programs import Programs
from initramfs.sections import read_sections

FOLDER = Path(__file__).parent
MODULE_LISTS = ("root", "devices")
REQUIREMENTS = tree.PROJECT / "requirements/agent.txt"
_TOOLS = {"mmdebstrap": "mmdebstrap", "dpkg-deb": "dpkg", "tar": "tar"}
# What the cached part depends on, besides the lock.
_FOUNDATIONS = (
    *(FOLDER / name for name in ("tree.txt", "modules.txt", "build.py", "debian.py", "kernel.py")),
    *(FOLDER / name for name in ("image.py", "programs.py", "tree.py")),
    REQUIREMENTS,
)


def main() -> int:
    """Build or lock; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m initramfs.build", description=__doc__)
    parser.add_argument("--arch", default=machine_architecture(), help="Debian's name for it")
    parser.add_argument("--output", type=Path, default=tree.PROJECT / "build", metavar="DIR")
    parser.add_argument(
        "--lock", action="store_true", help="lock Debian's packages at today's versions instead"
    )
    options = parser.parse_args()
    # Whatever the person's own, files must come out the same.
    os.umask(0o022)
    try:
        if options.arch not in ARCHITECTURES:
            raise BuildError(f"no image for {options.arch} yet, only {', '.join(ARCHITECTURES)}")
        architecture = ARCHITECTURES[options.arch]
        output: Path = options.output.absolute()
        _check_machine()
        with _alone(output):
            if options.lock:
                renew_lock(architecture, output / "cache")
            else:
                build(architecture, output)
    except BuildError as error:
        print(f"initramfs.build: {error}", file=sys.stderr)
        return 1
    return 0


def renew_lock(architecture: Architecture, cache: Path) -> None:
    """Write the lock file anew from packages.txt and what the mirror has today."""
    path = lock.lock_path(architecture.name)
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    old = lock.read_lock(architecture.name) if path.exists() else None
    wanted = read_sections(FOLDER / "packages.txt")
    new = debian.resolve(wanted, machine_mirror(), architecture, debs)
    path.write_text(lock.format_lock(lock.renew(old, new)), encoding="utf-8")
    print(f"locked {sum(map(len, new.sections.values()))} packages in {path}")


def build(architecture: Architecture, output: Path) -> None:
    """Make the image in `output`, unless it is there already, made of the same inputs."""
    locked = lock.read_lock(architecture.name)
    base_key = _digest([lock.lock_path(architecture.name), *_FOUNDATIONS])
    sources = [path for name in tree.OUR_PACKAGES for path in (tree.PROJECT / name).rglob("*.py")]
    parts = [FOLDER / name for name in ("init", *tree.LAUNCHERS, "cpio.py")]
    key = _digest([*parts, *sources], base_key)
    if _is_built(output, key):
        print(f"{output} is up to date")
        return
    base = output / "cache" / f"base-{architecture.name}"
    if not _has_key(base, base_key):
        _build_base(architecture, locked, output / "cache", base, base_key)
        (base / "key").write_text(base_key)
    print("building the image", flush=True)
    (output / "manifest.json").unlink(missing_ok=True)
    programs = Programs(base / "rootfs", architecture)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        agent, rootfs = Path(scratch) / "agent", Path(scratch) / "rootfs"
        agent_image = Path(scratch) / "agent.erofs"
        tree.write_agent(programs, agent)
        versions = {"image": key, **{it.name: it.version for it in locked["image"]}}
        tree.write_versions(agent, versions)
        tree.settle(agent, locked.epoch)
        write_erofs(programs, agent, agent_image, locked.epoch, key)
        for part in (base / "rootfs", agent):
            shutil.copytree(part, rootfs, symlinks=True, dirs_exist_ok=True)
        tree.settle(rootfs, locked.epoch)
        images = (base / "base.erofs", agent_image)
        initramfs = output / "initramfs.cpio"
        write_initramfs(rootfs, base / "modules", images, initramfs, locked.epoch)
        shutil.copyfile(base / "vmlinux", output / "vmlinux")
        if (output / "rootfs").exists():
            (output / "rootfs").rename(Path(scratch) / "old")
        rootfs.rename(output / "rootfs")
    _write_manifest(architecture, locked, output, key)
    size = (output / "initramfs.cpio").stat().st_size
    print(f"built {output}: initramfs.cpio has {size / 1e6:.1f} MB")


def _build_base(
    architecture: Architecture, locked: Lock, cache: Path, base: Path, key: str
) -> None:
    """Make what the agent's own code does not change: `rootfs/` and its image, and the kernel."""
    if base.exists():
        shutil.rmtree(base)
    base.mkdir(parents=True)
    debs = cache / "debs"
    debs.mkdir(exist_ok=True)
    wanted = [*locked["image"], *locked["kernel"], *locked["build"]]
    archives = debian.fetch(wanted, RELEASE, machine_mirror(), architecture, debs)
    print("unpacking", flush=True)
    programs = Programs(base / "rootfs", architecture)
    root = programs.root
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        tools = Path(scratch)
        debian.unpack(archives[: len(locked["image"])], root)
        debian.unpack(archives[len(locked["image"]) :], tools)
        print("installing the agent's libraries", flush=True)
        pip = tools / "usr/lib/python3/dist-packages"
        wheels = tree.install_wheels(programs, REQUIREMENTS, pip)
        kernel.extract_kernel(tools, programs, wheels, base / "vmlinux")
        lists = read_sections(FOLDER / "modules.txt")
        kernel.write_modules(tools, {name: lists[name] for name in MODULE_LISTS}, base / "modules")
        # In the root, which is there when the initramfs is gone.
        later = {"later": lists["later"]}
        kernel.write_modules(tools, later, root / tree.HOME / "modules")
    contents_of_tree = read_sections(FOLDER / "tree.txt")
    tree.write_settings(root)
    tree.prune(root, contents_of_tree["programs"], contents_of_tree["unneeded"])
    tree.link_applets(root)
    print("compiling", flush=True)
    tree.precompile(programs, root, [root / "usr/lib/python3.13", root / tree.HOME])
    tree.settle(root, locked.epoch)
    print("compressing", flush=True)
    write_erofs(programs, root, base / "base.erofs", locked.epoch, key)


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise BuildError("needs root, for the image's files are root's: use sudo")
    for program, package in _TOOLS.items():
        if shutil.which(program) is None:
            raise BuildError(f"needs {program}, from Debian's package {package}")


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Wait until no other build works in the folder, and keep others out."""
    (output / "cache").mkdir(parents=True, exist_ok=True)
    with (output / "cache/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(paths: Iterable[Path], *more: str) -> str:
    """What changes when a file's name or contents change."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        contents = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(tree.PROJECT)} {contents}\n".encode())
    for text in more:
        digest.update(text.encode())
    return digest.hexdigest()


def _has_key(base: Path, key: str) -> bool:
    path = base / "key"
    return path.is_file() and path.read_text() == key


def _is_built(output: Path, key: str) -> bool:
    path = output / "manifest.json"
    if not path.is_file() or not (output / "rootfs").is_dir():
        return False
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest["key"] == key and all(
        (output / name).is_file() and (output / name).stat().st_size == said["size"]
        for name, said in manifest["files"].items()
    )


def _write_manifest(architecture: Architecture, locked: Lock, output: Path, key: str) -> None:
    files = {}
    for name in ("initramfs.cpio", "vmlinux"):
        with (output / name).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"size": file.tell(), "sha256": sha256}
    manifest = {
        "architecture": architecture.name,
        "epoch": locked.epoch,
        "key": key,
        "files": files,
        "packages": {it.name: it.version for it in (*locked["kernel"], *locked["image"])},
    }
    (output / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
