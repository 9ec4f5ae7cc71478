"""`make run`, without the VM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.images import Images
from tests.support.machine import PROJECT

DEMO = [sys.executable, "-m", "initramfs.demo", "--machine=namespaces"]


def demo(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*DEMO, *words], cwd=PROJECT, capture_output=True, text=True, check=False)


def test_it_shows_a_container_and_the_times_of_all_steps() -> None:
    done = demo()
    assert (done.returncode, done.stderr) == (0, "")
    assert "Hello from a container" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("==> ")] != []
    assert done.stdout.count(" s\n") >= 5


def test_its_exit_status_is_the_commands() -> None:
    assert demo("--", "sh", "-c", "exit 7").returncode == 7


def test_any_image_will_do(images: Images) -> None:
    done = demo("--image", images.configured.reference)
    assert done.returncode == 0
    assert "default arguments" in done.stdout


def test_an_image_that_cannot_be_pulled_is_one_line_on_stderr() -> None:
    done = demo("--image", "localhost:1/absent")
    assert done.returncode == 1
    assert "localhost:1" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    with subprocess.Popen(
        [*DEMO, "--", "sleep", "1000"],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "A container runs" in line:
                break
        os.killpg(process.pid, number)
        _, said = process.communicate()
    assert process.returncode == 130
    assert "stopped" in said
    assert list(tmp_path.iterdir()) == []
