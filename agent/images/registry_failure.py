"""What went wrong with a registry, in one line: from requests' exceptions and HTTP's answers.

requests and urllib3 wrap a cause up to four times, with object addresses and URLs in the text,
a proxy's password possibly among them; so texts are made anew from what lies at the bottom.
"""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import orjson
import requests
import urllib3.exceptions

from agent.images.paced_socket import TooMuch, TooSlow
from agent.images.registries import RegistryError, TimeLimits
from agent.images.transport import TransportError
from protocol.retry import is_transient

# What requests and urllib3 raise when they fail, also over what a server sends in headers: a
# redirect to no URL is a ValueError, and JSON that is nested too deeply a RecursionError.
FAILURES = (
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    OSError,
    ValueError,
    RecursionError,
)

_LONGEST_WORDS = 300
_ERROR_BYTES = 4096
_TUNNEL_REFUSED = re.compile(r"Tunnel connection failed: (\d{3}) ?(.*)")


def failure_of(error: BaseException, host: str, limits: TimeLimits) -> RegistryError:
    """The error of a request to `host`, or to where that leads, without a whole answer."""
    if isinstance(error, TransportError):
        return RegistryError(str(error))
    causes = list(_causes(error))
    if any(isinstance(cause, urllib3.exceptions.ProxyError) for cause in causes):
        host = "the proxy"
    elif isinstance(error, requests.RequestException) and error.request is not None:
        host = host_of(error.request.url) or host
    host = host[:_LONGEST_WORDS]
    for cause in causes:
        match cause:
            case TooSlow():
                return RegistryError(f"{host} is too slow: {cause}", transient=True, timed_out=True)
            case TooMuch():
                return RegistryError(f"{host} answers with {cause}")
            case socket.gaierror():
                return RegistryError(
                    f"cannot resolve {host}: {cause.strerror}",
                    transient=cause.errno == socket.EAI_AGAIN,
                    unreachable=True,
                )
            case ssl.SSLCertVerificationError():
                hint = ""
                if cause.verify_code in _UNKNOWN_ISSUER:
                    hint = f"; if its CA is a private one, add --registry-ca {host}=FILE"
                elif cause.verify_code in _OUT_OF_DATE:
                    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
                    hint = f"; this machine's clock says {now} UTC"
                return RegistryError(f"{host} is not trusted: {cause.verify_message}{hint}")
            case ssl.SSLError() if cause.reason in _PLAIN_HTTP:
                return RegistryError(
                    f"{host} does not speak TLS; if it is meant to be used over plain HTTP, "
                    f"add --insecure-registry {host}"
                )
            case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
                return RegistryError(f"{host} hung up without an answer", transient=True)
            case ssl.SSLError():
                return RegistryError(f"TLS with {host}: {cause.reason or cause.strerror}")
            case urllib3.exceptions.ConnectTimeoutError() | requests.ConnectTimeout():
                return RegistryError(
                    f"no connection to {host} within {limits.connect_s:g} s",
                    transient=True,
                    unreachable=True,
                    timed_out=True,
                )
            case urllib3.exceptions.ReadTimeoutError() | requests.ReadTimeout():
                return RegistryError(
                    f"nothing came from {host} for {limits.silence_s:g} s",
                    transient=True,
                    unreachable=True,
                    timed_out=True,
                )
            case http.client.RemoteDisconnected():
                return RegistryError(f"{host} hung up without an answer", transient=True)
            case urllib3.exceptions.IncompleteRead() | http.client.IncompleteRead():
                return RegistryError("the body ended early", transient=True)
            case OSError(errno=int()) if cause.strerror:
                return RegistryError(
                    f"connection to {host}: {cause.strerror}",
                    transient=is_transient(cause),
                    unreachable=True,
                )
            case OSError() if refused := _TUNNEL_REFUSED.match(str(cause)):
                status, reason = int(refused[1]), _one_line(refused[2])
                return RegistryError(
                    f"the proxy answered {status} {reason}".rstrip(),
                    transient=is_transient(status),
                )
            case http.client.HTTPException():
                return RegistryError(f"{host} does not speak HTTP: {_one_line(str(cause))}")
            case requests.TooManyRedirects():
                return RegistryError(f"{host} redirects without end")
    bottom = causes[0]
    return RegistryError(f"{host}: {_one_line(str(bottom)) or type(bottom).__name__}")


def host_of(url: str | None) -> str:
    """``HOST[:PORT]`` of a URL, without the credentials that a redirect may have put there."""
    return urlsplit(url or "").netloc.rpartition("@")[2]


def refusal_of(response: requests.Response, hint: str) -> RegistryError:
    """The error that an answer other than success is, in the registry's own words.

    `hint` is what else there is to say, or empty.
    """
    status = response.status_code
    answer = f"{host_of(response.url)} answered {status} {response.reason or ''}".rstrip()
    said = [answer, _words(response), hint]
    return RegistryError(
        ": ".join(filter(None, said)),
        transient=is_transient(status),
        retry_after_s=_retry_after_s(response.headers.get("Retry-After")),
    )


# X509_STORE_CTX_get_error(3): self-signed, or an issuer that is not at hand; not yet, no longer.
_UNKNOWN_ISSUER = frozenset({18, 19, 20, 21})
_OUT_OF_DATE = frozenset({9, 10})
# OpenSSL's reasons when what answers a ClientHello is no TLS.
_PLAIN_HTTP = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})


def _causes(error: BaseException) -> Iterator[BaseException]:
    """From the bottom up: what happened, then what it was wrapped in."""
    below = error.__cause__ or error.__context__
    if below is not None:
        yield from _causes(below)
    # Some wrap a cause without being raised from it.
    for argument in error.args:
        if isinstance(argument, BaseException) and argument is not below:
            yield from _causes(argument)
    yield error


def _words(response: requests.Response) -> str:
    """What the body says: https://github.com/opencontainers/distribution-spec#error-codes."""
    try:
        errors = orjson.loads(response.content)["errors"]
        said = [f"{error.get('code', '')}: {error.get('message', '')}" for error in errors[:3]]
        return _one_line("; ".join(word.strip(": ") for word in said))
    except (ValueError, TypeError, KeyError, AttributeError):
        is_text = response.headers.get("Content-Type", "").startswith("text/plain")
        return (
            _one_line(response.content[:_ERROR_BYTES].decode(errors="replace")) if is_text else ""
        )


def _one_line(text: str) -> str:
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words if len(words) <= _LONGEST_WORDS else words[:_LONGEST_WORDS] + "…"


def _retry_after_s(value: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds, or a date."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value) - datetime.now(UTC)
    except (ValueError, TypeError):  # TypeError: a date without a zone
        return None
    return max(0.0, until.total_seconds())
