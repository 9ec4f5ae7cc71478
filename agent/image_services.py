"""Everything about images that the agent has running, once its storage is mounted."""

from __future__ import annotations

import logging
from functools import partial

import attrs

from agent.config import AgentConfig
from agent.errors import cause_of, failing_as
from agent.files.journal import Journal
from agent.image_answers import ImageAnswers
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore
from agent.images.exporter import LayerExporter
from agent.images.flattener import LayerFlattener
from agent.images.garbage import GarbageCollector
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.packed_image import PackedImage
from agent.images.packed_share import PackedShare
from agent.images.puller import Puller
from agent.images.registries import RegistrySettings
from agent.images.registry_hosts import problems
from agent.processes.shares import Shares
from protocol.errors import ErrorCode

log = logging.getLogger(__name__)


@attrs.frozen
class Images:
    """Everything that needs the storage to be mounted."""

    store: ContentStore
    layers: LayerStore
    overlays: Overlays
    puller: Puller
    claims: LayerClaims
    garbage: GarbageCollector
    journal: Journal
    """Of uploads, which a crash may leave behind."""
    exporter: LayerExporter
    answers: ImageAnswers
    flattener: LayerFlattener
    packed: PackedImage | None
    """What all references mean, where there is a share of packed layers."""


def open_images(config: AgentConfig, shares: Shares) -> Images:
    """Open what is kept in the storage, which is mounted, and mount its layers. Blocks.

    A layer that cannot be mounted, and a registry that is configured wrongly, are in the log.

    Raises:
        AgentError: MOUNT_FAILED, with the cause.
    """
    storage = config.storage_dir
    claims = LayerClaims()
    with failing_as(ErrorCode.MOUNT_FAILED, f"open the images in {storage}"):
        store = ContentStore(storage)
        layers = LayerStore(storage, mkfs_erofs=config.mkfs_erofs)
        known = [layer for image in store.images() for layer in image.layers]
        refused = layers.mount_all((layer.digest, layer.diff_id) for layer in known)
        for digest, error in refused.items():
            log.error("mount layer %s: %s", digest, cause_of(error))
        share, packed = None, None
        if (wanted := config.packed_layers) is not None:
            share = PackedShare(partial(shares.mount_in_vm, wanted))
            packed = PackedImage(share, store, layers, claims, storage / "packed.json")
        overlays = Overlays(storage, layers, claims, share)
        journal = Journal(storage / "uploads", otherwise=config.run_dir / "uploads")
    settings = RegistrySettings(
        insecure=config.insecure_registries,
        ca_files=config.registry_ca_files,
        hosts_dir=config.hosts_dir,
    )
    for problem in problems(settings.hosts_dir) if settings.hosts_dir else ():
        log.error("registries: %s", problem)
    puller = Puller(store, layers, settings, claims)
    garbage = GarbageCollector(store, layers, overlays, claims, packed)
    return Images(
        store,
        layers,
        overlays,
        puller,
        claims,
        garbage,
        journal,
        exporter=LayerExporter(store, layers, claims, packed),
        answers=ImageAnswers(store),
        flattener=LayerFlattener(store.blobs, layers, claims),
        packed=packed,
    )
