"""Whom a container's command runs as, by the image's own passwd(5) and group(5)."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

# The largest id that the container runtimes take.
_LARGEST_ID = 2**31 - 1


class UnknownUser(Exception):
    """A user or group that the image does not have; the text names it."""


@attrs.frozen
class User:
    """Numbers for the kernel, and the home directory for HOME."""

    uid: int
    gid: int
    supplementary_gids: tuple[int, ...] = ()
    home: str = "/"


@attrs.frozen
class _Account:
    name: str
    uid: int
    gid: int
    home: str


@attrs.frozen
class _Group:
    name: str
    gid: int
    members: tuple[str, ...]


def find_user(spec: str, passwd: str, group: str) -> User:
    """The user that ``spec`` means: ``name``, ``uid``, ``name:group`` or ``uid:gid``, "" is root.

    As docker has it: a number need not be in ``passwd`` (then: group 0, home ``/``), supplementary
    groups are the primary one, which a set-group-id program would lose otherwise
    (CVE-2022-36109), and those that list the user; a group in ``spec`` stands alone. ``passwd``
    and ``group`` are the files' texts; lines that mean nothing are passed over.

    Raises:
        UnknownUser: a name that is not there, or a number out of range.
    """
    user_name, _, group_name = spec.partition(":")
    user_name = user_name or "0"
    account = next(
        (one for one in _accounts(passwd) if user_name in (one.name, str(one.uid))), None
    )
    if account is None:
        uid = _number(user_name)
        if uid is None:
            raise UnknownUser(f"user {user_name!r} is not in the image's /etc/passwd")
        account = _Account(name="", uid=uid, gid=0, home="")
    groups = list(_groups(group))
    home = account.home or "/"
    if not group_name:
        listed = [one.gid for one in groups if account.name and account.name in one.members]
        gids = tuple(dict.fromkeys((account.gid, *listed)))
        return User(account.uid, account.gid, gids, home)
    gid = next((one.gid for one in groups if group_name in (one.name, str(one.gid))), None)
    if gid is None:
        gid = _number(group_name)
    if gid is None:
        raise UnknownUser(f"group {group_name!r} is not in the image's /etc/group")
    return User(account.uid, gid, (gid,), home)


def _accounts(passwd: str) -> Iterator[_Account]:
    for line in passwd.split("\n"):
        fields = line.split(":")
        if len(fields) < 6:
            continue
        uid, gid = _number(fields[2]), _number(fields[3])
        if uid is not None and gid is not None:
            yield _Account(fields[0], uid, gid, fields[5])


def _groups(group: str) -> Iterator[_Group]:
    for line in group.split("\n"):
        fields = line.split(":")
        if len(fields) < 4:
            continue
        gid = _number(fields[2])
        if gid is not None:
            yield _Group(fields[0], gid, tuple(fields[3].split(",")))


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return int(text) if int(text) <= _LARGEST_ID else None
