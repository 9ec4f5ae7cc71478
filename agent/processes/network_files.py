"""hostname, hosts and resolv.conf of a container, whose network is the VM's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from agent.errors import cause_of
from agent.processes.command import Bind

log = logging.getLogger(__name__)

_HOSTS: Sequence[str] = ("127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback")


def write_network_files(directory: Path, hostname: str) -> list[Bind]:
    """Write copies of the VM's to ``directory``, for a container to change as it likes.

    Raises:
        OSError: it is not writable.
    """
    texts = {
        "hostname": f"{hostname}\n",
        "hosts": hosts_file(_text_of_vm("/etc/hosts"), hostname),
        "resolv.conf": _text_of_vm("/etc/resolv.conf"),
    }
    for name, text in texts.items():
        file = directory / name
        file.write_text(text, encoding="utf-8")
        file.chmod(0o644)  # for every user of the container, whatever our umask
    return [Bind(str(directory / name), f"/etc/{name}") for name in texts]


def renew_resolv_conf(run_dir: Path, before: str, text: str) -> None:
    """Give the VM's new resolv.conf to the containers that run, whose files are below ``run_dir``:
    to those that have the one from before, and not one of their own.

    Theirs is a mount of the file, which therefore is written over and not replaced. Blocks. What
    fails is logged.
    """
    for copy in run_dir.glob("*/*/resolv.conf"):
        try:
            with copy.open("r+", encoding="utf-8", errors="replace") as file:
                if file.read() == before:
                    file.seek(0)
                    file.write(text)
                    file.truncate()
        except OSError as error:
            # It may have ended meanwhile.
            log.info("renew %s: %s", copy, cause_of(error))


def hosts_file(of_vm: str, hostname: str) -> str:
    """/etc/hosts for a container: the VM's, whose network it has, with its name in it."""
    lines = of_vm.rstrip("\n").split("\n") if of_vm.strip() else [*_HOSTS]
    known = {name for line in lines for name in line.partition("#")[0].split()[1:]}
    if hostname not in known:
        lines.append(f"127.0.1.1\t{hostname}")
    return "".join(f"{line}\n" for line in lines)


def _text_of_vm(path: str) -> str:
    with suppress(FileNotFoundError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""
