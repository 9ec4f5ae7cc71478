"""What all connections of the workload protocol share, opened once."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import attrs
import trio

from agent.errors import cause_of, failing_as
from agent.gate import Gate
from agent.services import Services
from agent.workload.commands import Commands
from agent.workload.log import WorkloadLog, opened_log
from agent.workload.place import Machine, Place, Words
from agent.workload.supervisor import Supervisor
from agent.workload.token import IMAGE_FILES, LEAST_BITS, Attempts, InvalidToken, Token
from agent.workload_config import WorkloadConfig
from agent.workload_sessions.container_place import PersistentContainer
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Workload:
    """Whom to let in, where commands run, which do, and what the workload has written."""

    token: Gate[Token]
    place: Place
    commands: Commands
    log: WorkloadLog
    supervisor: Supervisor
    attempts: Attempts = attrs.field(factory=Attempts)


@asynccontextmanager
async def open_workload(services: Services) -> AsyncIterator[Workload]:
    """The workload for the block; an earlier agent's is taken over. What runs goes on after it.

    Raises:
        AgentError: INTERNAL_ERROR; its files cannot be written.
    """
    config = services.config.workload
    directory = services.config.run_dir / "workload"
    with ExitStack() as held:
        with failing_as(ErrorCode.INTERNAL_ERROR, f"open the workload's log in {directory}"):
            workload_log = held.enter_context(opened_log(directory / "log", config.log_bytes))
        place: Place = Machine(services.processes)
        if config.image is not None:
            place = PersistentContainer(services, config.image, config.overlay)
        commands = Commands()
        supervisor = Supervisor(
            place=place,
            log=workload_log,
            commands=commands,
            directory=directory,
            may_start=lambda: not services.work.is_stopping,
            words=None if config.command is None else Words(config.command),
            restart=config.restart,
        )
        workload = Workload(Gate(), place, commands, workload_log, supervisor)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_token, workload.token, services)
            nursery.start_soon(workload_log.run)
            await nursery.start(supervisor.supervise)
            yield workload
            nursery.cancel_scope.cancel()


async def _read_token(token: Gate[Token], services: Services) -> None:
    """Find the token where the configuration or the image has it; what is wrong is logged."""
    config = services.config.workload
    if config.token_file is not None:
        files = [config.token_file]
        if config.token_file.is_relative_to(services.config.storage_dir):
            await services.images.decided()
    else:
        files = [*IMAGE_FILES] if services.config.in_image else []
    token.open(await trio.to_thread.run_sync(_first_token, files, config))


def _first_token(files: list[Path], config: WorkloadConfig) -> Token:
    """The token of the first file that is there; where there is none, one that nobody knows."""
    for path in files:
        try:
            return Token.read(path)
        except FileNotFoundError as error:
            if path == config.token_file:
                log.error("the workload's token: %s", cause_of(error))
        except (OSError, InvalidToken) as error:
            log.error("the workload's token in %s: %s", path, cause_of(error))
            break
    return Token.of(secrets.token_hex(LEAST_BITS // 4))
