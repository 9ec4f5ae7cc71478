"""The containers on an overlay: umount2(2) takes no notice of them, they have their own mounts."""

from __future__ import annotations

from pathlib import Path

# What the kernel's seq_show_option() escapes in an option's value.
_ESCAPED = {ord(character): f"\\{ord(character):03o}" for character in ", \t\n\\"}


def containers_on(upper: Path) -> list[int]:
    """The processes, one of each mount namespace, whose root is the overlay with that upperdir.

    Namespaces that merely have a copy of its mount do not count: every container has one of all
    mounts while it starts. Reads /proc/<pid>/mountinfo (proc_pid_mountinfo(5)). Blocks.
    """
    option = f",upperdir={str(upper).translate(_ESCAPED)},"
    seen = {Path("/proc/self/ns/mnt").readlink()}
    users = []
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        try:
            namespace = (process / "ns/mnt").readlink()
            if namespace in seen:
                continue
            seen.add(namespace)
            mounts = (process / "mountinfo").read_text(errors="surrogateescape")
        except OSError:  # it has ended
            continue
        if any(_is_root(line) and option in f"{line}," for line in mounts.splitlines()):
            users.append(int(process.name))
    return users


def _is_root(mount: str) -> bool:
    return mount.split(" ", 5)[4] == "/"
