"""Uploads and an agent that is killed, or whose file system fails it, at any step of them."""

import hashlib
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from protocol import requests, responses
from tests.support.blocking_client import BlockingClient
from tests.support.files import sha256
from tests.support.machine import Machine, agent_alone
from tests.support.rounds import rounds

OLD = b"old"
NEW = os.urandom(100_000)


@attrs.define
class Agent:
    """An agent that can be killed, and has a successor then; and a directory to write to."""

    home: Path
    directory: Path
    machine: Machine
    _running: ExitStack

    def kill(self) -> None:
        os.kill(self.machine.pid, signal.SIGKILL)

    def succeed(self) -> None:
        """Wait for the end of a killed one, and start the next."""
        self.machine.wait()
        self._running.close()
        self.machine = self._running.enter_context(agent_alone(self.home))

    def client(self) -> BlockingClient:
        return BlockingClient(self.machine.address)

    def hidden(self) -> list[str]:
        return [path.name for path in self.directory.rglob(".innkeep-*")]

    def notes(self) -> list[Path]:
        places = (self.home / "storage/uploads", self.home / "run/uploads")
        return [note for place in places for note in place.iterdir()]


@contextmanager
def killable_agent() -> Iterator[Agent]:
    # In memory: no disk decides how long all its syncs take.
    with TemporaryDirectory(dir="/dev/shm") as home, ExitStack() as running:
        directory = Path(home, "files")
        directory.mkdir()
        machine = running.enter_context(agent_alone(Path(home)))
        agent = Agent(Path(home), directory, machine, running)
        with agent.client() as client:
            # Answered when all of it has come up.
            assert isinstance(client.ask(requests.FileStat("/")), responses.Ok)
        yield agent


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with killable_agent() as agent:
        yield agent


@contextmanager
def tampering(agent: Agent, *injection: str) -> Iterator[None]:
    """Let a system call of the agent's fail, or kill it, as strace(1) can."""
    argv = ["strace", "-f", "-p", str(agent.machine.pid), "-o", "/dev/null", *injection]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        for line in strace.stderr:
            if b" attached" in line:
                break
        else:
            raise AssertionError("strace has ended")
        try:
            yield
        finally:
            # Not SIGTERM: it would wait for the threads of an agent that is dead.
            strace.kill()


def content(path: Path) -> tuple[bytes, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return path.read_bytes(), stat.S_IMODE(found.st_mode), found.st_uid


STEPS = {
    "before the file's owner": "fchown",
    "before its mode": "fchmod",
    "before its sync": "fsync",
    "before the note": "symlink",
    "before the hidden name": "linkat",
    "before the rename": "renameat",
    "before the note goes": "unlink",
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_an_agent_that_is_killed_in_the_middle_leaves_the_old_file_or_the_new(
    agent: Agent, step: str
) -> None:
    target = agent.directory / "file"
    target.write_bytes(OLD)
    target.chmod(0o640)
    with agent.client() as client:
        client.ask(requests.Ping())
        with tampering(agent, f"--inject={step}:signal=SIGKILL"):
            request = requests.FileWrite(str(target), NEW, mode=0o600, uid=1000)
            assert client.ask(request) is None
    assert content(target) in ((OLD, 0o640, 0), (NEW, 0o600, 1000))
    if step == "renameat":
        assert len(agent.hidden()) == 1
    agent.succeed()
    with agent.client() as client:
        client.ask(requests.FileRead(str(target)))
    assert agent.hidden() == []
    assert agent.notes() == []
    target.unlink()


FAILURES = {
    "no room for the file": "fsync:error=ENOSPC:when=1",
    "a disk that fails": "fsync:error=EIO:when=1",
    "no room for the data": "write:error=ENOSPC:when=1",
    "a quota": "write:error=EDQUOT:when=1",
    "no room for the hidden name": "linkat:error=ENOSPC:when=2",
    "no room for the name": "renameat:error=ENOSPC",
    "a quota of another's files": "fchown:error=EDQUOT",
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_a_step_that_fails_leaves_the_old_file_and_nothing_else(agent: Agent, failure: str) -> None:
    target = agent.directory / "file"
    target.write_bytes(OLD)
    with agent.client() as client:
        client.ask(requests.Ping())
        with tampering(agent, f"--inject={failure}"):
            answer = client.ask(requests.FileWrite(str(target), NEW, uid=1000))
        assert isinstance(answer, responses.Error), answer
        assert answer.code == "FILE_IO_FAILED"
        assert content(target) == (OLD, 0o644, 0)
        assert agent.hidden() == []
        assert agent.notes() == []
        assert client.ask(requests.FileWrite(str(target), NEW)) == responses.Ok()
        assert content(target) == (NEW, 0o644, 0)
    target.unlink()


def test_without_a_storage_files_are_written_all_the_same_and_those_in_it_refused(
    tmp_path: Path,
) -> None:
    """Nothing is where it should be kept, and what needs it is told so."""
    place = tmp_path / "no-directory"
    place.touch()
    target = tmp_path / "file"
    target.write_bytes(OLD)
    with agent_alone(tmp_path / "agent", options=[f"--storage={place}"]) as machine:
        notes = tmp_path / "agent" / "run" / "uploads"
        with BlockingClient(machine.address) as client:
            assert client.ask(requests.FileWrite(str(target), NEW)) == responses.Ok()
            resumed = {"resume": True, "sha256": hashlib.sha256(OLD).hexdigest()}
            begin = requests.FileWriteBegin(str(target), total_size=len(OLD), **resumed)
            assert client.ask(begin) == responses.Ok({"offset": 0})
            assert client.ask(requests.FileWriteChunk(OLD, done=False)) == responses.Ok()
            client.ask(requests.Ping())
            assert len(list(notes.iterdir())) == 1
            assert client.ask(begin) == responses.Ok({"offset": len(OLD)})
            assert client.ask(requests.FileWriteChunk(b"", done=True)) == responses.Ok()
            assert (target.read_bytes(), list(notes.iterdir())) == (OLD, [])
            refused = client.ask(requests.FileRead("/file", persistent_overlay_id="some"))
        assert isinstance(refused, responses.Error)
        assert refused.code == "FILE_IO_FAILED"
        assert str(place) in refused.message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent", "file", "no-directory"]


def test_without_nameless_files_uploads_are_hidden_and_noted(agent: Agent) -> None:
    """As on a virtiofs share, which has no O_TMPFILE."""
    target = agent.directory / "a" / "file"
    # Nothing else is opened by that path.
    refusal = "--trace-path=.", "--inject=openat:error=EOPNOTSUPP"
    with agent.client() as client:
        client.ask(requests.Ping())
        for end in ("done", "hang-up", "crash"):
            with tampering(agent, *refusal), agent.client() as other:
                begin = requests.FileWriteBegin(str(target), total_size=len(NEW), uid=1000)
                assert other.ask(begin) == responses.Ok()
                (name,) = agent.hidden()
                assert name.startswith(".innkeep-upload-")
                assert len(agent.notes()) == 1
                if end == "done":
                    chunk = requests.FileWriteChunk(NEW, done=True)
                    assert other.ask(chunk) == responses.Ok()
                elif end == "hang-up":
                    other.hang_up()
                else:
                    agent.kill()
                    agent.succeed()
            with agent.client() as next_client:
                next_client.ask(requests.FileRead(str(target)))
            assert agent.hidden() == []
            assert agent.notes() == []
            assert content(target) == (NEW, 0o644, 1000)
    target.unlink()


# Any order of all of it, against a model


@attrs.define(eq=False)
class Going:
    """An upload that has begun on a connection of its own."""

    client: BlockingClient
    name: str
    data: bytes
    mode: int
    resumes: bool
    sent: int

    @property
    def file(self) -> tuple[bytes, int]:
        return self.data, self.mode


NAMES = st.sampled_from(["a", "b", "dir/c", "dir/sub/d"])
CONTENTS = st.tuples(st.integers(0, 255), st.sampled_from([0, 1, 5_000, 1_500_000])).map(
    lambda drawn: bytes([drawn[0]]) * drawn[1]
)
MODES = st.sampled_from([0o644, 0o600, 0o4755])


class Uploads(RuleBasedStateMachine):
    """What is under each name is what the last whole upload put there."""

    going = Bundle("going")

    def __init__(self) -> None:
        super().__init__()
        self._held = ExitStack()
        self.agent = self._held.enter_context(shared_agent())
        self.files: dict[str, tuple[bytes, int]] = {}
        self.open: list[Going] = []
        self.resumable: dict[tuple[str, bytes], int] = {}

    def teardown(self) -> None:
        for upload in self.open:
            upload.client.hang_up()
            upload.client.socket.close()
        with self.agent.client() as client:
            for name in [path.name for path in self.agent.directory.iterdir()]:
                request = requests.FileRemove(str(self.agent.directory / name), recursive=True)
                assert client.ask(request) == responses.Ok()
        for note in self.agent.notes():  # their files are gone
            note.unlink()
        self._held.close()

    def path(self, name: str) -> str:
        return str(self.agent.directory / name)

    @rule(name=NAMES, data=CONTENTS, mode=MODES)
    def write(self, name: str, data: bytes, mode: int) -> None:
        with self.agent.client() as client:
            answer = client.ask(requests.FileWrite(self.path(name), data, mode=mode))
        assert answer == responses.Ok()
        self.files[name] = data, mode

    @rule(target=going, name=NAMES, data=CONTENTS, mode=MODES, resumes=st.booleans())
    def begin(self, name: str, data: bytes, mode: int, resumes: bool) -> object:
        client = self.agent.client()
        answer = client.ask(
            requests.FileWriteBegin(
                self.path(name),
                mode=mode,
                total_size=len(data),
                resume=resumes,
                sha256=sha256(data) if resumes else None,
            )
        )
        busy = any(each.resumes and (each.name, each.data) == (name, data) for each in self.open)
        if resumes and busy:
            assert isinstance(answer, responses.Error)
            assert "another connection" in answer.message
            client.hang_up()
            client.socket.close()
            return multiple()
        sent = 0
        if resumes:
            assert isinstance(answer, responses.Ok)
            assert isinstance(answer.data, dict)
            sent = answer.data["offset"]
            assert sent <= self.resumable.get((name, data), 0)
            self.resumable[name, data] = sent
        else:
            assert answer == responses.Ok()
        upload = Going(client, name, data, mode, resumes, sent)
        self.open.append(upload)
        return upload

    @rule(upload=going, share=st.floats(0, 1))
    def go_on(self, upload: Going, share: float) -> None:
        if upload not in self.open:
            return
        size = round(share * (len(upload.data) - upload.sent))
        self._take(upload, size)
        assert upload.client.ask(self._chunk(upload, size, done=False)) == responses.Ok()
        upload.sent += size

    @rule(upload=consumes(going))
    def finish(self, upload: Going) -> None:
        if upload not in self.open:
            return
        rest = len(upload.data) - upload.sent
        assert upload.client.ask(self._chunk(upload, rest, done=True)) == responses.Ok()
        self._end(upload)
        self.files[upload.name] = upload.file
        self.resumable.pop((upload.name, upload.data) if upload.resumes else ("", b""), None)

    @rule(upload=consumes(going), by=st.sampled_from([-1, 1]))
    def finish_with_another_size(self, upload: Going, by: int) -> None:
        if upload not in self.open or upload.sent + by > len(upload.data) + 1:
            return
        rest = len(upload.data) - upload.sent + by
        if rest < 0:
            return
        data = (upload.data + b"x")[upload.sent : upload.sent + rest]
        answer = upload.client.ask(requests.FileWriteChunk(data, done=True))
        assert isinstance(answer, responses.Error)
        assert answer.code == "INVALID_REQUEST"
        self._end(upload)
        self.resumable.pop((upload.name, upload.data) if upload.resumes else ("", b""), None)

    @rule(upload=consumes(going), share=st.floats(0, 1))
    def hang_up(self, upload: Going, share: float) -> None:
        if upload not in self.open:
            return
        size = len(upload.data) - upload.sent
        self._take(upload, size)
        # All but the last byte at most: a whole last chunk may be taken, or not.
        upload.client.send(self._chunk(upload, size, done=False), share * 0.999)
        upload.client.hang_up()
        self._end(upload)

    @rule(upload=consumes(going))
    def ask_for_something_else(self, upload: Going) -> None:
        if upload not in self.open:
            return
        assert isinstance(upload.client.ask(requests.Ping()), responses.Pong)
        chunk = upload.client.ask(requests.FileWriteChunk(b"", done=True))
        assert isinstance(chunk, responses.Error)
        self._end(upload)

    @rule(name=NAMES)
    def read(self, name: str) -> None:
        with self.agent.client() as client:
            answer = client.ask(requests.FileRead(self.path(name)))
            if name not in self.files:
                assert isinstance(answer, responses.Error)
                assert "No such file" in answer.message
                return
            digest = hashlib.sha256()
            while isinstance(answer, responses.DataChunk) and not answer.done:
                digest.update(answer.data)
                answer = client.receive()
            assert answer == responses.DataChunk(b"", done=True)
            assert digest.hexdigest() == sha256(self.files[name][0])

    @rule()
    def crash(self) -> None:
        self.agent.kill()
        self._restart()

    @rule(upload=consumes(going), share=st.floats(0, 1) | st.just(1.0))
    def crash_at_the_end(self, upload: Going, share: float) -> None:
        """Its last chunk is on its way when the agent dies: one file or the other is there."""
        if upload not in self.open:
            return
        rest = len(upload.data) - upload.sent
        self._take(upload, rest)
        upload.client.send(self._chunk(upload, rest, done=True), share)
        self.agent.kill()
        self._restart()
        found = content(self.agent.directory / upload.name)
        if found is not None and found[:2] == upload.file:
            self.files[upload.name] = upload.file

    @invariant()
    def every_file_is_whole(self) -> None:
        for name in ("a", "b", "dir/c", "dir/sub/d"):
            expected = self.files.get(name)
            found = content(self.agent.directory / name)
            assert found == (None if expected is None else (*expected, 0)), name

    @invariant()
    def nothing_else_is_there(self) -> None:
        hidden = self.agent.hidden()
        assert all(name.startswith(".innkeep-resume-") for name in hidden)
        assert len(hidden) <= len(self.resumable)
        assert len(self.agent.notes()) <= len(self.resumable)

    def _chunk(self, upload: Going, size: int, *, done: bool) -> requests.FileWriteChunk:
        return requests.FileWriteChunk(upload.data[upload.sent : upload.sent + size], done=done)

    def _take(self, upload: Going, size: int) -> None:
        """So many bytes more may be there from now on."""
        if upload.resumes:
            self.resumable[upload.name, upload.data] = upload.sent + size

    def _end(self, upload: Going) -> None:
        self.open.remove(upload)
        upload.client.socket.close()

    def _restart(self) -> None:
        self.agent.succeed()
        for upload in list(self.open):
            self._end(upload)
        with self.agent.client() as client:
            # What its predecessor left there has been removed before that is answered.
            client.ask(requests.FileStat(str(self.agent.directory)))


_AGENTS: list[Agent] = []


@contextmanager
def shared_agent() -> Iterator[Agent]:
    yield _AGENTS[-1]


def test_in_any_order_files_are_whole_and_nothing_else_is_left() -> None:
    with killable_agent() as agent:
        _AGENTS.append(agent)
        try:
            run_state_machine_as_test(
                Uploads,
                settings=settings(
                    max_examples=rounds(quick=3, soak=500), stateful_step_count=20, deadline=None
                ),
            )
        finally:
            _AGENTS.pop()
