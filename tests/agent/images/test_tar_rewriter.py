"""What a layer's tar becomes for mkfs.erofs, which reads some archives otherwise than tar does."""

import re
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.images.layer_entries import root
from agent.images.tar_header import TarError
from agent.images.tar_rewriter import MAX_EXTENSION_BYTES
from tests.agent.images.rewriting import rewritten
from tests.support import trees
from tests.support.tarballs import (
    content,
    directory,
    entry,
    hard_link,
    members,
    symlink,
    tarball,
    with_field,
)

END = bytes(2 * 512)


def test_an_ordinary_archive_passes_byte_for_byte_after_the_root() -> None:
    entries = (
        directory("etc/"),
        entry("etc/passwd", b"root", mode=0o600, uid=1, gid=2, mtime=3),
        entry("etc/motd", b"x" * 5000),
        symlink("etc/mtab", "/proc/mounts"),
        hard_link("etc/passwd-", "etc/passwd"),
    )
    assert rewritten(tarball(*entries)) == root() + b"".join(entries) + END


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3000))
def test_it_is_the_same_however_the_archive_is_cut(step: int) -> None:
    assert rewritten(ODD, step) == rewritten(ODD)


ODD = tarball(
    directory("a/"),
    entry("a/" + "long" * 40, b"content", uid=4_000_000_000, mtime=1.5),
    entry("b/c/d", b"y" * 700, pax_headers={"SCHILY.xattr.user.x": "1", "mtime": "7.25"}),
    symlink("l", "b/c"),
    entry("l/e", b"below a link"),
    entry(".wh.gone"),
    entry("b/.wh..wh..opq"),
)


def test_an_archive_may_end_without_its_blocks_of_zeros() -> None:
    for end in (b"", bytes(512), bytes(1024), bytes(10240)):
        for archive in (entry("a", b"x"), b""):
            assert rewritten(archive + end) == root() + archive + max(end, END)


def test_what_follows_the_end_means_nothing() -> None:
    assert list(members(rewritten(tarball() + entry("a") + b"rubbish"))) == ["."]


@pytest.mark.parametrize("step", [1, 100, 512, 4096])
def test_whatever_is_written_anew_the_tar_itself_is_there(step: int) -> None:
    # Global records, a size that means nothing, what AUFS kept, a sparse file's last block.
    sized = with_field(hard_link("h", "a"), 124, b"00000000001\0")
    odd = (
        tarfile.TarInfo.create_pax_global_header({"comment": "f00"}),
        entry("a", b"x"),
        sized,
        entry(".wh..wh.plnk/1.2", b"kept by AUFS"),
        entry("d/" * 90 + "n" * 200, b"long"),
    )
    rewritten(tarball(*odd) + b"and what is behind it", step)
    rewritten(trees.archive(trees.sparse_files, "--sparse", gnu=True), 100 * step)
    rewritten(trees.archive(trees.sparse_files, "--sparse", "--sparse-version=1.0"), 100 * step)


@pytest.mark.parametrize(
    ("stated", "nanoseconds"),
    [
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("17.123456789123", 17_123_456_789),
        ("-1.25", -1_250_000_000),
        ("9", 9_000_000_000),
        ("4.", 4_000_000_000),
    ],
)
def test_a_time_keeps_its_fraction(stated: str, nanoseconds: int) -> None:
    out = rewritten(tarball(entry("a", pax_headers={"mtime": stated})))
    # mkfs.erofs reads the fraction as a number of nanoseconds, to be added to the seconds.
    found = members(out)["a"]
    said = found.pax_headers.get("mtime", f"{int(found.mtime)}.000000000")
    seconds, _, fraction = said.partition(".")
    assert len(fraction) == 9
    assert int(seconds) * 10**9 + int(fraction) == nanoseconds


ODD_HEADERS = {
    "the type of V7": with_field(entry("a", b"x"), 156, b"\0"),
    "no magic, as in V7": with_field(entry("a", b"x"), 257, bytes(8)),
    "GNU's access times where POSIX has a prefix": with_field(
        with_field(entry("a", b"x"), 257, b"ustar  \0"), 345, b"14000000000\00014000000000\0"
    ),
    "a contiguous file": with_field(entry("a", b"x"), 156, b"7"),
    "the mode with the file's type": with_field(entry("a", b"x"), 100, b"0100644\0"),
    "numbers without a terminator": with_field(entry("a", b"x"), 100, b"00000644"),
    "numbers after spaces": with_field(entry("a", b"x"), 108, b"     0 \0"),
    "empty numbers": with_field(entry("a", b"x"), 108, bytes(16)),
    "base-256 numbers": with_field(entry("a", b"x"), 124, b"\x80" + bytes(10) + b"\1"),
    "star's times behind the prefix": with_field(
        with_field(entry("a", b"x"), 476, b"00000000000 00000000000 "), 508, b"tar\0"
    ),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_old_and_odd_headers_become_ordinary_ones(name: str) -> None:
    out = rewritten(tarball(ODD_HEADERS[name]))
    found = members(out)["a"]
    assert (found.type, found.mode, found.uid, found.gid) == (tarfile.REGTYPE, 0o644, 0, 0)
    assert content(out, "a") == b"x"
    assert out[: len(root())] == root()
    assert out[len(root()) :][257:265] == b"ustar\x0000"


def test_a_checksum_of_signed_bytes_is_right_too() -> None:
    odd = with_field(entry("a", b"x"), 0, b"\xe9")
    odd = with_field(odd, 100, b"00000644")  # or mkfs.erofs would get the header as it is
    others = odd[:148] + b" " * 8 + odd[156:512]
    signed = sum(byte - 256 if byte > 127 else byte for byte in others)
    out = rewritten(tarball(odd[:148] + b"%06o\0 " % signed + odd[156:]))
    assert list(members(out)) == [".", "\udce9"]


def test_numbers_beyond_octal_fields_are_kept() -> None:
    out = rewritten(
        tarball(
            entry("ids", uid=4_000_000_000, gid=3_000_000_000),
            with_field(entry("old"), 136, (b"\xff" * 11 + b"\xfb")),
        )
    )
    assert members(out)["ids"].uid == 4_000_000_000
    assert members(out)["ids"].gid == 3_000_000_000
    assert members(out)["old"].pax_headers["mtime"] == "-5.000000000"


def test_entries_that_state_a_size_but_have_no_content_do_not_swallow_what_follows() -> None:
    sized = [
        with_field(directory("d/"), 124, b"00000000005\0"),
        entry("a", b"x"),
        with_field(hard_link("h", "a"), 124, b"00000000001\0"),
        with_field(symlink("s", "a"), 124, b"00000000777\0"),
        entry("z", b"last"),
    ]
    out = rewritten(tarball(*sized))
    assert list(members(out)) == [".", "d", "a", "h", "s", "z"]
    assert content(out, "z") == b"last"


def test_global_headers_mean_nothing() -> None:
    header = tarfile.TarInfo.create_pax_global_header({"comment": "f00", "mtime": "5"})
    assert rewritten(header + tarball(entry("a", b"x"))) == rewritten(tarball(entry("a", b"x")))


def test_names_and_attributes_without_end_are_refused() -> None:
    # Without the entry's own header.
    record = entry("a", pax_headers={"comment": "x" * 500_000})[:-512]
    with pytest.raises(TarError, match="too many names and attributes follow it"):
        rewritten(record * 20)


def test_long_names_and_targets_of_gnu_are_kept() -> None:
    info = tarfile.TarInfo("d/" * 60 + "n" * 255)
    info.type, info.linkname = tarfile.SYMTYPE, "t" * 3000
    found = members(rewritten(tarball(info.tobuf(tarfile.GNU_FORMAT))))[info.name]
    assert found.linkname == info.linkname


def test_attributes_that_only_others_know_are_left_out() -> None:
    records = {
        "SCHILY.xattr.user.kept": "1",
        "SCHILY.xattr.user.empty": "",
        "SCHILY.xattr.trusted.overlay.redirect": "/etc/shadow",
        "SCHILY.xattr.com.apple.quarantine": "1",
        "SCHILY.xattr.system.nfs4_acl": "1",
        "SCHILY.xattr.user.": "1",
        "LIBARCHIVE.xattr.user.kept": "MQ==",
    }
    found = members(rewritten(tarball(entry("a", pax_headers=records))))["a"]
    assert {key for key in found.pax_headers if "xattr" in key} == {
        "SCHILY.xattr.user.kept",
        "SCHILY.xattr.user.empty",
    }


def test_directories_without_an_entry_get_one_before_what_is_in_them() -> None:
    out = members(rewritten(tarball(entry("a/b/c", b"x"))))
    assert list(out) == [".", "a", "a/b", "a/b/c"]
    assert {out[name].mode for name in (".", "a", "a/b")} == {0o755}


def test_entries_end_up_where_links_and_dots_lead_inside_the_root() -> None:
    out = members(
        rewritten(
            tarball(
                symlink("lib", "usr/lib"),
                entry("lib/below", b"x"),
                symlink("abs", "/usr"),
                entry("abs/lib/../up", b"x"),
                entry("../../outside", b"x"),
                hard_link("link", "/lib/below"),
            )
        )
    )
    assert set(out) == {".", "lib", "usr", "usr/lib", "usr/lib/below", "abs", "usr/up"} | {
        "outside",
        "link",
    }
    assert out["link"].linkname == "usr/lib/below"


def test_a_whiteout_leaves_the_layer_s_own_entries_alone() -> None:
    before = members(rewritten(tarball(entry(".wh.f"), entry("f", b"x"), entry(".wh.g"))))
    assert set(before) == {".", ".wh.f", "f", ".wh.g"}
    after = members(rewritten(tarball(entry("f", b"x"), entry(".wh.f"))))
    assert set(after) == {".", "f"}
    for order in (
        (directory("d/"), entry("d/x"), entry(".wh.d")),
        (entry(".wh.d"), directory("d/"), entry("d/x")),
        (entry(".wh.d"), entry("d/x")),
    ):
        names = list(members(rewritten(tarball(*order))))
        assert names.index("d") < names.index("d/.wh..wh..opq")
        assert "d/x" in names


def test_a_whiteout_s_content_is_none() -> None:
    out = rewritten(tarball(entry(".wh.a", b"why ever" * 100), entry("b", b"x")))
    assert members(out)[".wh.a"].size == 0
    assert content(out, "b") == b"x"


def test_what_aufs_kept_for_itself_is_left_out() -> None:
    out = rewritten(
        tarball(entry(".wh..wh.aufs", b"x"), directory(".wh..wh.plnk/"), entry(".wh..wh.plnk/1.2"))
    )
    assert list(members(out)) == ["."]


GOOD = entry("good", b"x")
REFUSED = {
    "the archive ends in the middle": GOOD[:700],
    "but no entry that they are of": GOOD + entry("x", pax_headers={"mtime": "1.5"})[:1024],
    "no tar header follows": GOOD + b"rubbish" * 100,
    "a block of zeros follows it, but not the end": GOOD + bytes(512) + entry("b"),
    "hard link to 'nothing', which this layer does not have": hard_link("a", "nothing"),
    "hard link to 'd', a directory": directory("d/") + hard_link("a", "d"),
    "it lies below 'good', which is no directory": GOOD + entry("good/a"),
    "too many symbolic links": symlink("l", "l/x") + entry("l/a"),
    "it is a whiteout of nothing": entry(".wh."),
    "it lies below a whiteout": entry(".wh.a/b"),
    "it is the root, and no directory": entry("./"),
    "its name is too long": entry("n" * 256),
    "its name is too long ": entry("/".join(["n" * 200] * 21)),
    "which is none that a layer may have": entry("a", kind=b"M"),
    "its name or target is empty": with_field(entry("a"), 0, b"\0"),
    "it links to nothing": symlink("a", ""),
    "its owner is": entry("a", pax_headers={"uid": "4294967296"}),
    "a number in its PAX header": entry("a", pax_headers={"gid": "1_0"}),
    "its time is b'now'": entry("a", pax_headers={"mtime": "now"}),
    "a number in its header": with_field(entry("a"), 108, b"notanum\0"),
    "its size is negative": with_field(entry("a"), 124, b"\xff" * 12),
    "its device number": entry("a", kind=tarfile.CHRTYPE, devmajor=5000),
    "more than 31 KiB of extended attributes": entry(
        "a", pax_headers={f"SCHILY.xattr.user.{number}": "v" * 1000 for number in range(32)}
    ),
    "of names and attributes follow": entry(
        "a", pax_headers={"comment": "x" * MAX_EXTENSION_BYTES}
    ),
    "a PAX header that follows is damaged": entry("a", b"9 comment\n", kind=b"x"),
    "a PAX header that follows is damaged ": entry("a", b"99 comment=1\n", kind=b"x"),
}


@pytest.mark.parametrize("cause", REFUSED)
def test_what_cannot_be_a_layer_is_refused_with_the_cause(cause: str) -> None:
    with pytest.raises(TarError) as raised:
        rewritten(REFUSED[cause] + END)
    assert cause.strip() in str(raised.value)


def test_an_error_names_the_entry() -> None:
    with pytest.raises(TarError, match=r"^entry 'some/where': it is a hard link to 'gone'"):
        rewritten(tarball(entry("a"), hard_link("some/where", "gone")))


def test_a_layer_has_a_limit_of_entries() -> None:
    entries = [entry(f"f{number}") for number in range(10)]
    assert len(members(rewritten(tarball(*entries), max_entries=10))) == 11
    with pytest.raises(TarError, match="the layer has more than 10 entries"):
        rewritten(tarball(*entries, entry("one/more")), max_entries=10)


# Of archives that mkfs.erofs would take far too long for: each name is searched for in a list.
ENDLESS = {
    "new names": [entry(f"d/{number}") for number in range(100)],
    "long ones": [entry(f"d/{number}", pax_headers={"a": "b"}) for number in range(100)],
    "the same names": [entry(f"d/{number % 25}") for number in range(200)],
    "removed names": [entry(f"d/.wh.{number}") for number in range(100)],
    "directories": [directory(f"d/{number}/") for number in range(100)],
    "implied directories": [entry(f"d/{number}/x") for number in range(100)],
    "directories in turn": [entry(f"d/{number % 25}/{number}") for number in range(25 + 25 * 7)],
    "hard links": [
        *(entry(f"d/{number}") for number in range(25)),
        *(hard_link(f"e/{number % 5}", "d/24") for number in range(200)),
    ],
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_directory_that_mkfs_erofs_would_search_for_hours_is_named_with_its_size(
    kind: str,
) -> None:
    archive = tarball(*ENDLESS[kind])
    assert rewritten(archive)
    with pytest.raises(TarError, match=r"^entry '.+': too many names are in one") as raised:
        rewritten(archive, max_steps=3000)
    found = re.search(r"one directory, (\d+) in 'd' so far", str(raised.value))
    assert found, raised.value
    assert 20 <= int(found[1]) < 100


def test_a_tree_of_many_small_directories_is_not_what_takes_hours() -> None:
    """Each of them is found at once by all the entries in it but the first."""
    tree = [
        entry(f"{top}/{middle}/{number}")
        for top in range(5)
        for middle in range(5)
        for number in range(8)
    ]
    assert rewritten(tarball(*tree), max_steps=3000)


def test_everything_that_gnu_tar_makes_of_odd_files_is_kept() -> None:
    archive = trees.archive(trees.odd_entries)
    before, after = members(archive), members(rewritten(archive))
    assert {name.removeprefix("./") for name in before} == {
        name.removeprefix("./") for name in after
    }
