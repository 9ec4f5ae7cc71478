"""What ``diagnose`` does where a part fails, or does not end."""

import logging
import os
import tomllib
from collections.abc import AsyncIterator
from pathlib import Path

import attrs
import pytest
import trio
import trio.testing

from agent import logs
from agent.config import AgentConfig
from agent.introspection import Introspection
from agent.services import Services, open_services
from protocol.constants import AGENT_VERSION
from protocol.machine import Missing


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[Services]:
    """Without cgroups, and with a crun that does not answer before ``released`` is written to."""
    os.mkfifo(tmp_path / "released")
    crun = tmp_path / "crun"
    crun.write_text(f"#!/bin/sh\nexec cat {tmp_path}/released\n")
    crun.chmod(0o755)
    config = AgentConfig(
        listen="unix:none",
        in_image=False,
        storage_dir=tmp_path / "storage",
        run_dir=tmp_path / "run",
        crun=str(crun),
        mkfs_erofs="/none",
    )
    for path in (config.storage_dir, config.run_dir):
        path.mkdir()
    async with open_services(config, None) as opened:
        await opened.images.decided()
        yield opened


async def test_a_part_that_does_not_end_is_missing_and_the_others_are_there(
    services: Services, tmp_path: Path
) -> None:
    diagnostics = attrs.evolve(await services.diagnostics.value(), limit_s=0.5)
    with trio.fail_after(10):
        diagnosis = await diagnostics.diagnose()
    assert diagnosis.versions is None
    assert Missing("versions", "took longer than 0.5 s") in diagnosis.missing
    assert diagnosis.storage.ready
    assert diagnosis.storage.total_bytes
    assert diagnosis.mounts is not None
    assert diagnosis.agent is not None
    assert diagnosis.agent.threads > 1
    os.close(os.open(tmp_path / "released", os.O_WRONLY))


async def test_where_there_are_no_cgroups_that_is_said_and_no_failure(
    services: Services, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.to_thread.run_sync, (tmp_path / "released").write_text, "crun version 1.0\n"
        )
        diagnosis = await (await services.diagnostics.value()).diagnose()
    assert (diagnosis.cgroups, diagnosis.running) == (None, None)
    causes = {each.part: each.cause for each in diagnosis.missing}
    assert causes["cgroups"] == causes["running"] == "commands have no cgroups here"
    assert causes["versions.erofs_utils"].startswith("No such file or directory")
    assert diagnosis.versions is not None
    assert diagnosis.versions.crun == "1.0"
    stats = await (await services.statistics.value()).read()
    assert (stats.workloads, stats.containers, stats.commands) == (None, (), ())
    assert Missing("workloads", "commands have no cgroups here") in stats.missing


async def test_an_agent_whose_threads_are_all_taken_answers_all_the_same(
    services: Services, tmp_path: Path
) -> None:
    threads = trio.to_thread.current_default_thread_limiter()
    threads.total_tokens = 1
    async with trio.open_nursery() as nursery:
        # The thread that this takes waits until the fifo is read.
        nursery.start_soon(
            trio.to_thread.run_sync, (tmp_path / "released").write_text, "crun version 1.0\n"
        )
        await trio.testing.wait_all_tasks_blocked()
        assert threads.available_tokens == 0
        with trio.fail_after(10):
            stats = await (await services.statistics.value()).read()
            diagnosis = await (await services.diagnostics.value()).diagnose()
    assert stats.memory.total_bytes
    assert diagnosis.agent is not None


def test_the_last_failures_of_the_log_are_kept_and_nothing_else() -> None:
    introspection = Introspection()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        logs.configure("INFO", introspection.failures)
        log = logging.getLogger("test")
        log.info("all is well")
        log.info("a request failed", extra=logs.FAILED_REQUEST)
        token = logs.trace_id.set("t" * 5000)
        for number in range(1000):
            log.warning("warning %d %s", number, "x" * 5000)
        logs.trace_id.reset(token)
        try:
            raise ValueError("of no use")
        except ValueError:
            log.exception("a defect")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    last = introspection.failures.last()
    assert len(last) == 64
    assert (last[-1].message, last[-1].level) == ("a defect: ValueError: of no use", "error")
    assert last[-2].message.startswith("warning 999 xxx")
    assert len(last[-2].message) == 1000
    assert (last[-1].trace_id, last[-2].trace_id) == (None, "t" * 1000)
    assert last[-1].ts.endswith("Z")


def test_the_agents_version_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == AGENT_VERSION
