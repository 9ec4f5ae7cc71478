"""A registry together with its mirrors: whoever has it gives it, and the registry is asked last.

What comes is verified by digest wherever it comes from; only who may say what a tag stands for is
a matter of trust, and of the configuration.

Imported only where a registry is spoken to, since requests is slow to import.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

from agent.images.blob_body import BlobBody
from agent.images.manifest import Descriptor, InvalidManifest, parse_manifest
from agent.images.proxy import proxy_url
from agent.images.reference import Reference
from agent.images.registries import MirrorError, RegistryError, RegistrySettings
from agent.images.registry import RegistryClient
from agent.images.registry_hosts import endpoints_of
from protocol.values import RegistryAuth

log = logging.getLogger(__name__)

T = TypeVar("T")


class MirroredRegistry:
    """Conversations about one repository, for the time of one pull; a context manager.

    Any thread may call any method. Those that ask for something raise RegistryError, the
    registry's own, with what its mirrors said; construction raises HostsError and InvalidProxy.

    A mirror that kept the pull waiting, or whose content was wrong, is not asked again. Others
    are, for everything else: they may well have the one blob and lack the other.
    """

    def __init__(
        self,
        reference: Reference,
        settings: RegistrySettings,
        auth: RegistryAuth | None,
        *,
        proxy: str | None = None,
        no_proxy: str | None = None,
    ) -> None:
        endpoints = endpoints_of(reference.registry, settings)
        proxy = proxy_url(proxy) if proxy else None
        self._clients = [
            RegistryClient(
                reference,
                endpoint,
                settings,
                auth,
                is_mirror=endpoint is not endpoints[-1],
                proxy=proxy,
                no_proxy=no_proxy,
            )
            for endpoint in endpoints
        ]
        self._last = self._clients[-1]
        self._given_up: set[RegistryClient] = set()
        self._failed: defaultdict[str, set[RegistryClient]] = defaultdict(set)
        self._gave: defaultdict[str, set[RegistryClient]] = defaultdict(set)

    def __enter__(self) -> MirroredRegistry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for client in self._clients:
            client.close()

    def abort(self) -> None:
        """Make what other threads wait for here fail at once, and all later requests too."""
        for client in self._clients:
            client.abort()

    def head_manifest(self, target: str) -> str | None:
        """The digest of what a tag stands for; None where nobody tells."""
        return self._first(target, lambda client: client.head_manifest(target))

    def get_manifest(self, target: str) -> tuple[bytes, str | None]:
        """The manifest or index of a tag or digest, its digest verified, and its content type."""

        def get(client: RegistryClient) -> tuple[bytes, str | None]:
            data, content_type = client.get_manifest(target)
            if client is not self._last:
                try:
                    parse_manifest(data, content_type)
                except InvalidManifest as error:  # a page of a proxy's, perhaps
                    raise RegistryError(str(error)) from error
            return data, content_type

        return self._first(target, get)

    def get_document(self, descriptor: Descriptor) -> bytes:
        """A small blob, such as an image's config, verified."""
        return self._first(descriptor.digest, lambda client: client.get_document(descriptor))

    @contextmanager
    def open_blob(self, digest: str, size: int, offset: int) -> Iterator[BlobBody]:
        """A blob of `size` bytes from `offset` on, as far as its source can; not verified here.

        A RegistryError that the block raises is taken as the source's failure, and comes out as a
        MirrorError where that was a mirror: the next call asks another.
        """
        with ExitStack() as stack:

            def enter(client: RegistryClient) -> tuple[RegistryClient, BlobBody]:
                return client, stack.enter_context(client.open_blob(digest, size, offset))

            client, body = self._first(digest, enter)
            if client is self._last:
                yield body
                return
            self._gave[digest].add(client)
            try:
                yield body
            except RegistryError as failure:
                self._note(client, failure)
                self._failed[digest].add(client)
                raise MirrorError(f"mirror {client.host}: {failure}", transient=True) from failure

    def blame(self, digest: str) -> bool:
        """A blob turned out to be another: whether there is a mirror to blame, and so others to
        ask for it.
        """
        culprits = self._gave.pop(digest, set())
        for client in culprits:
            log.warning("mirror %s sent what is not %s; not asked again", client.host, digest)
        self._given_up |= culprits
        return bool(culprits)

    def _first(self, target: str, request: Callable[[RegistryClient], T]) -> T:
        """What `request` returns for the first who knows; else the last one's failure."""
        failures: list[tuple[RegistryClient, RegistryError]] = []
        for client in self._sources(target):
            try:
                answer = request(client)
            except RegistryError as failure:
                failures.append((client, failure))
                if client is not self._last:
                    self._note(client, failure)
            else:
                if answer is not None or client is self._last:
                    return answer
        if failures:
            raise _together(failures)
        raise RegistryError(
            "no host that its configuration has left has the capability "
            + ("'pull'" if ":" in target else "'resolve', which a tag takes")
        )

    def _sources(self, target: str) -> Iterator[RegistryClient]:
        """Who may be asked for a digest, or for what a tag stands for."""
        for client in self._clients:
            able = client.endpoint.can_pull if ":" in target else client.endpoint.can_resolve
            if able and client not in self._given_up and client not in self._failed[target]:
                yield client

    def _note(self, client: RegistryClient, failure: RegistryError) -> None:
        log.info("mirror %s: %s", client.host, failure)
        if failure.timed_out:
            self._given_up.add(client)


def _together(failures: list[tuple[RegistryClient, RegistryError]]) -> RegistryError:
    """The failure of the one that was asked last, and what the mirrors before it had said.

    Where a registry is out of reach, its mirrors are all there is, and theirs may pass.
    """
    *before, (_, last) = failures
    if not before:
        return last
    said = "; ".join(f"{client.host}: {failure}" for client, failure in before)
    return RegistryError(
        f"{last} (mirrors: {said})",
        transient=last.transient
        or (last.unreachable and any(failure.transient for _, failure in before)),
        unreachable=last.unreachable,
        retry_after_s=last.retry_after_s,
    )
