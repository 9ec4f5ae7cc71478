"""A store in a directory and pulls into it, without EROFS."""

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from agent.errors import AgentError
from agent.images.content_store import ContentStore, StoredImage
from agent.images.platform import parse_platform
from agent.images.progress import PullProgress
from agent.images.puller import Puller
from agent.images.reference import parse_reference
from agent.images.registries import RegistrySettings
from protocol.errors import ErrorCode
from protocol.values import PullPlan
from tests.agent.images.recording_layers import RecordingLayers
from tests.support.layout import LayerBlob, plain_layer


def noise(name: str, size: int = 300_000) -> LayerBlob:
    """A layer of bytes that no compression makes smaller; not a tar, which nothing here needs."""
    return plain_layer(hashlib.shake_128(name.encode()).digest(size))


def blob(layer: LayerBlob) -> str:
    return f"blobs/{layer.digest}"


@attrs.define
class Pulling:
    """A store in a directory, and pulls into it."""

    directory: Path
    registries: RegistrySettings
    layers: RecordingLayers = attrs.field(factory=RecordingLayers)
    frames: list[tuple[float, PullProgress]] = attrs.field(factory=list)
    store: ContentStore = attrs.field(init=False)
    puller: Puller = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """What the next process finds: the disk's contents, and nothing of what was in memory."""
        self.store = ContentStore(self.directory)
        self.puller = Puller(self.store, self.layers, self.registries)

    async def note(self, frame: PullProgress) -> None:
        self.frames.append((trio.current_time(), frame))

    async def pull(self, reference: str, platform: str | None = None, **how: Any) -> StoredImage:
        how = {"auth": None, "on_progress": self.note} | how
        return await self.puller.pull(
            parse_reference(reference), parse_platform(platform) if platform else None, **how
        )

    async def plan(self, reference: str) -> PullPlan:
        return await self.puller.plan(parse_reference(reference), None, None, self.note)

    async def refused(self, reference: str, platform: str | None = None, **how: Any) -> str:
        """The message of a pull that fails."""
        with pytest.raises(AgentError) as failed:
            await self.pull(reference, platform, **how)
        assert failed.value.code is ErrorCode.PULL_FAILED
        message = failed.value.message
        assert message.startswith(f"pull {parse_reference(reference)}: ")
        assert "\n" not in message
        return message.removeprefix(f"pull {parse_reference(reference)}: ")

    async def layers_until(self, is_so: Callable[[], bool]) -> None:
        await trio.to_thread.run_sync(self.layers.wait_until, is_so)

    def files(self) -> set[str]:
        """The store's blobs and beginnings of such, and whatever else there is in them."""
        oci = self.directory / "oci"
        return {
            str(path.relative_to(oci))
            for part in ("blobs", "ingest", "unpacked")
            for path in (oci / part).rglob("*")
            if path.is_file()
        }


async def event(happened: threading.Event) -> None:
    """Wait for what another thread sets."""
    assert await trio.to_thread.run_sync(happened.wait, 10)
