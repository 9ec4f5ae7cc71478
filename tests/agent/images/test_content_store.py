"""The store of images, and other tools' view of it."""

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.images.blob_store import UnpackedLayer
from agent.images.content_store import ContentStore, NotWhole, StoredImage
from agent.images.reference import parse_reference
from protocol.values import ImageInfo
from tests.support.commands import run
from tests.support.layout import CONFIG, MANIFEST, LayerBlob, digest_of, gzip_layer, plain_layer
from tests.support.trees import archive, numbered

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path)


@pytest.fixture(scope="module")
def layers() -> list[LayerBlob]:
    return [gzip_layer(archive(numbered(1))), plain_layer(archive(numbered(2)))]


def config_of(layers: Sequence[LayerBlob], **process: object) -> bytes:
    return json.dumps(
        {
            "created": "2024-02-29T12:00:00Z",
            "architecture": "amd64",
            "os": "linux",
            "config": process,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            # umoci 0.4.7 does not take a history without times.
            "history": [{"created": "2024-02-29T12:00:00Z"} for _ in layers],
        }
    ).encode()


def add_layer(store: ContentStore, layer: LayerBlob, tar_bytes: int = 1000) -> None:
    with store.blobs.open_partial(layer.digest) as partial:
        partial.append(layer.blob)
        unpacked = UnpackedLayer(layer.diff_id, tar_bytes)
        whole = store.blobs.whole_layer(layer.digest, unpacked, blob=partial.whole())
    assert store.blobs.add_layers([whole]) == [None]


def add_manifest(
    store: ContentStore, layers: Sequence[LayerBlob], config: bytes, *, docker: bool = False
) -> str:
    manifest = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST if docker else MANIFEST,
        "config": {
            "mediaType": DOCKER_CONFIG if docker else CONFIG,
            "digest": store.blobs.add_document(config),
            "size": len(config),
        },
        "layers": [
            {
                "mediaType": DOCKER_LAYER if docker else layer.media_type,
                "digest": layer.digest,
                "size": len(layer.blob),
            }
            for layer in layers
        ],
    }
    return store.blobs.add_document(json.dumps(manifest, indent=1).encode())


def add_image(
    store: ContentStore, text: str, layers: Sequence[LayerBlob], **process: object
) -> StoredImage:
    for layer in layers:
        add_layer(store, layer)
    digest = add_manifest(store, layers, config_of(layers, **process))
    return tag(store, text, digest)


def tag(store: ContentStore, text: str, digest: str, **known: str) -> StoredImage:
    how = {"resolved": digest, "platform": "linux/amd64"} | known
    return store.tag(parse_reference(text), digest, **how)


def found(store: ContentStore, text: str) -> StoredImage | None:
    return store.find(parse_reference(text))


def test_an_image_is_known_with_all_that_hosts_are_told(
    store: ContentStore, layers: list[LayerBlob]
) -> None:
    process = {
        "Entrypoint": ["/init"],
        "Cmd": ["x"],
        "Env": ["A=1"],
        "User": "u",
        "WorkingDir": "/w",
    }
    image = add_image(store, "alpine", layers, **process)
    assert store.images() == [image]
    assert image.info() == ImageInfo(
        reference="docker.io/library/alpine:latest",
        digest=digest_of(config_of(layers, **process)),
        size=2000,
        created="2024-02-29T12:00:00Z",
        architecture="amd64",
        os="linux",
        layer_count=2,
        layers=tuple(layer.digest for layer in layers),
        entrypoint=("/init",),
        cmd=("x",),
        env=("A=1",),
        workdir="/w",
        user="u",
    )
    assert store.by_config_digest(image.config_digest) == image
    assert store.by_config_digest(image.manifest_digest) is None


def test_an_image_is_found_by_any_spelling_of_its_reference(
    store: ContentStore, layers: list[LayerBlob]
) -> None:
    image = add_image(store, "alpine:3", layers)
    index = "sha256:" + "1" * 64
    tag(store, "alpine:3", image.manifest_digest, resolved=index)
    for text in (
        "docker.io/library/alpine:3",
        "index.docker.io/alpine:3",
        f"alpine@{image.manifest_digest}",
        f"alpine:other@{image.manifest_digest}",
        f"alpine@{index}",
    ):
        assert found(store, text) == image, text
    for text in ("alpine", f"user/alpine@{index}", "alpine@sha256:" + "2" * 64):
        assert found(store, text) is None, text


def test_skopeo_and_umoci_read_the_store(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    reference = "127.0.0.1:5000/some/image:1.0"
    image = add_image(store, reference, layers, Cmd=["/bin/sh"])
    location = f"{store.blobs.directory}:{image.reference}"
    inspected = json.loads(run("skopeo", "inspect", f"oci:{location}"))
    assert inspected["Digest"] == image.manifest_digest
    assert inspected["Layers"] == [layer.digest for layer in layers]
    raw_config = run("skopeo", "inspect", "--config", "--raw", f"oci:{location}")
    assert digest_of(raw_config) == image.config_digest

    run("umoci", "stat", "--image", location)
    run("umoci", "unpack", "--image", location, tmp_path / "bundle")
    assert (tmp_path / "bundle/rootfs/layers/002").read_text() == "layer 2\n"


def test_a_schema_2_image_is_kept_byte_for_byte_and_readable_as_an_oci_image(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    base = layers[:1]
    config = config_of(base, Cmd=["/bin/true"])
    add_layer(store, base[0])
    digest = add_manifest(store, base, config, docker=True)
    image = tag(store, "schema2", digest)
    assert (image.manifest_digest, image.config_digest) == (digest, digest_of(config))
    assert json.loads(store.blobs.path(digest).read_bytes())["mediaType"] == DOCKER_MANIFEST

    location = f"{store.blobs.directory}:{image.reference}"
    inspected = json.loads(run("skopeo", "inspect", f"oci:{location}"))
    assert inspected["Layers"] == [base[0].digest]
    run("umoci", "unpack", "--image", location, tmp_path / "bundle")
    assert ContentStore(tmp_path).images() == [image]


def test_everything_is_still_known_after_a_restart(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    first = add_image(store, "first", layers)
    second = add_image(store, "second", layers[:1])
    again = ContentStore(tmp_path)
    assert again.images() == [first, second]
    before = store.find_tag(parse_reference("second"))
    assert again.find_tag(parse_reference("second")) == before


def test_a_reference_means_what_it_was_given_last(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    add_image(store, "moving", layers)
    moved = add_image(store, "moving", layers[:1])
    assert found(store, "moving") == moved
    assert ContentStore(tmp_path).images() == [moved]


def test_an_image_that_is_not_whole_gets_no_name(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    before = add_image(store, "name", layers[:1])
    digest = add_manifest(store, layers, config_of(layers))
    with pytest.raises(NotWhole, match=f"layer {layers[1].digest} is missing"):
        tag(store, "name", digest)
    with store.blobs.open_partial(layers[1].digest) as partial:
        partial.append(layers[1].blob)
    with pytest.raises(NotWhole, match="is missing"):
        tag(store, "name", digest)
    store.blobs.path(layers[1].digest).write_bytes(layers[1].blob)
    with pytest.raises(NotWhole, match="is not known to be"):
        tag(store, "name", digest)
    assert store.images() == ContentStore(tmp_path).images() == [before]


def test_a_blob_is_believed_to_hold_only_what_unpacking_it_showed(
    store: ContentStore, layers: list[LayerBlob]
) -> None:
    add_image(store, "good", layers)
    swapped = [
        LayerBlob(layer.media_type, layer.blob, other.diff_id)
        for layer, other in zip(layers, reversed(layers), strict=True)
    ]
    digest = add_manifest(store, layers, config_of(swapped))
    with pytest.raises(NotWhole, match="is not known to be"):
        tag(store, "bad", digest)


def test_what_a_crash_leaves_is_removed_but_beginnings_of_layers_stay(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    with store.blobs.open_partial(layers[0].digest) as partial:
        partial.append(layers[0].blob[:10])
    leftover = tmp_path / "oci/ingest/tmpabc"
    leftover.write_bytes(b'{"manif')
    blobs = ContentStore(tmp_path).blobs
    assert not leftover.exists()
    assert blobs.partial_bytes(layers[0].digest) == 10
    assert not blobs.has(layers[0].digest, len(layers[0].blob))


@pytest.mark.parametrize("damage", ["manifest", "config", "layer", "record", "truncated layer"])
def test_an_image_with_a_damaged_part_is_left_out_and_the_others_are_there(
    damage: str,
    store: ContentStore,
    layers: list[LayerBlob],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = add_image(store, "broken", layers)
    good = add_image(store, "good", layers[:1])
    victims = {
        "manifest": store.blobs.path(broken.manifest_digest),
        "config": store.blobs.path(broken.config_digest),
        "layer": store.blobs.path(layers[1].digest),
        "record": tmp_path / "oci/unpacked" / layers[1].digest.removeprefix("sha256:"),
        "truncated layer": store.blobs.path(layers[1].digest),
    }
    if damage == "layer":
        victims[damage].unlink()
    else:
        victims[damage].write_bytes(victims[damage].read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        again = ContentStore(tmp_path)
    assert again.images() == [good]
    assert "docker.io/library/broken:latest" in caplog.text
    # And the next image's name is written as if nothing had been.
    add_image(again, "other", layers[:1])
    assert len(ContentStore(tmp_path).images()) == 2


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"manifests":[1,{},{"digest":5},{"digest":"sha256:x","size":1,"annotations":{}}]}',
    ],
)
def test_an_index_that_others_wrote_or_broke_does_no_harm(
    index: bytes, store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    add_image(store, "lost", layers)
    (tmp_path / "oci/index.json").write_bytes(index)
    again = ContentStore(tmp_path)
    assert again.images() == []
    image = add_image(again, "new", layers)
    assert ContentStore(tmp_path).images() == [image]


def test_names_that_many_threads_give_at_once_are_all_kept(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    image = add_image(store, "name:0", layers)
    threads = [
        threading.Thread(target=tag, args=(store, f"name:{n}", image.manifest_digest))
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {f"docker.io/library/name:{n}" for n in range(9)}
    for known in (store, ContentStore(tmp_path)):
        assert {image.reference for image in known.images()} == names


def test_a_discarded_layer_leaves_nothing(
    store: ContentStore, layers: list[LayerBlob], tmp_path: Path
) -> None:
    add_layer(store, layers[0])
    with store.blobs.open_partial(layers[1].digest) as partial:
        partial.append(b"x")
    for layer in layers:
        store.blobs.discard(layer.digest)
    assert store.blobs.unpacked(layers[0].digest) is None
    left = [path for path in (tmp_path / "oci").rglob("*") if path.is_file()]
    assert sorted(path.name for path in left) == ["index.json", "oci-layout"]
