"""Files get their names when they are on the disk, whoever else asks for the same meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from agent.images.group_commit import GroupCommit, Naming


def written(directory: Path, name: str) -> Naming:
    directory.mkdir(exist_ok=True)
    source = directory / f"{name}.partial"
    source.write_text(name)
    return Naming(source, directory / name)


def test_the_files_of_many_threads_all_get_their_names(tmp_path: Path) -> None:
    commit = GroupCommit()
    wanted = [
        [written(tmp_path / "images", str(n)), written(tmp_path / "records", str(n))]
        for n in range(40)
    ]
    threads = [threading.Thread(target=commit.publish, args=(namings,)) for namings in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for folder in ("images", "records"):
        found = {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}
        assert found == {str(n): str(n) for n in range(40)}


def test_what_cannot_be_published_is_its_askers_failure_alone(tmp_path: Path) -> None:
    commit = GroupCommit()
    good = [[written(tmp_path / "images", str(n))] for n in range(8)]
    # The second of its files is missing, so the first gets no name either.
    half = written(tmp_path / "images", "half")
    bad = [half, Naming(tmp_path / "missing", tmp_path / "images/other")]
    failures = []

    def publish(namings: list[Naming]) -> None:
        try:
            commit.publish(namings)
        except FileNotFoundError as error:
            failures.append(Path(error.filename))

    threads = [threading.Thread(target=publish, args=(it,)) for it in (*good[:4], bad, *good[4:])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [tmp_path / "missing"]
    names = {path.name for path in (tmp_path / "images").iterdir()}
    assert names == {*map(str, range(8)), "half.partial"}


def test_a_publisher_goes_on_after_a_failure(tmp_path: Path) -> None:
    commit = GroupCommit()
    with pytest.raises(FileNotFoundError):
        commit.publish([Naming(tmp_path / "missing", tmp_path / "name")])
    commit.publish([written(tmp_path, "name")])
    assert (tmp_path / "name").read_text() == "name"
