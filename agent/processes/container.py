"""Commands in containers: crun, its bundles, and telling its failures from the command's."""

from __future__ import annotations

import errno
import os
import re
import resource
import secrets
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import attrs
import orjson
import trio

from agent.errors import AgentError, failing_as
from agent.processes.accounts import UnknownUser, User, find_user
from agent.processes.bundle import DEFAULT_CAPABILITIES, Container, hosts_file, runtime_config
from agent.processes.collect import OUTPUT_LIMIT_BYTES, Collected, collect
from agent.processes.command import BASE_ENVIRONMENT, Bind, Command, ContainerCommand
from agent.processes.executable import explain_refusal
from agent.processes.rootfs import Rootfs
from agent.processes.seccomp import OciProfile, oci_profile
from agent.processes.service import Processes
from protocol.errors import ErrorCode

# Debian's golang-github-containers-common.
SECCOMP_PROFILE = Path("/usr/share/containers/seccomp.json")

# docker's limit on open files, which is what the kernel allows by default.
_OPEN_FILES = 1024 * 1024

# Containers that are being prepared or tidied away at the same time.
_THREADS = 16

# crun's exit status for its own failures, as for many a command.
_CRUN_FAILED = 1

# What crun's process in the container says on the command's stderr when exec fails.
_EXEC_FAILED = re.compile(
    rb"exec container process (?:\(missing dynamic library\?\) )?`(?P<path>.*)`: (?P<cause>.*)\n?"
)


@attrs.frozen
class Bundle:
    """A container's directory for crun, under the name that crun knows the container by."""

    directory: Path

    @property
    def container_id(self) -> str:
        return self.directory.name

    @property
    def pid_file(self) -> Path:
        """Written by crun when the container is made and nothing but exec is left to do."""
        return self.directory / "pid"


@attrs.define(eq=False)
class ContainerRuntime:
    """Runs commands in containers, by crun; made by ``open``."""

    _processes: Processes
    _bundles: Path
    _state: Path
    _crun: str
    _seccomp_profile: Path
    _open_files: int
    _seccomp: OciProfile | None = None
    _threads: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, _THREADS))

    @classmethod
    def open(
        cls,
        processes: Processes,
        run_dir: Path,
        *,
        crun: str = "crun",
        seccomp_profile: Path = SECCOMP_PROFILE,
    ) -> ContainerRuntime:
        """The runtime, with its bundles and crun's state below ``run_dir``.

        What an earlier agent left there is removed: its containers are being ended.

        Raises:
            OSError: ``run_dir`` is not writable.
        """
        bundles, state = run_dir / "bundles", run_dir / "crun"
        for directory in (bundles, state):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True, mode=0o700)
        return cls(
            processes=processes,
            bundles=bundles,
            state=state,
            crun=crun,
            seccomp_profile=seccomp_profile,
            open_files=_granted_open_files(),
        )

    async def run(
        self,
        command: ContainerCommand,
        rootfs: Path,
        *,
        stdin_data: str | None = None,
        timeout_s: float | None = None,
        output_limit_bytes: int = OUTPUT_LIMIT_BYTES,
    ) -> Collected:
        """Run a command to its end in a container of its own on ``rootfs``, a mounted directory.

        The container ends with its command, and when cancelled; nothing of it is left then.
        ``stdin_data``, ``timeout_s`` and ``output_limit_bytes`` are as for ``collect``.

        Raises:
            AgentError: RUN_FAILED: no container can be made, or the command cannot be executed.
        """
        tree = self._processes.tree
        if tree is None:
            raise AgentError(
                ErrorCode.RUN_FAILED, "containers need cgroup2, and there is none to write to"
            )
        async with self._bundle(command, rootfs) as bundle:
            with _failing_to_run():
                async with self._processes.running(
                    self._crun_run(bundle),
                    parent=tree.containers,
                    takes_stdin=stdin_data is not None,
                ) as process:
                    collected = await collect(
                        process,
                        stdin_data=stdin_data,
                        timeout_s=timeout_s,
                        output_limit_bytes=output_limit_bytes,
                    )
                    # Should crun itself have been killed, the container would go on without it.
                    await process.end_tree()
            if collected.exit_code == _CRUN_FAILED:
                check = partial(_check_start, bundle, collected, command, rootfs)
                await trio.to_thread.run_sync(check, limiter=self._threads)
            return collected

    def _crun_run(self, bundle: Bundle) -> Command:
        # crun makes no cgroup: it and the container are born in the command's. That saves the
        # move by cgroup.procs (milliseconds) and leaves nothing of crun's making to remove.
        argv = (self._crun, f"--root={self._state}", "--cgroup-manager=disabled", "run")
        options = (f"--bundle={bundle.directory}", f"--pid-file={bundle.pid_file}")
        return Command(argv=(*argv, *options, bundle.container_id), environment=BASE_ENVIRONMENT)

    @asynccontextmanager
    async def _bundle(self, command: ContainerCommand, rootfs: Path) -> AsyncIterator[Bundle]:
        bundle = Bundle(self._bundles / secrets.token_hex(8))
        try:
            write = partial(self._write_bundle, bundle, command, rootfs)
            await trio.to_thread.run_sync(write, limiter=self._threads)
            yield bundle
        finally:
            remove = partial(self._remove_bundle, bundle)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(remove, limiter=self._threads)

    def _write_bundle(self, bundle: Bundle, command: ContainerCommand, rootfs: Path) -> None:
        with failing_as(ErrorCode.RUN_FAILED, f"run {command.argv[0]}: prepare the container"):
            user = _user(command, rootfs)
            hostname = socket.gethostname()
            bundle.directory.mkdir(mode=0o700)
            binds = _network_files(bundle.directory, hostname)
            container = Container(
                argv=command.argv,
                environment={**BASE_ENVIRONMENT, "HOME": user.home, **command.environment},
                directory=command.directory,
                user=user,
                rootfs=rootfs,
                hostname=hostname,
                binds=[*binds, *command.binds],
                seccomp=self._seccomp_of_this_machine(),
                open_files=self._open_files,
            )
            config = orjson.dumps(runtime_config(container))
            (bundle.directory / "config.json").write_bytes(config)

    def _seccomp_of_this_machine(self) -> OciProfile:
        if self._seccomp is None:
            profile = orjson.loads(self._seccomp_profile.read_bytes())
            self._seccomp = oci_profile(profile, DEFAULT_CAPABILITIES, os.uname().machine)
        return self._seccomp

    def _remove_bundle(self, bundle: Bundle) -> None:
        # crun removes its state itself unless it was killed.
        shutil.rmtree(self._state / bundle.container_id, ignore_errors=True)
        shutil.rmtree(bundle.directory, ignore_errors=True)


def _user(command: ContainerCommand, rootfs: Path) -> User:
    with Rootfs.opened(rootfs) as files:
        passwd, group = files.read_text("etc/passwd"), files.read_text("etc/group")
    try:
        return find_user(command.user, passwd, group)
    except UnknownUser as error:
        raise AgentError(ErrorCode.RUN_FAILED, f"run {command.argv[0]}: {error}") from error


def _network_files(directory: Path, hostname: str) -> list[Bind]:
    """Copies of the VM's, for a container to change as it likes."""
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


def _text_of_vm(path: str) -> str:
    with suppress(FileNotFoundError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _check_start(
    bundle: Bundle, collected: Collected, command: ContainerCommand, rootfs: Path
) -> None:
    """Raise RUN_FAILED if it was not the command that ended with crun's exit status.

    Without the pid file there was no command, and all that was written is crun's. With it only
    exec can have failed, which crun's process in the container tells in one line.
    """
    doing = f"run {command.argv[0]}"
    if not bundle.pid_file.exists():
        said = " ".join(collected.stderr.decode(errors="replace").split())
        raise AgentError(ErrorCode.RUN_FAILED, f"{doing}: {said or 'crun failed'}")
    failed = _EXEC_FAILED.fullmatch(collected.stderr)
    if failed is None or collected.stdout:
        return
    path, cause = (os.fsdecode(text) for text in failed.groups())
    refusal = next((number for number in errno.errorcode if os.strerror(number) == cause), 0)
    if refusal:
        with Rootfs.opened(rootfs) as files:
            cause = explain_refusal(path, refusal, files.open)
    raise AgentError(ErrorCode.RUN_FAILED, f"{doing}: {path}: {cause}")


@contextmanager
def _failing_to_run() -> Iterator[None]:
    """What failed to start is crun, but what the host asked for is a container."""
    try:
        yield
    except AgentError as error:
        raise AgentError(ErrorCode.RUN_FAILED, error.message) from error


def _granted_open_files() -> int:
    """``_OPEN_FILES``, or as many as may be granted; raises this process's own hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(_OPEN_FILES, int(Path("/proc/sys/fs/nr_open").read_text()))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, wanted))
        except (OSError, ValueError):
            return hard
    return wanted
