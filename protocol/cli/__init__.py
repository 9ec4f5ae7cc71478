"""``innkeep``, the host's command line; its libraries are the optional extra ``cli``."""

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
    sys.exit(run(sys.argv[1:]))
