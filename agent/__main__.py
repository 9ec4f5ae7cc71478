"""Start the agent: bind and listen first; import, configure and serve afterwards.

A host's connect must be queued and never refused, so the socket listens within milliseconds of
exec, and everything heavy (trio, cattrs, argparse, even the socket module) is imported later.
"""

import _socket  # the socket module itself costs several milliseconds under emulation
import errno
import gc
import os
import sys
import time

from agent.bootwords import DEFAULT_LISTEN, kernel_words, listen_argument, variable_of

# Hosts probe a booting VM every 20 ms, each time on a connection of its own.
BACKLOG = 512

# A child that a killed agent was about to have execute something has its sockets until it does, or
# until init has ended it. No event tells when an address is free.
PATIENCE_S = 5.0
PAUSE_S = 0.02
# It lets go of all of them at once, and what else has a port of the workload's is not waited for.
WORKLOAD_PATIENCE_S = 0.5

# protocol.constants.Port, which takes too long to import here.
WORKLOAD_PORTS = (5000, 5001)


def bind(address: str, patience_s: float = PATIENCE_S) -> _socket.socket:
    """A listening socket at ``unix:PATH`` or ``vsock:PORT`` (any CID of this machine).

    A stale unix socket is replaced, a live one is not. An address that is taken is waited for, for
    ``patience_s`` at most.

    Raises:
        ValueError: an address of another form.
        OSError: the address is taken, or the machine has no vsock.
    """
    until = time.monotonic() + patience_s
    while True:
        try:
            return _bound(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                raise
        time.sleep(PAUSE_S)


def _bound(address: str) -> _socket.socket:
    kind, _, where = address.partition(":")
    if kind == "unix" and where:
        listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        if os.path.exists(where):
            _remove_if_stale(where)
        listener.bind(where)
    elif kind == "vsock" and where.isdigit():
        listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
        listener.bind((_socket.VMADDR_CID_ANY, int(where)))
    else:
        raise ValueError("expected unix:PATH or vsock:PORT")
    listener.listen(BACKLOG)
    return listener


def bind_workload(address: str) -> tuple[list[_socket.socket], list[str]]:
    """The listeners beside ``address`` for the workload's control and log, and their addresses.

    On vsock they have ports of their own; a unix socket's are its path with ``_`` and that number
    behind it, as VMMs name the sockets of a guest's ports. Where there can be none, there are none.
    """
    kind, _, where = address.partition(":")
    listeners: list[_socket.socket] = []
    addresses: list[str] = []
    for port in WORKLOAD_PORTS:
        beside = f"unix:{where}_{port}" if kind == "unix" else f"vsock:{port}"
        try:
            listeners.append(bind(beside, WORKLOAD_PATIENCE_S))
        except (OSError, ValueError) as error:
            # Nobody needs them whom the agent's own port would not serve.
            print(f"innkeep: listen on {beside}: {error}", file=sys.stderr)
            for listener, bound in zip(listeners, addresses, strict=True):
                listener.close()
                remove(bound)
            return [], []
        addresses.append(beside)
    return listeners, addresses


def _remove_if_stale(path: str) -> None:
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    finally:
        probe.close()


def remove(address: str) -> None:
    """Take the name of a unix socket of ours away again; on vsock there is none."""
    kind, _, where = address.partition(":")
    if kind == "unix":
        os.unlink(where)


def main() -> int:
    """Serve until a shutdown request, or a signal to end. The exit status is for init:
    0 powers the machine off, anything else starts the agent again."""
    argv = sys.argv[1:]
    with open("/proc/cmdline", encoding="utf-8", errors="replace") as file:
        cmdline = file.read()
    words = kernel_words(os.environ.get("INNKEEP_CMDLINE", cmdline))
    told = words.get("listen", os.environ.get(variable_of("listen"))) or DEFAULT_LISTEN
    address = listen_argument(argv) if argv else told
    if address is None:
        # Nothing to listen on: the arguments' parser says what is missing, or prints its help.
        return serve(None, cmdline, argv, [], 0.0)
    try:
        listener = bind(address)
    except (OSError, ValueError) as error:
        print(f"innkeep: listen on {address}: {error}", file=sys.stderr)
        return 2
    listening_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    more, addresses = bind_workload(address)
    try:
        return serve(listener, cmdline, argv, more, listening_s)
    finally:
        for bound in (address, *addresses):
            remove(bound)


def serve(
    listener: _socket.socket | None,
    cmdline: str,
    argv: list[str],
    workload_listeners: list[_socket.socket],
    listening_s: float,
) -> int:
    """Read the whole configuration, and serve on the listeners, which are closed in the end.

    ``listening_s`` is when they listened, in seconds after boot."""
    # What is imported stays: collecting among it costs a tenth of the start.
    gc.disable()
    from agent.config import AgentConfig
    from agent.config_values import ConfigError

    try:
        config = AgentConfig.from_boot(cmdline, os.environ, argv)
    except ConfigError as error:
        print(f"innkeep: {error}", file=sys.stderr)
        return 2
    assert listener is not None  # without --listen the parser has exited
    steps = {"listening": listening_s, "config": time.clock_gettime(time.CLOCK_BOOTTIME)}

    import socket
    from contextlib import ExitStack

    from agent.lifetime import run

    gc.freeze()
    gc.enable()
    with ExitStack() as stack:
        first, *others = (
            stack.enter_context(socket.socket(fileno=each.detach()))
            for each in (listener, *workload_listeners)
        )
        return run(first, others, config, steps)


if __name__ == "__main__":
    sys.exit(main())
