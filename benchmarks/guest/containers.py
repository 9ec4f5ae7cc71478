"""The rows of commands in containers, against the programs that make containers."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import attrs

from agent.processes.accounts import User
from agent.processes.bundle import (
    DEFAULT_CAPABILITIES,
    Container,
    ContainerProcess,
    runtime_config,
)
from agent.processes.command import BASE_ENVIRONMENT, Bind
from agent.processes.network_files import hosts_file
from agent.processes.seccomp import oci_profile
from benchmarks.guest.commands import spawn
from benchmarks.guest.connection import Connection, UnexpectedAnswer, frame
from benchmarks.guest.row import Ratio, Setting, interleaved, median_duration
from protocol import AgentRequest, AgentResponse, decode, decode_value, requests, responses
from protocol.values import ImageInfo, OverlayInfo

# On the same file system as the agent's own overlays.
SCRATCH = Path("/storage/benchmark")
LAYERS = Path("/storage/layers")
SECCOMP_PROFILE = Path("/usr/share/containers/seccomp.json")
OPEN_FILES = 1024 * 1024
# As the agent mounts what it will not keep (agent/images/overlay.py).
OVERLAY_OPTIONS = "index=off,metacopy=off,redirect_dir=nofollow,volatile"

TRUE = ("true",)
ENDLESS = ("sleep", "1000000")
CONTAINER = "benchmark"

Value = TypeVar("Value")


def joined(setting: Setting) -> Ratio:
    """A command in a container that runs already."""
    request = requests.Run(image=setting.image, command=TRUE, persistent_overlay_id="joined")
    run = frame(request)
    with Connection() as host, _scratch(), _mounted_overlay(host, setting.image) as rootfs:
        host.complete(run)  # starts the container
        bundle = _Bundle.make(SCRATCH / "bundle", ENDLESS, rootfs)
        with bundle.running():
            commands = setting.count(full=10, quick=3)
            ours, theirs = interleaved(
                setting.count(full=30, quick=3),
                lambda: median_duration(commands, partial(host.complete, run)),
                lambda: median_duration(commands, partial(bundle.crun, "exec", CONTAINER, *TRUE)),
            )
    return _row("run true, joining, p50", ours, theirs, "crun exec", limit=1.5)


def fresh(setting: Setting) -> Ratio:
    """A command in a container of its own, on an overlay of its own."""
    run = frame(requests.Run(image=setting.image, command=TRUE))
    with Connection() as host, _scratch():
        overlay = _Overlay(SCRATCH / "overlay", _layers(host, setting.image))
        bundle = _Bundle.make(SCRATCH / "bundle", TRUE, overlay.merged)

        def by_programs() -> None:
            spawn("mount", "-t", "overlay", "-o", overlay.options, "overlay", str(overlay.merged))
            try:
                bundle.crun("run", f"--bundle={bundle.directory}", CONTAINER)
            finally:
                spawn("umount", str(overlay.merged))

        def timed_by_programs() -> float:
            overlay.renew()
            return median_duration(1, by_programs)

        ours, theirs = interleaved(
            setting.count(full=200, quick=10),
            lambda: median_duration(1, partial(host.complete, run)),
            timed_by_programs,
        )
    return _row("run true, fresh, p50", ours, theirs, "mount, crun run, umount", limit=1.6)


def _row(name: str, ours: float, theirs: float, against: str, *, limit: float) -> Ratio:
    return Ratio(
        name=name,
        ours=ours * 1e3,
        reference=theirs * 1e3,
        against=against,
        unit="ms",
        limit=limit,
    )


@attrs.frozen
class _Bundle:
    """A container as the agent makes it, for crun."""

    directory: Path

    @classmethod
    def make(cls, directory: Path, argv: tuple[str, ...], rootfs: Path) -> _Bundle:
        directory.mkdir()
        hostname = socket.gethostname()
        texts = {
            "hostname": f"{hostname}\n",
            "hosts": hosts_file(Path("/etc/hosts").read_text(), hostname),
            "resolv.conf": Path("/etc/resolv.conf").read_text(),
        }
        for name, text in texts.items():
            (directory / name).write_text(text)
        profile = json.loads(SECCOMP_PROFILE.read_bytes())
        process = ContainerProcess(
            argv=argv,
            environment={**BASE_ENVIRONMENT, "HOME": "/root", "PATH": "/bin"},
            directory="/",
            user=User(0, 0, (0,), "/root"),
            # As many as the agent may grant, who has our limit.
            open_files=min(OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        )
        container = Container(
            process=process,
            rootfs=rootfs,
            hostname=hostname,
            binds=[
                *(Bind(str(directory / name), f"/etc/{name}") for name in texts),
                Bind("/storage/workspace", "/workspace"),
            ],
            seccomp=oci_profile(profile, DEFAULT_CAPABILITIES, os.uname().machine),
        )
        (directory / "config.json").write_text(json.dumps(runtime_config(container)))
        return cls(directory)

    def crun(self, *words: str) -> None:
        """Run crun as the agent does, to its end."""
        spawn("crun", f"--root={self.directory / 'crun'}", "--cgroup-manager=disabled", *words)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The container runs for the block."""
        self.crun("run", "--detach", f"--bundle={self.directory}", CONTAINER)
        try:
            yield
        finally:
            self.crun("delete", "--force", CONTAINER)


@attrs.frozen
class _Overlay:
    """The directories of an overlay, and the layers below them, the topmost first."""

    directory: Path
    layers: list[Path]

    @property
    def merged(self) -> Path:
        return self.directory / "merged"

    @property
    def options(self) -> str:
        lower = ":".join(map(str, self.layers))
        places = f"lowerdir={lower},upperdir={self.directory}/upper,workdir={self.directory}/work"
        return f"{places},{OVERLAY_OPTIONS}"

    def renew(self) -> None:
        """Make the directories anew."""
        shutil.rmtree(self.directory, ignore_errors=True)
        for name in ("merged", "upper", "work"):
            (self.directory / name).mkdir(parents=True)


@contextmanager
def _scratch() -> Iterator[None]:
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir()
    try:
        yield
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)


@contextmanager
def _mounted_overlay(host: Connection, image: str) -> Iterator[Path]:
    """An overlay of the image, of the agent's making; where it is mounted."""
    request = requests.PrepareOverlay(image=image, workload_id="benchmark")
    prepared = _asked(host, request, OverlayInfo)
    try:
        yield Path(prepared.rootfs_path)
    finally:
        _ok(host, requests.CleanupOverlay(workload_id="benchmark"))


def _layers(host: Connection, image: str) -> list[Path]:
    """Where the image's layers are mounted, the topmost first."""
    layers = _asked(host, requests.Query(image=image), ImageInfo).layers
    return [LAYERS / digest.removeprefix("sha256:") for digest in reversed(layers)]


def _asked(host: Connection, request: AgentRequest, kind: type[Value]) -> Value:
    return decode_value(_ok(host, request), kind)


def _ok(host: Connection, request: AgentRequest) -> object:
    """What an ``ok`` carries."""
    answer: AgentResponse = decode(host.ask(frame(request)), AgentResponse).body
    if not isinstance(answer, responses.Ok):
        raise UnexpectedAnswer(str(answer))
    return answer.data
