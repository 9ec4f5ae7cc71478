"""Telling, from a container's files, why the kernel will not execute a program of it."""

import errno
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.processes.executable import Opener, explain_refusal, unrunnable
from agent.processes.rootfs import Rootfs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in ("bin", "usr/bin", "srv"):
        (tmp_path / directory).mkdir(parents=True)
    return tmp_path


@pytest.fixture
def opener(root: Path) -> Iterator[Opener]:
    with Rootfs.opened(root) as files:
        yield files.open


def write(path: Path, content: str | bytes, mode: int = 0o755) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)


def told(opener: Opener, *argv: str, path: str = "/bin:/usr/bin", directory: str = "/") -> str:
    """Why a command will not run; "" if it may."""
    return unrunnable(argv, {"PATH": path}, directory, opener) or ""


def test_a_program_and_a_script_with_its_interpreter_may_run(root: Path, opener: Opener) -> None:
    shutil.copy("/bin/busybox", root / "bin" / "sh")
    write(root / "bin" / "script", "#!/bin/sh -e\n")
    write(root / "bin" / "of-script", "#! /bin/script\n")
    for name in ("sh", "script", "of-script", "/bin/script"):
        assert told(opener, name) == ""


def test_what_is_not_found_or_not_executable_is_left_to_the_runtime(
    root: Path, opener: Opener
) -> None:
    write(root / "bin" / "data", "#!/no/such/shell\n", mode=0o644)
    for name in ("absent", "/absent", "data", "/bin", "", "/bin/data/below"):
        assert told(opener, name) == ""


def test_a_missing_interpreter_is_named(root: Path, opener: Opener) -> None:
    write(root / "bin" / "script", "#!/no/such/shell -e\n")
    expected = "/bin/script: bad interpreter: '/no/such/shell': No such file or directory"
    assert told(opener, "script") == expected
    assert told(opener, "/bin/script") == expected
    write(root / "bin" / "of-script", "#!/bin/script\n")
    assert "bad interpreter: '/no/such/shell'" in told(opener, "of-script")


def test_an_interpreter_that_cannot_be_executed_is_named(root: Path, opener: Opener) -> None:
    write(root / "bin" / "data", "data", mode=0o644)
    write(root / "bin" / "script", "#!/bin/data\n")
    assert told(opener, "script") == "/bin/script: bad interpreter: '/bin/data': not executable"


def test_scripts_that_interpret_one_another_have_an_end(root: Path, opener: Opener) -> None:
    write(root / "bin" / "one", "#!/bin/two\n")
    write(root / "bin" / "two", "#!/bin/one\n")
    assert "too many scripts" in told(opener, "one")


def test_a_program_without_its_dynamic_linker_is_told(root: Path, opener: Opener) -> None:
    program = Path("/bin/true").read_bytes()
    write(root / "bin" / "true", program)
    assert "bad interpreter" in told(opener, "true")
    assert "ld-linux" in told(opener, "true")


def test_a_file_of_no_known_format_is_told(root: Path, opener: Opener) -> None:
    for content in ("echo no first line\n", ""):
        write(root / "bin" / "file", content)
        assert "exec format error" in told(opener, "file")


def test_the_first_executable_file_on_the_path_decides(root: Path, opener: Opener) -> None:
    write(root / "bin" / "tool", "#!/no/such/shell\n", mode=0o644)
    shutil.copy("/bin/busybox", root / "usr" / "bin" / "tool")
    assert told(opener, "tool") == ""
    (root / "bin" / "tool").chmod(0o755)
    assert "bad interpreter" in told(opener, "tool")
    assert told(opener, "tool", path="/usr/bin:/bin") == ""


def test_a_path_with_a_slash_is_taken_from_the_workdir(root: Path, opener: Opener) -> None:
    write(root / "srv" / "script", "#!/no/such/shell\n")
    assert "bad interpreter" in told(opener, "./script", directory="/srv")
    assert told(opener, "./script", directory="/") == ""
    assert "bad interpreter" in told(opener, "script", path=":/bin", directory="/srv")


def test_links_lead_nowhere_but_inside(root: Path, opener: Opener, tmp_path: Path) -> None:
    (root / "bin" / "outside").symlink_to("/bin/busybox")
    assert told(opener, "outside") == ""  # dangling there, whatever there is here
    write(root / "bin" / "script", "#!/no/such/shell\n")
    (root / "bin" / "link").symlink_to("../../../../bin/script")
    assert "bad interpreter" in told(opener, "link")


def test_a_fifo_or_a_device_in_the_place_of_a_program_is_passed_over(
    root: Path, opener: Opener
) -> None:
    os.mkfifo(root / "bin" / "fifo", 0o755)
    os.mknod(root / "bin" / "null", 0o755 | 0o020000, os.makedev(1, 3))
    assert told(opener, "fifo") == ""
    assert told(opener, "null") == ""


def test_headers_that_lie_are_told_as_what_they_are(root: Path, opener: Opener) -> None:
    write(root / "bin" / "liar", b"\x7fELF\x02\x01" + b"\xff" * 58)
    write(root / "bin" / "stub", b"\x7fELF\x02\x01")
    for name in ("liar", "stub"):
        assert told(opener, name).startswith(f"/bin/{name}: exec format error")
    # One that is far away is none.
    header = struct.pack("<6s26xQ14xHH4x", b"\x7fELF\x02\x01", 64, 56, 1)
    interpreter = struct.pack("<I4xQ16xQ16x", 3, 2**64 - 1, 16)
    write(root / "bin" / "far", header.ljust(64, b"\0") + interpreter)
    assert "bad interpreter" in told(opener, "far")
    write(root / "bin" / "bare", "#!\n")
    assert "bad interpreter" not in told(opener, "bare")


def test_other_refusals_are_told_in_the_kernels_words(opener: Opener) -> None:
    assert explain_refusal("/bin/x", errno.E2BIG, opener) == "Argument list too long"
    assert explain_refusal("/bin/absent", errno.ENOENT, opener) == "No such file or directory"
