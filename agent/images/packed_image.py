"""The image that a share's packed layers are, whatever a request calls it.

Its directories are layers as they are. A tar is made a layer of the store, once: what is known of
it is kept in `packed.json` in the storage, by its name, length and time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import attrs
import orjson
import trio

from agent.errors import AgentError, cause_of, failing_as
from agent.images.atomic_file import publish
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, StoredImage, StoredLayer
from agent.images.image_config import parse_config
from agent.images.layer import LayerStore
from agent.images.layer_build import LayerBuild, LayerError
from agent.images.manifest import DIGEST, InvalidManifest
from agent.images.overlay_layers import OverlayLayers
from agent.images.overlay_record import OverlayRecord
from agent.images.packed_share import PackedEntry, PackedError, PackedShare, unpacked_names
from agent.images.platform import local_platform
from protocol.errors import ErrorCode
from protocol.values import PlannedLayer, PullPlan

log = logging.getLogger(__name__)

DIGEST_OF_PACKED = "packed"
_DIRECTORY = "inode/directory"
_TAR = "application/vnd.oci.image.layer.v1.tar"
_BLOCK = 1 << 20
_FAILURES = (PackedError, LayerError, InvalidManifest)


@attrs.frozen
class _KnownTar:
    """A tar of the share, as it was when its digest was found out."""

    size: int
    mtime_ns: int
    diff_id: str = attrs.field(validator=attrs.validators.matches_re(DIGEST.pattern))


@attrs.define(eq=False)
class PackedImage:
    """The image of ``share``, looked for when it is first asked for, and the same from then on."""

    _share: PackedShare
    _store: ContentStore
    _layers: LayerStore
    _claims: LayerClaims
    _record: Path
    """The file with what is known of tars."""
    _turn: trio.Lock = attrs.field(factory=trio.Lock)
    _known: StoredImage | None = None
    _build: LayerBuild | None = None

    async def image(self, reference: str, code: ErrorCode) -> StoredImage:
        """The image, under the name that it was asked for by.

        Raises:
            AgentError: ``code``; there is no share, no image in it, or a tar that is no layer.
        """
        if self._known is None:
            async with self._turn:
                if self._known is None:
                    await self._find(code)
        assert self._known is not None
        return attrs.evolve(self._known, reference=reference)

    async def look_at_boot(self) -> None:
        """Have it ready for the first request; why it cannot be had is logged."""
        try:
            await self.image(DIGEST_OF_PACKED, ErrorCode.NOT_FOUND)
        except AgentError as error:
            log.error("%s", error.message)
        except Exception:
            # Of no more consequence than to a request that looks again.
            log.exception("packed layers: internal error")

    async def plan(self, reference: str, code: ErrorCode) -> PullPlan:
        """A pull's: there is nothing to fetch. Raises as ``image``."""
        image = await self.image(reference, code)
        return PullPlan(
            reference=reference,
            digest=image.config_digest,
            platform=str(local_platform()),
            layers=tuple(PlannedLayer(layer.digest, 0, 0) for layer in image.layers),
            fetch_bytes=0,
            disk_bytes=0,
            free_bytes=await trio.to_thread.run_sync(self._store.blobs.free_bytes),
        )

    def pins(self) -> set[OverlayRecord]:
        """What no collection may take: the image's layers, or while it is not known what earlier
        agents have made of its tars. Blocks, and raises OSError."""
        if self._known is not None:
            return {OverlayRecord.of(self._known)}
        tars = tuple((tar.diff_id, tar.diff_id) for tar in self._read_record().values())
        return {OverlayRecord(DIGEST_OF_PACKED, DIGEST_OF_PACKED, tars)}

    def by_config_digest(self, digest: str) -> StoredImage | None:
        """The image, if that is its digest and it is known."""
        return self._known if digest == DIGEST_OF_PACKED else None

    async def _find(self, code: ErrorCode) -> None:
        doing = "find the packed layers"
        with failing_as(code, doing):
            try:
                found = await trio.to_thread.run_sync(self._look)
                diff_ids = {tar.diff_id for tar in found.values() if tar is not None}
                # A collection that is under way may be taking what earlier agents have built.
                async with self._claims.held(diff_ids):
                    self._known = await self._made(found)
            except _FAILURES as error:
                raise AgentError(code, f"{doing}: {cause_of(error)}") from error
            except AgentError as error:
                raise AgentError(code, f"{doing}: {error.message}") from error

    async def _made(self, found: Mapping[PackedEntry, _KnownTar | None]) -> StoredImage:
        """As ``_make``, which a cancellation ends soon."""
        made: list[StoredImage] = []
        failures: list[Exception] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._interrupt_when_cancelled)
            try:
                made.append(await trio.to_thread.run_sync(self._make, found))
            except (*_FAILURES, AgentError, OSError) as error:
                failures.append(error)
            nursery.cancel_scope.cancel()
        if failures:
            raise failures[0]
        return made[0]

    async def _interrupt_when_cancelled(self) -> None:
        # A thread looks for a cancellation only between two blocks, and the last one may be long.
        try:
            await trio.sleep_forever()
        finally:
            if self._build is not None:
                self._build.interrupt()

    def _look(self) -> dict[PackedEntry, _KnownTar | None]:
        """The share's layers, bottom first, with what is known of those that are tars."""
        earlier = self._read_record()
        found: dict[PackedEntry, _KnownTar | None] = {
            entry: None if entry.tar is None else _known_tar(entry.tar, earlier.get(entry.id))
            for entry in self._share.entries()
        }
        tars = {entry.id: attrs.asdict(tar) for entry, tar in found.items() if tar is not None}
        if tars != {name: attrs.asdict(tar) for name, tar in earlier.items()}:
            self._store.blobs.write(self._record, orjson.dumps(tars))
        return found

    def _make(self, found: Mapping[PackedEntry, _KnownTar | None]) -> StoredImage:
        layers = []
        for entry, tar in found.items():
            if tar is None or entry.tar is None:
                layers.append(StoredLayer(*unpacked_names(entry.id), 0, _DIRECTORY, 0))
                continue
            if not self._layers.has(tar.diff_id):
                self._build_layer(entry.tar, tar.diff_id)
            layers.append(StoredLayer(tar.diff_id, tar.diff_id, 0, _TAR, tar.size))
        mounts = OverlayLayers(self._layers, self._share)
        for layer in layers:
            mounts.mount(layer.digest, layer.diff_id)
        config = self._share.config()
        platform = local_platform()
        defaults: dict[str, object] = {"os": platform.os, "architecture": platform.architecture}
        return StoredImage(
            reference=DIGEST_OF_PACKED,
            manifest_digest=DIGEST_OF_PACKED,
            config_digest=DIGEST_OF_PACKED,
            layers=tuple(layers),
            config={**defaults, **(parse_config(config) if config is not None else {})},
        )

    def _build_layer(self, tar: Path, diff_id: str) -> None:
        capacity_bytes = self._store.blobs.capacity_bytes()
        with self._layers.building(diff_id, _TAR, capacity_bytes) as self._build:
            try:
                for block in _blocks(tar):
                    self._build.write(block)
                built = self._build.finish()
            finally:
                self._build = None
        (failure,) = publish([built.files])
        if failure is not None:
            for naming in built.files:
                naming.source.unlink(missing_ok=True)
            raise failure

    def _read_record(self) -> dict[str, _KnownTar]:
        try:
            tars = orjson.loads(self._record.read_bytes())
            return {name: _KnownTar(**tar) for name, tar in tars.items()}
        except FileNotFoundError:
            return {}
        except (AttributeError, TypeError, ValueError):
            # Damaged: then the digests are found out again.
            return {}


def _known_tar(path: Path, earlier: _KnownTar | None) -> _KnownTar:
    status = path.stat()
    size, mtime_ns = status.st_size, status.st_mtime_ns
    if earlier is not None and (earlier.size, earlier.mtime_ns) == (size, mtime_ns):
        return earlier
    sha256 = hashlib.sha256()
    for block in _blocks(path):
        sha256.update(block)
    return _KnownTar(size, mtime_ns, f"sha256:{sha256.hexdigest()}")


def _blocks(path: Path) -> Iterator[bytes]:
    """A file's, for worker threads of trio: they end when their task is cancelled."""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            trio.from_thread.check_cancelled()
            yield block
