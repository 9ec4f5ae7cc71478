"""Sparse files of all four kinds that GNU tar writes come out whole."""

import io
import tarfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.images.sparse import MAX_HOLE_BYTES, Expansion, SparseMap
from agent.images.tar_header import TarError
from tests.agent.images.rewriting import content_of, rewritten
from tests.support import trees
from tests.support.tarballs import entry, tarball, with_field


def sparse_archive(name: str) -> bytes:
    if name == "gnu":
        return trees.archive(trees.sparse_files, "--sparse", gnu=True)
    version = f"--sparse-version={name.removeprefix('pax ')}"
    return trees.archive(trees.sparse_files, "--sparse", version)


def files(archive: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isreg():
                assert not member.issparse(), member.name
                file = tar.extractfile(member)
                assert file is not None
                yield member.name.removeprefix("./"), file.read()


@pytest.mark.parametrize("step", [1 << 20, 511, 512, 513])
@pytest.mark.parametrize("name", ["gnu", "pax 0.0", "pax 0.1", "pax 1.0"])
def test_the_files_are_what_they_were_before_they_were_archived(name: str, step: int) -> None:
    archive = sparse_archive(name)
    assert len(archive) < 1 << 20  # or tar has not stored the files sparsely
    expected = dict(files(trees.archive(trees.sparse_files)))
    assert dict(files(rewritten(archive, step))) == expected


def test_links_to_a_sparse_file_link_to_the_whole_one() -> None:
    with tarfile.open(fileobj=io.BytesIO(rewritten(sparse_archive("gnu")))) as tar:
        linked = tar.getmember("./many-again")
    assert (linked.type, linked.linkname) == (tarfile.LNKTYPE, "./many")


@given(
    st.lists(st.tuples(st.integers(0, 300), st.binary(max_size=300)), max_size=8),
    st.integers(0, 2000),
    st.integers(1, 400),
)
def test_an_expansion_puts_each_extent_in_its_place(
    gaps: list[tuple[int, bytes]], tail: int, step: int
) -> None:
    whole = bytearray()
    extents = []
    for gap, data in gaps:
        whole += bytes(gap)
        extents.append((len(whole), len(data)))
        whole += data
    whole += bytes(tail)
    sparse = SparseMap(len(whole), tuple(extents))
    sparse.validate()
    stored = b"".join(data for _, data in gaps)
    assert sparse.stored_bytes == len(stored)
    expansion = Expansion(sparse)
    out = b""
    for start in range(0, len(stored), step):
        out += b"".join(map(content_of, expansion.feed(memoryview(stored[start : start + step]))))
    out += b"".join(map(content_of, expansion.finish()))
    assert out == whole + bytes(-len(whole) % 512)


def gnu_entry(extents: list[tuple[int, int]], size: int, stored: int) -> bytes:
    fields = b"".join(b"%011o\0%011o\0" % extent for extent in extents).ljust(96, b"\0")
    made = entry("a/sparse", bytes(stored), kind=tarfile.GNUTYPE_SPARSE)
    made = with_field(made, 257, b"ustar  \0")
    return with_field(made, 386, fields + b"\0" + b"%011o\0" % size)


@pytest.mark.parametrize(
    ("extents", "size", "stored", "cause"),
    [
        ([(10, 5), (0, 5)], 100, 10, "not in order"),
        ([(0, 10), (5, 5)], 100, 15, "not in order"),
        ([(0, 10)], 5, 10, "beyond its end"),
        ([(0, 10)], 100, 20, "has 20 bytes, its sparse map 10"),
        ([], MAX_HOLE_BYTES + 1, 0, "more than 8 GiB of holes"),
    ],
)
def test_a_map_that_cannot_be_is_refused_with_the_entry_s_name(
    extents: list[tuple[int, int]], size: int, stored: int, cause: str
) -> None:
    with pytest.raises(TarError, match=f"entry 'a/sparse': .*{cause}"):
        rewritten(tarball(gnu_entry(extents, size, stored)))


def pax_entry(data: bytes, **records: str) -> bytes:
    headers = {key.replace("_", "."): value for key, value in records.items()}
    return entry("GNUSparseFile.1/x", data, pax_headers=headers)


@pytest.mark.parametrize(
    ("records", "data", "cause"),
    [
        ({"GNU_sparse_major": "2", "GNU_sparse_minor": "0"}, b"", "none that GNU tar ever had"),
        ({"GNU_sparse_size": "9", "GNU_sparse_map": "0"}, b"", "half an extent"),
        ({"GNU_sparse_size": "9", "GNU_sparse_map": "0,x"}, b"", "a number in its sparse map"),
        ({"GNU_sparse_size": "9", "GNU_sparse_offset": "0"}, b"", "not in order"),
    ],
)
def test_records_that_contradict_themselves_are_refused(
    records: dict[str, str], data: bytes, cause: str
) -> None:
    with pytest.raises(TarError, match=cause):
        rewritten(tarball(pax_entry(data, **records)))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "cut short"),
        (b"2\n0\n5\n".ljust(512, b"\0"), "cut short"),
        (b"9" * 600, "too long"),
        (b"999999999\n".ljust(512, b"\0"), "too long"),
        (b"1\n-5\n9\n".ljust(512, b"\0"), "a number in its sparse map"),
    ],
)
def test_a_map_before_the_content_that_is_none_is_refused(content: bytes, cause: str) -> None:
    records = {"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_realsize": "100"}
    records["GNU_sparse_name"] = "real/name"
    with pytest.raises(TarError, match=f"entry 'real/name': .*{cause}"):
        rewritten(tarball(pax_entry(content, **records)))


def test_more_extents_than_anybody_has_are_refused() -> None:
    extension = b"".join(b"%011o\0%011o\0" % (n, 0) for n in range(21)) + b"\1" + bytes(7)
    first = with_field(gnu_entry([(0, 0)] * 4, 10, 0), 482, b"\1")
    with pytest.raises(TarError, match="its sparse map is too long"):
        rewritten(first + extension * 5000)
