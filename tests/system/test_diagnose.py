"""What a machine tells of itself, and what it never does."""

import base64
from pathlib import Path

import trio

from initramfs.local_registry import LocalRegistry
from protocol import decode_value, requests, responses
from protocol.client import AgentClient, open_client
from protocol.machine import Diagnosis
from protocol.values import RegistryAuth
from tests.support.execution import execute, pull, refusal
from tests.support.images import Images
from tests.support.machine import Machine, booted
from tests.support.watch import until
from tests.support.wire import open_wire

SECRETS = [f"planted-secret-{number}" for number in range(10)]
MOST_BYTES = 256 << 10


async def diagnosis(client: AgentClient) -> Diagnosis:
    answer = await client.ask(requests.Diagnose(), responses.Ok)
    return decode_value(answer.data, Diagnosis)


async def test_all_parts_are_there(machine: Machine, client: AgentClient) -> None:
    await until(lambda: '"ready ' in machine.console_text(), machine.console)
    told = await diagnosis(client)
    assert told.versions is not None
    assert told.versions.python.startswith("3.13.")
    assert None not in (told.versions.crun, told.versions.erofs_utils, told.versions.image)
    steps = {each.name: each.at_ms for each in told.boot.steps}
    assert set(steps) >= {"agent", "serving", "services", "storage", "network"}
    assert list(steps.values()) == sorted(steps.values())
    assert steps["serving"] < told.boot.uptime_ms
    assert told.storage.ready
    assert (told.storage.directory, told.storage.device) == ("/storage", None)
    assert told.storage.total_bytes
    assert told.mounts is not None
    assert "/sys/fs/cgroup" in {each.path for each in told.mounts.points}
    assert told.network.ready
    assert told.network.interfaces is not None
    assert "lo" in {each.name for each in told.network.interfaces}
    assert told.cgroups is not None
    assert told.cgroups.descendants >= 6
    assert told.cgroups.workloads is not None
    assert told.agent is not None
    assert told.agent.pid > 1
    assert 10 < told.agent.descriptors < told.agent.descriptors_limit
    assert told.agent.resident_bytes > 20 << 20
    assert (told.pressure is None) == ("pressure" in {each.part for each in told.missing})


async def test_what_runs_and_who_is_connected_is_counted(
    machine: Machine, client: AgentClient
) -> None:
    before = await diagnosis(client)
    pid = int((await execute(client, "sleep", "1000", background=True)).stdout)
    async with open_client(machine.address) as other:
        assert isinstance(await other.request(requests.Ping()), responses.Pong)
        after = await diagnosis(client)
    assert (before.running, after.running) != (None, None)
    assert before.running is not None
    assert after.running is not None
    assert after.running.background == before.running.background + 1
    assert before.agent is not None
    assert after.agent is not None
    assert after.agent.connections == before.agent.connections + 1
    await execute(client, "kill", "-9", str(pid))


async def test_a_request_that_failed_is_remembered_with_its_trace_id(
    machine: Machine, client: AgentClient
) -> None:
    async with open_wire(machine.address) as wire:
        answer = await wire.ask("vm_exec", command=["/none/such"], trace_id="trace-of-a-failure")
        assert answer["code"] == "SPAWN_FAILED"
    (entry,) = (
        each for each in (await diagnosis(client)).log if each.trace_id == "trace-of-a-failure"
    )
    assert entry.message.startswith("vm_exec: SPAWN_FAILED: ")
    assert entry.target == "agent.session"


async def test_storage_that_cannot_be_had_is_told_with_its_cause(tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "oci").write_text("in the way")
    with booted(tmp_path) as machine:
        async with open_client(machine.address) as client:
            await client.request(requests.StorageStatus())
            told = await diagnosis(client)
    assert not told.storage.ready
    assert "open the images in /storage: " in str(told.storage.error)
    assert told.storage.total_bytes is None
    (error,) = (each for each in told.log if each.level == "error")
    assert error.message == f"storage: {told.storage.error}"


async def test_nothing_secret_of_any_request_is_in_an_answer(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    variable, argument, stdin, script, content, password, proxy, token, in_url, wrong = SECRETS
    token_file = tmp_path / "token"
    token_file.write_text(token * 2)
    image = images.busybox.reference
    with booted(
        tmp_path / "machine",
        insecure_registries=[registry.address],
        options=[f"--token-file={token_file}", "--append=innkeep.log=debug"],
    ) as machine:
        async with open_client(machine.address) as client:
            await pull(client, image)
            secret = {"env": (("SECRET", variable),), "stdin_data": stdin}
            words = ("sh", "-c", "sleep 1000", argument)
            background = await execute(client, *words, background=True, **secret)
            await refusal(client, requests.VmExec(command=("/none", argument), **secret))
            run = requests.Run(
                image=image,
                command=("/none", argument),
                remote_volume_mount=f"exit 1 # {script}",
                persistent_overlay_id="secrets",
                **secret,
            )
            assert isinstance(await client.request(run), responses.Error | responses.Completed)
            await refusal(
                client,
                requests.Pull(
                    image="127.0.0.1:1/none",
                    auth=RegistryAuth("user", password),
                    proxy=f"http://user:{proxy}@127.0.0.1:1",
                ),
            )
            await refusal(client, requests.FileWrite("/proc/none", content.encode()))
            url = f"http://user:{in_url}@127.0.0.1:1/"
            await client.request(requests.NetworkTest(url=url))
            async with open_wire(machine.address) as wire:
                await wire.ask("vm_exec", command="none", env=[["SECRET", wrong]])
            answers = [
                str((await client.request(request)).data)  # type: ignore[union-attr]
                for request in (requests.Diagnose(), requests.VmStats())
            ]
            pid = int(background.stdout)
            assert f"'pid': {pid}" in answers[1]
            assert "127.0.0.1:1" in answers[0]
        leaks = [
            secret
            for secret in SECRETS
            for form in (secret, base64.b64encode(secret.encode()).decode()[:-4])
            if any(form in answer for answer in answers)
        ]
        assert leaks == []
        assert all(len(answer) < MOST_BYTES for answer in answers)
        # A new agent knows the command by its number as well.
        served = machine.console_text().count("serving on")
        await trio.run_process(["kill", "-9", str(machine.agent_pid())])
        await until(lambda: machine.console_text().count("serving on") > served, machine.console)
        async with open_client(machine.address) as client:
            answer = await client.ask(requests.VmStats(), responses.Ok)
            assert f"'pid': {pid}" in str(answer.data)
