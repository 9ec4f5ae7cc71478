"""vi on a terminal: it draws, and draws anew when the window grows."""

from tests.protocol.terminal import Terminal


async def edit(terminal: Terminal) -> None:
    """Put a line between the two of a new /tmp/file, at a shell's prompt; vi is left open."""
    await terminal.type("printf 'first\\nsecond\\n' >/tmp/file; vi /tmp/file\r")
    screen = await terminal.see(r"/tmp/file 1/2 50%")
    assert b"first" in screen
    # 24 lines without the two of the file, and without the last, which tells its name.
    assert screen.count(b"~") == 21
    terminal.resize(100, 30)
    await terminal.see(r"\x1b\[29;1H~")
    await terminal.see(r"/tmp/file 1/2 50%")
    await terminal.type("oin between")
    await terminal.see("in between")
    # Alone, as by hand: what follows it at once is taken for the rest of a function key.
    await terminal.type("\x1b")
    await terminal.see(r"- /tmp/file \[Modified\] 2/3 66%")
