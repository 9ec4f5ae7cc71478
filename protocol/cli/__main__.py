"""``python -m protocol.cli``."""

from protocol.cli import main

main()
