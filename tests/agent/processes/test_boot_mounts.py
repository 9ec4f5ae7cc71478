"""What the VM has mounted at boot, among what a request wants in its container."""

from pathlib import Path

import pytest

from agent.errors import AgentError
from agent.processes.command import Bind
from agent.processes.shares import Shares
from protocol.values import Mount


def at_boot(directory: Path, *paths: str) -> Shares:
    return Shares(at_boot=tuple(Mount(str(directory), path, read_only=False) for path in paths))


def test_every_container_has_it(tmp_path: Path) -> None:
    assert at_boot(tmp_path, "/srv/inner", "/srv").binds([]) == [
        Bind(str(tmp_path), "/srv", gives_way=True),
        Bind(str(tmp_path), "/srv/inner", gives_way=True),
    ]


@pytest.mark.parametrize("path", ["/srv/data", "//srv/./data/"])
def test_a_request_may_have_something_else_in_its_place(tmp_path: Path, path: str) -> None:
    wanted = Mount("/", path, read_only=True)
    assert at_boot(tmp_path, "/srv/data", "/opt").binds([wanted]) == [
        Bind(str(tmp_path), "/opt", gives_way=True),
        Bind("/", "/srv/data", read_only=True),
    ]


def test_it_lies_within_what_a_request_mounts_above(tmp_path: Path) -> None:
    wanted = Mount("/", "/srv", read_only=False)
    assert at_boot(tmp_path, "/srv/data").binds([wanted]) == [
        Bind("/", "/srv"),
        Bind(str(tmp_path), "/srv/data", gives_way=True),
    ]


def test_one_that_cannot_be_had_is_an_error_of_the_request(tmp_path: Path) -> None:
    shares = at_boot(tmp_path / "missing", "/srv/data")
    with pytest.raises(AgentError, match="at '/srv/data': No such file or directory"):
        shares.binds([])


def test_the_workspace_may_be_one_of_them(tmp_path: Path) -> None:
    shares = Shares(at_boot=(Mount("work", "/workspace/", read_only=False),))
    assert shares.claiming(Path("/workspace")) == Path("/mnt/virtiofs/work")
    assert at_boot(tmp_path, "/srv").claiming(Path("/workspace")) is None
