"""Pulls that cannot succeed: refused with the cause, nothing kept, and the next good one works."""

import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import pytest

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support import trees
from tests.support.crowded_layer import crowded_layer
from tests.support.execution import pull, refusal, run
from tests.support.images import Images
from tests.support.layout import LayerBlob, digest_of, gzip_layer, zstd_layer
from tests.support.machine import Machine, booted
from tests.support.misbehaving_registry import MisbehavingRegistry, cut, flipped
from tests.support.store import inventory, wrong_blobs
from tests.support.tarballs import entry, hard_link, symlink, tarball


@pytest.fixture(autouse=True)
async def store_as_it_was(machine: Machine, client: AgentClient) -> AsyncIterator[None]:
    """Whatever a failed pull leaves, it is nothing that could later be taken for good."""
    yield
    assert wrong_blobs(machine.storage) == []
    blobs = machine.storage / "oci/blobs/sha256"
    listed = await client.request(requests.ListImages())
    assert isinstance(listed, responses.Ok)
    assert isinstance(listed.data, list)
    for info in listed.data:
        assert all((blobs / layer.removeprefix("sha256:")).exists() for layer in info["layers"])


@contextmanager
def damaged(path: Path, change: bytes) -> Iterator[None]:
    """A file with its middle byte flipped, or `change` at its end, for the block."""
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes(whole + change if change else flipped)
    try:
        yield
    finally:
        path.write_bytes(whole)


async def pull_failure(client: AgentClient, reference: str) -> str:
    """The message of a pull that must fail."""
    error = await refusal(client, requests.Pull(image=reference))
    assert error.code == "PULL_FAILED"
    return error.message


async def test_a_layer_with_one_flipped_byte(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    image = images.variant("flipped", {"Cmd": ["true"]}, images.noise_layer("flipped", 300_000))
    with damaged(registry.blob_path(image.layers[-1]), b""):
        message = await pull_failure(client, image.reference)
    assert image.layers[-1] in message
    assert "digest" in message
    assert (await refusal(client, requests.Query(image=image.reference))).code == "NOT_FOUND"
    await pull(client, image.reference)
    assert (await run(client, image.reference)).exit_code == 0


@pytest.mark.parametrize("pack", [gzip_layer, zstd_layer])
async def test_a_compressed_layer_with_one_flipped_byte(
    registry: LocalRegistry,
    client: AgentClient,
    images: Images,
    pack: Callable[[bytes], LayerBlob],
) -> None:
    """Whether the decompressor or the digest notices first, the answer names the layer."""
    name = f"flipped-{pack.__name__.replace('_', '-')}"
    layer = images.noise_layer(name, 100_000, pack)
    image = images.variant(name, {"Cmd": ["true"]}, layer)
    with damaged(registry.blob_path(image.layers[-1]), b""):
        assert image.layers[-1] in await pull_failure(client, image.reference)
    await pull(client, image.reference)


async def test_a_configuration_with_one_flipped_byte(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    image = images.variant("flipped-config", {"Cmd": ["true", "some words to hit"]})
    with damaged(registry.blob_path(image.config_digest), b""):
        message = await pull_failure(client, image.reference)
    assert image.config_digest in message
    await pull(client, image.reference)


async def test_a_manifest_that_is_not_the_one_of_its_digest(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    image = images.variant("wrong-manifest", {"Cmd": ["true"]})
    by_digest = f"{image.reference.rpartition(':')[0]}@{image.manifest_digest}"
    with damaged(registry.blob_path(image.manifest_digest), b"\n"):
        message = await pull_failure(client, by_digest)
    assert image.manifest_digest in message
    assert "digest" in message
    await pull(client, by_digest)


async def test_an_index_whose_manifest_is_not_the_one_of_its_digest(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    image = images.multi_platform_too
    with damaged(registry.blob_path(image.manifest_digest), b"\n"):
        message = await pull_failure(client, image.reference)
    assert image.manifest_digest in message
    await pull(client, image.reference)


async def test_a_layer_that_is_not_its_diff_id(client: AgentClient, images: Images) -> None:
    good = images.noise_layer("not-its-diff-id", 100_000)
    wrong = attrs.evolve(good, diff_id=digest_of(b"another tar"))
    reference = images.push_manifest("not-its-diff-id", [wrong], {"Cmd": ["true"]})
    message = await pull_failure(client, reference)
    assert wrong.diff_id in message
    assert good.digest in message
    image = images.variant("its-diff-id", {"Cmd": ["true"]}, good)
    await pull(client, image.reference)
    assert (await run(client, image.reference)).exit_code == 0


async def test_a_configuration_that_lists_another_number_of_layers(
    client: AgentClient, images: Images
) -> None:
    reference = images.push_manifest(
        "one-diff-id-too-many",
        [images.noise_layer("counted-layers", 1000)],
        {},
        more_diff_ids=[digest_of(b"no layer")],
    )
    assert "diff_id" in await pull_failure(client, reference)


@pytest.mark.parametrize(
    ("layer", "cause"),
    [
        (gzip_layer(b"this is no archive" * 100), "tar"),
        (attrs.evolve(gzip_layer(bytes(10240)), media_type="application/x-unknown"), "x-unknown"),
        (attrs.evolve(gzip_layer(bytes(10240)), blob=b"no gzip at all"), "gzip"),
    ],
    ids=["no-tar", "unknown-media-type", "not-what-its-type-says"],
)
async def test_layers_that_are_no_layers(
    client: AgentClient, images: Images, layer: LayerBlob, cause: str
) -> None:
    reference = images.push_manifest(f"no-layer-{cause}", [layer], {})
    assert cause in await pull_failure(client, reference)


async def test_a_layer_that_wants_out_of_its_tree_stays_in_it(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    """By `..`, by absolute names, and through links that lead out."""
    tar = tarball(
        entry("../../../escaped-1", b"1"),
        entry("/escaped-2", b"2"),
        symlink("out", "../../../../../"),
        entry("out/escaped-3", b"3"),
        symlink("absolute", "/"),
        entry("absolute/escaped-4", b"4"),
        hard_link("../escaped-5", "../../escaped-1"),
        entry("device", kind=tarfile.CHRTYPE, devmajor=1, devminor=1, mode=0o666),
    )
    image = images.variant("wants-out", {"Cmd": ["true"]}, gzip_layer(tar))
    await pull(client, image.reference)
    script = "cat /escaped-1 /escaped-2 /escaped-3 /escaped-4 /escaped-5; cat /device || echo no"
    done = await run(client, image.reference, "sh", "-c", script)
    assert done.stdout == b"12341no\n"
    for root in (machine.path("/"), machine.path("/storage"), Path("/")):
        assert [path for path in root.iterdir() if path.name.startswith("escaped")] == []


async def test_a_layer_of_more_than_a_million_entries_is_refused_by_the_one_that_is_too_many(
    machine: Machine, client: AgentClient, misbehaving: MisbehavingRegistry
) -> None:
    """It is a few megabytes to fetch."""
    layer = crowded_layer(directories=1001, files=1000)
    misbehaving.add_image("crowded", [layer])
    before = inventory(machine.storage)
    message = await pull_failure(client, misbehaving.reference("crowded"))
    assert layer.digest in message
    assert "entry '000999/000000': the layer has more than 1,000,000 entries" in message
    assert inventory(machine.storage) == before


async def test_a_layer_with_a_directory_that_would_take_hours_is_refused_at_once_by_its_name(
    machine: Machine, client: AgentClient, misbehaving: MisbehavingRegistry
) -> None:
    layer = crowded_layer(directories=1, files=250_000)
    misbehaving.add_image("one-directory", [layer])
    before = inventory(machine.storage)
    message = await pull_failure(client, misbehaving.reference("one-directory"))
    assert layer.digest in message
    assert "too many names are in one directory, 223,607 in '000000' so far" in message
    assert inventory(machine.storage) == before


async def test_a_layer_that_links_to_what_it_does_not_have_is_refused_by_name(
    client: AgentClient, images: Images
) -> None:
    tar = tarball(hard_link("shadow", "../../../etc/shadow"))
    image = images.variant("links-out", {"Cmd": ["true"]}, gzip_layer(tar))
    message = await pull_failure(client, image.reference)
    assert image.layers[-1] in message
    assert "it is a hard link to '../../../etc/shadow', which this layer does not have" in message


async def test_an_absent_image_is_refused_in_the_registrys_own_words(
    registry: LocalRegistry, client: AgentClient, images: Images
) -> None:
    message = await pull_failure(client, f"{registry.address}/no/such/image:tag")
    assert "404" in message
    assert "unknown" in message.lower()
    await pull(client, images.busybox.reference)


async def test_a_registry_that_is_not_there_is_said_to_refuse(client: AgentClient) -> None:
    message = await pull_failure(client, "localhost:1/image")
    assert "localhost:1" in message


async def test_a_registry_that_no_configuration_names_is_never_asked_in_plain_http(
    client: AgentClient, registry: LocalRegistry
) -> None:
    """The same server under a name that the machine was not told of: TLS, and so no answer."""
    before = registry.access_log.read_text()
    message = await pull_failure(client, f"localhost:{registry.port}/busybox:busybox")
    assert f"localhost:{registry.port}" in message
    assert registry.access_log.read_text() == before


async def test_a_registry_that_stops_in_mid_body_every_time(
    client: AgentClient, images: Images, misbehaving: MisbehavingRegistry
) -> None:
    layer = images.noise_layer("mid-body", 200_000)
    misbehaving.add_image("mid-body", [layer])
    path = f"blobs/{layer.digest}"
    attempts = 4
    # From the start each time: without ranges no attempt gets further than the one before.
    misbehaving.misbehave(path, *[cut(1000)] * attempts)
    message = await pull_failure(client, misbehaving.reference("mid-body"))
    assert layer.digest in message
    assert len(misbehaving.requests_for(path)) == attempts
    info = await pull(client, misbehaving.reference("mid-body"))
    assert info["layers"] == [layer.digest]


async def test_a_registry_that_stops_in_mid_body_once_is_asked_for_the_rest(
    client: AgentClient, images: Images, misbehaving: MisbehavingRegistry
) -> None:
    layer = images.noise_layer("mid-body-once", 200_000)
    misbehaving.add_image("mid-body-once", [layer])
    misbehaving.misbehave(f"blobs/{layer.digest}", cut(150_000))
    await pull(client, misbehaving.reference("mid-body-once"))
    _, second = misbehaving.requests_for(f"blobs/{layer.digest}")
    assert second.headers["Range"].startswith("bytes=")
    assert second.headers["Range"] != "bytes=0-"


async def test_a_registry_that_sends_another_body_of_the_right_length(
    client: AgentClient, images: Images, misbehaving: MisbehavingRegistry
) -> None:
    layer = images.noise_layer("another-body", 50_000)
    misbehaving.add_image("another-body", [layer])
    misbehaving.misbehave(f"blobs/{layer.digest}", flipped)
    message = await pull_failure(client, misbehaving.reference("another-body"))
    assert layer.digest in message
    await pull(client, misbehaving.reference("another-body"))


async def test_a_full_disk(
    registry: LocalRegistry, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Known beforehand from the manifest, or met on the way by a layer that grows unpacked."""
    directory = tmp_path_factory.mktemp("full-disk")
    with booted(directory, insecure_registries=[registry.address], storage_mib=24) as small:
        async with open_client(small.address) as client:
            message = await pull_failure(client, images.large.reference)
            assert "the disk is too full" in message
            assert "bytes are missing" in message
            zeros = images.variant("zeros", {}, gzip_layer(trees.archive(trees.zeros)))
            assert "the disk is full" in await pull_failure(client, zeros.reference)
            info = await pull(client, images.busybox.reference)
            assert info["digest"] == images.busybox.config_digest
            assert (await run(client, images.busybox.reference)).exit_code == 0
            listed = await client.request(requests.ListImages())
            assert listed == responses.Ok([info])
