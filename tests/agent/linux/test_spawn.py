"""Starting a program: what it is given, what it is not, and what is said when it cannot start."""

import errno
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.linux.spawn import posix_spawn
from tests.support.process_tree import children


def output_of(
    path: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: str = "/",
    cgroup: Path | None = None,
) -> str:
    """What the program writes to stdout; it has ended and is reaped."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reading) as output:
        try:
            pid = posix_spawn(
                path, argv, env, cwd=cwd, stdio=(None, writing, writing), cgroup=cgroup
            )
        finally:
            os.close(writing)
        text = output.read()
    os.waitpid(pid, 0)
    return text


def refusal(
    path: str, *, argv: Sequence[str] = ("x",), cwd: str = "/", cgroup: Path | None = None
) -> int:
    """The errno that starting a program raises."""
    with pytest.raises(OSError) as raised:  # noqa: PT011 the number is what each caller looks at
        output_of(path, argv, {}, cwd=cwd, cgroup=cgroup)
    assert raised.value.errno is not None
    return raised.value.errno


@pytest.fixture(params=["in a cgroup", "in no cgroup"])
def home(request: pytest.FixtureRequest, cgroup: Path) -> Path | None:
    """Where a program is started: everything below holds for both."""
    return cgroup if request.param == "in a cgroup" else None


async def test_a_program_gets_its_words_exactly(home: Path | None) -> None:
    words = ["", "two words", "é", "$HOME\n"]
    text = output_of("/bin/sh", ["-", "-c", 'printf "%s|" "$@"', "zero", *words], {}, cgroup=home)
    assert text.split("|") == [*words, ""]
    first = output_of("/bin/cat", ["a name", "/proc/self/cmdline"], {}, cgroup=home)
    assert first == "a name\0/proc/self/cmdline\0"


async def test_a_program_gets_its_environment_exactly(home: Path | None) -> None:
    env = {"B": "2=3", "A": "", "odd.name": "ö\n", "LC_ALL": "no_such.LOCALE", "PYTHONHOME": "/"}
    text = output_of("/bin/cat", ["cat", "/proc/self/environ"], env, cgroup=home)
    assert set(text.removesuffix("\0").split("\0")) == {
        f"{name}={value}" for name, value in env.items()
    }


async def test_it_starts_where_it_is_told(home: Path | None, tmp_path: Path) -> None:
    assert output_of("/bin/pwd", ["pwd"], {}, cwd=str(tmp_path), cgroup=home) == f"{tmp_path}\n"


async def test_a_relative_path_is_below_its_directory(home: Path | None, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho $0\n")
    script.chmod(0o755)
    assert output_of("./script", ["x"], {}, cwd=str(tmp_path), cgroup=home) == "./script\n"


async def test_it_has_no_descriptors_but_its_three(home: Path | None) -> None:
    with open_inheritable("/dev/zero"):
        text = output_of("/bin/sh", ["sh", "-c", "echo /proc/self/fd/*"], {}, cgroup=home)
    numbers = {path.rpartition("/")[2] for path in text.split()}
    # The shell lists the directory itself, through the lowest free descriptor.
    assert numbers == {"0", "1", "2", "3"}


@contextmanager
def open_inheritable(path: str) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    try:
        yield
    finally:
        os.close(descriptor)


async def test_its_stdin_is_dev_null_unless_given(home: Path | None) -> None:
    argv = ["readlink", "/proc/self/fd/0"]
    assert output_of("/bin/readlink", argv, {}, cgroup=home) == "/dev/null\n"


async def test_its_signals_are_as_the_kernel_makes_them(home: Path | None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN  # CPython's doing
    try:
        status = output_of("/bin/cat", ["cat", "/proc/self/status"], {}, cgroup=home)
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert int(fields["SigIgn"], 16) == 0
    assert int(fields["SigBlk"], 16) == 0


async def test_it_leads_a_session_of_its_own(home: Path | None) -> None:
    pid, session = output_of(
        "/bin/sh", ["sh", "-c", "echo $$; cut -d' ' -f6 /proc/self/stat"], {}, cgroup=home
    ).split()
    assert pid == session


async def test_it_is_born_in_its_cgroup(cgroup: Path) -> None:
    text = output_of("/bin/cat", ["cat", "/proc/self/cgroup"], {}, cgroup=cgroup)
    (unified,) = (line for line in text.splitlines() if line.startswith("0::"))
    assert unified.endswith(f"/{cgroup.name}")


async def test_what_exec_says_comes_back(home: Path | None, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello\n")
    assert refusal(str(tmp_path / "nothing"), cgroup=home) == errno.ENOENT
    assert refusal(str(text), cgroup=home) == errno.EACCES
    text.chmod(0o755)
    assert refusal(str(text), cgroup=home) == errno.ENOEXEC
    text.write_text("#!/no/such/interpreter\n")
    assert refusal(str(text), cgroup=home) == errno.ENOENT
    assert refusal("/bin/true", cwd=str(tmp_path / "nowhere"), cgroup=home) == errno.ENOENT
    assert refusal("/bin/true", cwd=str(text), cgroup=home) == errno.ENOTDIR
    huge = "x" * 1024 * 1024
    assert refusal("/bin/true", argv=["true", huge], cgroup=home) == errno.E2BIG


async def test_a_failed_start_leaves_nothing(home: Path | None) -> None:
    before = open_files(), children(os.getpid())
    assert refusal("/no/such/program", cgroup=home) == errno.ENOENT
    assert (open_files(), children(os.getpid())) == before


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize(
    ("path", "argv", "env", "cwd"),
    [
        ("/bin/tr\0ue", ["true"], {}, "/"),
        ("/bin/true", ["tr\0ue"], {}, "/"),
        ("/bin/true", ["true"], {"A": "\0"}, "/"),
        ("/bin/true", ["true"], {}, "/\0"),
    ],
)
async def test_a_nul_byte_is_refused_and_not_a_shorter_string_used(
    path: str, argv: list[str], env: dict[str, str], cwd: str, home: Path | None
) -> None:
    with pytest.raises(ValueError, match="NUL"):
        output_of(path, argv, env, cwd=cwd, cgroup=home)
