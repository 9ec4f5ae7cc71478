"""Commands in containers: what crun is told, and telling its failures from the command's."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import attrs
import orjson
import trio

from agent.errors import AgentError, failing_as
from agent.processes.accounts import UnknownUser, User, find_user
from agent.processes.bundle import (
    DEFAULT_CAPABILITIES,
    Container,
    ContainerProcess,
    capabilities_in,
    process_config,
    runtime_config,
)
from agent.processes.cgroup import CgroupTree
from agent.processes.command import BASE_ENVIRONMENT, Command, ContainerCommand
from agent.processes.container_view import ContainerView
from agent.processes.crun import Invocation
from agent.processes.executable import unrunnable
from agent.processes.network_files import write_network_files
from agent.processes.process import Process, Stdio
from agent.processes.rootfs import Rootfs
from agent.processes.running import Running, pid_of_detached
from agent.processes.seccomp import OciProfile, oci_profile
from agent.processes.service import Processes
from protocol.errors import ErrorCode

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")

# Debian's golang-github-containers-common.
SECCOMP_PROFILE = Path("/usr/share/containers/seccomp.json")

# docker's limit on open files, which is what the kernel allows by default.
_OPEN_FILES = 1024 * 1024

# Containers that are being prepared or tidied away at the same time.
_THREADS = 16


@attrs.define(eq=False)
class ContainerRuntime:
    """Runs commands in containers, by crun; made by ``open``."""

    processes: Processes
    directory: Path
    """Of the containers that stay, and of nothing else."""
    _invocations: Path
    _state: Path
    _crun: str
    _seccomp_profile: Path
    _open_files: int
    _seccomp: dict[bool, OciProfile] = attrs.field(factory=dict)
    threads: trio.CapacityLimiter = attrs.field(factory=partial(trio.CapacityLimiter, _THREADS))

    @classmethod
    def open(
        cls,
        processes: Processes,
        run_dir: Path,
        *,
        crun: str = "crun",
        seccomp_profile: Path = SECCOMP_PROFILE,
    ) -> ContainerRuntime:
        """The runtime, with its files and crun's state below ``run_dir``.

        What commands of an earlier agent left there is removed: they are being ended.

        Raises:
            OSError: ``run_dir`` is not writable.
        """
        directory, invocations, state = (run_dir / name for name in ("containers", "runs", "crun"))
        shutil.rmtree(invocations, ignore_errors=True)
        for path in (directory, invocations, state):
            path.mkdir(parents=True, mode=0o700, exist_ok=True)
        for path in state.iterdir():
            # crun keeps a cache of its own there, too, which begins with a dot.
            if not (path.name.startswith(".") or (directory / path.name).exists()):
                shutil.rmtree(path, ignore_errors=True)
        return cls(
            processes=processes,
            directory=directory,
            invocations=invocations,
            state=state,
            crun=crun,
            seccomp_profile=seccomp_profile,
            open_files=_granted_open_files(),
        )

    @property
    def tree(self) -> CgroupTree:
        """The cgroups. Raises AgentError: RUN_FAILED; there are none."""
        tree = self.processes.tree
        if tree is None:
            raise AgentError(
                ErrorCode.RUN_FAILED, "containers need cgroup2, and there is none to write to"
            )
        return tree

    def cgroups(self, *, privileged: bool) -> Path:
        """Where containers of a kind have theirs; raises as ``tree``."""
        return self.tree.privileged if privileged else self.tree.containers

    @asynccontextmanager
    async def running(
        self,
        command: ContainerCommand,
        rootfs: Path,
        *,
        takes_stdin: bool = False,
        terminal: bool = False,
    ) -> AsyncIterator[Running]:
        """A command in a container of its own on ``rootfs``, a mounted directory, for the block.

        The container ends with its command, and with the block; nothing of it is left then.

        Raises:
            AgentError: RUN_FAILED: no container can be made, or the command cannot be executed.
        """
        parent = self.cgroups(privileged=command.privileged)

        def prepare(directory: Path) -> Invocation:
            return self._write_config(directory, command, rootfs, terminal=terminal)

        async with self._invocation(prepare, is_bundle=True) as invocation:
            argv = self._argv(invocation, "run", f"--bundle={invocation.directory}")
            async with self._started(
                (*argv, invocation.directory.name), parent, takes_stdin, terminal
            ) as process:
                try:
                    yield Running(process, invocation, command, command.binds)
                finally:
                    # Should crun itself have been killed, the container would go on without it.
                    with trio.CancelScope(shield=True):
                        await process.end_tree()
                    # Nobody is left to write; what was written and not taken is not wanted.
                    process.close_outputs()

    @asynccontextmanager
    async def joining(
        self,
        command: ContainerCommand,
        container_id: str,
        first_pid: int,
        parent: Path,
        *,
        takes_stdin: bool = False,
        terminal: bool = False,
    ) -> AsyncIterator[Running]:
        """A command in a container that runs, in a cgroup of its own below ``parent``.

        ``first_pid`` is the container's first process. Left before the command has ended, or
        cancelled, the block ends with its whole tree dead; what the command leaves behind lives on.

        Raises:
            AgentError: as ``running``.
        """

        def prepare(directory: Path) -> Invocation:
            return self._write_process(directory, command, first_pid, terminal=terminal)

        async with self._invocation(prepare, is_bundle=False) as invocation:
            argv = self._exec(invocation, container_id)
            async with self._started(argv, parent, takes_stdin, terminal) as process:
                yield Running(process, invocation, command, ())
                if process.was_killed:
                    # Not the command's end but crun's own: nobody would see to the command's.
                    await process.end_tree()

    async def start_background(
        self,
        command: ContainerCommand,
        container_id: str,
        first_pid: int,
        parent: Path,
        *,
        stdin_data: str | None = None,
        timeout_s: float | None = None,
    ) -> int:
        """Start a command in a container that runs, with its output in a log; its pid in the VM.

        Raises:
            AgentError: as ``running``.
        """

        def prepare(directory: Path) -> Invocation:
            return self._write_process(directory, command, first_pid, terminal=False)

        async with self._invocation(prepare, is_bundle=False) as invocation:
            argv = self._exec(invocation, container_id, "--detach")
            return await self.processes.start_background(
                Command(argv=argv, environment=BASE_ENVIRONMENT),
                parent=parent,
                pid_of=partial(pid_of_detached, invocation, command),
                stdin_data=stdin_data,
                timeout_s=timeout_s,
            )

    async def start_kept(
        self,
        command: ContainerCommand,
        container_id: str,
        first_pid: int,
        parent: Path,
        stdio: Stdio,
        directory: Path,
        *,
        keeping: Callable[[Command], Command],
        let: Callable[[Process], Awaitable[None]],
        record: Callable[[Process], None],
    ) -> tuple[Process, int]:
        """Start a command in a container that runs, to outlive its request and the agent.

        ``keeping`` makes the command that starts crun once it is ``let``, and waits for its end:
        the process that is returned, with the pid of the command itself in the VM. ``directory``
        is made for crun's files, which stay. As ``Processes.start_kept``.

        Raises:
            AgentError: as ``running``.
        """
        prepare = partial(self._write_process, directory, command, first_pid, terminal=False)
        invocation = await self.in_thread(prepare)
        try:
            argv = self._exec(invocation, container_id)

            async def pid_of(process: Process) -> int:
                await let(process)
                return await Running(process, invocation, command, ()).pid()

            with _failing_to_run():
                return await self.processes.start_kept(
                    keeping(Command(argv=argv, environment=BASE_ENVIRONMENT)),
                    stdio,
                    record=record,
                    pid_of=pid_of,
                    parent=parent,
                )
        finally:
            invocation.close()

    async def start(
        self,
        command: ContainerCommand,
        rootfs: Path,
        directory: Path,
        parent: Path,
        *,
        logged: bool,
    ) -> int:
        """Start a container on ``rootfs`` that outlives its request; its first process's pid.

        ``directory`` is its bundle, and its name is the container's; it stays, with the bundle.
        The first process has the cgroup ``parent``/first. ``logged``: its output goes to a log of
        the container's name.

        Raises:
            AgentError: as ``running``; then ``directory`` is gone.
        """
        write = partial(self._write_config, directory, command, rootfs, terminal=False)
        invocation = await self.in_thread(write)
        try:
            bundle = f"--bundle={directory}"
            argv = (*self._argv(invocation, "run", "--detach", bundle), directory.name)
            crun = Command(argv=argv, environment=BASE_ENVIRONMENT)
            pid_of = partial(pid_of_detached, invocation, command)
            with _failing_to_run():
                if logged:
                    return await self.processes.start_background(
                        crun, parent=parent, name="first", log_name=directory.name, pid_of=pid_of
                    )
                stdio = Stdio()
                async with self.processes.running(
                    crun, stdio, parent=parent, name="first"
                ) as process:
                    return await pid_of(process)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.in_thread(self.forget, directory)
            raise
        finally:
            invocation.close()

    def forget(self, directory: Path) -> None:
        """Remove what is kept of a container that has ended. Blocks."""
        # crun removes its state itself only where it sees the end.
        shutil.rmtree(self._state / directory.name, ignore_errors=True)
        shutil.rmtree(directory, ignore_errors=True)

    async def in_thread(
        self, work: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Result:
        """Do what blocks on files."""
        return await trio.to_thread.run_sync(work, *arguments, limiter=self.threads)

    def _exec(self, invocation: Invocation, container_id: str, *more: str) -> tuple[str, ...]:
        process = f"--process={invocation.directory / 'process.json'}"
        return (*self._argv(invocation, "exec", process, *more), container_id)

    def _argv(self, invocation: Invocation, *words: str) -> tuple[str, ...]:
        # crun makes no cgroup: it and the container are born in the command's. That saves the
        # move by cgroup.procs (milliseconds) and leaves nothing of crun's making to remove.
        options = (f"--root={self._state}", "--cgroup-manager=disabled", f"--log={invocation.log}")
        return (self._crun, *options, *words, *invocation.options)

    @asynccontextmanager
    async def _started(
        self, argv: Sequence[str], parent: Path, takes_stdin: bool, terminal: bool
    ) -> AsyncIterator[Process]:
        """crun itself never has a terminal: it sends the one that it makes in the container."""
        crun = Command(argv=tuple(argv), environment=BASE_ENVIRONMENT)
        stdio = Stdio(takes_stdin=takes_stdin and not terminal)
        with _failing_to_run():
            async with self.processes.running(crun, stdio, parent=parent) as process:
                yield process

    @asynccontextmanager
    async def _invocation(
        self, prepare: Callable[[Path], Invocation], *, is_bundle: bool
    ) -> AsyncIterator[Invocation]:
        directory = self._invocations / os.urandom(8).hex()
        try:
            invocation = await self.in_thread(prepare, directory)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self.in_thread(self.forget, directory)
            raise
        try:
            yield invocation
        finally:
            invocation.close()
            with trio.CancelScope(shield=True):
                if is_bundle:
                    await self.in_thread(self.forget, directory)
                else:
                    # A few names in a directory of ours: the way to a thread takes longer.
                    invocation.remove()

    def _write_config(
        self, directory: Path, command: ContainerCommand, rootfs: Path, *, terminal: bool
    ) -> Invocation:
        with failing_as(ErrorCode.RUN_FAILED, f"run {command.argv[0]}: prepare the container"):
            with ExitStack() as stack:
                view = ContainerView.of_binds(stack, rootfs, command.binds)
                view.check_places(command.binds)
                process = self._process(command, view, terminal=terminal)
            hostname = socket.gethostname()
            directory.mkdir(mode=0o700)
            container = Container(
                process=process,
                rootfs=rootfs,
                hostname=hostname,
                binds=[*write_network_files(directory, hostname), *command.binds],
                seccomp=self._seccomp_of_this_machine(command.privileged),
                privileged=command.privileged,
            )
            config = orjson.dumps(runtime_config(container))
            (directory / "config.json").write_bytes(config)
            return Invocation.prepare(directory, terminal=terminal)

    def _write_process(
        self, directory: Path, command: ContainerCommand, first_pid: int, *, terminal: bool
    ) -> Invocation:
        with failing_as(ErrorCode.RUN_FAILED, f"run {command.argv[0]}: join the container"):
            with ExitStack() as stack:
                # As the container sees it, with all that was mounted into it.
                view = ContainerView.of_binds(stack, Path(f"/proc/{first_pid}/root"), ())
                process = self._process(command, view, terminal=terminal)
            directory.mkdir(mode=0o700)
            (directory / "process.json").write_bytes(orjson.dumps(process_config(process)))
            return Invocation.prepare(directory, terminal=terminal)

    def _process(
        self, command: ContainerCommand, view: ContainerView, *, terminal: bool
    ) -> ContainerProcess:
        user = _user(command, view.root)
        environment = {**BASE_ENVIRONMENT, "HOME": user.home, **command.environment}
        refusal = unrunnable(command.argv, environment, command.directory, view.open)
        if refusal is not None:
            raise AgentError(ErrorCode.RUN_FAILED, f"run {command.argv[0]}: {refusal}")
        return ContainerProcess(
            argv=command.argv,
            environment=environment,
            directory=command.directory,
            user=user,
            open_files=self._open_files,
            terminal=terminal,
            capabilities=_capabilities(command.privileged),
        )

    def _seccomp_of_this_machine(self, privileged: bool) -> OciProfile:
        if privileged not in self._seccomp:
            profile = orjson.loads(self._seccomp_profile.read_bytes())
            machine = os.uname().machine
            self._seccomp[privileged] = oci_profile(profile, _capabilities(privileged), machine)
        return self._seccomp[privileged]


def _capabilities(privileged: bool) -> Sequence[str]:
    if not privileged:
        return DEFAULT_CAPABILITIES
    # Nobody can give what it has not: in the VM that is all, elsewhere it may be less.
    lines = Path("/proc/self/status").read_text().splitlines()
    (mask,) = (line.split()[1] for line in lines if line.startswith("CapBnd:"))
    return capabilities_in(int(mask, 16))


def _user(command: ContainerCommand, files: Rootfs) -> User:
    passwd, group = files.read_text("etc/passwd"), files.read_text("etc/group")
    try:
        return find_user(command.user, passwd, group)
    except UnknownUser as error:
        raise AgentError(ErrorCode.RUN_FAILED, f"run {command.argv[0]}: {error}") from error


@contextmanager
def _failing_to_run() -> Iterator[None]:
    """What failed to start is crun, but what the host asked for is a container."""
    try:
        yield
    except AgentError as error:
        if error.code is not ErrorCode.SPAWN_FAILED:
            raise
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
