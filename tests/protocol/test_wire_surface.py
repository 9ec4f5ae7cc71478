"""What hosts can see of the protocol does not change by accident."""

import subprocess
import sys

import protocol
from tests.protocol.surface import FROZEN, REFERENCE, reference, write


def test_the_wire_surface_is_the_frozen_one() -> None:
    # A change on purpose is written by: python -m tests.protocol.surface
    assert write() == FROZEN.read_text()


def test_the_documentation_tells_every_message_and_field() -> None:
    # Written by the same command.
    assert reference() == REFERENCE.read_text()


def test_everything_promised_is_exported() -> None:
    for name in protocol.__all__:
        assert getattr(protocol, name) is not None


def test_the_codec_brings_nothing_along_that_the_agents_start_would_pay_for() -> None:
    script = "import sys, protocol, protocol.retry; print(*sys.modules, sep='\\n')"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = {name.partition(".")[0] for name in result.stdout.split()}
    assert loaded.isdisjoint({"trio", "typer", "rich", "asyncio", "ssl", "requests", "oras"})
    assert "protocol.workload" not in result.stdout.split()
