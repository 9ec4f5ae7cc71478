"""What a host is told of a boot configuration with a mistake in it, without the console."""

from pathlib import Path

import trio

from initramfs.local_registry import LocalRegistry
from protocol import decode_value, requests, responses
from protocol.client import open_client
from protocol.errors import ErrorCode
from protocol.machine import Diagnosis
from tests.support.execution import execute, pull
from tests.support.images import Images
from tests.support.machine import booted
from tests.support.mirrors import mirrored


async def test_a_misspelt_word_is_told_with_every_pong_and_the_rest_works(tmp_path: Path) -> None:
    with booted(tmp_path, options=["--append=innkeep.comand_pids=64"]) as machine:
        async with open_client(machine.address) as client:
            pong = await client.ask(requests.Ping(), responses.Pong)
            (told,) = pong.config_errors
            assert "innkeep.comand_pids: there is no such setting" in told
            assert "did you mean innkeep.command_pids?" in told
            assert (await execute(client, "true")).exit_code == 0
        assert told in machine.console_text()


async def test_mirrors_come_with_the_boot(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    mirrored(hosts, registry.address)
    with booted(tmp_path, options=[f"--hosts-dir={hosts}"]) as machine:
        async with open_client(machine.address) as client:
            reference = images.busybox.reference.replace(registry.address, "mirrored.invalid")
            assert (await pull(client, reference))["reference"] == reference


async def test_with_a_value_that_cannot_be_work_is_refused_with_it_until_the_shutdown(
    tmp_path: Path,
) -> None:
    options = ["--append=innkeep.dns_filter=yes", "--append=innkeep.workload.command=true"]
    with booted(tmp_path, options=options) as machine:
        async with open_client(machine.address) as client:
            pong = await client.ask(requests.Ping(), responses.Pong)
            assert pong.config_errors == ("innkeep.dns_filter=yes: expected 0 or 1",)
            for request in (requests.VmExec(command=("true",)), requests.StorageStatus()):
                refused = await client.ask(request, responses.Error)
                assert refused.code == ErrorCode.INVALID_REQUEST
                assert refused.message == f"boot configuration: {pong.config_errors[0]}"
            told = decode_value(
                (await client.ask(requests.Diagnose(), responses.Ok)).data, Diagnosis
            )
            assert [each.message for each in told.log if each.level == "error"] == [
                f"configuration: {pong.config_errors[0]}"
            ]
            done = await client.ask(requests.Shutdown(), responses.Ok)
            assert done.data == {"shutdown": True}
        assert await trio.to_thread.run_sync(machine.wait) == 0
