"""A person at a terminal, `innkeep run -it`, and the shell of a container in a VM: over vsock.

In a container of its own, or one of a persistent overlay that it shares with others.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from protocol.client import AgentClient
from tests.protocol.terminal import Terminal, on_terminal
from tests.support.editor import edit
from tests.support.execution import lifeline, pull, shell
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, Machine

pytestmark = pytest.mark.timeout(180)

PROMPT = "ready> "
OVERLAY = ("--overlay", "terminals")
PATIENCE_S = 60
PEOPLE = 20
# That many programs begin at a time: this machine has to start each, and the VM its container.
BEGIN_AT_ONCE = 4


@pytest.fixture
async def busybox(vm_client: AgentClient, images: Images) -> str:
    """The reference of an image in the VM's store."""
    reference = images.busybox.reference_from(LOOPBACK_IN_VM)
    await pull(vm_client, reference)
    return reference


@pytest.fixture(params=["own", "overlay"])
def container(request: pytest.FixtureRequest, busybox: str) -> tuple[str, ...]:
    """The end of a command line that begins with `run -it`, up to the command."""
    return (*(OVERLAY if request.param == "overlay" else ()), busybox)


@asynccontextmanager
async def shell_in(machine: Machine, container: tuple[str, ...]) -> AsyncIterator[Terminal]:
    """A terminal in front of a shell that has shown its prompt."""
    command = ("run", "-it", "-e", f"PS1={PROMPT}", *container, "sh")
    async with on_terminal(machine.address, *command) as terminal:
        await terminal.see(PROMPT)
        yield terminal


async def leave(terminal: Terminal, status: int) -> None:
    """^D: the shell ends with the status of its last command, and our terminal is as it was."""
    await terminal.see(PROMPT)
    await terminal.type("\x04")
    with trio.fail_after(PATIENCE_S):
        assert await terminal.exit_code() == status
    assert not terminal.is_raw


async def test_commands_are_edited_with_keys_and_the_end_key_leaves(
    vm: Machine, container: tuple[str, ...]
) -> None:
    async with shell_in(vm, container) as terminal:
        assert terminal.is_raw
        # ^U takes the line back, ^A and ^K what is left of it; DEL a letter.
        await terminal.type("echo wrong\x15echo all wrong\x01\x0becho a$((1 + 1))bx\x7f; tty\r")
        assert b"/dev/pts/" in await terminal.see(r"a2b\r\n/dev/pts/\d+\r\n")
        await terminal.see(PROMPT)
        await terminal.type("(exit 42)\r")
        await leave(terminal, 42)


async def test_the_program_is_told_of_a_new_size(vm: Machine, container: tuple[str, ...]) -> None:
    async with shell_in(vm, container) as terminal:
        script = 'trap "stty size; kill \\$!; exit 0" WINCH; stty size; sleep 1000 & wait'
        await terminal.type(f"sh -c '{script}'\r")
        await terminal.see(r"\r\n24 80\r\n")
        terminal.resize(132, 50)
        await terminal.see(r"50 132\r\n")
        await leave(terminal, 0)


async def test_the_interrupt_key_ends_the_command_and_not_the_shell(
    vm: Machine, container: tuple[str, ...]
) -> None:
    async with shell_in(vm, container) as terminal:
        await terminal.type("sh -c 'echo up$((1)); exec sleep 1000'\r")
        await terminal.see("up1")
        await terminal.type("\x03")
        await terminal.see(PROMPT)
        await terminal.type("echo status $?\r")
        await terminal.see(r"\r\nstatus 130\r\n")
        await leave(terminal, 0)


async def test_a_command_is_stopped_and_brought_back(
    vm: Machine, container: tuple[str, ...]
) -> None:
    async with shell_in(vm, container) as terminal:
        await terminal.type("echo up$((1)); cat\r")
        await terminal.see(r"\r\nup1\r\n")
        await terminal.type("one\r")
        # Once by the terminal there, once by cat.
        await terminal.see(r"one\r\none\r\n")
        await terminal.type("\x1a")
        await terminal.see("Stopped")
        await terminal.see(PROMPT)
        await terminal.type("fg\r")
        await terminal.see(r"\ncat\r\n")
        await terminal.type("two\r")
        await terminal.see(r"two\r\ntwo\r\n")
        await terminal.type("\x04")
        await leave(terminal, 0)


async def test_an_editor_draws_its_screen_and_again_when_the_window_grows(
    vm: Machine, container: tuple[str, ...]
) -> None:
    async with shell_in(vm, container) as terminal:
        await edit(terminal)
        await terminal.type(":wq\r")
        await terminal.see(PROMPT)
        await terminal.type("cat /tmp/file; rm /tmp/file\r")
        await terminal.see(r"\r\nfirst\r\nin between\r\nsecond\r\n")
        await leave(terminal, 0)


async def test_a_window_that_is_closed_takes_the_commands_with_it(
    vm: Machine, container: tuple[str, ...]
) -> None:
    async with lifeline(vm.address, "/workspace") as line:
        script = line.script("trap '' HUP; (setsid sleep 1000 &); cat")
        command = ("run", "-it", *container, "sh", "-c", script)
        async with on_terminal(vm.address, *command) as terminal:
            await line.started()
            terminal.hang_up()
            with trio.fail_after(PATIENCE_S):
                await line.ended()


async def test_shells_of_one_overlay_are_in_one_container_and_it_stays(
    vm: Machine, vm_client: AgentClient, busybox: str
) -> None:
    container = (*OVERLAY, busybox)
    async with shell_in(vm, container) as one, shell_in(vm, container) as other:
        await one.type("echo note >/tmp/note; sleep 98704 & mkfifo /tmp/told; cat /tmp/told\r")
        await other.type("until [ -p /tmp/told ]; do :; done; cat /tmp/note >/tmp/told\r")
        await one.see(r"\r\nnote\r\n")
        await other.see(PROMPT)
        await other.type("tty; rm /tmp/told /tmp/note\r")
        # A terminal of its own in the same devpts.
        await other.see(r"/dev/pts/1\r\n")
        await leave(other, 0)
        await leave(one, 0)
    async with shell_in(vm, container) as terminal:
        await terminal.type("pidof sleep && killall sleep\r")
        await terminal.see(r"\r\n\d+\r\n")
        await leave(terminal, 0)
    assert "98704" not in await shell(vm_client, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


async def test_twenty_people_work_at_once_and_each_sees_only_what_is_theirs(
    vm: Machine, busybox: str
) -> None:
    begin = trio.CapacityLimiter(BEGIN_AT_ONCE)
    here: list[int] = []
    everybody_is_here = trio.Event()

    async def work(number: int) -> None:
        container = (*(OVERLAY if number % 2 else ()), busybox)
        async with AsyncExitStack() as stack:
            async with begin:
                terminal = await stack.enter_async_context(shell_in(vm, container))
            here.append(number)
            if len(here) == PEOPLE:
                everybody_is_here.set()
            await everybody_is_here.wait()
            seen = b""
            await terminal.type(f"word=person{number}; for i in 1 2 3; do echo $word-$i; done\r")
            for i in (1, 2, 3):
                seen += await terminal.see(rf"\r\nperson{number}-{i}(?=\r\n)")
            seen += await terminal.see(PROMPT)
            terminal.resize(100 + number, 30 + number)
            # The keys may be there before the new size is.
            await terminal.type(f"until stty size | grep '^{30 + number} '; do :; done\r")
            seen += await terminal.see(rf"\r\n{30 + number} {100 + number}\r\n")
            seen += await terminal.see(PROMPT)
            others = [n for n in range(PEOPLE) if n != number and b"person%d-" % n in seen]
            assert others == []
            await terminal.type(f"(exit {100 + number})\r")
            await leave(terminal, 100 + number)
            assert b"person" not in await terminal.rest()

    async with trio.open_nursery() as nursery:
        for number in range(PEOPLE):
            nursery.start_soon(work, number)
