"""The other end of a machine's link: a network namespace with addresses and a real DHCP server."""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from tests.support.commands import find_program, run


@frozen
class Router:
    """A network of its own, which ends with its process; its `link0` leads to a machine's eth0."""

    pid: int
    directory: Path

    def run(self, *command: str) -> str:
        """What a command of this machine says in that network."""
        return run("nsenter", f"--net=/proc/{self.pid}/ns/net", *command).decode()

    @contextmanager
    def dhcp_server(self, *options: str) -> "Iterator[subprocess.Popen[bytes]]":
        """dnsmasq, which takes every client for its own, for the block; it knows no old lease."""
        leases = self.directory / "leases"
        leases.unlink(missing_ok=True)
        with self._serving(
            [
                *(find_program("dnsmasq"), "--keep-in-foreground", "--conf-file=/dev/null"),
                *("--pid-file=", "--log-facility=-", "--log-dhcp", "--user=root"),
                *("--port=0", "--no-ping", "--dhcp-authoritative"),
                *("--bind-dynamic", "--interface=link0", f"--dhcp-leasefile={leases}"),
                *options,
            ]
        ) as server:
            yield server

    def leases(self) -> str:
        """What dnsmasq has given away: time, MAC, address, name, client id a line."""
        return (self.directory / "leases").read_text()

    @contextmanager
    def short_leases(self, seconds: int) -> "Iterator[subprocess.Popen[bytes]]":
        """busybox's udhcpd, whose leases may be shorter than dnsmasq's least of two minutes."""
        (self.directory / "given").touch()
        configuration = self.directory / "udhcpd.conf"
        configuration.write_text(
            f"start 10.9.0.90\nend 10.9.0.90\ninterface link0\nmin_lease 1\n"
            f"lease_file {self.directory}/given\npidfile {self.directory}/udhcpd.pid\n"
            f"option subnet 255.255.255.0\noption lease {seconds}\n"
        )
        with self._serving([find_program("busybox"), "udhcpd", "-f", str(configuration)]) as server:
            yield server

    @contextmanager
    def _serving(self, argv: Sequence[str]) -> "Iterator[subprocess.Popen[bytes]]":
        enter = ["nsenter", f"--net=/proc/{self.pid}/ns/net"]
        with (self.directory / "server.log").open("ab") as log:
            server = subprocess.Popen([*enter, *argv], stdout=log, stderr=log)
        try:
            yield server
        finally:
            server.terminate()
            server.wait()


@contextmanager
def router(directory: Path, *addresses: str) -> Iterator[Router]:
    """One for the block and one machine, which gets its eth0; `addresses` are link0's."""
    directory.mkdir(parents=True, exist_ok=True)
    # It has its network when it echoes.
    with subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            made = Router(process.pid, directory)
            made.run("ip", "link", "add", "link0", "type", "veth", "peer", "name", "eth0")
            for address in addresses:
                nodad = ["nodad"] if ":" in address else []
                made.run("ip", "address", "add", address, "dev", "link0", *nodad)
            made.run("ip", "link", "set", "link0", "up")
            yield made
        finally:
            process.kill()
