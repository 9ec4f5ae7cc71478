"""Which layers a packed share holds, and in which order."""

from pathlib import Path

import pytest

from agent.images.packed_share import PackedEntry, PackedError, PackedShare, unpacked_id


@pytest.fixture
def share(tmp_path: Path) -> PackedShare:
    return PackedShare(lambda: tmp_path)


def made(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).mkdir() if name.endswith("/") else (directory / name).touch()


def ids(share: PackedShare) -> list[str]:
    return [entry.id for entry in share.entries()]


def test_directories_are_layers_sorted_by_name(share: PackedShare, tmp_path: Path) -> None:
    made(tmp_path, "b/", "a/", "c/")
    assert share.entries() == [PackedEntry("a"), PackedEntry("b"), PackedEntry("c")]


def test_a_tar_is_a_layer_where_no_directory_has_its_id(share: PackedShare, tmp_path: Path) -> None:
    made(tmp_path, "a/", "a.tar", "b.tar", "a-1.tar")
    assert share.entries() == [
        PackedEntry("a"),
        PackedEntry("a-1", tmp_path / "a-1.tar"),
        PackedEntry("b", tmp_path / "b.tar"),
    ]


def test_an_order_is_gone_by_as_far_as_it_names_layers(share: PackedShare, tmp_path: Path) -> None:
    made(tmp_path, "a/", "b/", "c.tar", "d/")
    (tmp_path / "layer-order").write_text("c\nnone\n b \na\n\nc\n")
    assert ids(share) == ["c", "b", "a"]
    (tmp_path / "layer-order").write_text("none\n")
    assert ids(share) == ["a", "b", "c", "d"]


def test_what_else_lies_about_is_no_layer(share: PackedShare, tmp_path: Path) -> None:
    made(tmp_path, "a/", "lost+found/", ".Trashes/", "b.partial/", "c.tar.partial", "config.json")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "link.tar").symlink_to("config.json")
    assert ids(share) == ["a"]


def test_a_share_without_layers_is_no_image(share: PackedShare, tmp_path: Path) -> None:
    made(tmp_path, "lost+found/", "readme")
    with pytest.raises(PackedError, match=f"{tmp_path}: there are no directories or tars in it"):
        share.entries()


def test_a_layer_whose_name_cannot_be_told_is_an_error(share: PackedShare, tmp_path: Path) -> None:
    made(tmp_path, "a/", "b\udcff/")
    with pytest.raises(PackedError, match="has no printable name"):
        share.entries()


@pytest.mark.parametrize(
    "names",
    [
        ("sha256:a", "packed:b"),
        ("sha256:..", "packed:.."),
        ("sha256:a/b", "packed:a/b"),
        ("sha256:", "packed:"),
        ("sha256:a", "sha256:a"),
        ("packed:a", "packed:a"),
    ],
)
def test_only_names_of_directories_stand_for_them(names: tuple[str, str]) -> None:
    assert unpacked_id(*names) is None
    assert unpacked_id("sha256:a", "packed:a") == "a"
