"""Overlays: an image's layers under an upper directory, that stay or that go with a command."""

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

import pytest
import trio

from agent.errors import AgentError
from agent.images.content_store import StoredImage
from agent.images.layer import LayerStore
from agent.images.overlay import Overlays
from agent.images.overlay_record import OverlayRecord
from agent.images.workload_id import InvalidWorkloadId, persistent_workload_id
from agent.linux.mount import MS_BIND, mount, umount2
from protocol.errors import ErrorCode
from protocol.values import OverlayInfo
from tests.agent.images.building import image_of
from tests.support import trees
from tests.support.tarballs import directory, entry, tarball

BASE = tarball(
    directory("./", 0o750, uid=5, mtime=11),
    directory("tmp/", 0o1777, mtime=12),
    directory("home/"),
    directory("home/guest/", 0o700, uid=1000, gid=1000, pax_headers={"SCHILY.xattr.user.a": "1"}),
    directory("etc/"),
    entry("etc/passwd", b"root"),
)


@pytest.fixture
def image(layers: LayerStore) -> StoredImage:
    return image_of(layers, BASE, tarball(directory("etc/"), entry("etc/motd", b"hello")))


def names(directory: str | Path) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def status(*parts: str) -> os.stat_result:
    return Path(*parts).stat()


def text(*parts: str) -> str:
    return Path(*parts).read_text()


def exists(*parts: str) -> bool:
    return Path(*parts).exists()


def write(*parts: str) -> None:
    Path(*parts).write_text("written")


@contextmanager
def opened(*parts: str) -> Iterator[TextIO]:
    with Path(*parts).open() as file:
        yield file


def mounts_at(path: str) -> int:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return sum(line.split()[4] == path for line in lines)


async def refusal(overlays: Overlays, image: StoredImage | None, workload_id: str) -> str:
    with pytest.raises(AgentError) as raised:
        await overlays.prepare(image, workload_id)
    assert raised.value.code == ErrorCode.OVERLAY_FAILED
    return raised.value.message


async def cleanup_refusal(overlays: Overlays, workload_id: str) -> str:
    with pytest.raises(AgentError) as raised:
        await overlays.cleanup(workload_id)
    assert raised.value.code == ErrorCode.CLEANUP_FAILED
    return raised.value.message


async def test_it_shows_all_layers_and_keeps_changes_in_its_upper_directory(
    overlays: Overlays, storage: Path, image: StoredImage
) -> None:
    info = await overlays.prepare(image, "web")
    assert info == OverlayInfo(
        rootfs_path=f"{storage}/overlays/web/merged",
        upper_path=f"{storage}/overlays/web/upper",
        work_path=f"{storage}/overlays/web/work",
    )
    merged = Path(info.rootfs_path)
    assert (merged / "etc/passwd").read_text() == "root"
    assert (merged / "etc/motd").read_text() == "hello"
    (merged / "etc/motd").write_text("changed")
    assert (storage / "overlays/web/upper/etc/motd").read_text() == "changed"
    assert overlays.mounted() == ["web"]


async def test_upper_layers_win_and_whiteouts_hide(overlays: Overlays, layers: LayerStore) -> None:
    image = image_of(
        layers,
        trees.archive(trees.before_whiteouts),
        trees.archive(trees.whiteouts),
        trees.archive(trees.after_whiteouts),
    )
    async with overlays.ephemeral(image) as info:
        merged = Path(info.rootfs_path)
        assert names(merged) == [
            "back-again",
            "emptied",
            "gone",
            "kept",
            "opaque",
            "replaced",
            "turns-into-directory",
        ]
        assert names(merged / "opaque") == ["-early", "four", "three"]
        assert names(merged / "gone") == ["new"]
        assert names(merged / "emptied") == []
        assert (merged / "back-again").read_text() == "second\n"
        assert (merged / "replaced").is_file()


async def test_preparing_it_again_changes_nothing(overlays: Overlays, image: StoredImage) -> None:
    info = await overlays.prepare(image, "web")
    device = status(info.rootfs_path).st_dev
    assert await overlays.prepare(image, "web") == info
    assert mounts_at(info.rootfs_path) == 1
    assert status(info.rootfs_path).st_dev == device


async def test_callers_at_once_get_one_overlay(overlays: Overlays, image: StoredImage) -> None:
    answers = []

    async def prepare() -> None:
        answers.append(await overlays.prepare(image, "web"))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(prepare)
    assert len(set(answers)) == 1
    assert mounts_at(answers[0].rootfs_path) == 1


async def test_it_is_there_again_with_its_contents_after_a_reboot(
    overlays: Overlays, layers: LayerStore, storage: Path, image: StoredImage
) -> None:
    info = await overlays.prepare(image, "web")
    write(info.rootfs_path, "etc/new")
    overlays.unmount_all()
    layers.unmount_all()
    assert overlays.mounted() == []
    again = Overlays(storage, layers)
    assert await again.prepare(image, "web") == info
    assert text(info.rootfs_path, "etc/new") == "written"


async def test_an_agent_that_restarts_finds_it_mounted(
    overlays: Overlays, layers: LayerStore, storage: Path, image: StoredImage
) -> None:
    info = await overlays.prepare(image, "web")
    again = Overlays(storage, layers)
    assert again.mounted() == ["web"]
    assert await again.prepare(None, "web") == info
    assert mounts_at(info.rootfs_path) == 1


async def test_it_keeps_its_image_when_the_tag_moves(
    overlays: Overlays, layers: LayerStore, image: StoredImage
) -> None:
    await overlays.prepare(image, "old")
    moved = image_of(layers, BASE, tarball(entry("etc/new", b"moved")))
    assert moved.reference == image.reference
    overlays.unmount_all()
    old, new = await overlays.prepare(moved, "old"), await overlays.prepare(moved, "new")
    assert names(f"{old.rootfs_path}/etc") == ["motd", "passwd"]
    assert names(f"{new.rootfs_path}/etc") == ["new", "passwd"]
    assert overlays.pins() == {OverlayRecord.of(image), OverlayRecord.of(moved)}


async def test_without_an_image_only_one_that_exists_is_prepared(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    assert "it does not exist, and its image is not here" in await refusal(overlays, None, "web")
    assert not (storage / "overlays/web").exists()
    await overlays.prepare(image, "web")
    overlays.unmount_all()
    assert (await overlays.prepare(None, "web")).rootfs_path == f"{storage}/overlays/web/merged"


async def test_an_upper_directory_without_a_record_is_taken_over(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    upper = storage / "overlays/other-agent/upper"
    upper.mkdir(parents=True)
    (upper / "file").write_text("of another agent")
    info = await overlays.prepare(image, "other-agent")
    assert text(info.rootfs_path, "file") == "of another agent"


async def test_a_layer_that_is_gone_is_told_with_the_way_out(
    overlays: Overlays, layers: LayerStore, image: StoredImage, storage: Path
) -> None:
    await overlays.prepare(image, "web")
    overlays.unmount_all()
    layers.unmount_all()
    gone = image.layers[0].diff_id
    layers.remove(gone)
    message = f"layer {gone} is not in the store; pull test/image:latest again"
    assert await refusal(overlays, image, "web") == message


async def test_a_damaged_record_is_told_and_the_overlay_can_be_removed(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    await overlays.prepare(image, "web")
    overlays.unmount_all()
    (storage / "overlays/web/overlay.json").write_text('{"layers": [')
    assert "the overlay's record is damaged" in await refusal(overlays, image, "web")
    with pytest.raises(OSError, match="damaged"):
        overlays.pins()
    await overlays.cleanup("web")
    assert overlays.pins() == set()


async def test_the_root_is_as_the_topmost_entry_for_it_says(
    overlays: Overlays, layers: LayerStore
) -> None:
    plain = image_of(layers, tarball(entry("a")))
    async with overlays.ephemeral(image_of(layers, BASE, tarball(entry("a")))) as info:
        root = status(info.rootfs_path)
        assert (root.st_mode, root.st_uid) == (stat.S_IFDIR | 0o750, 5)
        assert root.st_mtime_ns == 11 * 10**9
    async with overlays.ephemeral(plain) as info:
        assert status(info.rootfs_path).st_mode == stat.S_IFDIR | 0o755


async def test_a_directory_without_an_entry_is_as_the_layers_below_say(
    overlays: Overlays, layers: LayerStore
) -> None:
    image = image_of(
        layers, BASE, tarball(entry("tmp/x"), entry("home/guest/y/z"), entry("fresh/f"))
    )
    async with overlays.ephemeral(image) as info:
        merged = Path(info.rootfs_path)
        tmp, guest = (merged / "tmp").stat(), (merged / "home/guest").stat()
        assert (stat.S_IMODE(tmp.st_mode), tmp.st_mtime_ns) == (0o1777, 12 * 10**9)
        assert (stat.S_IMODE(guest.st_mode), guest.st_uid, guest.st_gid) == (0o700, 1000, 1000)
        assert os.getxattr(merged / "home/guest", "user.a") == b"1"
        assert stat.S_IMODE((merged / "home/guest/y").stat().st_mode) == 0o755
        assert (merged / "home/guest/y/z").exists()
        assert (merged / "tmp/x").exists()
        assert (merged / "fresh/f").exists()


async def test_what_a_whiteout_hides_has_no_say_in_it(
    overlays: Overlays, layers: LayerStore
) -> None:
    image = image_of(
        layers,
        BASE,
        tarball(entry(".wh.tmp"), directory("home/"), entry("home/.wh..wh..opq")),
        tarball(entry("tmp/x"), entry("home/guest/y")),
    )
    async with overlays.ephemeral(image) as info:
        merged = Path(info.rootfs_path)
        assert stat.S_IMODE((merged / "tmp").stat().st_mode) == 0o755
        assert stat.S_IMODE((merged / "home/guest").stat().st_mode) == 0o755


async def test_a_layer_with_an_opaque_root_hides_all_below_it(
    overlays: Overlays, layers: LayerStore
) -> None:
    image = image_of(
        layers, BASE, tarball(entry(".wh..wh..opq"), entry("only")), tarball(entry("and"))
    )
    async with overlays.ephemeral(image) as info:
        assert names(info.rootfs_path) == ["and", "only"]


async def test_setuid_programs_and_devices_work_in_it(
    overlays: Overlays, image: StoredImage
) -> None:
    async with overlays.ephemeral(image) as info:
        flags = os.statvfs(info.rootfs_path).f_flag
        assert not flags & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC)


async def test_an_image_may_have_as_many_layers_as_the_kernel_takes(
    overlays: Overlays, layers: LayerStore
) -> None:
    tars = [trees.archive(trees.numbered(number)) for number in range(128)]
    async with overlays.ephemeral(image_of(layers, *tars)) as info:
        assert len(names(f"{info.rootfs_path}/layers")) == 129
        assert text(info.rootfs_path, "layers/top") == "127\n"


async def test_cleaning_up_leaves_nothing_of_it(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    info = await overlays.prepare(image, "web")
    write(info.rootfs_path, "etc/new")
    await overlays.cleanup("web")
    assert mounts_at(info.rootfs_path) == 0
    assert names(storage / "overlays") == []
    assert overlays.pins() == set()
    await overlays.cleanup("web")
    await overlays.cleanup("never-was")


@contextmanager
def process(*argv: str | Path, cwd: str | None = None) -> Iterator[None]:
    """A process that runs during the block, and says so before it begins."""
    script = ["sh", "-c", "echo up; exec sleep 1000"]
    with subprocess.Popen([*argv, *script], cwd=cwd, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == b"up\n"
            yield
        finally:
            running.kill()


async def test_an_overlay_in_use_is_not_cleaned_up(overlays: Overlays, image: StoredImage) -> None:
    info = await overlays.prepare(image, "web")
    with process(cwd=info.rootfs_path):
        message = await cleanup_refusal(overlays, "web")
        assert message == "clean up overlay 'web': a process is using it; stop that first"
        assert exists(info.rootfs_path, "etc/motd")
    await overlays.cleanup("web")


async def test_an_overlay_with_a_container_is_not_cleaned_up(
    overlays: Overlays, layers: LayerStore
) -> None:
    info = await overlays.prepare(image_of(layers, trees.archive(trees.busybox)), "web")
    container = ["unshare", "--mount", "--propagation", "private", "chroot", info.rootfs_path]
    with process(*container):
        message = await cleanup_refusal(overlays, "web")
        assert message.startswith("clean up overlay 'web': the container of process ")
        assert overlays.mounted() == ["web"]
    await overlays.cleanup("web")


async def test_a_mount_namespace_that_has_a_copy_of_it_is_no_reason_to_keep_it(
    overlays: Overlays, image: StoredImage
) -> None:
    await overlays.prepare(image, "web")
    with process("unshare", "--mount", "--propagation", "private"):
        await overlays.cleanup("web")


async def test_cleaning_up_stops_at_a_mount_and_follows_no_link(
    overlays: Overlays, image: StoredImage, storage: Path, tmp_path: Path
) -> None:
    info = await overlays.prepare(image, "web")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (Path(info.upper_path) / "link").symlink_to(outside)
    (Path(info.upper_path) / "mounted").mkdir()
    overlays.unmount_all()
    mount(outside, f"{info.upper_path}/mounted", flags=MS_BIND)
    assert "cross-device" in await cleanup_refusal(overlays, "web")
    assert (outside / "precious").exists()
    (removed,) = (storage / "overlays").iterdir()
    umount2(removed / "upper/mounted")
    Overlays(storage, LayerStore(storage))
    assert names(storage / "overlays") == []
    assert (outside / "precious").exists()


async def test_a_tree_deeper_than_any_path_is_removed(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    info = await overlays.prepare(image, "web")
    here = os.open(info.upper_path, os.O_RDONLY)
    for _ in range(800):
        os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    await overlays.cleanup("web")
    assert names(storage / "overlays") == []


@pytest.mark.parametrize("workload_id", ["", ".", "..", "a/b", "a b", "+x", "x" * 129, "ü"])
async def test_names_that_are_no_ids_are_refused(
    overlays: Overlays, image: StoredImage, workload_id: str, storage: Path
) -> None:
    for message in (
        await refusal(overlays, image, workload_id),
        await cleanup_refusal(overlays, workload_id),
    ):
        assert "1 to 128 of A-Z a-z 0-9 . _ -" in message
    assert names(storage / "overlays") == []


async def test_a_persistent_overlay_may_have_the_longest_name(
    overlays: Overlays, image: StoredImage
) -> None:
    workload_id = persistent_workload_id("x" * 128)
    assert workload_id == "persistent-" + "x" * 128
    info = await overlays.prepare(image, workload_id)
    assert f"/overlays/{workload_id}/" in info.rootfs_path
    for wrong in ("", ".", "x" * 129, "persistent-" + "x" * 128, "a/b"):
        with pytest.raises(InvalidWorkloadId):
            persistent_workload_id(wrong)


async def test_an_ephemeral_overlay_is_fresh_and_gone_afterwards(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    async with overlays.ephemeral(image) as first, overlays.ephemeral(image) as second:
        assert first != second
        write(first.rootfs_path, "etc/new")
        assert not exists(second.rootfs_path, "etc/new")
        assert overlays.mounted() == []
    assert names(storage / "overlays") == []


async def test_it_is_gone_too_when_what_used_it_is_cancelled(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    with trio.CancelScope() as scope:
        async with overlays.ephemeral(image):
            scope.cancel()
            await trio.sleep_forever()
    assert names(storage / "overlays") == []


async def test_it_is_gone_too_when_something_still_runs_in_it(
    overlays: Overlays, image: StoredImage, storage: Path
) -> None:
    with ExitStack() as held:
        async with overlays.ephemeral(image) as info:
            file = held.enter_context(opened(info.rootfs_path, "etc/motd"))
        assert file.read() == "hello"
        assert mounts_at(info.rootfs_path) == 0
        assert names(storage / "overlays") == []


async def test_what_a_crash_left_is_removed_at_the_next_start(
    overlays: Overlays, layers: LayerStore, image: StoredImage, storage: Path
) -> None:
    await overlays.prepare(image, "web")
    left = overlays.ephemeral(image)
    info = await left.__aenter__()
    (storage / "overlays/+removed-0123/upper/deep").mkdir(parents=True)
    again = Overlays(storage, layers)
    assert names(storage / "overlays") == ["web"]
    assert mounts_at(info.rootfs_path) == 0
    assert again.mounted() == ["web"]
    await left.__aexit__(None, None, None)


async def test_an_overlay_that_cannot_be_made_leaves_nothing(
    overlays: Overlays, layers: LayerStore, image: StoredImage, storage: Path
) -> None:
    layers.remove(image.layers[1].diff_id)
    with pytest.raises(AgentError, match="pull test/image:latest again"):
        async with overlays.ephemeral(image):
            pytest.fail("there is no such overlay")
    assert names(storage / "overlays") == []


async def test_one_that_is_in_use_does_not_keep_the_others_mounted(
    overlays: Overlays, image: StoredImage
) -> None:
    busy, free = [await overlays.prepare(image, name) for name in ("busy", "free")]
    with opened(busy.rootfs_path, "etc/motd"), pytest.raises(OSError, match="busy"):
        overlays.unmount_all()
    assert (mounts_at(busy.rootfs_path), mounts_at(free.rootfs_path)) == (1, 0)
