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
from urllib.parse import urlsplit

import attrs
import oras.auth.utils
import oras.provider
import requests

from agent.images.blob_body import BlobBody
from agent.images.blob_store import digest_of
from agent.images.manifest import ACCEPTED_MANIFESTS, LARGEST_MANIFEST, Descriptor
from agent.images.reference import Reference
from agent.images.registries import RegistryError, RegistrySettings
from agent.images.registry_failure import FAILURES, failure_of, host_of, refusal_of
from agent.images.registry_hosts import Endpoint, real_host
from agent.images.transport import Transport
from protocol.values import RegistryAuth

_MOST_REDIRECTS = 10
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d+/(?:\d+|\*)")


class RegistryClient:
    """Conversations with one endpoint about one repository, for the time of one pull.

    Any thread may call any method. All but ``abort`` and ``close`` raise RegistryError. ``auth``
    is used only where the endpoint is the very host that the reference names.
    """

    def __init__(
        self,
        reference: Reference,
        endpoint: Endpoint,
        settings: RegistrySettings,
        auth: RegistryAuth | None,
        *,
        is_mirror: bool = False,
        proxy: str | None = None,
        no_proxy: str | None = None,
    ) -> None:
        # Lines of oras quote token servers' answers, and urllib3's have signed URLs in them.
        for name in ("oras", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        own = endpoint.host == real_host(reference.registry)
        self.endpoint = endpoint
        self.host = endpoint.host
        self._auth = auth if own else None
        self._authorization: str | None = None
        self._authenticating = threading.Lock()
        self._asking_token: int | None = None  # the thread that does
        self._token_refusal: requests.Response | None = None
        limits = settings.limits
        connect_s = limits.mirror_connect_s if is_mirror else limits.connect_s
        self._limits = attrs.evolve(limits, connect_s=endpoint.dial_timeout_s or connect_s)
        self._transport = Transport(
            endpoint,
            self._limits,
            ca_files={real_host(name): file for name, file in settings.ca_files.items()},
            proxy=proxy,
            no_proxy=no_proxy,
        )
        self._oras = oras.provider.Registry(self.host, insecure=endpoint.is_plain)
        self._repository = reference.repository
        self._url = f"{endpoint.url}/{reference.repository}"
        # Mirrors of many registries go by it.
        self._query = {} if own else {"ns": reference.registry}
        session = self._oras.session
        session.trust_env = False  # no proxies, netrc or CA bundle of the agent's environment
        session.max_redirects = _MOST_REDIRECTS
        # A blob's digest is that of the bytes as they are stored.
        session.headers.update({"Accept-Encoding": "identity", "User-Agent": "innkeep"})
        session.mount("https://", self._transport)
        session.mount("http://", self._transport)
        session.hooks["response"].append(self._note_token_refusal)
        if self._auth is not None:
            self._oras.auth.set_basic_auth(self._auth.username, self._auth.password)

    def close(self) -> None:
        """Close the connections that it keeps."""
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
    def open_blob(self, digest: str, size: int, offset: int) -> Iterator[BlobBody]:
        """A blob of `size` bytes from `offset` on, as far as the registry can; nothing of it is
        verified here.
        """
        url = f"{self._url}/blobs/{digest}"
        with self._transport.expecting(size):
            response = self._send("GET", url, _range_from(offset), stream=True)
            if offset and (
                response.status_code == 416 or _range_of(response) not in (None, offset)
            ):
                # What some answer that have no ranges, or wrong ones.
                response.close()
                response = self._send("GET", url, {}, stream=True)
        try:
            if response.status_code == 206:
                if _range_of(response) != offset:
                    raise RegistryError(f"{self.host} answered with another range than asked for")
                yield BlobBody(response, offset, self.host, self._limits)
            elif response.status_code == 200:
                yield BlobBody(response, 0, self.host, self._limits)
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
        if response.status_code == 401 and host_of(response.url) == self.host:
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
                method,
                url,
                params=self._query,
                headers=headers | credentials,
                stream=stream,
                allow_redirects=True,
            )
        except FAILURES as error:
            raise failure_of(error, self.host, self._limits) from error
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
        # As docker asks where a registry leaves it open.
        wanted.scope = wanted.scope or f"repository:{self._repository}:pull"
        try:
            realm = urlsplit(wanted.realm or "")
        except ValueError:
            realm = urlsplit("")
        # Over plain HTTP credentials go only where the configuration already lets them go.
        same_host = realm.hostname == urlsplit(self._url).hostname
        if realm.scheme != "https" and not (self.endpoint.is_plain and same_host):
            raise RegistryError(
                f"{self.host} asks for a token of {(wanted.realm or '')[:300]!r}, not HTTPS"
            )
        self._token_refusal = None
        self._asking_token = threading.get_ident()
        backend = self._oras.auth
        try:
            token = (backend.request_token if self._auth else backend.request_anonymous_token)(
                wanted
            )
        except FAILURES as error:  # an answer that is not JSON among them
            raise failure_of(error, realm.netloc, self._limits) from error
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


def _range_of(response: requests.Response) -> int | None:
    """Where the part of a blob that a 206 has begins, -1 where it does not say; else None."""
    if response.status_code != 206:
        return None
    sent = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    return int(sent[1]) if sent else -1


def _range_from(offset: int) -> dict[str, str]:
    return {"Range": f"bytes={offset}-"} if offset else {}


def _accept_manifests() -> dict[str, str]:
    return {"Accept": ", ".join(ACCEPTED_MANIFESTS)}
