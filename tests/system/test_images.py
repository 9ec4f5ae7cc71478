"""Real images from a real registry: pulled, described, mounted, run, the same as umoci's."""

import json
import socket

import pytest
import trio

from protocol import requests, responses
from protocol.client import AgentClient
from protocol.requests import AgentRequest
from tests.support import commands
from tests.support.execution import pull, refusal, run
from tests.support.images import ARCHITECTURE, OTHER_ARCHITECTURE, Images, PushedImage
from tests.support.layout import MANIFEST, digest_of
from tests.support.machine import Machine
from tests.support.store import wrong_blobs
from tests.support.tree import describe, differences

# Each image, and what it prints by itself.
OUTPUTS = {
    "busybox": b"hello from busybox\n",
    "sixty_layers": b"59\n",
    "whiteouts": b"-early\nfour\nthree\n",
    "zstd": b"Linux\n",
    "uncompressed": b"Linux\n",
    "docker_schema2": b"Linux\n",
    "multi_platform": f"{ARCHITECTURE}\n".encode(),
    "sparse_gnu": b"8388608 /many\n",
    "sparse_pax": b"8388608 /many\n",
}


@pytest.fixture(params=[*OUTPUTS, "odd_entries"])
def image(request: pytest.FixtureRequest, images: Images) -> PushedImage:
    found = getattr(images, request.param)
    assert isinstance(found, PushedImage)
    return found


async def test_the_answer_to_a_pull_describes_the_image(
    client: AgentClient, image: PushedImage
) -> None:
    info = await pull(client, image.reference)
    assert info["reference"] == image.reference
    assert info["digest"] == image.config_digest
    assert info["layers"] == list(image.layers)
    assert info["layer_count"] == len(image.layers)
    assert (info["os"], info["architecture"]) == ("linux", ARCHITECTURE)
    queried = await client.request(requests.Query(image=image.reference))
    assert queried == responses.Ok(info)
    listed = await client.request(requests.ListImages())
    assert isinstance(listed, responses.Ok)
    assert isinstance(listed.data, list)
    assert info in listed.data


async def test_its_merged_tree_is_what_umoci_unpacks(
    machine: Machine, client: AgentClient, images: Images, image: PushedImage
) -> None:
    await pull(client, image.reference)
    workload = f"tree-{image.tag}"
    answer = await client.request(
        requests.PrepareOverlay(image=image.reference, workload_id=workload)
    )
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    merged = machine.path(answer.data["rootfs_path"])
    actual = await trio.to_thread.run_sync(describe, merged)
    expected = await trio.to_thread.run_sync(images.tree, image)
    assert differences(expected, actual) == []
    removed = await client.request(requests.CleanupOverlay(workload_id=workload))
    assert removed == responses.Ok()


@pytest.mark.parametrize("name", OUTPUTS)
async def test_a_container_of_it_runs(client: AgentClient, images: Images, name: str) -> None:
    image = getattr(images, name)
    await pull(client, image.reference)
    done = await run(client, image.reference)
    assert (done.exit_code, done.stdout, done.stderr) == (0, OUTPUTS[name], b"")


async def test_odd_names_and_modes_reach_the_container(client: AgentClient, images: Images) -> None:
    image = images.odd_entries
    await pull(client, image.reference)
    script = (
        "cat '/names/größe-大きさ-🐢'; stat -c %a /modes/4755; cat /names/$(printf 'new\\nline')"
    )
    done = await run(client, image.reference, "/bin/sh", "-c", script)
    assert b"\xf0\x9f\x90\xa24755\n" in done.stdout


async def test_each_layer_is_a_read_only_directory_under_its_digest(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    """Hosts overlay these themselves, and read them from other VMs."""
    info = await pull(client, images.whiteouts.reference)
    layers = [machine.path(f"/storage/layers/{d.removeprefix('sha256:')}") for d in info["layers"]]
    _, before, between, _ = layers
    assert (before / "gone/one").read_text() == "gone one\n"
    whiteout = (between / "gone").lstat()
    assert (whiteout.st_mode & 0o170000, whiteout.st_rdev) == (0o020000, 0)
    with pytest.raises(OSError, match="Read-only"):
        (before / "new").touch()


async def test_skopeo_reads_the_content_store(
    machine: Machine, client: AgentClient, image: PushedImage
) -> None:
    info = await pull(client, image.reference)
    layout = f"oci:{machine.storage}/oci:{image.reference}"
    raw = await trio.to_thread.run_sync(commands.run, "skopeo", "inspect", "--raw", layout)
    manifest = json.loads(raw)
    assert manifest["mediaType"] == MANIFEST
    assert manifest["config"]["digest"] == image.config_digest
    if image.tag != "schema2":
        # That one stands in the index as a copy in OCI's media types, which every tool reads.
        assert digest_of(raw) == image.manifest_digest
    text = await trio.to_thread.run_sync(commands.run, "skopeo", "inspect", layout)
    inspected = json.loads(text)
    assert inspected["Digest"] == digest_of(raw)
    assert inspected["Layers"] == list(image.layers)
    assert inspected["Env"] == info["env"] or (inspected["Env"] is None and info["env"] == [])


async def test_every_blob_of_the_store_is_what_its_name_says(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    for image in (images.busybox, images.zstd, images.docker_schema2, images.multi_platform):
        await pull(client, image.reference)
    assert wrong_blobs(machine.storage) == []


async def test_a_size_is_the_sum_of_the_uncompressed_layers(
    client: AgentClient, images: Images
) -> None:
    sizes = {
        name: (await pull(client, getattr(images, name).reference))["size"]
        for name in ("busybox", "zstd", "uncompressed")
    }
    plain = images.uncompressed.layout / "blobs/sha256" / images.uncompressed.layers[0][7:]
    assert set(sizes.values()) == {plain.stat().st_size}


async def test_another_platform_is_taken_from_the_index_when_asked_for(
    client: AgentClient, images: Images
) -> None:
    image = images.multi_platform
    answer = await client.request(
        requests.Pull(image=image.reference, oci_platform=f"linux/{OTHER_ARCHITECTURE}")
    )
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    assert answer.data["architecture"] == OTHER_ARCHITECTURE
    # The platform pulled last owns the reference.
    assert await client.request(requests.Query(image=image.reference)) == answer
    assert (await pull(client, image.reference))["architecture"] == ARCHITECTURE


async def test_a_platform_that_the_index_lacks_is_an_error_that_names_those_it_has(
    client: AgentClient, images: Images
) -> None:
    error = await refusal(
        client,
        requests.Pull(image=images.multi_platform.reference, oci_platform="linux/s390x"),
    )
    assert error.code == "PULL_FAILED"
    assert "linux/s390x" in error.message
    assert f"linux/{ARCHITECTURE}" in error.message


async def test_an_image_is_found_by_any_spelling_of_its_reference(
    client: AgentClient, images: Images
) -> None:
    image = images.busybox
    info = await pull(client, image.reference)
    by_digest = f"{image.reference.rpartition(':')[0]}@{image.manifest_digest}"
    pulled = await pull(client, by_digest)
    assert pulled["digest"] == info["digest"]
    for spelling in (image.reference, by_digest):
        answer = await client.request(requests.Query(image=spelling))
        assert isinstance(answer, responses.Ok), answer


@pytest.mark.parametrize(
    "reference", ["", "lower/UPPER", "a b", "x:y:z", "name@sha256:12", "-x", "a/../b", "a//b"]
)
async def test_what_is_no_reference_is_refused_before_any_network_use(
    client: AgentClient, reference: str
) -> None:
    """Not even the host that it begins with is connected to."""
    with socket.create_server(("127.0.0.1", 0)) as registry:
        registry.setblocking(False)
        for image in (reference, f"127.0.0.1:{registry.getsockname()[1]}/{reference}"):
            asked: dict[str, AgentRequest] = {
                "PULL_FAILED": requests.Pull(image=image),
                "QUERY_FAILED": requests.Query(image=image),
                "OVERLAY_FAILED": requests.PrepareOverlay(image=image, workload_id="w"),
                "INVALID_REQUEST": requests.Run(image=image, command=("true",)),
            }
            for code, request in asked.items():
                error = await refusal(client, request)
                assert error.code == code
                assert repr(image) in error.message or image in error.message
        with pytest.raises(BlockingIOError):
            registry.accept()


async def test_an_image_that_is_not_there_is_not_found(client: AgentClient) -> None:
    assert (await refusal(client, requests.Query(image="absent"))).code == "NOT_FOUND"
    error = await refusal(client, requests.Run(image="absent", command=("true",)))
    assert error.code == "NOT_FOUND"
    assert "absent" in error.message
    error = await refusal(client, requests.PrepareOverlay(image="absent", workload_id="w"))
    assert error.code in ("NOT_FOUND", "OVERLAY_FAILED")
