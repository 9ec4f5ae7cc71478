"""The agent outside its image: a process like any other, which leaves the machine alone."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import trio

from protocol import requests, responses
from protocol.client import open_client
from tests.support.execution import execute, pull
from tests.support.images import Images
from tests.support.machine import PROJECT, Machine, agent_alone
from tests.support.tree import describe, differences


async def ping(agent: Machine) -> None:
    async with open_client(agent.address) as client:
        assert isinstance(await client.request(requests.Ping()), responses.Pong)


def run_agent(*options: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run it to its end, which comes by itself when it cannot serve."""
    argv = [sys.executable, "-m", "agent", *options]
    env = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)


async def test_it_serves_on_a_unix_socket(lone_agent: Machine) -> None:
    async with open_client(lone_agent.address) as client:
        assert isinstance(await client.request(requests.Ping()), responses.Pong)
        assert (await execute(client, "echo", "hello")).stdout == b"hello\n"


def test_its_mounts_are_seen_by_nobody_else(lone_agent: Machine, images: Images) -> None:
    merged = Path(trio.run(prepare_overlay, lone_agent, images.whiteouts.reference))
    inside = Path(f"/proc/{lone_agent.pid}/root") / merged.relative_to("/")
    assert differences(images.tree(images.whiteouts), describe(inside)) == []
    assert list(merged.iterdir()) == []
    assert str(lone_agent.storage) not in Path("/proc/self/mountinfo").read_text()


async def prepare_overlay(agent: Machine, image: str) -> str:
    """Pull an image and compose an overlay of it; where its root is mounted."""
    async with open_client(agent.address) as client:
        await pull(client, image)
        overlay = requests.PrepareOverlay(image=image, workload_id="alone")
        answer = await client.request(overlay)
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    return str(answer.data["rootfs_path"])


def test_an_address_that_the_agent_before_still_holds_is_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(tmp_path / "agent.sock"))
        held.listen()

        def let_go_when_asked() -> None:
            # It has found it taken when it connects for the second time.
            for _ in range(2):
                held.accept()[0].close()
            held.close()

        holder = Thread(target=let_go_when_asked)
        holder.start()
        with agent_alone(tmp_path) as agent:
            holder.join()
            trio.run(ping, agent)


def test_a_sigterm_ends_it_in_order(tmp_path: Path) -> None:
    with agent_alone(tmp_path) as agent:
        trio.run(ping, agent)
        os.kill(agent.pid, signal.SIGTERM)
        assert agent.wait() == 0


def test_a_socket_that_nobody_serves_any_more_is_replaced(tmp_path: Path) -> None:
    with agent_alone(tmp_path) as agent:
        os.kill(agent.pid, signal.SIGKILL)
        agent.wait()
    assert (tmp_path / "agent.sock").is_socket()
    with agent_alone(tmp_path) as agent:
        trio.run(ping, agent)


def test_a_socket_that_another_agent_serves_is_left_to_it(
    lone_agent: Machine, tmp_path: Path
) -> None:
    listen = f"--listen={lone_agent.address}"
    done = run_agent(listen, "--storage=storage", "--run-dir=run", cwd=tmp_path)
    assert done.returncode == 2
    assert lone_agent.address in done.stderr
    assert "in use" in done.stderr
    trio.run(ping, lone_agent)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--listen=tcp:80", "--storage=x", "--run-dir=x"], "tcp:80"),
        (["--listen=unix:here"], "--storage"),
        (["--listen=unix:here", "--storage=x", "--run-dir=x", "--wat"], "--wat"),
        (["--listen=unix:no/where", "--storage=x", "--run-dir=x"], "no/where"),
    ],
)
def test_arguments_that_mean_nothing_are_named(
    options: list[str], named: str, tmp_path: Path
) -> None:
    done = run_agent(*options, cwd=tmp_path)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
