"""Archives of any shape: mkfs.erofs makes of them what the rewriter foresees."""

import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.images.layer import LayerStore
from agent.images.layer_build import LayerError
from agent.images.tar_header import TarError
from tests.agent.images.building import build, digest_of
from tests.agent.images.rewriting import rewritten
from tests.support.tarballs import directory, entry, hard_link, symlink, tarball

# Few names, so that entries meet: below, instead of, and linking to each other.
NAMES = st.sampled_from(["a", "b", "c"])
PARENTS = st.lists(NAMES | st.sampled_from(["..", "."]), max_size=3)
PATHS = st.builds(lambda parents, name: "/".join([*parents, name]), PARENTS, NAMES)
TIMES = st.sampled_from([0, 1.5, 1_700_000_000])


def whiteout(path: str) -> bytes:
    parent, slash, name = path.rpartition("/")
    return entry(f"{parent}{slash}.wh.{name}")


ENTRIES: list[st.SearchStrategy[bytes]] = [
    st.builds(entry, PATHS, st.sampled_from([b"", b"x", b"y" * 4097]), mtime=TIMES),
    st.builds(directory, PATHS, st.sampled_from([0o755, 0o1777]), mtime=TIMES),
    st.builds(symlink, PATHS, PATHS | st.just("/a/b") | st.just("/")),
    st.builds(hard_link, PATHS, PATHS),
    st.builds(whiteout, PATHS),
    st.builds(lambda path: entry(f"{path}/.wh..wh..opq"), PATHS),
    st.builds(lambda path: entry(path, kind=tarfile.FIFOTYPE), PATHS),
]


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.one_of(ENTRIES), max_size=12))
def test_an_archive_becomes_its_layer_or_is_refused_before_mkfs_erofs_sees_it(
    layers: LayerStore, entries: list[bytes]
) -> None:
    archive = tarball(*entries)
    cause = refusal(archive)
    if cause is None:
        # `finish` holds the mounted image against the tree.
        assert layers.has(build(layers, archive))
        layers.remove(digest_of(archive))
    else:
        with pytest.raises(LayerError) as raised:
            build(layers, archive)
        assert str(raised.value) == f"{digest_of(archive)}: {cause}"


def refusal(archive: bytes) -> str | None:
    try:
        rewritten(archive)
    except TarError as error:
        return str(error)
    return None
