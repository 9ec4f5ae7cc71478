"""An agent that is killed between a command's start and the moment that it is known: by strace(1),
at a system call of a real one. Whatever the command was to be, the next agent ends it."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from agent.processes.cgroup import Cgroup, CgroupTree
from agent.processes.service import open_processes
from tests.support.commands import find_program
from tests.support.machine import PROJECT
from tests.support.watch import until

pytestmark = pytest.mark.timeout(60)

# It protects itself as far as that takes no privilege: children have 7 more than it.
AGENT = """
import sys
from pathlib import Path

import trio

from agent.processes.command import Command
from agent.processes.oom_protection import OomProtection
from agent.processes.process import Stdio
from agent.processes.service import open_processes

own = int(Path("/proc/self/oom_score_adj").read_text())

async def serve():
    cgroups, logs = map(Path, sys.argv[1:3])
    with OomProtection.held(own, own + 7) as protection:
        async with open_processes(cgroups, logs, protection=protection) as it:
            print("serving", flush=True)
            sys.stdin.readline()
            command = Command.from_request(("sleep", "1000"))
            if sys.argv[3] == "foreground":
                await it.execute(command)
            elif sys.argv[3] == "background":
                await it.start_background(command)
            else:
                await it.start_kept(command, Stdio(), record=print, pid_of=lambda process: None)

trio.run(serve)
"""

# Of the thread that starts it: it is stopped, changed, and continued.
BEFORE_IT_GOES_ON = "inject=kill:error=EPERM:signal=SIGKILL:when=2"


@contextmanager
def agent_to_be_killed(*words: str) -> Iterator["subprocess.Popen[bytes]"]:
    """One that starts its command when it is told to, and is killed then."""
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, *words],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as agent:
        try:
            assert agent.stdout is not None
            assert agent.stdout.readline() == b"serving\n"
            # The command itself is let go when it is executed.
            strace = [find_program("strace"), "-f", "--detach-on=execve", "-p", str(agent.pid)]
            with subprocess.Popen(
                [*strace, "-o", "/dev/null", "-e", "trace=kill,execve", "-e", BEFORE_IT_GOES_ON],
                stderr=subprocess.PIPE,
            ) as tracer:
                try:
                    assert tracer.stderr is not None
                    assert b"attached" in tracer.stderr.readline()
                    yield agent
                finally:
                    tracer.kill()
        finally:
            agent.kill()


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("kind", ["foreground", "background", "kept"])
async def test_a_command_that_a_dead_agent_has_stopped_is_ended_by_the_next_one(
    kind: str, cgroup_root: Path, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    with agent_to_be_killed(str(cgroup_root), str(logs), kind) as agent:
        assert agent.stdin is not None
        agent.stdin.write(b"go on\n")
        agent.stdin.flush()
        assert await trio.to_thread.run_sync(agent.wait) == -9
    tree = CgroupTree.open(cgroup_root)
    (cgroup,) = Cgroup.all_in(tree.commands)
    (pid,) = cgroup.pids()
    assert "State:\tT (stopped)" in status(pid)
    async with open_processes(cgroup_root, logs):
        await until(lambda: Cgroup.all_in(tree.commands) == [], tree.commands)
    assert cgroup.pids() == []
