"""File trees for layers, made on a real file system and archived by GNU tar."""

import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support.commands import find_program, run

Builder = Callable[[Path], None]

# The time of all entries, so that a layer has the same digest each time; not a whole second.
_WHEN_NS = 1_600_000_000_123_456_789


def archive(build: Builder, *options: str, gnu: bool = False) -> bytes:
    """The tar of what `build` makes in an empty directory; `options` are GNU tar's.

    In the POSIX format, with all extended attributes: ACLs and capabilities are stored as docker
    stores them, as the extended attributes that they are (`SCHILY.xattr.*`), not in tar's own
    ACL records. Or in the old GNU format, which has no attributes.
    """
    # Neither the archiver's pid nor access times: the same tree is the same tar.
    posix = [
        "--format=posix",
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--xattrs",
    ]
    with tempfile.TemporaryDirectory(prefix="innkeep-tree-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        build(root)
        _set_times(root)
        return run(
            "tar",
            "--create",
            *(["--format=gnu"] if gnu else posix),
            "--numeric-owner",
            "--sort=name",
            *options,
            "--file=-",
            "--directory",
            root,
            ".",
        )


def busybox(root: Path) -> None:
    """A small system: static busybox with all its applets, two users, the usual directories."""
    for name, mode in {"bin": 0o755, "etc": 0o755, "root": 0o700, "tmp": 0o1777}.items():
        (root / name).mkdir()
        (root / name).chmod(mode)
    for name in ("dev", "proc", "sys", "home/guest", "var/log"):
        (root / name).mkdir(parents=True)
    program = Path(find_program("busybox"))
    shutil.copy(program, root / "bin/busybox")
    for applet in run(program, "--list").decode().split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nguest:x:1000:1000:guest:/home/guest:/bin/sh\n"
    )
    (root / "etc/group").write_text("root:x:0:\nguest:x:1000:\nwheel:x:10:root,guest\n")
    os.chown(root / "home/guest", 1000, 1000)


def busybox_alone(root: Path) -> None:
    """Static busybox, without any link or directory besides."""
    _copy(Path(find_program("busybox")), root / "usr/bin/busybox")


def programs(*names: str) -> Builder:
    """Programs of this machine below /usr/bin, with the libraries that they are linked to."""

    def build(root: Path) -> None:
        for name in names:
            program = Path(find_program(name))
            _copy(program, root / "usr/bin" / name)
            for word in run("ldd", program).decode().split():
                if word.startswith("/"):
                    _copy(Path(word), root / word.lstrip("/"))

    return build


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def numbered(number: int) -> Builder:
    """Layer `number` of many: a file of its own, and one that each layer replaces."""

    def build(root: Path) -> None:
        (root / "layers").mkdir()
        (root / "layers" / f"{number:03}").write_text(f"layer {number}\n")
        (root / "layers" / "top").write_text(f"{number}\n")

    return build


def before_whiteouts(root: Path) -> None:
    for directory in ("kept", "gone", "emptied", "replaced", "opaque", "opaque/below"):
        (root / directory).mkdir()
        (root / directory / "one").write_text(f"{directory} one\n")
        (root / directory / "two").write_text(f"{directory} two\n")
    (root / "turns-into-directory").write_text("a file\n")
    (root / "link").symlink_to("kept/one")
    (root / "back-again").write_text("first\n")


def whiteouts(root: Path) -> None:
    """Whiteouts of files, of a directory, of a link; an opaque directory; type changes.

    https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts
    """
    (root / "kept").mkdir()
    (root / "kept/.wh.two").touch()
    (root / ".wh.gone").touch()
    (root / ".wh.link").touch()
    (root / "emptied").mkdir()
    (root / "emptied/.wh.one").touch()
    (root / "emptied/.wh.two").touch()
    (root / "opaque").mkdir(mode=0o750)
    # `sort=name` puts this one before the marker, which is for the layers below only.
    (root / "opaque/-early").write_text("before the marker\n")
    (root / "opaque/.wh..wh..opq").touch()
    (root / "opaque/three").write_text("only this\n")
    (root / "turns-into-directory").mkdir()
    (root / "turns-into-directory/inside").write_text("a directory now\n")
    (root / "replaced").write_text("a file now\n")
    (root / ".wh.back-again").touch()


def after_whiteouts(root: Path) -> None:
    (root / "gone").mkdir()
    (root / "gone/new").write_text("the old entries stay away\n")
    (root / "back-again").write_text("second\n")
    (root / "opaque").mkdir(mode=0o750)
    (root / "opaque/four").write_text("beside three\n")


def odd_entries(root: Path) -> None:
    """Hard links, special modes, devices, attributes and names that break naive code."""
    for directory in ("a", "b/c", "names", "modes", "attributes", "special", "empty"):
        (root / directory).mkdir(parents=True)
    (root / "a/original").write_text("one inode, three names\n")
    os.link(root / "a/original", root / "b/hard")
    os.link(root / "a/original", root / "b/c/hard")
    (root / "a/absolute").symlink_to("/b/hard")
    (root / "a/dangling").symlink_to("../../nowhere")
    (root / "a/long-target").symlink_to("x" * 1000)

    names = [
        "-rf",
        "--help",
        " spaces ",
        "new\nline",
        "tab\tand\\backslash",
        "größe-大きさ-🐢",
        "quote'\"$(id)`id`*?",
        ".hidden",
        "n" * 255,
        "..three",
        "trailing.",
        "trailing...",
        "PAX=value 100%",
    ]
    for name in names:
        (root / "names" / name).write_text(name)
    # Bytes that are no UTF-8: legal to the kernel.
    for bytes_name in (b"latin-\xe9", b"\xff\n" * 127 + b"\xfe", bytes(range(1, 32))):
        (root / "names" / os.fsdecode(bytes_name)).write_bytes(bytes_name)
    deep = root.joinpath("names", *(["d" * 60] * 5))
    deep.mkdir(parents=True)
    (deep / "deep").write_text("past 256 bytes of path\n")

    for mode in (0o000, 0o400, 0o644, 0o777, 0o4755, 0o2755, 0o1644, 0o6711):
        file = root / "modes" / f"{mode:04o}"
        file.write_text("mode\n")
        os.chown(file, 1000 + mode, 65534)
        file.chmod(mode)
    for mode in (0o1777, 0o2775, 0o700):
        subdirectory = root / "modes" / f"directory-{mode:04o}"
        subdirectory.mkdir()
        subdirectory.chmod(mode)
    big_owner = root / "modes/big-owner"
    big_owner.write_text("ids beyond tar's octal field\n")
    os.chown(big_owner, 2**31 + 5, 3_000_000)

    attributes = root / "attributes"
    for name in ("user", "capability", "acl", "binary", "trusted"):
        (attributes / name).write_text(name)
    os.setxattr(attributes / "user", "user.long", b"v" * 2000)
    os.setxattr(attributes / "user", "user.größe", "ü".encode())
    os.setxattr(attributes / "binary", "user.binary", b"\x00\x01=\n\xff")
    os.setxattr(attributes / "trusted", "trusted.innkeep", b"root only")
    # VFS_CAP_REVISION_2, cap_net_raw and cap_net_bind_service effective: linux/capability.h
    capability = struct.pack("<IIIII", 0x02000001, (1 << 13) | (1 << 10), 0, 0, 0)
    os.setxattr(attributes / "capability", "security.capability", capability)
    os.setxattr(attributes / "acl", "system.posix_acl_access", _acl(uid=1000, permissions=7))
    os.setxattr(attributes, "system.posix_acl_default", _acl(uid=1001, permissions=5))
    os.setxattr(attributes, "user.on-a-directory", b"yes")

    os.mknod(root / "special/null", 0o666 | 0o020000, os.makedev(1, 3))
    os.mknod(root / "special/disk", 0o660 | 0o060000, os.makedev(259, 70_000))
    os.mkfifo(root / "special/fifo", 0o640)
    (root / "special/zero-length").touch()


def sparse_files(root: Path) -> None:
    """Files with holes at the start, in the middle, at the end, everywhere, and in many places."""
    _sparse(root / "head", 1 << 20, {(1 << 20) - 9: b"at the en"})
    _sparse(root / "middle", 3 << 20, {0: b"first", 2 << 20: b"data" * 5000})
    _sparse(root / "tail", (2 << 20) + 77, {0: b"only the start" * 999})
    _sparse(root / "nothing", 5 << 20, {})
    # More extents than the old GNU header and its first extension hold (4 and 21).
    _sparse(root / "many", 8 << 20, {n * (128 << 10): b"%d" % n * 100 for n in range(60)})
    (root / "plain").write_text("no hole\n")
    os.link(root / "many", root / "many-again")


def zeros(root: Path) -> None:
    """64 MiB that compress to almost nothing."""
    (root / "zeros").write_bytes(bytes(64 << 20))


def _sparse(path: Path, size: int, extents: dict[int, bytes]) -> None:
    with path.open("wb") as file:
        for offset, data in extents.items():
            file.seek(offset)
            file.write(data)
        file.truncate(size)


def _acl(*, uid: int, permissions: int) -> bytes:
    """A minimal ACL with one named user, as linux/posix_acl_xattr.h lays it out."""
    user_obj, user, group_obj, mask, other, nobody = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
    entries = [
        (user_obj, 6, nobody),
        (user, permissions, uid),
        (group_obj, 4, nobody),
        (mask, 7, nobody),
        (other, 4, nobody),
    ]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def _set_times(root: Path) -> None:
    # Children before their directories, whose times each change within them sets anew.
    for directory, _, _ in os.walk(root, topdown=False):
        for entry in os.scandir(directory):
            os.utime(entry, ns=(_WHEN_NS, _WHEN_NS), follow_symlinks=False)
    os.utime(root, ns=(_WHEN_NS, _WHEN_NS))
