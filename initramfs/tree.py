"""The image's root filesystem: Debian's packages and our own, less what nothing uses."""

import glob
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from initramfs.errors import BuildError
from initramfs.programs import PYTHON, Programs

HOME = "usr/lib/innkeep"
PROJECT = Path(__file__).parents[1]
OUR_PACKAGES = ("agent", "protocol")
LAUNCHERS = ("run_agent.py", "open_root_disk.py")
_FOLDERS = {
    "dev": 0o755,
    "mnt/root": 0o700,
    "mnt/virtiofs": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "storage": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    "var/log": 0o755,
    "workspace": 0o755,
}
_LINKS = {
    f"usr/bin/{PYTHON.partition('.')[0]}": PYTHON,
    "usr/sbin/init": "/init",
    "var/run": "../run",
    "var/tmp": "../tmp",
}
_FILES = {
    "etc/fstab": """\
sysfs /sys sysfs nosuid,nodev,noexec 0 0
devpts /dev/pts devpts nosuid,noexec,gid=5,mode=620,ptmxmode=666 0 0
tmpfs /dev/shm tmpfs nosuid,nodev 0 0
tmpfs /run tmpfs nosuid,nodev,mode=755 0 0
tmpfs /tmp tmpfs nosuid,nodev,mode=1777 0 0
cgroup2 /sys/fs/cgroup cgroup2 nosuid,nodev,noexec 0 0
""",
    "etc/hostname": "innkeep\n",
    "etc/hosts": "127.0.0.1\tlocalhost innkeep\n::1\tlocalhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/resolv.conf": "",
}


def install_wheels(programs: Programs, requirements: Path, pip: Path) -> Path:
    """Install the agent's libraries for the image's own Python; the folder they are in.

    Raises:
        BuildError: pip failed, for instance because a file is not the one that was locked.
    """
    wheels = programs.root / HOME
    options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--no-compile"]
    quiet = ["--quiet", "--no-warn-script-location", "--root-user-action=ignore"]
    try:
        programs.python(
            *["-m", "pip", "install", *options, *quiet, "--disable-pip-version-check"],
            *["--target", str(wheels), "--requirement", str(requirements)],
            path=[pip],
        )
    except BuildError as error:
        raise BuildError(f"the agent's libraries cannot be installed: {error}") from error
    # One list of trusted authorities, as Debian's own certifi has it.
    bundle = wheels / "certifi/cacert.pem"
    bundle.unlink()
    bundle.symlink_to("/etc/ssl/certs/ca-certificates.crt")
    return wheels


def write_settings(root: Path) -> None:
    """Do what the packages' own scripts would have done, and make the mount points."""
    for name, mode in _FOLDERS.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    for name, target in _LINKS.items():
        _remove(root / name)
        (root / name).symlink_to(target)
    for name, text in _FILES.items():
        (root / name).write_text(text, encoding="utf-8")
    for name in ("passwd", "group"):
        shutil.copyfile(root / f"usr/share/base-passwd/{name}.master", root / "etc" / name)
    authorities = sorted((root / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.write_bytes(b"".join(path.read_bytes() for path in authorities))


def prune(root: Path, programs: Sequence[str], unneeded: Iterable[str]) -> None:
    """Remove the programs that are not named, and what the patterns match."""
    for folder in ("usr/bin", "usr/sbin"):
        for path in (root / folder).iterdir():
            if path.name not in programs:
                path.unlink()
    for pattern in unneeded:
        # pathlib's glob would miss links that lead nowhere.
        for name in glob.glob(pattern, root_dir=root, recursive=True):  # noqa: PTH207 see above
            _remove(root / name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_applets(root: Path) -> None:
    """Make busybox answer to every name that no other program of the image has."""
    busybox = root / "usr/bin/busybox"
    listed = subprocess.run([busybox, "--list-full"], stdout=subprocess.PIPE, text=True, check=True)
    present = {path.name for name in ("bin", "sbin") for path in (root / "usr" / name).iterdir()}
    for name in listed.stdout.split():
        path = root / name
        if path.name not in present and name != "linuxrc":
            path.symlink_to("/usr/bin/busybox")


def write_agent(programs: Programs, root: Path) -> None:
    """Make a tree of our own packages, their launcher and init, to lie over the base."""
    home = root / HOME
    home.mkdir(parents=True)
    for name in OUR_PACKAGES:
        # The command line is the host's.
        ignored = shutil.ignore_patterns("__pycache__", "cli")
        shutil.copytree(PROJECT / name, home / name, ignore=ignored)
    for name in LAUNCHERS:
        shutil.copyfile(PROJECT / "initramfs" / name, home / name)
    shutil.copyfile(PROJECT / "initramfs/init", root / "init")
    (root / "init").chmod(0o755)
    precompile(programs, root, [home / name for name in OUR_PACKAGES])


def write_versions(root: Path, versions: Mapping[str, str]) -> None:
    """Tell the agent what the image is made of, for it to tell whoever asks."""
    lines = (f"{name} {version}\n" for name, version in versions.items())
    (root / HOME / "versions").write_text("".join(lines), encoding="ascii")


def precompile(programs: Programs, root: Path, folders: Iterable[Path]) -> None:
    """Compile to bytecode that is never checked against its source, for the tree is read-only.

    The folders are inside `root`, and tracebacks will name their files from there.
    """
    # One worker: bytecode depends on what its process has compiled before.
    options = ["-q", "-j1", "--invalidation-mode=unchecked-hash"]
    paths = ["-s", str(root), "-p", "/"]
    programs.python("-m", "compileall", *options, *paths, *sorted(folders))


def settle(root: Path, epoch: int) -> None:
    """Give every file the one owner, mode and time that it has in every build."""
    for path in (root, *root.rglob("*")):
        os.chown(path, 0, 0, follow_symlinks=False)
        if (root / HOME) in path.parents and not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)
