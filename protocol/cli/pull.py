"""Pulling an image with a live progress bar."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from protocol import requests, responses
from protocol.client import AgentClient, expect


class PullBar:
    """A progress bar on stderr while in its context; nothing where stderr is no terminal."""

    def __init__(self, image: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._task = self._progress.add_task(f"Pulling {image}", total=100)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, progress: responses.Progress) -> None:
        """Take over what the agent says."""
        said = [progress.message]
        if progress.bytes_per_s is not None:
            said.append(f"{decimal(progress.bytes_per_s)}/s")
        if progress.seconds_left is not None:
            said.append(f"{progress.seconds_left} s left")
        self._progress.update(self._task, description=", ".join(said), completed=progress.percent)


async def pull(
    client: AgentClient, image: str, platform: str | None, *, dry_run: bool = False
) -> responses.Ok:
    """Have the agent pull; its ``ok`` holds the ImageInfo. Raises AgentRefused.

    With ``dry_run`` it holds a PullPlan, if the agent has that capability: ask before.
    """
    request = requests.Pull(image=image, oci_platform=platform, dry_run=dry_run)
    with PullBar(image) as bar:
        async with client.stream(request) as answers:
            async for answer in answers:
                if isinstance(answer, responses.Progress):
                    bar.show(answer)
    return expect(answer, responses.Ok)
