"""``innkeep diagnose`` and ``innkeep stats``: for people, and for programs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import asdict, evolve

from protocol import AgentResponse, requests, responses
from protocol import machine as of
from tests.protocol.command_line import PROJECT, with_answers
from tests.protocol.fake_agent import Script, serving

STALL = of.Stall(avg10=1.5, avg60=0.25, avg300=0.0, total_us=9)
PRESSURE = of.Pressure(*[of.ResourcePressure(STALL, None)] * 3)
# What no controller counts, outside a VM.
NO_USE: dict[str, Any] = dict.fromkeys(of.CgroupUse.__annotations__)
WORKLOADS = of.CgroupUse(
    cpu_us=1_000_000,
    user_us=600_000,
    system_us=400_000,
    memory_bytes=100_000_000,
    memory_peak_bytes=200_000_000,
    memory_limit_bytes=800_000_000,
    swap_bytes=0,
    pids=12,
    pids_limit=1867,
    read_bytes=1_500_000,
    written_bytes=0,
    oom_kills=1,
)
WEB = of.ContainerUse(**asdict(WORKLOADS), id="ab" * 16, overlay="web", pid=101, program="httpd")
JOINED = of.CommandUse(**asdict(WORKLOADS), pid=102, container="ab" * 16, program="tail")
LOOSE = of.CommandUse(**{**NO_USE, "cpu_us": 5}, pid=7, container=None, program=None)


def stats(uptime_ms: int, cpu_us: int) -> of.VmStats:
    used = evolve(WORKLOADS, cpu_us=cpu_us)
    return of.VmStats(
        uptime_ms=uptime_ms,
        cpu=of.CpuUse(
            count=2,
            usage_us=cpu_us,
            user_us=cpu_us,
            system_us=0,
            iowait_us=0,
            steal_us=0,
            load1=0.5,
            load5=0.25,
            load15=0.0,
        ),
        memory=of.MemoryUse(
            total_bytes=1_000_000_000,
            available_bytes=700_000_000,
            free_bytes=600_000_000,
            cache_bytes=90_000_000,
            swap_total_bytes=0,
            swap_free_bytes=0,
        ),
        io=of.IoUse(read_bytes=0, written_bytes=0, reads=0, writes=0),
        network=(
            of.InterfaceUse(
                name="eth0",
                received_bytes=uptime_ms * 2,
                received_packets=1,
                received_dropped=0,
                received_errors=0,
                sent_bytes=uptime_ms,
                sent_packets=1,
                sent_dropped=0,
                sent_errors=0,
            ),
        ),
        pressure=PRESSURE,
        oom_kills=1,
        workloads=used,
        agent=None,
        containers=(evolve(WEB, cpu_us=cpu_us),),
        commands=(LOOSE, JOINED),
        left_out=3,
        missing=(of.Missing("agent", "the agent runs outside its image"),),
    )


BEFORE, AFTER = stats(10_000, 1_000_000), stats(12_000, 2_000_000)
TABLE = """\
cpu 50.0% of 200%, load 0.50 0.25 0.00, waiting in the last 10 s for cpu 1.5%, memory 1.5%, io 1.5%
memory 300.0MB of 1.0GB, 90.0MB of files, 1 killed for it
network 2.0kB/s in, 1.0kB/s out
3 more containers and commands are not shown
ID           NAME            PROGRAM CPU % MEM USAGE / LIMIT MEM % BLOCK I/O  PIDS
abababababab web             httpd   50.0% 100.0MB / 800.0MB 12.5% 1.5MB / 0B 12
102          in abababababab tail    0.0%  100.0MB / 800.0MB 12.5% 1.5MB / 0B 12
7            in the VM       -       0.0%  - / -             -     - / -      -
-            workloads       -       50.0% 100.0MB / 800.0MB 12.5% 1.5MB / 0B 12
"""


def words(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


async def test_stats_are_shares_of_the_time_between_two_answers(tmp_path: Path) -> None:
    answers = {requests.VmStats: [[responses.Ok(BEFORE)], [responses.Ok(AFTER)]]}
    result, asked = await with_answers(tmp_path / "socket", answers, "stats", "--no-stream")
    assert words(result.stdout.decode()) == words(TABLE)
    assert asked == [requests.VmStats()] * 2
    assert result.returncode == 0


async def test_programs_get_one_answer_as_it_came(tmp_path: Path) -> None:
    answers = {requests.VmStats: [[responses.Ok(BEFORE)]]}
    result, asked = await with_answers(
        tmp_path / "socket", answers, "--json", "stats", "--no-stream"
    )
    assert json.loads(result.stdout)["containers"][0]["overlay"] == "web"
    assert len(asked) == 1


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["people", "programs"])
async def test_they_are_shown_again_and_again_until_they_are_interrupted(
    tmp_path: Path, options: list[str]
) -> None:
    script = Script({requests.VmStats: [[responses.Ok(BEFORE)], [responses.Ok(AFTER)]]})
    async with serving(tmp_path / "socket", script) as address:
        argv = [sys.executable, "-m", "protocol.cli", "--connect", address, *options, "stats"]
        async with trio.open_nursery() as nursery:
            process = await nursery.start(_run, argv)
            shown = b""
            mark = b'"uptime_ms": 12000' if options else b"workloads"
            while shown.count(mark) < 2:
                shown += await process.stdout.receive_some(65536)
            process.send_signal(signal.SIGINT)
            assert await process.wait() == 130


async def _run(argv: list[str], task_status: Any) -> None:
    # A signal that whoever started the tests ignores is ignored by what they start, too.
    process = await trio.lowlevel.open_process(
        argv, stdout=subprocess.PIPE, cwd=PROJECT, env={**os.environ, "COLUMNS": "200"}
    )
    task_status.started(process)
    await process.wait()


DIAGNOSIS = of.Diagnosis(
    time="2026-01-01T00:00:00.000Z",
    took_ms=12,
    versions=of.Versions(
        agent="0.1.0",
        protocol=1,
        python="3.13.5",
        kernel="6.12.0",
        crun="1.21-1",
        erofs_utils=None,
        image="ab" * 32,
    ),
    boot=of.Boot(uptime_ms=61_000, steps=(of.BootStep("agent", 810), of.BootStep("ready", 1213))),
    storage=of.StorageCondition(
        ready=False,
        error="mount /dev/vda: it holds LUKS",
        directory="/storage",
        device="/dev/vda",
        in_memory=False,
        total_bytes=None,
        used_bytes=None,
        free_bytes=None,
    ),
    disks=(of.DiskDevice(name="vda", size_bytes=10_000_000_000, read_only=True),),
    mounts=of.Mounts(
        points=(of.MountPoint(path="/", source="root", kind="overlay", options="rw"),), left_out=7
    ),
    network=of.NetworkCondition(
        ready=False,
        error="configure the network: no interface",
        problems=("eth0: mtu 1: too small",),
        interfaces=(
            of.Interface(
                name="eth0",
                up=True,
                carrier=False,
                mac="02:00:00:00:00:01",
                mtu=1500,
                addresses=("192.0.2.1/24",),
            ),
        ),
        routes=(
            of.Route(destination="0.0.0.0/0", gateway="192.0.2.254", interface="eth0", metric=0),
        ),
        resolv_conf="# made by hand\nnameserver 192.0.2.53\n",
    ),
    cgroups=of.Cgroups(
        controllers=("cpu", "memory"),
        descendants=9,
        dying=1,
        workloads=WORKLOADS,
        workloads_memory_events=None,
        agent=None,
        agent_memory_events=None,
    ),
    pressure=PRESSURE,
    oom_kills=2,
    agent=of.AgentCondition(
        pid=30,
        cpu_us=1_500_000,
        resident_bytes=40_000_000,
        descriptors=19,
        descriptors_limit=1024,
        threads=7,
        tasks=20,
        connections=3,
        oom_score_adj=-1000,
    ),
    running=of.Running(commands=4, background=3, containers=2, standing=1),
    log=(
        of.LogEntry(
            ts="2026-01-01T00:00:00.000Z",
            level="error",
            target="agent.services",
            message="storage: [bold]it[/bold] holds LUKS",
            trace_id="t1",
        ),
    ),
    missing=(of.Missing("versions.erofs_utils", "No such file or directory"),),
)
TOLD = """\
versions
  innkeep 0.1.0, protocol 1
  Linux 6.12.0, Python 3.13.5, crun 1.21-1
  image abababababab
boot
  up for 61 s, at 2026-01-01T00:00:00.000Z
  agent 0.810 s, ready 1.213 s
storage
  not ready: /dev/vda at /storage
  mount /dev/vda: it holds LUKS
disks
  vda 10.0 GB, read-only
network
  not ready: configure the network: no interface
  eth0 up, no carrier, 02:00:00:00:00:01, mtu 1500 192.0.2.1/24
  0.0.0.0/0 via 192.0.2.254 on eth0
  nameserver 192.0.2.53
mounts
  / overlay root rw
  and 7 more
load
  waiting for cpu: some 1.5% of 10 s, 0.2% of 60 s
  waiting for memory: some 1.5% of 10 s, 0.2% of 60 s
  waiting for io: some 1.5% of 10 s, 0.2% of 60 s
  2 processes killed for memory since boot
  4 commands in the VM, 3 in the background; 2 containers, 1 that stay
  9 cgroups, 1 that are going
  workloads: 100.0 MB of 800.0 MB memory (at most 200.0 MB), 12 of 1867 processes
agent
  process 30: 40.0 MB resident, 1.5 s of processor time
  19 of 1024 descriptors, 7 threads, 20 tasks, 3 connections
last failures
  2026-01-01T00:00:00.000Z error storage: [bold]it[/bold] holds LUKS (trace t1)
not known
  versions.erofs_utils: No such file or directory
"""


async def test_a_diagnosis_is_told_part_by_part(tmp_path: Path) -> None:
    answers = {requests.Diagnose: [[responses.Ok(DIAGNOSIS)]]}
    result, asked = await with_answers(tmp_path / "socket", answers, "diagnose")
    assert result.stdout.decode() == TOLD
    assert asked == [requests.Diagnose()]


async def test_parts_that_could_not_be_told_are_passed_over(tmp_path: Path) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ("versions", "disks", "mounts", "cgroups", "pressure", "oom_kills", "agent", "running")
    )
    network = evolve(DIAGNOSIS.network, interfaces=None, routes=None, resolv_conf=None)
    told = evolve(DIAGNOSIS, **nothing, network=network, log=())
    answers = {requests.Diagnose: [[responses.Ok(told)]]}
    result, _ = await with_answers(tmp_path / "socket", answers, "diagnose")
    headings = [line for line in result.stdout.decode().splitlines() if line[0] != " "]
    assert headings == ["boot", "storage", "network", "not known"]
    assert result.returncode == 0


async def test_programs_get_the_diagnosis_as_it_came(tmp_path: Path) -> None:
    answers: dict[Any, list[list[AgentResponse]]] = {requests.Diagnose: [[responses.Ok(DIAGNOSIS)]]}
    result, _ = await with_answers(tmp_path / "socket", answers, "--json", "diagnose")
    assert json.loads(result.stdout)["storage"]["error"] == "mount /dev/vda: it holds LUKS"
