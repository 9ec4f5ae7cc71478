"""Layers are put into the store together, and what fails for one fails for no other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

from agent.images.atomic_file import Naming, publish
from agent.images.blob_store import UnpackedLayer, WholeLayer
from agent.images.group_commit import GroupCommit


def written(directory: Path, name: str) -> Naming:
    directory.mkdir(exist_ok=True)
    source = directory / f"{name}.partial"
    source.write_text(name)
    return Naming(source, directory / name)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def layer(digit: str) -> WholeLayer:
    digest = f"sha256:{digit * 64}"
    return WholeLayer(digest, UnpackedLayer(digest, 1), (), None)


def test_files_of_many_groups_get_their_names_in_one_step(tmp_path: Path) -> None:
    groups = [
        (written(tmp_path / "images", str(n)), written(tmp_path / "records", str(n)))
        for n in range(40)
    ]
    assert publish(groups) == [None] * 40
    for folder in ("images", "records"):
        found = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
        assert found == {str(n): str(n) for n in range(40)}


def test_a_group_of_which_one_file_cannot_be_synced_gets_no_name_and_others_do(
    tmp_path: Path,
) -> None:
    half = written(tmp_path / "images", "half")
    groups = [
        [written(tmp_path / "images", "first")],
        [half, Naming(tmp_path / "missing", tmp_path / "images/other")],
        [written(tmp_path / "images", "last")],
    ]
    failures = publish(groups)
    assert [isinstance(failure, FileNotFoundError) for failure in failures] == [False, True, False]
    assert names_in(tmp_path / "images") == {"first", "half.partial", "last"}


class Disk:
    """Takes layers when it is told to; `groups` are those that it was given."""

    def __init__(self) -> None:
        self.groups: list[str] = []
        self.go_on = threading.Event()
        self.failing = ""

    def add(self, layers: Sequence[WholeLayer]) -> list[OSError | None]:
        self.groups.append("".join(it.digest[-1] for it in layers))
        assert self.go_on.wait(10)
        return [OSError("worn out") if it.digest[-1] == self.failing else None for it in layers]


async def test_layers_that_come_while_others_are_added_are_added_together() -> None:
    disk = Disk()
    commit = GroupCommit(disk.add)
    async with trio.open_nursery() as nursery:
        for digit in "abcd":
            nursery.start_soon(commit.add, layer(digit))
            await trio.testing.wait_all_tasks_blocked()
        disk.go_on.set()
    assert disk.groups == ["a", "bcd"]


async def test_a_layer_that_fails_is_its_own_tasks_failure_alone() -> None:
    disk = Disk()
    disk.failing = "c"
    commit = GroupCommit(disk.add)
    done = []

    async def add(digit: str) -> None:
        await commit.add(layer(digit))
        done.append(digit)

    async def fail(digit: str) -> None:
        with pytest.raises(OSError, match="worn out"):
            await commit.add(layer(digit))

    async with trio.open_nursery() as nursery:
        for digit in "abcd":
            nursery.start_soon(fail if digit == "c" else add, digit)
            await trio.testing.wait_all_tasks_blocked()
        disk.go_on.set()
    assert sorted(done) == ["a", "b", "d"]


async def test_a_cancelled_task_takes_nothing_with_it_but_its_own_layer() -> None:
    disk = Disk()
    commit = GroupCommit(disk.add)
    async with trio.open_nursery() as nursery:
        first, waiting = trio.CancelScope(), trio.CancelScope()

        async def add(digit: str, scope: trio.CancelScope) -> None:
            with scope:
                await commit.add(layer(digit))

        for digit, scope in (("a", first), ("b", waiting), ("c", trio.CancelScope())):
            nursery.start_soon(add, digit, scope)
            await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        waiting.cancel()
        await trio.testing.wait_all_tasks_blocked()
        disk.go_on.set()
    assert disk.groups == ["a", "c"]
