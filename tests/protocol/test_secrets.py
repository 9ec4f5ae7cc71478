"""What a log line made of a message's repr may show."""

from typing import Any

import pytest

from protocol import Envelope, requests, responses, workload
from protocol.values import ImageInfo, Mount, RegistryAuth

HIDDEN = "s3cret"
ENV = (("TOKEN", HIDDEN), ("B", HIDDEN))


@pytest.mark.parametrize(
    "message",
    [
        RegistryAuth("user", HIDDEN),
        requests.Pull("alpine", auth=RegistryAuth("user", HIDDEN)),
        requests.Pull("alpine", proxy=f"http://user:{HIDDEN}@proxy:3128"),
        requests.Pull("alpine", proxy=f"http://user:p@{HIDDEN}@proxy:3128"),
        requests.NetworkTest(f"https://user:{HIDDEN}@example.org/"),
        requests.VmExec(("ls",), env=ENV, stdin_data=HIDDEN),
        requests.Run("alpine", ("ls",), env=ENV, stdin_data=HIDDEN, remote_volume_mount=HIDDEN),
        requests.Resumed(entropy=HIDDEN.encode()),
        requests.Stdin(HIDDEN.encode()),
        requests.FileWrite("/x", HIDDEN.encode()),
        requests.FileWriteChunk(HIDDEN.encode(), done=True),
        responses.Completed(0, HIDDEN.encode(), HIDDEN.encode()),
        responses.Stdout(HIDDEN.encode()),
        responses.Stderr(HIDDEN.encode()),
        responses.DataChunk(HIDDEN.encode(), done=False),
        workload.Auth(HIDDEN, 1),
        workload.Run(1, ("ls",), env=ENV),
        workload.Stdout(1, HIDDEN.encode(), truncated=False),
        workload.Stderr(1, HIDDEN.encode(), truncated=False),
        ImageInfo("r", "d", 1, "amd64", "linux", 0, (), env=(f"TOKEN={HIDDEN}",)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_repr_shows_no_secret(message: Any) -> None:
    for shown in (repr(message), str(message), f"{message}", repr(Envelope("t", message))):
        assert HIDDEN not in shown
        assert type(message).__name__ in shown


def test_a_repr_still_tells_what_is_going_on() -> None:
    run = requests.Run("alpine", ("ls", "-l"), env=ENV, mounts=(Mount("t", "/p", True),))
    shown = repr(run)
    assert "image='alpine', command=('ls', '-l'), env=(TOKEN=<hidden>, B=<hidden>)" in shown
    assert "stdin_data=None" in shown
    assert repr(requests.Stdin(b"12345")) == "Stdin(data=<5 bytes>)"
    assert "stdin_data=<5 characters>" in repr(requests.VmExec((), stdin_data="12345"))
    assert repr(requests.NetworkTest("http://u:p@h/x")) == "NetworkTest(url='<hidden>@h/x')"
    assert repr(requests.NetworkTest("http://h/x")) == "NetworkTest(url='http://h/x')"
    assert "proxy=None" in repr(requests.Pull("a"))
