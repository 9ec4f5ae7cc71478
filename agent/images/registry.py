"""The registry's side of a pull: OCI distribution by way of oras. The only module that imports it.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md

oras brings the session and the token flow. Around it is put right: time limits, bounds and trust
(`transport.py`), attempts (oras's own retry everything, for two minutes; ours are the caller's
affair), digests, sizes, ranges, docker.io's real host, what a token is asked of whom, and the
registry's own words in errors.

Blocking, for worker threads: importing this module alone takes some 200 ms.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from urllib.parse import urlsplit

import oras.auth.utils
import oras.provider
import requests
import urllib3.exceptions

from agent.images.blob_store import digest_of
from agent.images.manifest import ACCEPTED_MANIFESTS, LARGEST_MANIFEST, Descriptor
from agent.images.reference import DOCKER_HUB, Reference
from agent.images.registries import RegistryError, RegistrySettings
from agent.images.registry_failure import failure_of, host_of, refusal_of
from agent.images.transport import Transport
from protocol.values import RegistryAuth

# Docker's name for its registry is not the name of its host.
_HOSTS = {DOCKER_HUB: "registry-1.docker.io"}
_MOST_REDIRECTS = 10
_BLOCK = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")
_FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, OSError)


class BlobBody:
    """A blob's bytes from ``offset`` on: that which was asked for, or 0 of a registry without
    ranges.
    """

    def __init__(self, response: requests.Response, offset: int, host: str) -> None:
        self.offset = offset
        self._response = response
        self._host = host

    def blocks(self) -> Iterator[bytes]:
        """The bytes as they arrive, at most 1 MiB at a time, ending when the body does.

        A body that ends before its time just ends; the caller knows the blob's size.

        Raises:
            RegistryError: nothing arrived for 30 s, or the connection broke.
        """
        while True:
            try:
                block = self._response.raw.read1(_BLOCK, decode_content=False)
            except urllib3.exceptions.IncompleteRead:
                return
            except _FAILURES as error:
                raise failure_of(error, self._host) from error
            if not block:
                return
            yield block


class RegistryClient:
    """Conversations about one repository, for the time of one pull; a context manager.

    Any thread may call any method. All but ``abort`` raise RegistryError.
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
        # Lines of oras quote token servers' answers, and urllib3's have signed URLs in them.
        for name in ("oras", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._host = _HOSTS.get(reference.registry, reference.registry)
        self._insecure = reference.registry in settings.insecure
        self._auth = auth
        self._authorization: str | None = None
        self._authenticating = threading.Lock()
        self._asking_token: int | None = None  # the thread that does
        self._token_refusal: requests.Response | None = None
        self._transport = Transport(
            plain_http=self._insecure,
            ca_files={_HOSTS.get(name, name): file for name, file in settings.ca_files.items()},
            proxy=proxy,
            no_proxy=no_proxy,
        )
        self._oras = oras.provider.Registry(self._host, insecure=self._insecure)
        self._url = f"{self._oras.prefix}://{self._host}/v2/{reference.repository}"
        session = self._oras.session
        session.trust_env = False  # no proxies, netrc or CA bundle of the agent's environment
        session.max_redirects = _MOST_REDIRECTS
        # A blob's digest is that of the bytes as they are stored.
        session.headers.update({"Accept-Encoding": "identity", "User-Agent": "innkeep"})
        session.mount("https://", self._transport)
        session.mount("http://", self._transport)
        session.hooks["response"].append(self._note_token_refusal)
        if auth is not None:
            self._oras.auth.set_basic_auth(auth.username, auth.password)

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._oras.session.close()

    def abort(self) -> None:
        """Make what other threads wait for here fail at once, and all later requests too."""
        self._transport.abort()

    def head_manifest(self, target: str) -> str | None:
        """The digest of what a tag stands for; None where the registry does not tell."""
        response = self._send("HEAD", f"{self._url}/manifests/{target}", _accept_manifests())
        if response.status_code != 200:
            # An answer to HEAD has no words; those to the GET that follows have.
            return None
        return response.headers.get("Docker-Content-Digest")

    def get_manifest(self, target: str) -> tuple[bytes, str | None]:
        """The manifest or index of a tag or digest, its digest verified, and its content type."""
        response = self._get(f"{self._url}/manifests/{target}", _accept_manifests())
        data = response.content
        if len(data) > LARGEST_MANIFEST:
            raise RegistryError(f"manifest of more than {LARGEST_MANIFEST} bytes")
        promised = response.headers.get("Docker-Content-Digest")
        if ":" in target:
            promised = target
        if promised is not None and promised.startswith("sha256:") and digest_of(data) != promised:
            raise RegistryError(f"the manifest's digest is {digest_of(data)}, not {promised}")
        return data, response.headers.get("Content-Type")

    def get_document(self, descriptor: Descriptor) -> bytes:
        """A small blob, such as an image's config, verified."""
        response = self._get(f"{self._url}/blobs/{descriptor.digest}", {})
        data = response.content
        if len(data) != descriptor.size:
            raise RegistryError(
                f"body ended after {len(data)} of {descriptor.size} bytes"
                if len(data) < descriptor.size
                else f"body goes on after the manifest's {descriptor.size} bytes",
                transient=len(data) < descriptor.size,
            )
        if digest_of(data) != descriptor.digest:
            raise RegistryError(
                f"the digest of what came for {descriptor.digest} is {digest_of(data)}"
            )
        return data

    @contextmanager
    def open_blob(self, digest: str, offset: int) -> Iterator[BlobBody]:
        """A blob from `offset` on, as far as the registry can; nothing of it is verified here."""
        url = f"{self._url}/blobs/{digest}"
        response = self._send("GET", url, _range_from(offset), stream=True)
        if response.status_code == 416 and offset:
            # What some answer that have no ranges.
            response.close()
            response = self._send("GET", url, {}, stream=True)
        try:
            if response.status_code == 206:
                sent = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
                if sent is None or int(sent[1]) != offset:
                    raise RegistryError(f"{self._host} answered with another range than asked for")
                yield BlobBody(response, offset, self._host)
            elif response.status_code == 200:
                yield BlobBody(response, 0, self._host)
            else:
                raise refusal_of(response, self._hint(response))
        finally:
            # Hands the connection back where the body was read to its end, and else closes it.
            response.close()

    def _get(self, url: str, headers: dict[str, str]) -> requests.Response:
        response = self._send("GET", url, headers)
        if response.status_code != 200:
            raise refusal_of(response, self._hint(response))
        return response

    def _send(
        self, method: str, url: str, headers: dict[str, str], *, stream: bool = False
    ) -> requests.Response:
        """Send a request, a second time with credentials where the registry asks for them."""
        used = self._authorization
        response = self._send_once(method, url, headers, used, stream)
        if response.status_code == 401 and host_of(response.url) == self._host:
            challenge = response.headers.get("WWW-Authenticate", "")
            if self._authenticate(challenge, used):
                response.close()
                response = self._send_once(method, url, headers, self._authorization, stream)
        return response

    def _send_once(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        authorization: str | None,
        stream: bool,
    ) -> requests.Response:
        # requests takes this header off again where a redirect leads to another host.
        credentials = {"Authorization": authorization} if authorization else {}
        try:
            response: requests.Response = self._oras.session.request(
                method, url, headers=headers | credentials, stream=stream, allow_redirects=True
            )
        except _FAILURES as error:
            raise failure_of(error, self._host) from error
        return response

    # Authentication

    def _authenticate(self, challenge: str, used: str | None) -> bool:
        """Get what a 401 asks for; whether there is now something new to try.

        https://distribution.github.io/distribution/spec/auth/token/
        """
        with self._authenticating:
            if self._authorization != used:
                return True  # another thread has met the same 401
            bearer = re.search(r"\bbearer\s", challenge, re.IGNORECASE)
            if bearer:
                self._authorization = f"Bearer {self._ask_token(challenge[bearer.end() :])}"
                return True
            if re.match(r"basic\b", challenge, re.IGNORECASE) and self._auth and not used:
                encoded = oras.auth.utils.get_basic_auth(self._auth.username, self._auth.password)
                self._authorization = f"Basic {encoded}"
                return True
            return False

    def _ask_token(self, challenge: str) -> str:
        wanted = oras.auth.utils.parse_auth_header(challenge)
        realm = urlsplit(wanted.realm or "")
        # Over plain HTTP credentials go only where the configuration already lets them go.
        same_host = realm.hostname == urlsplit(self._url).hostname
        if realm.scheme != "https" and not (self._insecure and same_host):
            raise RegistryError(f"{self._host} asks for a token of {wanted.realm!r}, not HTTPS")
        self._token_refusal = None
        self._asking_token = threading.get_ident()
        backend = self._oras.auth
        try:
            token = (backend.request_token if self._auth else backend.request_anonymous_token)(
                wanted
            )
        except _FAILURES as error:  # an answer that is not JSON among them
            raise failure_of(error, realm.netloc) from error
        except AttributeError as error:  # JSON, but no object
            raise RegistryError(f"{realm.netloc} answered with no token") from error
        finally:
            self._asking_token = None
        if self._token_refusal is not None:
            raise refusal_of(self._token_refusal, self._hint(self._token_refusal))
        if not isinstance(token, str) or not token.isprintable():
            raise RegistryError(f"{realm.netloc} answered with no token")
        return token

    def _note_token_refusal(
        self, response: requests.Response, *_args: object, **_settings: object
    ) -> None:
        # oras forgets why it got no token.
        if self._asking_token == threading.get_ident():
            self._token_refusal = response if response.status_code >= 400 else None

    def _hint(self, response: requests.Response) -> str:
        if response.status_code != 401:
            return ""
        return "the credentials were refused" if self._auth else "it wants credentials"


def _range_from(offset: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-"} if offset else {}


def _accept_manifests() -> dict[str, str]:
    return {"Accept": ", ".join(ACCEPTED_MANIFESTS)}
