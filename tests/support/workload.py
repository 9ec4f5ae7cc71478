"""The workload's ports, served in this process, and peers that talk to them."""

import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from socket import socket
from typing import Any

import trio
from attrs import define, field, frozen

from agent.__main__ import bind_workload
from agent.config import AgentConfig
from agent.hangup import HangupWatch
from agent.processes.cgroup import Cgroup
from agent.services import Services, open_services
from agent.workload_config import WorkloadConfig
from agent.workload_sessions.ports import serve_workload
from protocol import GuestMessage, Port, encode_frame, workload
from protocol.client import ConnectionFailed, WorkloadClient, open_workload_client
from tests.support.wire import Wire

TOKEN = "5dd0a8f3c5be49f7a2f1a3f0c2c1b6d4"


@frozen
class Served:
    """`address` is the agent's own, beside which the two ports are."""

    address: str
    services: Services
    run_dir: Path


def agent_config(directory: Path, **fields: Any) -> AgentConfig:
    """One for an agent of a test, whose token is `TOKEN`; `fields` are its workload's."""
    token_file = directory / "token"
    token_file.write_text(f"{TOKEN}\n")
    return AgentConfig(
        listen=f"unix:{directory / 'a.sock'}",
        in_image=False,
        storage_dir=directory / "storage",
        run_dir=directory / "run",
        workload=WorkloadConfig(**{"token_file": token_file, **fields}),
    )


@asynccontextmanager
async def served(directory: Path, cgroup_root: Path | None, **fields: Any) -> AsyncIterator[Served]:
    """The ports for the block; what was started lives on after it, if it is the workload."""
    config = agent_config(directory, **fields)
    hangups = HangupWatch()
    bound, addresses = bind_workload(config.listen)
    assert len(bound) == 2
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket(fileno=each.detach())) for each in bound]
        for address in addresses:
            stack.callback(Path(address.removeprefix("unix:")).unlink)
        async with trio.open_nursery() as nursery, open_services(config, cgroup_root) as services:
            nursery.start_soon(hangups.run)
            nursery.start_soon(serve_workload, listeners, hangups, services)
            yield Served(config.listen, services, config.run_dir)
            nursery.cancel_scope.cancel()


def port_path(address: str, port: Port = Port.WORKLOAD_CONTROL) -> str:
    """The unix socket of a port beside an agent's own."""
    return f"{address.removeprefix('unix:')}_{port}"


@asynccontextmanager
async def open_raw(address: str, port: Port = Port.WORKLOAD_CONTROL) -> AsyncIterator[Wire]:
    """A connection that has said nothing yet."""
    async with await trio.open_unix_socket(port_path(address, port)) as stream:
        yield Wire(stream)


@define
class Told:
    """What a peer was told of one request."""

    stdout: bytearray = field(factory=bytearray)
    stderr: bytearray = field(factory=bytearray)
    started: bool = False
    truncated: int = 0
    exit: tuple[int, str] | None = None
    error: str | None = None

    @property
    def is_over(self) -> bool:
        return self.exit is not None or self.error is not None


@define
class Peer:
    """An authenticated connection that keeps what it was told, by request."""

    client: WorkloadClient
    of: dict[int | None, Told] = field(factory=dict)
    is_ready: bool = False
    order: list[GuestMessage] = field(factory=list)

    async def send(self, message: Any) -> None:
        await self.client.send(message)

    async def run(self, request_id: int, *command: str, **fields: Any) -> None:
        await self.send(workload.Run(request_id, command, **{"env": (), **fields}))

    async def exec(self, request_id: int, *command: str, tty: bool = False) -> None:
        await self.send(workload.Exec(request_id, command, tty))

    async def shell(self, request_id: int, script: str, *, tty: bool = False) -> None:
        await self.exec(request_id, "/bin/sh", "-c", script, tty=tty)

    async def signal(self, request_id: int, number: int) -> None:
        await self.send(workload.Signal(request_id, number))

    async def stop(self, timeout_ms: int) -> None:
        await self.send(workload.Stop(timeout_ms))

    def told(self, request_id: int | None) -> Told:
        return self.of.setdefault(request_id, Told())

    async def receive(self) -> GuestMessage:
        """The next message, which is kept, too."""
        message = await self.client.receive()
        match message:
            case workload.Ready():
                self.is_ready = True
            case workload.Started(request_id):
                assert not self.told(request_id).started
                self.told(request_id).started = True
            case workload.Stdout(request_id, data, truncated):
                self.told(request_id).stdout += data
                self.told(request_id).truncated += truncated
            case workload.Stderr(request_id, data, truncated):
                self.told(request_id).stderr += data
                self.told(request_id).truncated += truncated
            case workload.Exit(request_id, code, reason):
                self.told(request_id).exit = (code, reason)
            case workload.Error(request_id=request_id, message=text):
                self.told(request_id).error = text
        if not isinstance(message, workload.Stdout | workload.Stderr):
            self.order.append(message)
        return message

    async def until(self, condition: Callable[[], bool], within_s: float = 20) -> None:
        """Receive until it holds."""
        with trio.fail_after(within_s):
            while not condition():
                await self.receive()

    async def ready(self) -> None:
        await self.until(lambda: self.is_ready)

    async def over(self, *request_ids: int) -> Told:
        """Receive until these are over; what was told of the last."""
        await self.until(lambda: all(self.told(each).is_over for each in request_ids))
        return self.told(request_ids[-1])

    async def output(self, request_id: int, text: bytes) -> Told:
        """Receive until a request has written that."""
        told = self.told(request_id)
        await self.until(lambda: text in told.stdout or text in told.stderr)
        return told

    async def closed(self) -> bool:
        """Whether the agent closes the connection, having said no more than this peer keeps."""
        with trio.fail_after(10):
            while True:
                try:
                    await self.receive()
                except ConnectionFailed:
                    return True


@asynccontextmanager
async def open_peer(
    address: str, port: Port = Port.WORKLOAD_CONTROL, *, ready: bool = True
) -> AsyncIterator[Peer]:
    """A peer that the agent has let in."""
    async with open_workload_client(address, TOKEN, port) as client:
        peer = Peer(client)
        if ready and port is Port.WORKLOAD_CONTROL:
            await peer.ready()
        yield peer


@asynccontextmanager
async def open_log(address: str) -> AsyncIterator[Peer]:
    """A reader of the log, whose request has the id 0."""
    async with open_peer(address, Port.WORKLOAD_LOGS) as peer:
        yield peer


@asynccontextmanager
async def outlived(cgroup: Cgroup) -> AsyncIterator[None]:
    """Wait, after the block, until all that ran in a cgroup before it has ended."""
    with ExitStack() as held:
        processes = [os.pidfd_open(pid) for pid in cgroup.pids()]
        for process in processes:
            held.callback(os.close, process)
        yield
        with trio.fail_after(10):
            for process in processes:
                await trio.lowlevel.wait_readable(process)


def frames(*messages: dict[str, object]) -> bytes:
    """Messages as they are on the wire, from their JSON."""
    return b"".join(encode_frame(json.dumps(message).encode()) for message in messages)


LINE_BYTES = 13


def counting(lines: int) -> tuple[str, ...]:
    """A command that writes so many numbered lines, of `LINE_BYTES` each."""
    return ("awk", f'BEGIN {{ for (i = 1; i <= {lines}; i++) printf "%012d\\n", i }}')


@define
class Counted:
    """Follows what `counting` writes: every byte arrives, or is told to be missing."""

    offset: int = 0
    missing_bytes: int = 0

    def feed(self, data: bytes, *, truncated: bool) -> None:
        """The next message's; raises AssertionError where bytes are missing that nobody told of."""
        if truncated:
            line_end = data.index(b"\n")
            number = int(data[line_end + 1 : line_end + LINE_BYTES])
            found = (number - 1) * LINE_BYTES - line_end - 1
            assert found >= self.offset
            self.missing_bytes += found - self.offset
            self.offset = found
        first, skipped = divmod(self.offset, LINE_BYTES)
        last = (self.offset + len(data)) // LINE_BYTES + 1
        expected = b"".join(b"%012d\n" % number for number in range(first + 1, last + 1))
        assert data == expected[skipped : skipped + len(data)]
        self.offset += len(data)
