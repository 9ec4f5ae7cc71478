"""Pulling an image: what the store lacks of it is fetched, verified and unpacked, then named."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio

from agent.errors import AgentError, failing_as
from agent.images.claims import LayerClaims
from agent.images.content_store import ContentStore, NotWhole, StoredImage, Tag
from agent.images.layer import LayerStore
from agent.images.layer_build import LayerError
from agent.images.layer_fetcher import (
    LAYERS_AT_ONCE,
    DiskFullError,
    LayerFetcher,
    LayerFetchError,
)
from agent.images.layer_transfer import is_full_disk
from agent.images.manifest import InvalidManifest
from agent.images.platform import NoSuchPlatform, Platform, local_platform
from agent.images.progress import OnProgress, PullProgress, report_waiting, telling
from agent.images.proxy import InvalidProxy
from agent.images.pull_plan import plan_pull
from agent.images.reference import Reference
from agent.images.registries import RegistryError, RegistrySettings
from agent.images.registry_hosts import HostsError
from agent.images.resolution import Question, ResolvedImage
from agent.images.rollback import Rollback
from protocol import retry
from protocol.errors import ErrorCode
from protocol.values import PullPlan, RegistryAuth

if TYPE_CHECKING:
    from agent.images.mirrored_registry import MirroredRegistry

# For asking whether a tag has moved, where the image is there to be used if nobody answers.
_PATIENCE_S = 2
_ONE_ATTEMPT = retry.RetryPolicy(attempts=1, first_delay_s=0, max_delay_s=0)


class Puller:
    """Fetches images into `store` and `layers` from registries.

    Any number of pulls may run at once; of those that need the same layer one fetches it.
    """

    def __init__(
        self,
        store: ContentStore,
        layers: LayerStore,
        registries: RegistrySettings,
        claims: LayerClaims | None = None,
    ) -> None:
        self._store = store
        self._layers = layers
        self._registries = registries
        self._fetcher = LayerFetcher(store, layers, claims or LayerClaims())
        self._rollback = Rollback(store, layers, self._fetcher.claims)

    async def pull(
        self,
        reference: Reference,
        platform: Platform | None,
        auth: RegistryAuth | None,
        on_progress: OnProgress,
        *,
        proxy: str | None = None,
        no_proxy: str | None = None,
    ) -> StoredImage:
        """Fetch what the store lacks of an image, mount its layers, let the reference name it.

        ``platform`` None is this machine's. ``on_progress`` is awaited with one PullProgress
        after the other while layers are fetched; what it raises ends the pull. Cancelled or
        failed, a pull changes no reference; complete blobs stay, and what there is of others, for
        the next one. Where the disk is full, only those stay that were there before.

        Raises:
            AgentError: PULL_FAILED, naming the image, what failed and the cause.
        """
        question = Question(reference, platform or local_platform(), insist=platform is not None)
        async with (
            self._conversation(reference, auth, proxy, no_proxy) as (client, limiter),
            self._resolved(client, question, on_progress, limiter) as image,
        ):
            before = await trio.to_thread.run_sync(
                self._rollback.look, image.digests, limiter=limiter
            )
            try:
                await self._fetcher.fetch(image.layers, client, on_progress, limiter)
                return await trio.to_thread.run_sync(
                    self._name_fitting, question, image, limiter=limiter
                )
            except DiskFullError:
                await trio.to_thread.run_sync(
                    self._rollback.undo, image.digests, before, limiter=limiter
                )
                raise

    async def plan(
        self,
        reference: Reference,
        platform: Platform | None,
        auth: RegistryAuth | None,
        on_progress: OnProgress,
        *,
        proxy: str | None = None,
        no_proxy: str | None = None,
    ) -> PullPlan:
        """What ``pull`` would do with the same arguments; nothing is fetched that it would keep.

        Raises:
            AgentError: as for ``pull``.
        """
        question = Question(reference, platform or local_platform(), insist=platform is not None)
        async with (
            self._conversation(reference, auth, proxy, no_proxy) as (client, limiter),
            self._resolved(client, question, on_progress, limiter) as image,
        ):
            return await trio.to_thread.run_sync(
                plan_pull,
                image,
                str(reference),
                str(question.platform),
                self._store.blobs,
                self._layers,
                limiter=limiter,
            )

    @asynccontextmanager
    async def _conversation(
        self,
        reference: Reference,
        auth: RegistryAuth | None,
        proxy: str | None,
        no_proxy: str | None,
    ) -> AsyncIterator[tuple[MirroredRegistry, trio.CapacityLimiter]]:
        """A registry to ask, and threads to do it in; all that fails is PULL_FAILED."""
        doing = f"pull {reference}"
        # Its own, so that no pull waits for the threads of another.
        limiter = trio.CapacityLimiter(LAYERS_AT_ONCE)
        try:
            with failing_as(ErrorCode.PULL_FAILED, doing):
                client = await trio.to_thread.run_sync(
                    _open_registry,
                    reference,
                    self._registries,
                    auth,
                    proxy,
                    no_proxy,
                    limiter=limiter,
                )
                with client:
                    yield client, limiter
        except _FAILURES as error:
            raise AgentError(ErrorCode.PULL_FAILED, f"{doing}: {error}") from error

    @asynccontextmanager
    async def _resolved(
        self,
        client: MirroredRegistry,
        question: Question,
        on_progress: OnProgress,
        limiter: trio.CapacityLimiter,
    ) -> AsyncIterator[ResolvedImage]:
        """What the reference stands for now, held against collections for the block."""

        async def ask(known: Tag | None, policy: retry.RetryPolicy) -> ResolvedImage:
            try:
                return await trio.to_thread.run_sync(
                    question.ask,
                    client,
                    self._store.blobs,
                    known,
                    policy,
                    limiter=limiter,
                    # It only reads; so the name server, the one thing to wait for that cannot
                    # be aborted, keeps nobody waiting.
                    abandon_on_cancel=True,
                )
            except trio.Cancelled:
                client.abort()
                raise

        known = self._store.find_tag(question.reference)
        if known is not None and known.entry.platform != str(question.platform):
            known = None
        claims = self._fetcher.claims
        async with claims.held(known.digests if known is not None else ()):
            if known is not self._store.find_tag(question.reference):
                # A collection has just taken it away.
                known = None
            report = partial(report_waiting, f"Resolving {question.reference}", on_progress)
            if known is None:
                image = await telling(partial(ask, None, retry.PULL), report)
            else:
                again = partial(self._resolve_again, question, known, ask)
                image, cause = await telling(again, report)
                # Not before the report has stopped, whose last word would come after this.
                if cause is not None:
                    message = f"{question.reference}: {cause}; taking the image in the store"
                    await on_progress(PullProgress(message))
            async with claims.held(image.digests):
                yield image

    async def _resolve_again(
        self,
        question: Question,
        known: Tag,
        ask: Callable[[Tag | None, retry.RetryPolicy], Awaitable[ResolvedImage]],
    ) -> tuple[ResolvedImage, str | None]:
        """Ask whether a tag has moved, but do not need an answer; why there was none, if so."""
        if question.reference.digest is not None:
            return ResolvedImage.of(known), None
        cause = f"no answer within {_PATIENCE_S} s"
        try:
            with trio.move_on_after(_PATIENCE_S):
                return await ask(known, _ONE_ATTEMPT), None
        except RegistryError as error:
            if not (error.transient or error.unreachable):
                raise
            cause = str(error)
        return ResolvedImage.of(known), cause

    def _name_fitting(self, question: Question, image: ResolvedImage) -> StoredImage:
        try:
            return self._name(question, image)
        except OSError as error:
            if not is_full_disk(error):
                raise
            needed = sum(map(len, image.documents))
            raise DiskFullError(
                f"the disk is full, about {needed} more bytes are needed"
            ) from error

    def _name(self, question: Question, image: ResolvedImage) -> StoredImage:
        """Make the image, whose layers are all there, one of the store's."""
        for layer in image.layers:
            self._layers.mount(layer.digest, layer.diff_id)
        reference = question.reference
        # A digest stands for itself, whatever else the same image was resolved from.
        resolved = reference.digest or image.resolved
        platform = str(question.platform)
        known = self._store.find_tag(reference)
        if known is not None and known.entry == attrs.evolve(
            known.entry,
            reference=str(reference),
            manifest_digest=image.manifest_digest,
            resolved=resolved,
            platform=platform,
        ):
            return known.image
        self._store.blobs.add_documents(image.documents)
        return self._store.tag(
            reference, image.manifest_digest, resolved=resolved, platform=platform
        )


_FAILURES = (
    DiskFullError,
    HostsError,
    InvalidManifest,
    InvalidProxy,
    LayerError,
    LayerFetchError,
    NoSuchPlatform,
    NotWhole,
    RegistryError,
)


def _open_registry(
    reference: Reference,
    registries: RegistrySettings,
    auth: RegistryAuth | None,
    proxy: str | None,
    no_proxy: str | None,
) -> MirroredRegistry:
    # In a worker thread, and here, since it is slow to import.
    from agent.images.mirrored_registry import MirroredRegistry

    return MirroredRegistry(reference, registries, auth, proxy=proxy, no_proxy=no_proxy)
