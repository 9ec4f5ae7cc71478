"""Random conversations on several connections at once, against a model of the protocol's states.

Each command writes some output and then waits for a signal or a stop. So the model knows at every
moment what runs, and what each connection will have been told in the end. What is left to chance is
what is asked for and in which order, who does not read meanwhile, and who hangs up.
"""

import signal
import tempfile
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import AsyncExitStack
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import trio
from attrs import define, field
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from protocol import workload
from tests.support.cgroups import cgroup_corner
from tests.support.rounds import rounds
from tests.support.workload import Peer, open_peer, served

T = TypeVar("T")

# Ends by the status that a signal's number gives it, and by TERM politely.
SCRIPT = (
    "trap 'exit 7' USR1; trap 'exit 9' TERM; head -c {size} /dev/zero; sleep 1000 & echo on; wait"
)
BUSY = "the workload runs already: there is one at a time"
STOPPED = (9, "stopped")
ENDS = {
    signal.SIGUSR1: (7, "exited"),
    signal.SIGTERM: (9, "exited"),
    signal.SIGKILL: (137, "signaled: SIGKILL"),
}


@define
class Expected:
    """What the model says of one request that was made."""

    is_run: bool
    size: int
    end: tuple[int, str] | None = None
    """How it ends, once it has been made to."""
    overtaken: bool = False
    """Whether a stop came so soon after what ends it that it may have been the first."""

    def ends(self) -> list[tuple[int, str] | None]:
        """What may be told of its end."""
        if self.end is None or not self.overtaken:
            return [self.end]
        return [self.end, (self.end[0], "stopped"), STOPPED]


@define(eq=False)
class ModelledPeer:
    """One connection, and what the model expects it to be told."""

    peer: Peer
    hang_up: AsyncExitStack
    requests: dict[int, Expected] = field(factory=dict)
    errors: list[tuple[int | None, str]] = field(factory=list)
    """Which `error` messages, by id and a part of their text, in their order."""
    next_id: int = 1

    def running(self) -> dict[int, Expected]:
        return {each: of for each, of in self.requests.items() if of.end is None}

    async def caught_up(self) -> None:
        """Receive until all that the model expects has been told, and see that it is right."""
        await self.peer.until(self._is_told)
        for number, expected in self.requests.items():
            told = self.peer.told(number)
            assert told.started
            assert told.exit in expected.ends()
            if not told.truncated:
                assert told.stdout == bytes(expected.size) + b"on\n"
            elif expected.end is not None:
                assert told.stdout.endswith(b"on\n")
        found = [each for each in self.peer.order if isinstance(each, workload.Error)]
        assert len(found) == len(self.errors)
        for error, (number, text) in zip(found, self.errors, strict=True):
            assert error.request_id == number
            assert text in error.message

    def _is_told(self) -> bool:
        errors = sum(isinstance(each, workload.Error) for each in self.peer.order)
        return errors >= len(self.errors) and all(
            told.started and b"on\n" in told.stdout[-3:] and (of.end is None or told.exit)
            for number, of in self.requests.items()
            for told in [self.peer.told(number)]
        )


class Guest:
    """The ports, and connections to them, in a run of trio's that goes on while nobody looks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._begun: Future[trio.lowlevel.TrioToken] = Future()
        self._thread = Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        self._token = self._begun.result(60)

    def do(self, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Have something done there, and wait until it is."""
        return trio.from_thread.run(work, *arguments, trio_token=self._token)

    def end(self) -> None:
        """Hang up everywhere, and take the ports away; nothing of them is left."""
        trio.from_thread.run_sync(self._over.set, trio_token=self._token)
        self._thread.join()

    async def connect(self) -> ModelledPeer:
        stack = AsyncExitStack()
        peer = await stack.enter_async_context(open_peer(self._address))
        self._hang_up.push_async_callback(stack.aclose)
        return ModelledPeer(peer, stack)

    async def freed(self) -> None:
        """Return when a workload may be started; asking before is an error and no more."""
        while True:
            self._next_id += 1
            await self._watcher.run(self._next_id, "true")
            if (await self._watcher.over(self._next_id)).exit is not None:
                return

    async def _main(self) -> None:
        self._over = trio.Event()
        self._next_id = 0
        try:
            async with (
                cgroup_corner() as cgroup_root,
                served(self._directory, cgroup_root) as service,
                AsyncExitStack() as self._hang_up,
                open_peer(service.address) as self._watcher,
            ):
                self._address = service.address
                self._begun.set_result(trio.lowlevel.current_trio_token())
                await self._over.wait()
        except BaseException as error:
            if not self._begun.done():
                self._begun.set_exception(error)
            raise


class Conversations(RuleBasedStateMachine):
    """The agent's ports and their model, in a loop of trio's that goes on between the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[ModelledPeer] = []
        self.workload: Expected | None = None
        """The VM's, whichever connection asked for it; that may have hung up."""
        self.directory = tempfile.TemporaryDirectory(prefix="innkeep-")
        self.guest = Guest(Path(self.directory.name))

    def teardown(self) -> None:
        try:
            for modelled in self.peers:
                self.guest.do(modelled.caught_up)
        finally:
            self.guest.end()
            self.directory.cleanup()

    def chosen(self, data: Any) -> ModelledPeer:
        return data.draw(st.sampled_from(self.peers), label="peer")  # type: ignore[no-any-return]

    @precondition(lambda self: len(self.peers) < 3)
    @rule()
    def connect(self) -> None:
        self.peers.append(self.guest.do(self.guest.connect))

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), size=st.sampled_from([0, 1, 70_000, 3_000_000]))
    def exec(self, data: Any, size: int) -> None:
        modelled = self.chosen(data)
        number, modelled.next_id = modelled.next_id, modelled.next_id + 1
        modelled.requests[number] = Expected(False, size)
        self.guest.do(modelled.peer.shell, number, SCRIPT.format(size=size))

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), size=st.sampled_from([0, 70_000]))
    def run(self, data: Any, size: int) -> None:
        modelled = self.chosen(data)
        number, modelled.next_id = modelled.next_id, modelled.next_id + 1
        self.guest.do(modelled.peer.run, number, "/bin/sh", "-c", SCRIPT.format(size=size))
        if self.workload is not None:
            modelled.errors.append((number, BUSY))
            return
        self.workload = modelled.requests[number] = Expected(True, size)
        # Whether another's comes before or after it would be a matter of luck.
        self.guest.do(modelled.caught_up)

    @precondition(lambda self: any(each.running() for each in self.peers))
    @rule(data=st.data(), number=st.sampled_from(sorted(ENDS)))
    def signal(self, data: Any, number: int) -> None:
        speaking = [each for each in self.peers if each.running()]
        modelled = data.draw(st.sampled_from(speaking), label="peer")
        request_id = data.draw(st.sampled_from(sorted(modelled.running())), label="request_id")
        expected = modelled.running()[request_id]
        # Its traps are set when it has said so.
        self.guest.do(modelled.peer.output, request_id, b"on\n")
        self.guest.do(modelled.peer.signal, request_id, number)
        expected.end = ENDS[signal.Signals(number)]
        self.ended(expected, modelled)

    @precondition(lambda self: self.peers and self.workload is not None)
    @rule(data=st.data(), number=st.sampled_from(sorted(ENDS)))
    def signal_the_workload_from_anywhere(self, data: Any, number: int) -> None:
        modelled = self.chosen(data)
        expected = self.workload
        assert expected is not None
        self.guest.do(modelled.peer.signal, 0, number)
        expected.end = ENDS[signal.Signals(number)]
        self.ended(expected, modelled)

    @precondition(lambda self: self.peers)
    @rule(data=st.data(), request_id=st.integers(1000, 2**64 - 1))
    def signal_nobody(self, data: Any, request_id: int) -> None:
        modelled = self.chosen(data)
        self.guest.do(modelled.peer.signal, request_id, signal.SIGTERM)
        modelled.errors.append((request_id, str(request_id)))

    @precondition(lambda self: any(each.running() for each in self.peers))
    @rule(data=st.data())
    def use_an_id_twice(self, data: Any) -> None:
        modelled = data.draw(st.sampled_from([each for each in self.peers if each.running()]))
        number = data.draw(st.sampled_from(sorted(modelled.running())))
        self.guest.do(modelled.peer.exec, number, "true")
        modelled.errors.append((number, "in use"))

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def read(self, data: Any) -> None:
        self.guest.do(self.chosen(data).caught_up)

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def hang_up(self, data: Any) -> None:
        modelled = self.chosen(data)
        self.peers.remove(modelled)
        self.guest.do(modelled.hang_up.aclose)

    @precondition(lambda self: self.peers)
    @rule(data=st.data())
    def stop(self, data: Any) -> None:
        modelled = self.chosen(data)
        for each in self.peers:
            for request_id in each.running():
                self.guest.do(each.peer.output, request_id, b"on\n")
        self.guest.do(modelled.peer.stop, 60_000)
        for each in self.peers:
            for request_id, expected in each.requests.items():
                if expected.end is None:
                    expected.end = STOPPED
                elif each.peer.told(request_id).exit is None:
                    expected.overtaken = True
        if self.workload is not None:
            self.workload.end = STOPPED
            self.workload = None
        self.guest.do(self.guest.freed)

    def ended(self, expected: Expected, modelled: ModelledPeer) -> None:
        if expected is self.workload:
            self.workload = None
            self.guest.do(self.guest.freed)


def test_conversations_go_as_the_model_has_it() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Conversations,
        settings=settings(
            max_examples=rounds(5, 300),
            stateful_step_count=rounds(20, 40),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
