"""The system calls that containers may make: Debian's default profile, in the OCI's form.

podman and docker share the profile. Its own form depends on the machine and on the container's
capabilities; crun takes what remains when those are known
(https://github.com/opencontainers/runtime-spec/blob/main/config-linux.md#seccomp).
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator, Mapping
from typing import TypedDict

# uname(2)'s machine: the name in the profile's conditions, and in its table of architectures.
_MACHINES: Mapping[str, tuple[str, str]] = {
    "x86_64": ("amd64", "SCMP_ARCH_X86_64"),
    "aarch64": ("arm64", "SCMP_ARCH_AARCH64"),
    "riscv64": ("riscv64", "SCMP_ARCH_RISCV64"),
}

# The number of AF_VSOCK, and the bits that tell it from every other family.
_AF_VSOCK, _FAMILY_BITS = 40, 6
_MASKED = "SCMP_CMP_MASKED_EQ"

# Calls that make sockets have rules of our own.
_SOCKET_CALLS = frozenset({"socket", "socketcall"})


class Argument(TypedDict):
    """A condition on an argument of a system call; libseccomp's scmp_arg_cmp."""

    index: int
    value: int
    valueTwo: int
    op: str


class Conditions(TypedDict, total=False):
    """When a rule of Debian's profile holds."""

    arches: list[str]
    caps: list[str]


class Rule(TypedDict, total=False):
    """A rule in Debian's form; in the OCI's it has neither `includes` nor `excludes`."""

    names: list[str]
    action: str
    errnoRet: int | None
    args: list[Argument] | None
    includes: Conditions | None
    excludes: Conditions | None


class Architecture(TypedDict):
    """An architecture, and the others whose system calls its kernel takes."""

    architecture: str
    subArchitectures: list[str] | None


class Profile(TypedDict):
    """Debian's seccomp.json, as far as it matters here."""

    defaultAction: str
    defaultErrnoRet: int
    archMap: list[Architecture]
    syscalls: list[Rule]


class OciProfile(TypedDict):
    """``linux.seccomp`` of the OCI's config.json."""

    defaultAction: str
    defaultErrnoRet: int
    architectures: list[str]
    syscalls: list[Rule]


def oci_profile(profile: Profile, capabilities: Collection[str], machine: str) -> OciProfile:
    """``profile`` for a container with ``capabilities`` (its bounding set) on ``machine``.

    In addition it denies AF_VSOCK: the host's own services and the agent are not for containers.

    Raises:
        KeyError: a machine, or a profile, of a kind that is not known.
    """
    name, native = _MACHINES[machine]
    others = next(
        entry["subArchitectures"] for entry in profile["archMap"] if entry["architecture"] == native
    )
    rules = [
        converted
        for rule in profile["syscalls"]
        if _applies(rule, capabilities, name) and (converted := _converted(rule))
    ]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [native, *(others or ())],
        "syscalls": [*rules, *_socket_rules()],
    }


def _applies(rule: Rule, capabilities: Collection[str], machine: str) -> bool:
    """As containers/common's setupSeccomp has it: all of `includes`, none of `excludes`."""
    includes: Conditions = rule.get("includes") or {}
    excludes: Conditions = rule.get("excludes") or {}
    return (
        machine in (includes.get("arches") or [machine])
        and machine not in (excludes.get("arches") or [])
        and all(one in capabilities for one in includes.get("caps") or [])
        and not any(one in capabilities for one in excludes.get("caps") or [])
    )


def _converted(rule: Rule) -> Rule | None:
    names = [name for name in rule["names"] if name not in _SOCKET_CALLS]
    if not names:
        return None
    kept: Rule = {"names": names, "action": rule["action"]}
    if rule.get("errnoRet") is not None:
        kept["errnoRet"] = rule["errnoRet"]
    if rule.get("args"):
        kept["args"] = rule["args"]
    return kept


def _socket_rules() -> Iterator[Rule]:
    """Sockets of every family but one; those of that one fail as by a kernel without sockets.

    The kernel looks at the low 32 bits of the argument and a comparison at all 64, so "not equal
    to 40" would let 2**32 + 40 pass. Hence: allowed if one of the low bits differs from 40's, by
    a rule for each bit, since rules of one action are alternatives.
    """
    for bit in range(_FAMILY_BITS):
        mask = 1 << bit
        differs = Argument(index=0, value=mask, valueTwo=~_AF_VSOCK & mask, op=_MASKED)
        yield Rule(names=["socket"], action="SCMP_ACT_ALLOW", args=[differs])
    # The way of 32-bit programs before Linux 4.3, whose arguments no filter can see. libseccomp
    # allows it along with socket(2), whatever the family, unless a rule says otherwise; and a
    # rule with the default's errno is no rule to crun.
    yield Rule(names=["socketcall"], action="SCMP_ACT_ERRNO", errnoRet=errno.EAFNOSUPPORT)
