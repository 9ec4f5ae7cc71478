"""``innkeep``, the host's command line; its libraries are the optional extra ``cli``."""

import signal
import sys

_EXTRA = ("rich", "typer")


def main() -> None:
    """Run the command line and exit with its exit code."""
    try:
        from protocol.cli.app import run
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRA:
            raise
        sys.exit(f"innkeep: {library} is not installed; run: pip install innkeep[cli]")
    code = run(sys.argv[1:])
    # All is done and said. An interrupt that comes now ends us as it ends any program, and not
    # with a traceback out of the interpreter's own end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)
