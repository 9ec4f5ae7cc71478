"""Interactive commands and terminals in containers: of one's own, and joined."""

import hashlib
from typing import Any

import pytest
import trio
from attrs import frozen

from protocol import requests, responses
from tests.protocol.sessions import pattern
from tests.support.run_sessions import answers_to, session, stdout_in
from tests.support.standing import Persistent, leftovers, settled

PATIENCE_S = 20
INTERRUPT, STOP, END = "\x03", "\x1a", ""

# What a person has typed is echoed by the terminal, so scripts say what they are up to otherwise.
READY = "echo re''ady"


@frozen
class Place:
    """Where commands run: in a container of their own, or in one that stays."""

    overlay: Persistent
    overlay_id: str | None

    @property
    def address(self) -> str:
        return self.overlay.machine.address

    def request(self, *command: str, **fields: Any) -> requests.Run:
        """An interactive request; a single word is a shell script."""
        words = ("sh", "-c", *command) if len(command) == 1 else command
        fields = {"interactive": True, "persistent_overlay_id": self.overlay_id, **fields}
        return self.overlay.request(*words, **fields)

    def on_tty(self, *command: str, **fields: Any) -> requests.Run:
        return self.request(*command, tty=True, **fields)

    async def answers(self, request: requests.Run) -> list[Any]:
        return await answers_to(self.overlay.client, request)

    async def shown(self, *command: str, **fields: Any) -> str:
        """What a command on a terminal that nobody types to shows; it must succeed."""
        answers = await self.answers(self.on_tty(*command, **fields))
        assert answers[0] == responses.Started()
        assert answers[-1] == responses.Exited(0), answers
        assert {type(answer) for answer in answers[1:-1]} <= {responses.Stdout}
        return stdout_in(answers).decode().replace("\r\n", "\n")


@pytest.fixture(params=["ephemeral", "first", "joined", "detached"])
async def place(request: pytest.FixtureRequest, persistent: Persistent) -> Place:
    """A container of the command's own; one that starts for it, that runs already, and a
    workload's."""
    if request.param == "ephemeral":
        return Place(persistent, None)
    if request.param == "joined":
        await persistent.run("true")
    elif request.param == "detached":
        await persistent.detach("exec sleep 1000")
    return Place(persistent, persistent.id)


# What is answered, and when


async def test_a_session_is_started_then_output_then_exited(place: Place) -> None:
    assert await place.answers(place.request("echo out; exit 3")) == [
        responses.Started(),
        responses.Stdout(b"out\n"),
        responses.Exited(3),
    ]
    assert await place.answers(place.request(":")) == [responses.Started(), responses.Exited(0)]


async def test_the_streams_are_told_apart_and_come_while_the_command_runs(place: Place) -> None:
    script = "echo one; read go; echo two >&2; read go; echo three; exit 7"
    async with session(place.address, place.request(script)) as talk:
        await talk.see(b"one\n")
        await talk.send("go\n")
        await talk.see_error(b"two\n")
        await talk.send("go\n")
        assert (await talk.exited()).exit_code == 7
        assert (talk.stdout, talk.stderr) == (b"three\n", b"")


@pytest.mark.parametrize("tty", [False, True], ids=["interactive", "tty"])
@pytest.mark.parametrize(
    ("command", "fields", "causes"),
    [
        pytest.param("no-such-program", {}, ("not found",), id="not found"),
        pytest.param("/no/such/program", {}, ("not found",), id="no such path"),
        pytest.param("/etc/passwd", {}, ("not executable",), id="not executable"),
        pytest.param("/etc", {}, ("",), id="a directory"),
        pytest.param(
            "/workspace/script", {}, ("bad interpreter", "/no/such/shell"), id="bad interpreter"
        ),
        pytest.param("/workspace/format", {}, ("exec format error",), id="no program"),
        pytest.param(
            "/bin/true",
            {"workdir": "/etc/passwd"},
            ("/etc/passwd", "Not a directory"),
            id="workdir",
        ),
        pytest.param("/bin/true", {"user": "nobody-here"}, ("nobody-here",), id="user"),
    ],
)
async def test_what_cannot_be_started_is_an_error_and_nothing_else(
    place: Place, command: str, fields: dict[str, Any], causes: tuple[str, ...], tty: bool
) -> None:
    workspace = place.overlay.machine.storage / "workspace"
    for name, text in (("script", "#!/no/such/shell\n"), ("format", "echo no first line\n")):
        (workspace / name).write_text(text)
        (workspace / name).chmod(0o755)
    request = place.request(command, "argument", tty=tty, **fields)
    (error,) = await place.answers(request)
    assert isinstance(error, responses.Error), error
    assert error.code == "RUN_FAILED"
    assert command in error.message
    for cause in causes:
        assert cause in error.message
    # The connection, and the container, are as good as before.
    assert (await place.answers(place.request("exit 5")))[-1] == responses.Exited(5)


async def test_the_exit_code_is_the_commands_and_a_signal_is_128_and_its_number(
    place: Place,
) -> None:
    for tty in (False, True):
        for script, code in (("exit 255", 255), ("kill -TERM $$; sleep 1000", 143)):
            wrapped = f"sh -c '{script}'; exit $?"
            answers = await place.answers(place.request(wrapped, tty=tty))
            assert answers[-1].exit_code == code


# Input


async def test_input_arrives_and_no_data_is_its_end(place: Place) -> None:
    request = place.request("cat; echo ended", stdin_data="from the request, ")
    async with session(place.address, request) as talk:
        await talk.send("from the host")
        await talk.see(b"from the request, from the host")
        await talk.send(END)
        assert (await talk.exited()).exit_code == 0
        assert talk.stdout == b"ended\n"


async def test_megabytes_pass_in_both_directions_at_once(place: Place) -> None:
    data = pattern(8 << 20)
    async with (
        session(place.address, place.request("cat")) as talk,
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            for start in range(0, len(data), 1 << 20):
                await talk.send(data[start : start + (1 << 20)])
            await talk.send(END)

        nursery.start_soon(send)
        assert (await talk.exited()).exit_code == 0
        assert hashlib.sha256(talk.stdout).digest() == hashlib.sha256(data).digest()


# Terminals


async def test_a_terminal_is_all_three_streams_and_the_controlling_one(place: Place) -> None:
    script = (
        "echo out; echo err >&2; echo through the name >/dev/tty; tty;"
        "for n in 0 1 2; do test -t $n && readlink /proc/self/fd/$n; done"
    )
    out, err, through, name, *ends, last = (await place.shown(script)).split("\n")
    assert (out, err, through, last) == ("out", "err", "through the name", "")
    assert name.startswith("/dev/pts/")
    assert ends == [name] * 3
    # The session's leader, its process group, the session, and the terminal's foreground group.
    stat = await place.shown("cat", "/proc/self/stat")
    pid, _, _, _, group, session_id, terminal, foreground, *_ = stat.split()
    assert (group, session_id, foreground) == (pid, pid, pid)
    assert int(terminal) != 0


async def test_a_terminals_first_size_is_80_by_24(place: Place) -> None:
    # crun gives its size to a terminal in a container that runs when the command is on its way
    # already: one that is quicker hears of it, as of any other.
    script = (
        "trap 'stty size; exit' WINCH; size=$(stty size 2>/dev/null);"
        'test -n "$size" && echo $size && exit; sleep 1000 & while :; do wait; done'
    )
    command = ("stty", "size") if place.overlay_id is None else (script,)
    for _ in range(5):
        assert (await place.shown(*command)).splitlines()[-1] == "24 80"


async def test_nothing_of_what_the_quickest_commands_show_is_lost(place: Place) -> None:
    for number in range(20):
        assert await place.shown("echo", str(number)) == f"{number}\n"


async def test_each_new_size_reaches_the_program_in_the_container(place: Place) -> None:
    # The shell hears of signals while it waits, and not while it reads.
    script = (
        f"trap 'stty size' WINCH; trap 'exit 3' INT; sleep 1000 & {READY}; while :; do wait; done"
    )
    async with session(place.address, place.on_tty(script)) as talk:
        await talk.see(b"ready\r\n")
        for columns, rows in ((132, 50), (3, 2), (29_999, 29_998)):  # what busybox believes
            await talk.resize(columns, rows)
            await talk.see(f"{rows} {columns}\r\n".encode())
        await talk.send(INTERRUPT)
        assert (await talk.exited()).exit_code == 3


async def test_the_interrupt_key_ends_what_is_in_the_foreground_and_nothing_else(
    place: Place,
) -> None:
    script = f"trap 'echo inter''rupted' INT; sh -c '{READY}; exec sleep 1000'; echo $?; exit 3"
    async with session(place.address, place.on_tty(script)) as talk:
        await talk.see(b"ready\r\n")
        await talk.send(INTERRUPT)
        assert (await talk.exited()).exit_code == 3
        assert b"130" in talk.stdout
    async with session(place.address, place.on_tty(f"{READY}; exec sleep 1000")) as talk:
        await talk.see(b"ready\r\n")
        await talk.send(INTERRUPT)
        if place.overlay_id is not None:
            assert (await talk.exited()).exit_code == 130


async def test_the_end_is_the_end_of_file_key(place: Place) -> None:
    for typed in ("", "a line\n", "unfinished"):
        request = place.on_tty(f"stty -echo; {READY}; cat; echo ended")
        async with session(place.address, request) as talk:
            await talk.see(b"ready\r\n")
            if typed:
                await talk.send(typed)
            await talk.send(END)
            assert (await talk.exited()).exit_code == 0
            assert talk.stdout == typed.replace("\n", "\r\n").encode() + b"ended\r\n"


async def test_terminals_at_once_are_each_their_own(place: Place) -> None:
    names: list[str] = []
    async with trio.open_nursery() as nursery:

        async def one(number: int) -> None:
            request = place.on_tty(f"stty -echo; {READY}; read word; tty; echo $word")
            async with session(place.address, request) as talk:
                await talk.resize(80 + number, 24)
                await talk.see(b"ready\r\n")
                await talk.send(f"word {number}\n")
                assert (await talk.exited()).exit_code == 0
                name, word, _ = talk.stdout.decode().split("\r\n")
                assert word == f"word {number}"
                names.append(name)

        for number in range(8):
            nursery.start_soon(one, number)
    assert len(names) == 8


# The end


@pytest.mark.parametrize("tty", [False, True], ids=["interactive", "tty"])
async def test_a_time_limit_ends_the_commands_tree_and_neither_container_nor_others(
    place: Place, tty: bool
) -> None:
    async with place.overlay.lifeline() as line:
        script = line.script("echo so far; (setsid sleep 1000 &); (trap '' TERM; sleep 1000)")
        request = place.request(script, tty=tty, timeout_ms=500)
        async with session(place.address, request) as talk:
            exited = await talk.exited()
            assert (exited.exit_code, exited.timed_out) == (124, True)
            assert talk.stdout.split() == [b"so", b"far"]
        with trio.fail_after(PATIENCE_S):
            await line.ended()


@pytest.mark.parametrize("tty", [False, True], ids=["interactive", "tty"])
async def test_a_time_limit_of_nothing_ends_at_once(place: Place, tty: bool) -> None:
    answers = await place.answers(place.request("sleep 1000", tty=tty, timeout_ms=0))
    assert [answers[0], answers[-1].exit_code] == [responses.Started(), 124]


@pytest.mark.parametrize("tty", [False, True], ids=["interactive", "tty"])
async def test_a_hang_up_ends_the_commands_tree(place: Place, tty: bool) -> None:
    async with place.overlay.lifeline() as line:
        script = line.script("(setsid sleep 1000 &); (trap '' HUP TERM; sleep 1000)")
        async with session(place.address, place.request(script, tty=tty)):
            await line.started()
        with trio.fail_after(PATIENCE_S):
            await line.ended()
    # Whom it was joined to lives on.
    containers = place.overlay.containers()
    assert len(containers) == (0 if place.overlay_id is None else 1)
    await place.overlay.run("true")
    if place.overlay_id is not None:
        assert place.overlay.containers() == containers


@pytest.mark.parametrize("tty", [False, True], ids=["interactive", "tty"])
async def test_a_time_limit_holds_while_the_reader_stalls(place: Place, tty: bool) -> None:
    async with place.overlay.lifeline() as line:
        request = place.request(line.script("exec yes"), tty=tty, timeout_ms=1500)
        async with session(place.address, request) as talk:
            with trio.fail_after(PATIENCE_S):
                await line.ended()
            assert (await talk.exited()).exit_code == 124


async def test_what_a_session_leaves_behind_delays_its_end_by_nothing(
    persistent: Persistent,
) -> None:
    for tty in (False, True):
        async with persistent.lifeline() as line:
            # In a session of its own before this one ends, and hangs up on whom it has.
            left = "(setsid sh -c 'echo >/up; exec sleep 1000' &)"
            script = line.script(f"mkfifo /up; {left}; read word </up; rm /up; exit 3")
            request = persistent.request("sh", "-c", script, interactive=True, tty=tty)
            begun = trio.current_time()
            async with session(persistent.machine.address, request) as talk:
                assert (await talk.exited()).exit_code == 3
            assert trio.current_time() - begun < 5
            assert "sleep 1000" in await persistent.shell("ps")
            await persistent.end()
            await line.ended()


async def test_a_session_ends_and_the_others_in_its_container_go_on(
    persistent: Persistent,
) -> None:
    address = persistent.machine.address
    request = persistent.request("cat", interactive=True)
    async with session(address, request) as stays:
        namespace = await persistent.shell("readlink /proc/self/ns/pid")
        async with session(
            address, persistent.request("sleep", "1000", tty=True, timeout_ms=300)
        ) as (limited):
            assert (await limited.exited()).exit_code == 124
        async with session(address, persistent.request("sleep", "1000", tty=True)):
            pass
        await stays.send("still here\n")
        await stays.see(b"still here\n")
        assert await persistent.shell("readlink /proc/self/ns/pid") == namespace
        await stays.send(END)
        assert (await stays.exited()).exit_code == 0


async def test_nothing_of_many_sessions_stays_behind(place: Place) -> None:
    machine = place.overlay.machine
    for tty in (False, True):
        await place.answers(place.request(":", tty=tty))
    await settled(machine, *place.overlay.containers())
    before, files = await leftovers(place.overlay.client), machine.agents_open_files()
    for number in range(20):
        for tty in (False, True):
            answers = await place.answers(place.request(f"exit {number}", tty=tty))
            assert answers[-1] == responses.Exited(number)
            await place.answers(place.request("no-such-program", "x", tty=tty))
    await settled(machine, *place.overlay.containers())
    assert await leftovers(place.overlay.client) == before
    assert machine.agents_open_files() <= files + 2
