"""OpenSSH's agent on the host's side, with a key that only it has."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.constants import Port
from tests.support.commands import find_program, run


@contextmanager
def ssh_agent(sockets: Path, directory: Path) -> Iterator[str]:
    """Run ssh-agent where the host's port for it is, for the block; `sockets` is what the paths of
    its ports begin with, and the key is kept in `directory`.

    Yields what `ssh-add -l` prints of the key.
    """
    socket = f"{sockets}_{Port.SSH_AGENT}"
    key = directory / "id_ed25519"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "of the host", "-f", key)
    argv = [find_program("ssh-agent"), "-D", "-a", socket]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        try:
            # It says where it listens when it does.
            assert process.stdout is not None
            process.stdout.readline()
            run("ssh-add", "-q", key, env={"SSH_AUTH_SOCK": socket})
            yield run("ssh-keygen", "-l", "-f", f"{key}.pub").decode()
        finally:
            process.terminate()
            process.wait()
