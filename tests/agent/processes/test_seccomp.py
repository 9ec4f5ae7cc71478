"""Debian's seccomp profile, as the one for a container; what crun makes of it: test_container."""

from collections.abc import Sequence

import pytest

from agent.processes.bundle import DEFAULT_CAPABILITIES
from agent.processes.seccomp import Conditions, Profile, Rule, oci_profile


def profile(*rules: Rule) -> Profile:
    return Profile(
        defaultAction="SCMP_ACT_ERRNO",
        defaultErrnoRet=38,
        archMap=[
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            {"architecture": "SCMP_ARCH_RISCV64", "subArchitectures": None},
        ],
        syscalls=list(rules),
    )


def allowed(
    rule: Rule, capabilities: Sequence[str] = DEFAULT_CAPABILITIES, machine: str = "x86_64"
) -> bool:
    """Whether a rule is kept, apart from those that are always added."""
    rules = oci_profile(profile(rule), capabilities, machine)["syscalls"]
    return any(rule["names"][0] in kept["names"] for kept in rules)


@pytest.mark.parametrize(
    ("includes", "excludes", "expected"),
    [
        ({}, {}, True),
        ({"arches": ["arm64", "amd64"]}, {}, True),
        ({"arches": ["arm64"]}, {}, False),
        ({}, {"arches": ["amd64"]}, False),
        ({"caps": ["CAP_KILL"]}, {}, True),
        ({"caps": ["CAP_KILL", "CAP_SYS_ADMIN"]}, {}, False),
        ({}, {"caps": ["CAP_SYS_ADMIN"]}, True),
        ({}, {"caps": ["CAP_SYS_ADMIN", "CAP_KILL"]}, False),
    ],
)
def test_a_rule_holds_under_its_conditions(
    includes: Conditions, excludes: Conditions, expected: bool
) -> None:
    rule = Rule(
        names=["bpf"], action="SCMP_ACT_ALLOW", args=None, includes=includes, excludes=excludes
    )
    assert allowed(rule) is expected


def test_a_rule_is_kept_in_the_form_of_the_oci() -> None:
    rule = Rule(
        names=["clone", "socket"],
        action="SCMP_ACT_ERRNO",
        errnoRet=1,
        args=[{"index": 0, "value": 2, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
        includes={},
        excludes={},
    )
    assert oci_profile(profile(rule), DEFAULT_CAPABILITIES, "x86_64")["syscalls"][0] == {
        "names": ["clone"],
        "action": "SCMP_ACT_ERRNO",
        "errnoRet": 1,
        "args": [{"index": 0, "value": 2, "valueTwo": 0, "op": "SCMP_CMP_EQ"}],
    }


def test_programs_of_the_machines_other_word_sizes_are_filtered_too() -> None:
    def architectures(machine: str) -> list[str]:
        return oci_profile(profile(), DEFAULT_CAPABILITIES, machine)["architectures"]

    assert architectures("x86_64") == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    assert architectures("riscv64") == ["SCMP_ARCH_RISCV64"]


@pytest.mark.parametrize("family", [0, 1, 2, 10, 16, 17, 39, 40, 41, 45, 2**32 + 2, 2**32 + 40])
def test_sockets_of_every_family_but_vsock_are_allowed(family: int) -> None:
    rules = oci_profile(profile(), DEFAULT_CAPABILITIES, "x86_64")["syscalls"]
    conditions = [
        condition
        for rule in rules
        if rule["names"] == ["socket"] and rule["action"] == "SCMP_ACT_ALLOW"
        for condition in rule.get("args") or []
    ]
    assert all(condition["op"] == "SCMP_CMP_MASKED_EQ" for condition in conditions)
    passes = any(family & one["value"] == one["valueTwo"] for one in conditions)
    assert passes is (family % 2**32 != 40)
