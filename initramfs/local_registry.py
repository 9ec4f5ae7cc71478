"""Debian's docker-registry on loopback: for the demo, the tests and the benchmarks."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import IO

from attrs import frozen

_LISTENING = "listening on "


class RegistryError(RuntimeError):
    """The registry is not installed or did not start; the text says what to do or what it said."""


@frozen
class LocalRegistry:
    """A running registry.

    `address` is `127.0.0.1:PORT`, `pid` the server's process. `storage_dir` is the server's own
    directory, so a test can damage a blob at
    `docker/registry/v2/blobs/sha256/<two digits>/<digest>/data`. `access_log` has one line of
    Apache's combined format a request.
    """

    port: int
    pid: int
    storage_dir: Path
    access_log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def blob_path(self, digest: str) -> Path:
        """Where the server keeps the blob `sha256:<hex>`."""
        hex_digest = digest.removeprefix("sha256:")
        blobs = self.storage_dir / "docker/registry/v2/blobs/sha256"
        return blobs / hex_digest[:2] / hex_digest / "data"


@contextmanager
def local_registry(
    *,
    certificate: Path | None = None,
    key: Path | None = None,
    storage_dir: Path | None = None,
    upstream: str | None = None,
    auth: Mapping[str, object] | None = None,
) -> Iterator[LocalRegistry]:
    """Serve a registry until the block is left; nothing of it stays behind.

    Plain HTTP, or HTTPS when a PEM `certificate` chain and its `key` are given. It is empty, or
    has what was pushed to an earlier one in `storage_dir`, where what is pushed stays, or is a
    pull-through cache of the registry with the URL `upstream`. `auth` is that section of its
    configuration. Blocks for some 50 ms until the server listens. Raises RegistryError.
    """
    if shutil.which("docker-registry") is None:
        raise RegistryError("docker-registry is missing: apt-get install docker-registry")
    with tempfile.TemporaryDirectory(prefix="innkeep-registry-") as directory:
        root = Path(directory)
        storage_dir = storage_dir or root / "storage"
        configuration = _configuration(storage_dir, certificate, key)
        if upstream is not None:
            configuration["proxy"] = {"remoteurl": upstream}
        if auth is not None:
            configuration["auth"] = auth
        config = root / "config.yml"
        config.write_text(json.dumps(configuration))
        access_log = root / "access.log"
        with (
            access_log.open("wb") as requests,
            # A session of its own: the terminal's ^C is for the program that uses the registry,
            # which still needs it while it cleans up.
            subprocess.Popen(
                ["docker-registry", "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=requests,
                stderr=subprocess.PIPE,
                cwd=root,
                start_new_session=True,
            ) as server,
        ):
            assert server.stderr is not None
            listening: Future[int] = Future()
            reader = Thread(target=_read_log, args=(server.stderr, listening), daemon=True)
            reader.start()
            try:
                port = listening.result()
                yield LocalRegistry(port, server.pid, storage_dir, access_log)
            finally:
                server.kill()
                reader.join()


def _configuration(
    storage_dir: Path, certificate: Path | None, key: Path | None
) -> dict[str, object]:
    """The server's configuration; JSON is YAML. https://distribution.github.io/distribution/"""
    http: dict[str, object] = {
        # The kernel picks the port and the server logs it: nobody can take it in between.
        "addr": "127.0.0.1:0",
        "secret": "one server, nothing to share",
    }
    if certificate is not None:
        http["tls"] = {"certificate": str(certificate), "key": str(key)}
    return {
        "version": "0.1",
        "log": {"level": "info", "formatter": "json"},
        "storage": {
            "filesystem": {"rootdirectory": str(storage_dir)},
            "delete": {"enabled": True},
            "maintenance": {"uploadpurging": {"enabled": False}},
        },
        "http": http,
    }


def _read_log(log: IO[bytes], listening: "Future[int]") -> None:
    """Read the server's log to its end, so that it never blocks on a full pipe."""
    said = b""
    for line in log:
        if listening.done():
            continue
        said = line
        port = _listening_port(line)
        if port is not None:
            listening.set_result(port)
    if not listening.done():
        last = said.decode(errors="replace").strip() or "nothing"
        listening.set_exception(RegistryError(f"docker-registry ended at once and said: {last}"))


def _listening_port(line: bytes) -> int | None:
    try:
        message = str(json.loads(line)["msg"])
    except (ValueError, KeyError, TypeError):
        return None  # the server's plain usage text
    if not message.startswith(_LISTENING):
        return None
    return int(message.removesuffix(", tls").rpartition(":")[2])
