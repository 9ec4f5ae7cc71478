"""Where a registry's credentials are found after pulls: nowhere."""

import base64
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import open_client
from tests.support.certificates import PrivateCa
from tests.support.execution import refusal
from tests.support.images import Images
from tests.support.machine import Machine, agent_alone
from tests.support.private_registries import AUTH, WRONG
from tests.support.process_tree import descendants
from tests.support.proxy import http_proxy
from tests.support.token_server import TokenServer
from tests.support.tools import ROOTFS, image_program

PROXY_PASSWORD = "proxys-password"


@pytest.fixture
def agent(
    ca: PrivateCa,
    with_password: LocalRegistry,
    with_tokens: LocalRegistry,
    tokens: TokenServer,
    tmp_path: Path,
) -> Iterator[Machine]:
    """An agent that trusts all three, and says all that it has to say."""
    addresses = (with_password.address, with_tokens.address, tokens.address)
    env = {
        "INNKEEP_LOG": "debug",
        "INNKEEP_MKFS_EROFS": str(image_program(ROOTFS.absolute(), "mkfs.erofs", tmp_path)),
    }
    options = [f"--registry-ca={address}={ca.path}" for address in addresses]
    with agent_alone(tmp_path / "agent", options=options, env=env) as machine:
        yield machine


def forms(secret: str) -> set[bytes]:
    """How a secret could be written somewhere."""
    return {
        secret.encode(),
        urllib.parse.quote(secret).encode(),
        # Without the end, which depends on what follows.
        base64.b64encode(secret.encode())[:-4],
        base64.b64encode(f"{AUTH.username}:{secret}".encode())[:-4],
    }


def shown_in_proc(*pids: int) -> dict[str, bytes]:
    """What anybody in the VM may read of processes."""
    paths = [Path(f"/proc/{pid}/{what}") for pid in pids for what in ("cmdline", "environ")]
    return {str(path): path.read_bytes() for path in paths}


async def test_credentials_and_tokens_are_in_no_log_no_file_and_no_process_s_arguments(
    agent: Machine,
    with_password: LocalRegistry,
    with_tokens: LocalRegistry,
    tokens: TokenServer,
    images: Images,
) -> None:
    tokens.credentials = f"{AUTH.username}:{AUTH.password}"
    name = images.multi_platform.reference.partition("/")[2]
    said = []
    with http_proxy() as proxy:
        proxy.credentials = f"agent:{PROXY_PASSWORD}"
        url = f"http://agent:{PROXY_PASSWORD}@{proxy.address}"
        async with open_client(agent.address) as client:
            for server in (with_password, with_tokens):
                image = f"{server.address}/{name}"
                wrong = requests.Pull(image=image, auth=WRONG, proxy=url)
                error = await refusal(client, wrong)
                said.append(error.message)
                assert "the credentials were refused" in error.message
                right = requests.Pull(image=image, auth=AUTH, proxy=url)
                for _ in range(2):
                    answer = await client.request(right)
                    assert isinstance(answer, responses.Ok), answer
            broken = requests.Pull(image=image, auth=AUTH, proxy=f"http://a:{PROXY_PASSWORD}@:x")
            said.append((await refusal(client, broken)).message)
        assert proxy.requests
    secrets = set().union(*map(forms, (AUTH.password, WRONG.password, PROXY_PASSWORD)))
    secrets |= {token.rpartition(".")[2].encode() for token in tokens.tokens}
    assert len(tokens.tokens) >= 2

    root = agent.console.parent
    searched = [path for path in root.rglob("*") if path.is_file()]
    assert agent.console in searched
    assert any("oci/blobs" in str(path) for path in searched)
    texts = {str(path): path.read_bytes() for path in searched}
    texts |= shown_in_proc(agent.pid, *descendants(agent.pid))
    texts["what hosts were told"] = "\n".join(said).encode()
    leaks = [where for where, text in texts.items() if any(secret in text for secret in secrets)]
    assert leaks == []
