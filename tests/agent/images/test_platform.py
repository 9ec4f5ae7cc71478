"""Platforms, and which manifest of an index is for one."""

import os

import pytest

from agent.images.platform import (
    InvalidPlatform,
    NoSuchPlatform,
    Platform,
    choose,
    local_platform,
    parse_platform,
)


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/amd64", Platform("linux", "amd64")),
        ("linux/x86_64", Platform("linux", "amd64")),
        ("Linux/AMD64", Platform("linux", "amd64")),
        ("linux/arm64", Platform("linux", "arm64")),
        ("linux/arm64/v8", Platform("linux", "arm64")),
        ("linux/aarch64", Platform("linux", "arm64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
        ("linux/armhf", Platform("linux", "arm", "v7")),
        ("linux/amd64/v3", Platform("linux", "amd64", "v3")),
        ("linux/i386", Platform("linux", "386")),
        ("linux/riscv64", Platform("linux", "riscv64")),
    ],
)
def test_a_platform_has_one_spelling(text: str, platform: Platform) -> None:
    assert parse_platform(text) == platform
    assert parse_platform(str(platform)) == platform


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/amd64/v1/x", "li nux/amd64"]
)
def test_what_is_no_platform_is_refused_by_an_example_of_one(text: str) -> None:
    with pytest.raises(InvalidPlatform, match="such as linux/arm64"):
        parse_platform(text)


def test_the_local_platform_is_the_kernels() -> None:
    known = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
    machine = os.uname().machine
    assert str(local_platform()) == known.get(machine, f"linux/{machine}")


@pytest.mark.parametrize(
    ("wanted", "offered", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["windows/amd64", "unknown/unknown", "linux/amd64"], 2),
        # The first of equals.
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
        # A plain machine cannot run what is built for a newer one; a newer one prefers its own.
        ("linux/amd64", ["linux/amd64/v3", "linux/amd64"], 1),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2"], 1),
        ("linux/arm64", ["linux/arm/v7", "linux/arm64/v8"], 1),
        # Older ones of the same family run too, the newest first.
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], 1),
        ("linux/arm", ["linux/arm/v6", "linux/arm/v7", "linux/arm64"], 1),
    ],
)
def test_the_best_manifest_of_an_index_is_chosen(
    wanted: str, offered: list[str], chosen: int
) -> None:
    assert choose([parse_platform(text) for text in offered], parse_platform(wanted)) == chosen


def test_an_entry_without_a_platform_is_taken_where_it_is_the_only_one() -> None:
    assert choose([None], parse_platform("linux/amd64")) == 0
    with pytest.raises(NoSuchPlatform):
        choose([None, None], parse_platform("linux/amd64"))


def test_a_platform_that_is_not_there_is_answered_with_those_that_are() -> None:
    offered = [parse_platform(text) for text in ("linux/s390x", "linux/arm/v6", "unknown/unknown")]
    with pytest.raises(
        NoSuchPlatform, match=r"linux/arm/v5; the index has linux/arm/v6, linux/s390x"
    ):
        choose(offered, parse_platform("linux/arm/v5"))
