"""Manifests, indexes and configs of registries that are wrong, odd or hostile."""

import json
from typing import Any

import pytest

from agent.images.image_config import ImageConfig, parse_config
from agent.images.manifest import (
    DOCKER_CONFIG,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_MANIFEST,
    ImageIndex,
    ImageManifest,
    InvalidManifest,
    as_oci,
    parse_manifest,
)
from agent.images.platform import Platform

DIGEST = "sha256:" + "0123456789abcdef" * 4
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"


def descriptor(media_type: str, **more: object) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": DIGEST, "size": 7} | more


def manifest(**more: object) -> dict[str, Any]:
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(OCI_CONFIG),
        "layers": [descriptor(f"{OCI_LAYER}+gzip")],
    }
    return document | more


def parse(document: object, content_type: str | None = None) -> ImageManifest | ImageIndex:
    return parse_manifest(json.dumps(document).encode(), content_type)


def test_dockers_layers_are_known_by_the_media_types_of_oci() -> None:
    docker = manifest(
        mediaType=DOCKER_MANIFEST,
        config=descriptor(DOCKER_CONFIG),
        layers=[
            descriptor(f"{DOCKER_LAYER}.gzip"),
            descriptor(DOCKER_LAYER),
            descriptor(f"{DOCKER_LAYER}.zstd"),
        ],
    )
    parsed = parse(docker)
    assert isinstance(parsed, ImageManifest)
    types = [layer.media_type for layer in parsed.layers]
    assert types == [f"{OCI_LAYER}+gzip", OCI_LAYER, f"{OCI_LAYER}+zstd"]

    rewritten = json.loads(as_oci(json.dumps(docker).encode()))
    assert rewritten["mediaType"] == OCI_MANIFEST
    assert rewritten["config"] == descriptor(OCI_CONFIG)
    assert [layer["mediaType"] for layer in rewritten["layers"]] == types


def test_a_manifest_without_a_media_type_is_what_the_registry_says() -> None:
    document = manifest()
    del document["mediaType"]
    assert isinstance(parse(document, f"{OCI_MANIFEST}; charset=utf-8"), ImageManifest)
    with pytest.raises(InvalidManifest, match="unknown type 'text/html'"):
        parse(document, "text/html")


def test_an_index_lists_platforms() -> None:
    entries = [
        descriptor(
            OCI_MANIFEST, platform={"os": "linux", "architecture": "arm64", "variant": "v8"}
        ),
        descriptor(OCI_MANIFEST),
    ]
    parsed = parse({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    assert isinstance(parsed, ImageIndex)
    assert [entry.platform for entry in parsed.manifests] == [Platform("linux", "arm64"), None]


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ([], "not a JSON object"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema 1"),
        (manifest(manifests=[]), "both layers and manifests"),
        (manifest(config=None), "config is not a descriptor"),
        (
            manifest(config=descriptor("application/vnd.cncf.helm.config.v1+json")),
            "not a container",
        ),
        (manifest(config=descriptor(OCI_CONFIG, size=9 << 20)), "above"),
        (manifest(layers=None), "layers is not an array"),
        (manifest(layers=["x"]), r"layers\[0\] is not a descriptor"),
        (manifest(layers=[descriptor(f"{OCI_LAYER}+encrypted")]), r"layers\[0\] is of type"),
        (manifest(layers=[descriptor(OCI_LAYER, size=-1)]), r"layers\[0\] has no size"),
        (manifest(layers=[descriptor(OCI_LAYER, size=True)]), r"layers\[0\] has no size"),
        (manifest(layers=[descriptor(OCI_LAYER, size=1 << 63)]), r"layers\[0\] has no size"),
        (manifest(layers=[descriptor(OCI_LAYER, digest="sha256:../../etc")]), "no sha256 digest"),
        (manifest(layers=[descriptor(OCI_LAYER)] * 501), "501 layers"),
        ({"schemaVersion": 2, "mediaType": OCI_INDEX}, "manifests is not an array"),
    ],
)
def test_what_is_no_image_is_refused_by_the_field_that_is_wrong(document: object, why: str) -> None:
    with pytest.raises(InvalidManifest, match=why):
        parse(document)


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b'{"a":' * 50_000])
def test_what_is_no_json_or_too_deep_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidManifest, match="not JSON"):
        parse_manifest(data, OCI_MANIFEST)


def test_an_empty_config_is_one_with_nothing_in_it() -> None:
    config = ImageConfig.of(
        parse_config(b'{"config":null,"rootfs":{"type":"layers","diff_ids":null},"created":""}')
    )
    assert config.diff_ids == config.env == config.cmd == ()
    assert (config.created, config.user, config.platform) == (None, None, None)


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ({"rootfs": {"diff_ids": ["sha256:abc"]}}, "diff_ids are not all sha256"),
        ({"rootfs": []}, "rootfs is not an object"),
        ({"config": "x"}, "config is not an object"),
        ({"config": {"Env": ["A=1", 2]}}, "Env is not an array of strings"),
        ({"config": {"Cmd": "sh"}}, "Cmd is not an array of strings"),
        ({"config": {"User": 0}}, "User is not a string"),
        ({"created": 5}, "created is not a string"),
    ],
)
def test_a_config_of_wrong_types_is_refused_by_the_field(document: object, why: str) -> None:
    with pytest.raises(InvalidManifest, match=why):
        parse_config(json.dumps(document).encode())
