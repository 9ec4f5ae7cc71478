"""Commands on a terminal in the machine itself: what a person types, and what the kernel makes of
it. (The same with the command line, and in containers, is in `test_cli_terminal`.)

What is typed before a shell has shown its prompt is lost at times: it edits its lines itself, and
drops what came before when it takes the terminal over. `cat` and `read` leave that to the kernel.
"""

import time
from typing import Any

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.protocol.sessions import pattern
from tests.support.execution import execute, lifeline, shell
from tests.support.machine import Machine
from tests.support.run_sessions import FILL, answers_to, session, stdout_in
from tests.support.wire import open_wire

MIB = 1024 * 1024
INTERRUPT, STOP, END = "\x03", "\x1a", ""

# Shows the terminal's size each time that the kernel says it is another, until a line is typed.
SIZES = """
import fcntl, os, signal, struct, sys, termios
def show(*_):
    size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
    os.write(1, b"%d %d\\n" % struct.unpack("HHHH", size)[:2])
signal.signal(signal.SIGWINCH, show)
os.write(1, b"up\\n")
sys.stdin.readline()
"""


def on_tty(*command: str, **fields: Any) -> requests.VmExec:
    """The request for a command on a terminal; a single word is a shell script."""
    words = ("sh", "-c", *command) if len(command) == 1 else command
    return requests.VmExec(command=words, tty=True, **fields)


async def output_of(client: AgentClient, request: requests.VmExec) -> bytes:
    """What a command that nobody types to shows; it must succeed."""
    answers = await answers_to(client, request)
    assert answers[0] == responses.Started()
    assert answers[-1] == responses.Exited(0), answers
    assert {type(answer) for answer in answers[1:-1]} <= {responses.Stdout}
    return stdout_in(answers)


async def test_a_terminal_is_all_three_streams_and_comes_as_stdout(client: AgentClient) -> None:
    script = (
        "echo out; echo err >&2; for n in 0 1 2; do test -t $n && readlink /proc/self/fd/$n; done"
    )
    out, err, *ends = (await output_of(client, on_tty(script))).decode().split("\r\n")[:-1]
    assert (out, err) == ("out", "err")
    assert len(ends) == 3
    assert len(set(ends)) == 1
    assert ends[0].startswith("/dev/pts/")


async def test_it_is_the_controlling_terminal(client: AgentClient) -> None:
    script = "tty; echo through the name >/dev/tty; ps -o pid,tty,args | grep '[p]s -o'"
    name, through, *_ = (await output_of(client, on_tty(script))).decode().split("\r\n")
    assert name.startswith("/dev/pts/")
    assert through == "through the name"
    # The session's leader, its process group, the session, and the terminal's foreground group.
    stat = await output_of(client, on_tty("cat", "/proc/self/stat"))
    pid, _, _, _, group, session_id, terminal, foreground, *_ = stat.split()
    assert (group, session_id, foreground) == (pid, pid, pid)
    assert int(terminal) != 0


async def test_its_first_size_is_80_by_24(client: AgentClient) -> None:
    assert await output_of(client, on_tty("stty", "size")) == b"24 80\r\n"


async def test_each_new_size_reaches_the_program(machine: Machine) -> None:
    async with session(machine.address, on_tty("python3", "-c", SIZES)) as talk:
        await talk.see(b"up\r\n")
        for columns, rows in ((132, 50), (1, 1), (65535, 65535)):
            await talk.resize(columns, rows)
            await talk.see(f"{rows} {columns}\r\n".encode())
        await talk.send("\n")
        assert await talk.exited() == responses.Exited(0)


async def test_a_size_that_comes_first_is_there_when_it_is_asked_for(machine: Machine) -> None:
    async with session(machine.address, on_tty("read line; stty size")) as talk:
        await talk.resize(100, 30)
        await talk.send("\n")
        await talk.see(b"30 100\r\n")
        assert await talk.exited() == responses.Exited(0)


async def test_a_size_means_nothing_to_a_command_without_a_terminal(machine: Machine) -> None:
    request = requests.VmExec(("cat",), interactive=True)
    async with session(machine.address, request) as talk:
        await talk.resize(100, 30)
        await talk.send("on it goes")
        await talk.send(END)
        assert await talk.exited() == responses.Exited(0)
        assert talk.stdout == b"on it goes"


async def test_the_terminal_edits_and_echoes_lines(machine: Machine) -> None:
    async with session(machine.address, on_tty("cat", "-")) as talk:
        await talk.send("wrong\x15rx\x7fight\n")
        # What the terminal shows of the edit, and what the program then says.
        await talk.see(b"right\r\n")
        await talk.send(END)
        assert await talk.exited() == responses.Exited(0)


@pytest.mark.parametrize("typed", ["", "whole line\n", "unfinished"])
async def test_empty_input_is_the_end_also_after_an_unfinished_line(
    machine: Machine, typed: str
) -> None:
    async with session(machine.address, on_tty("stty -echo; echo up; cat; echo ended")) as talk:
        await talk.see(b"up\r\n")
        if typed:
            await talk.send(typed)
        await talk.send(END)
        assert await talk.exited() == responses.Exited(0)
        assert talk.stdout == typed.replace("\n", "\r\n").encode() + b"ended\r\n"


async def test_the_end_may_be_typed_ahead(machine: Machine) -> None:
    async with session(machine.address, on_tty("sleep 0.2; cat; echo ended; cat")) as talk:
        for typed in ("one\n", END, "two\n", END):
            await talk.send(typed)
        exited = await talk.exited()
        assert (exited.exit_code, talk.stdout.count(b"ended")) == (0, 1)


async def test_half_a_close_is_the_end_of_the_input_on_a_terminal_too(machine: Machine) -> None:
    async with open_wire(machine.address) as wire:
        await wire.send({"method": "vm_exec", "command": ["cat"], "tty": True})
        await wire.stream.send_eof()
        statuses = []
        while (answer := await wire.receive()) is not None:
            statuses.append(answer["status"])
        assert (statuses[0], statuses[-1]) == ("started", "exited")
        assert answer is None


async def test_the_requests_input_is_typed_first(machine: Machine) -> None:
    request = on_tty("stty -echo; head -n 2", stdin_data="from the request\n")
    async with session(machine.address, request) as talk:
        await talk.send("typed\n")
        assert await talk.exited() == responses.Exited(0)
        assert talk.stdout.replace(b"\r", b"").endswith(b"from the request\ntyped\n")


async def test_the_interrupt_key_ends_what_is_in_the_foreground_and_nothing_else(
    machine: Machine,
) -> None:
    script = (
        # The shell would go the way of its command, as shells do.
        "set -m; trap : INT; sleep 1000 & background=$!; sh -c 'echo up; exec sleep 1000';"
        "echo status $?; kill $background && echo was alive"
    )
    async with session(machine.address, on_tty(script)) as talk:
        await talk.see(b"up\r\n")
        await talk.send(INTERRUPT)
        await talk.see(b"status 130\r\n")
        await talk.see(b"was alive\r\n")
        assert await talk.exited() == responses.Exited(0)


async def test_the_interrupt_key_ends_a_command_that_does_not_care(machine: Machine) -> None:
    async with session(machine.address, on_tty("cat", "-")) as talk:
        await talk.send("up\n")
        await talk.see(b"up\r\nup\r\n")
        await talk.send(INTERRUPT)
        assert await talk.exited() == responses.Exited(130, signal=2)


async def test_jobs_are_stopped_and_brought_back(machine: Machine) -> None:
    request = on_tty("sh", "-i", env=(("PS1", "ready> "),))
    async with session(machine.address, request) as talk:
        await talk.see(b"ready> ")
        assert b"job control" not in talk.stdout
        await talk.send("echo up$((1)); cat\n")
        await talk.see(b"up1\r\n")
        await talk.send("once\n")
        # Once by the terminal, once by cat.
        await talk.see(b"once\r\nonce\r\n")
        await talk.send(STOP)
        await talk.see(b"Stopped")
        await talk.see(b"ready> ")
        await talk.send("fg\n")
        await talk.see(b"\ncat\r\n")
        await talk.send("again\n")
        await talk.see(b"again\r\nagain\r\n")
        await talk.send("\x04")
        await talk.see(b"ready> ")
        await talk.send("exit 7\n")
        assert (await talk.exited()).exit_code == 7


async def test_megabytes_pass_through_a_terminal_in_both_directions_at_once(
    client: AgentClient,
) -> None:
    data = pattern(2 * MIB)
    shown = bytearray()
    request = on_tty(f"stty raw -echo; echo up; head -c {len(data)}")
    with trio.fail_after(60):
        async with client.stream(request) as answers, trio.open_nursery() as nursery:

            async def type_it() -> None:
                for at in range(0, len(data), 1 << 18):
                    await client.send(requests.Stdin(data[at : at + (1 << 18)]))

            async for answer in answers:
                if isinstance(answer, responses.Stdout):
                    if not shown:
                        nursery.start_soon(type_it)
                    shown += answer.data
    assert answer == responses.Exited(0)
    assert bytes(shown).removeprefix(b"up\n") == data


async def test_all_output_comes_before_the_end(client: AgentClient) -> None:
    shown = await output_of(client, on_tty("seq", "1", "100000"))
    assert shown.decode().split("\r\n") == [*map(str, range(1, 100001)), ""]


async def test_all_output_comes_however_late(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script(f"stty raw; {FILL}")
        async with client.stream(on_tty(script)) as answers:
            with trio.fail_after(10):
                await line.ended()
            async with open_client(machine.address) as other:
                # Far beyond the patience with what a command leaves running.
                await shell(other, "sleep 0.5")
                written = int(await shell(other, "cat /tmp/written"))
            said = [answer async for answer in answers]
    assert said[-1] == responses.Exited(0)
    assert len(stdout_in(said)) == written > 0


async def test_a_reader_that_stalls_stalls_the_command_and_its_time_limit_holds(
    machine: Machine,
) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        request = on_tty(line.script("(setsid yes &); yes"), timeout_ms=1000)
        async with client.stream(request) as answers:
            await line.started()
            with trio.fail_after(5):
                await line.ended()
            *_, last = [answer async for answer in answers]
        assert last == responses.Exited(124, timed_out=True)


async def test_input_that_is_not_read_holds_nothing_up(client: AgentClient) -> None:
    with trio.fail_after(20):
        async with (
            client.stream(on_tty("stty -echo; sleep 0.3; echo done")) as answers,
            trio.open_nursery() as nursery,
        ):

            async def type_it() -> None:
                for _ in range(4):
                    await client.send(requests.Stdin(b"0123456789\n" * 50_000))

            nursery.start_soon(type_it)
            said = [answer async for answer in answers]
        assert said[-1] == responses.Exited(0)
        assert stdout_in(said).endswith(b"done\r\n")
        assert (await execute(client, "cat")).stdout == b""


async def test_the_end_of_the_session_hangs_up_on_its_background_processes(
    machine: Machine,
) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        begun = time.monotonic()
        said = await answers_to(client, on_tty(line.script("sleep 1000 & echo done")))
        assert time.monotonic() - begun < 0.6
        assert (stdout_in(said), said[-1]) == (b"done\r\n", responses.Exited(0))
        with trio.fail_after(5):
            await line.ended()


async def test_what_has_left_the_session_lives_on_and_delays_nothing(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        begun = time.monotonic()
        # It has the terminal's end open and writes to it, later, and more than it holds.
        later = "sleep 1; seq 1 100000; echo $? >/tmp/status"
        said = await answers_to(client, on_tty(line.script(f"setsid sh -c '{later}' & sleep 0.1")))
        assert time.monotonic() - begun < 0.7
        assert said[-1] == responses.Exited(0)
        with trio.fail_after(10):
            await line.ended()
        assert await shell(client, "cat /tmp/status") == "0\n"


async def test_a_terminal_beats_the_background(client: AgentClient) -> None:
    request = requests.VmExec(("tty",), tty=True, background=True)
    assert (await output_of(client, request)).startswith(b"/dev/pts/")
    request = requests.VmExec(("tty",), tty=True, interactive=True, background=True)
    assert (await output_of(client, request)).startswith(b"/dev/pts/")


async def test_hanging_up_kills_the_whole_tree(machine: Machine) -> None:
    async with lifeline(machine.address) as line:
        script = line.script("(setsid sh -c 'trap \"\" TERM HUP INT; sleep 1000' &); cat")
        async with session(machine.address, on_tty(script)):
            await line.started()
        with trio.fail_after(5):
            await line.ended()


async def test_a_time_limit_ends_the_whole_tree_with_124(machine: Machine) -> None:
    async with lifeline(machine.address) as line, open_client(machine.address) as client:
        script = line.script("echo so far; (setsid sleep 1000 &) ; sleep 1000")
        said = await answers_to(client, on_tty(script, timeout_ms=500))
        assert (said[1:-1], said[-1]) == (
            [responses.Stdout(b"so far\r\n")],
            responses.Exited(124, timed_out=True),
        )
        with trio.fail_after(5):
            await line.ended()
        said = await answers_to(client, on_tty("sleep 1000", timeout_ms=0))
        assert said == [responses.Started(), responses.Exited(124, timed_out=True)]


async def test_a_command_on_a_terminal_has_the_environment_and_the_signals_of_any(
    client: AgentClient,
) -> None:
    shown = await output_of(client, on_tty("env", "-u", "PATH", "env"))
    assert sorted(shown.split()) == [b"HOME=/root", b"TERM=xterm-256color"]
    # Without a shell between: busybox's ignores SIGQUIT, and so does what it turns into.
    grep = ("grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status")
    shown = await output_of(client, on_tty(*grep))
    assert set(shown.split()[1::2]) == {b"0" * 16}


async def test_no_descriptor_of_the_agents_is_on_a_terminal(
    machine: Machine, client: AgentClient
) -> None:
    async with session(machine.address, on_tty("cat", "-")):
        # 0, 1 and 2, and the directory that ls itself reads.
        shown = await output_of(client, on_tty("ls", "-1", "/proc/self/fd"))
        assert shown.split() == [b"0", b"1", b"2", b"3"]


async def test_terminals_at_once_are_each_their_own(machine: Machine) -> None:
    async with trio.open_nursery() as nursery:

        async def say(number: int) -> None:
            async with session(machine.address, on_tty("read line; echo =$line=")) as talk:
                await talk.send(f"{number}\n")
                await talk.see(f"={number}=\r\n".encode())
                assert await talk.exited() == responses.Exited(0)

        for number in range(30):
            nursery.start_soon(say, number)
