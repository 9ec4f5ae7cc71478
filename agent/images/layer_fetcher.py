"""Everything that an image's layers need to be in the store, several of them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from agent.errors import cause_of
from agent.images.blob_store import WholeLayer
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.group_commit import GroupCommit
from agent.images.layer import LayerStore
from agent.images.layer_build import LayerError
from agent.images.layer_transfer import DamagedBlob, LayerTransfer, is_full_disk
from agent.images.manifest import InvalidManifest
from agent.images.progress import OnProgress, ProgressMeter, first_failure, telling
from agent.images.registries import RegistryError
from agent.images.resolution import WantedLayer

if TYPE_CHECKING:
    from agent.images.mirrored_registry import MirroredRegistry

# Of one pull: each is a thread, a mkfs.erofs and a connection.
LAYERS_AT_ONCE = 4


class LayerFetchError(Exception):
    """A layer could not be brought into the store; the text names it and the cause."""


class DiskFullError(Exception):
    """The layers do not fit; the text says how much is missing."""


@attrs.frozen
class LayerFetcher:
    """Brings layers into ``store`` and ``layers``, for any number of pulls at once.

    Callers hold their image's layers in ``claims`` from before ``fetch`` until the image has its
    name.
    """

    store: ContentStore
    layers: LayerStore
    claims: LayerClaims
    _commit: GroupCommit = attrs.field(init=False)

    @_commit.default
    def _make_commit(self) -> GroupCommit:
        return GroupCommit(self.store.blobs.add_layers)

    async def fetch(
        self,
        wanted: tuple[WantedLayer, ...],
        client: MirroredRegistry,
        on_progress: OnProgress,
        limiter: trio.CapacityLimiter,
    ) -> None:
        """Return when all of an image's layers are there; `limiter` says how many at once.

        Of a layer that failed, and of others that are then given up, complete blobs stay, and
        what there is of incomplete ones.

        Raises:
            InvalidManifest: a blob is known to hold something else than the image says.
            LayerFetchError, DiskFullError: the first failure; and whatever `on_progress` raises.
        """
        lacking = await trio.to_thread.run_sync(self._find_lacking, wanted, limiter=limiter)
        if not lacking:
            return
        meter = ProgressMeter(len(wanted), ((layer.digest, layer.size) for layer in lacking))
        await telling(
            partial(self._fetch_all, lacking, client, meter, limiter),
            partial(meter.report, on_progress),
        )
        await on_progress(meter.frame())

    async def _fetch_all(
        self,
        lacking: Iterable[WantedLayer],
        client: MirroredRegistry,
        meter: ProgressMeter,
        limiter: trio.CapacityLimiter,
    ) -> None:
        running: set[LayerTransfer] = set()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_abort_when_cancelled, client, running)
                async with trio.open_nursery() as layers:
                    give_up = partial(_give_up, layers.cancel_scope, client, running)
                    for layer in lacking:
                        layers.start_soon(
                            self._fetch_one, layer, client, meter, limiter, running, give_up
                        )
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            failure = first_failure(group)
            if failure is None:
                raise
            raise failure from failure.__cause__

    async def _fetch_one(
        self,
        layer: WantedLayer,
        client: MirroredRegistry,
        meter: ProgressMeter,
        limiter: trio.CapacityLimiter,
        running: set[LayerTransfer],
        give_up: Callable[[], None],
    ) -> None:
        transfer = LayerTransfer(
            layer,
            self.store.blobs,
            self.layers,
            client,
            lambda position: meter.advance(layer.digest, position),
        )
        try:
            async with self.claims.lock(layer.digest):
                running.add(transfer)
                try:
                    whole = await trio.to_thread.run_sync(
                        self._bring, layer, transfer, limiter=limiter
                    )
                finally:
                    running.remove(transfer)
                if whole is not None:
                    await self._add(whole)
        except (RegistryError, DamagedBlob, LayerError, InvalidManifest, OSError) as error:
            give_up()
            if is_full_disk(error):
                needed = meter.missing_bytes(layer.digest, transfer.unpacked_bytes)
                raise DiskFullError(
                    f"the disk is full, about {needed} more bytes are needed"
                ) from error
            raise LayerFetchError(f"layer {layer.digest}: {cause_of(error)}") from error
        meter.finish(layer.digest)

    def _bring(self, layer: WantedLayer, transfer: LayerTransfer) -> WholeLayer | None:
        # Another pull may have brought it while this one waited.
        return None if self._is_present(layer) else transfer.run()

    async def _add(self, layer: WholeLayer) -> None:
        try:
            await self._commit.add(layer)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(layer.drop)
            raise

    def _find_lacking(self, wanted: Iterable[WantedLayer]) -> Collection[WantedLayer]:
        """Those of the layers, each once, for which something is to be done.

        Raises DiskFullError for what does not fit even before it is unpacked.
        """
        lacking = {layer.digest: layer for layer in wanted if not self._is_present(layer)}
        self._check_space(lacking.values())
        return lacking.values()

    def _is_present(self, layer: WantedLayer) -> bool:
        blobs = self.store.blobs
        unpacked = blobs.unpacked(layer.digest)
        if unpacked is None or not blobs.has(layer.digest, layer.size):
            return False
        if unpacked.diff_id != layer.diff_id:
            raise InvalidManifest(
                f"layer {layer.digest} has the diff_id {unpacked.diff_id}, and not the config's "
                f"{layer.diff_id}"
            )
        return self.layers.has(layer.diff_id)

    def _check_space(self, lacking: Iterable[WantedLayer]) -> None:
        blobs = self.store.blobs
        needed = sum(
            layer.size - min(blobs.partial_bytes(layer.digest), layer.size)
            for layer in lacking
            if not blobs.has(layer.digest, layer.size)
        )
        free = blobs.free_bytes()
        if needed > free:
            raise DiskFullError(
                f"the disk is too full: the layers need {needed} bytes, {free} are free, "
                f"{needed - free} bytes are missing"
            )


async def _abort_when_cancelled(client: MirroredRegistry, running: set[LayerTransfer]) -> None:
    # A thread looks for a cancellation only between two blocks. One may be 30 s in coming, and
    # long in unpacking.
    try:
        await trio.sleep_forever()
    finally:
        _abort(client, running)


def _give_up(
    others: trio.CancelScope, client: MirroredRegistry, running: set[LayerTransfer]
) -> None:
    """One layer failed: the others need not wait for what may be long in coming.

    They are cancelled before they meet what that breaks, so that they keep what they have.
    """
    others.cancel()
    _abort(client, running)


def _abort(client: MirroredRegistry, running: Iterable[LayerTransfer]) -> None:
    client.abort()
    for transfer in running:
        transfer.interrupt()
