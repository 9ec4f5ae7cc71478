"""A token server for docker-registry, which verifies what it signs.

https://distribution.github.io/distribution/spec/auth/jwt/
"""

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from attrs import define, field
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from tests.support.certificates import Certificate

_ISSUER = "tests"
_SERVICE = "registry"
# docker-registry takes a token for so long after it has expired.
LEEWAY_S = 60


@define(eq=False)
class TokenServer:
    """Gives tokens to those who know a password, or to anybody where there is none.

    `tokens` are those that it gave, and `queries` and `authorizations` what they were asked for
    with. A token is valid for `valid_s` seconds and the registry's leeway.
    """

    address: str
    _signer: Certificate
    credentials: str | None = None
    valid_s: float = 300
    tokens: list[str] = field(factory=list)
    queries: list[Mapping[str, list[str]]] = field(factory=list)
    authorizations: list[str | None] = field(factory=list)

    @property
    def registry_auth(self) -> Mapping[str, object]:
        """The `auth` section of a registry that asks for its tokens."""
        return {
            "token": {
                "realm": f"https://{self.address}/token",
                "service": _SERVICE,
                "issuer": _ISSUER,
                "rootcertbundle": str(self._signer.certificate),
            }
        }

    def answer(self, path: str, authorization: str | None) -> tuple[int, object]:
        query = parse_qs(urlsplit(path).query)
        self.queries.append(query)
        self.authorizations.append(authorization)
        if self.credentials is not None:
            encoded = base64.b64encode(self.credentials.encode()).decode()
            if authorization != f"Basic {encoded}":
                refusal = {"code": "UNAUTHORIZED", "message": "incorrect username or password"}
                return 401, {"errors": [refusal]}
        self.tokens.append(self._token(query.get("scope", [])))
        return 200, {"token": self.tokens[-1], "expires_in": self.valid_s}

    def _token(self, scopes: list[str]) -> str:
        pem = self._signer.certificate.read_bytes().split(b"-----")[2]
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        header = {"typ": "JWT", "alg": "ES256", "x5c": [b"".join(pem.split()).decode()]}
        claims = {
            "iss": _ISSUER,
            "sub": "someone",
            "aud": _SERVICE,
            "exp": now + int(self.valid_s),
            "nbf": now - 600,
            "iat": now - 600,
            "jti": str(len(self.tokens)),
            "access": access,
        }
        signed = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
        key = load_pem_private_key(self._signer.key.read_bytes(), None)
        assert isinstance(key, EllipticCurvePrivateKey)
        r, s = decode_dss_signature(key.sign(signed.encode(), ECDSA(hashes.SHA256())))
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        return f"{signed}.{_encoded(signature)}"


@contextmanager
def token_server(tls: ssl.SSLContext, signer: Certificate) -> Iterator[TokenServer]:
    """Serve on loopback by HTTPS until the block is left; `signer` signs the tokens."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, document = server.answer(self.path, self.headers.get("Authorization"))
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not on the test's stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.socket = tls.wrap_socket(listening.socket, server_side=True)
        server = TokenServer(f"127.0.0.1:{listening.server_port}", signer)
        thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def htpasswd(path: Path) -> Mapping[str, object]:
    """The `auth` section of a registry with one user: `user`, and the password `correct horse`."""
    path.write_text("user:$2b$04$ScZHhJwQk9lPQ731ZC5zReOPWrKDTD89XhryK.cU0URtVWMZq2XjO\n")
    return {"htpasswd": {"realm": "tests", "path": str(path)}}
