"""Whom `user` means, by an image's passwd and group."""

import pytest

from agent.processes.accounts import UnknownUser, User, find_user

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1::/usr/sbin:/usr/sbin/nologin
a line of no meaning
broken:x:minus:one:::
alice:x:1000:1001:Alice:/home/alice:/bin/sh
2000:x:1500:1500:a number for a name:/srv:
homeless:x:3000:3000:::
"""

GROUP = """\
root:x:0:
wheel:x:10:root,alice
broken
alice:x:1001:
audio:x:29:daemon,alice
"""

ALICE = User(1000, 1001, (1001, 10, 29), "/home/alice")


@pytest.mark.parametrize(
    ("spec", "user"),
    [
        ("", User(0, 0, (0, 10), "/root")),
        ("root", User(0, 0, (0, 10), "/root")),
        ("0", User(0, 0, (0, 10), "/root")),
        ("alice", ALICE),
        ("1000", ALICE),
        ("alice:", ALICE),
        ("alice:audio", User(1000, 29, (29,), "/home/alice")),
        ("1000:0", User(1000, 0, (0,), "/home/alice")),
        ("alice:4242", User(1000, 4242, (4242,), "/home/alice")),
        (":wheel", User(0, 10, (10,), "/root")),
        ("4242", User(4242, 0, (0,), "/")),
        ("4242:4243", User(4242, 4243, (4243,), "/")),
        ("2000", User(1500, 1500, (1500,), "/srv")),
        ("homeless", User(3000, 3000, (3000,), "/")),
    ],
)
def test_a_user_is_found_as_docker_finds_it(spec: str, user: User) -> None:
    assert find_user(spec, PASSWD, GROUP) == user


@pytest.mark.parametrize(
    "spec", ["bob", "broken", "-1", "1.5", "٣", "2147483648", "99999999999999999999"]
)
def test_an_unknown_user_is_named(spec: str) -> None:
    with pytest.raises(UnknownUser, match="/etc/passwd") as raised:
        find_user(spec, PASSWD, GROUP)
    assert repr(spec) in str(raised.value)


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(UnknownUser, match="group 'video' is not in the image's /etc/group"):
        find_user("alice:video", PASSWD, GROUP)


def test_an_image_without_these_files_has_numbers_only() -> None:
    assert find_user("", "", "") == User(0, 0, (0,), "/")
    assert find_user("7:8", "", "") == User(7, 8, (8,), "/")
    with pytest.raises(UnknownUser):
        find_user("root", "", "")
