"""Overlays of workloads: composed, mounted, kept, removed."""

from pathlib import Path

import pytest

from protocol import requests, responses
from protocol.client import AgentClient
from tests.support.execution import pull, refusal, shell
from tests.support.images import Images
from tests.support.machine import Machine


@pytest.fixture
async def busybox(client: AgentClient, images: Images) -> str:
    await pull(client, images.busybox.reference)
    return images.busybox.reference


async def prepare(client: AgentClient, image: str, workload_id: str) -> dict[str, str]:
    answer = await client.request(requests.PrepareOverlay(image=image, workload_id=workload_id))
    assert isinstance(answer, responses.Ok), answer
    assert isinstance(answer.data, dict)
    return answer.data


async def cleanup(client: AgentClient, workload_id: str) -> None:
    answer = await client.request(requests.CleanupOverlay(workload_id=workload_id))
    assert answer == responses.Ok()


async def test_its_directories_are_where_hosts_look_for_them(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    info = await prepare(client, busybox, "places")
    assert info == {
        "rootfs_path": "/storage/overlays/places/merged",
        "upper_path": "/storage/overlays/places/upper",
        "work_path": "/storage/overlays/places/work",
    }
    assert (machine.path(info["rootfs_path"]) / "bin/busybox").is_file()
    await cleanup(client, "places")


async def test_what_is_written_to_it_lands_in_its_upper(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    info = await prepare(client, busybox, "writes")
    merged, upper = machine.path(info["rootfs_path"]), machine.path(info["upper_path"])
    (merged / "etc/new").write_text("new")
    (merged / "etc/passwd").unlink()
    assert (upper / "etc/new").read_text() == "new"
    assert (upper / "etc/passwd").is_char_device()
    await cleanup(client, "writes")


async def test_preparing_it_again_gives_the_same_answer_and_keeps_the_contents(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    first = await prepare(client, busybox, "again")
    (machine.path(first["rootfs_path"]) / "kept").touch()
    mounts = await shell(client, "wc -l </proc/self/mountinfo")
    assert await prepare(client, busybox, "again") == first
    assert await shell(client, "wc -l </proc/self/mountinfo") == mounts
    assert (machine.path(first["rootfs_path"]) / "kept").exists()
    await cleanup(client, "again")


async def test_it_keeps_its_layers_when_the_tag_moves(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    old = images.variant("overlay-tag", {}, images.noise_layer("overlay-old"))
    await pull(client, old.reference)
    info = await prepare(client, old.reference, "pinned")
    new = images.variant("overlay-tag", {}, images.noise_layer("overlay-new"))
    await pull(client, new.reference)
    assert await prepare(client, new.reference, "pinned") == info
    assert _names(machine.path(info["rootfs_path"]) / "noise") == ["overlay-old"]
    fresh = await prepare(client, new.reference, "unpinned")
    assert _names(machine.path(fresh["rootfs_path"]) / "noise") == ["overlay-new"]
    await cleanup(client, "pinned")
    await cleanup(client, "unpinned")


async def test_an_image_of_sixty_layers_is_composed(
    machine: Machine, client: AgentClient, images: Images
) -> None:
    await pull(client, images.sixty_layers.reference)
    info = await prepare(client, images.sixty_layers.reference, "sixty")
    assert len(_names(machine.path(info["rootfs_path"]) / "layers")) == 59
    await cleanup(client, "sixty")


async def test_removing_it_unmounts_it_and_leaves_nothing(
    machine: Machine, client: AgentClient, busybox: str
) -> None:
    mounts = await shell(client, "cat /proc/self/mountinfo")
    info = await prepare(client, busybox, "removed")
    (machine.path(info["rootfs_path"]) / "etc/new").touch()
    await cleanup(client, "removed")
    assert not (machine.storage / "overlays/removed").exists()
    after = await shell(client, "cat /proc/self/mountinfo")
    assert [line for line in after.splitlines() if "removed" in line] == []
    assert len(after.splitlines()) <= len(mounts.splitlines()) + 1  # perhaps the image's layer


async def test_removing_what_is_not_there_is_fine(client: AgentClient) -> None:
    await cleanup(client, "never-was")


@pytest.mark.parametrize("workload_id", ["", ".", "..", "a/b", "../x", "a b", "ü", "x" * 129])
async def test_names_that_are_no_workloads_are_refused(
    client: AgentClient, busybox: str, workload_id: str
) -> None:
    error = await refusal(client, requests.PrepareOverlay(image=busybox, workload_id=workload_id))
    assert error.code == "OVERLAY_FAILED"
    error = await refusal(client, requests.CleanupOverlay(workload_id=workload_id))
    assert error.code == "CLEANUP_FAILED"


@pytest.mark.parametrize("workload_id", ["x", "A.b_c-9", "-", "...", "x" * 128])
async def test_names_of_all_allowed_forms_are_taken(
    machine: Machine, client: AgentClient, busybox: str, workload_id: str
) -> None:
    info = await prepare(client, busybox, workload_id)
    assert machine.path(info["rootfs_path"]).is_dir()
    await cleanup(client, workload_id)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "top")
