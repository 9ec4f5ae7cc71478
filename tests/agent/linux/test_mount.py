"""Mounting by system call: what it does, and what it says when it cannot."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.linux.loop import loop_device
from agent.linux.mount import (
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_RDONLY,
    MS_BIND,
    MS_RDONLY,
    MS_REMOUNT,
    closing,
    fsconfig_create,
    fsconfig_set_flag,
    fsconfig_set_string,
    fsmount,
    fsopen,
    is_mount_root,
    mount,
    move_mount,
    umount2,
)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A directory at which nothing is mounted any more after the test."""
    directory = tmp_path / "target"
    directory.mkdir()
    yield directory
    while is_mount_root(directory):
        umount2(directory, MNT_DETACH)


def test_a_file_system_is_mounted_and_unmounted(target: Path) -> None:
    assert not is_mount_root(target)
    mount("name", target, fstype="tmpfs", data="size=64k,mode=0700")
    assert is_mount_root(target)
    assert target.stat().st_mode & 0o7777 == 0o700
    umount2(target)
    assert not is_mount_root(target)


def test_a_directory_is_bound_and_made_read_only(target: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").touch()
    mount(tmp_path / "source", target, flags=MS_BIND)
    assert (target / "file").exists()
    mount(None, target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    with pytest.raises(OSError, match="Read-only"):
        (target / "other").touch()
    umount2(target)


def test_a_mount_in_use_is_busy_until_it_is_detached(target: Path) -> None:
    mount("name", target, fstype="tmpfs")
    with (target / "file").open("w"):
        with pytest.raises(OSError, match="busy") as raised:
            umount2(target)
        assert (raised.value.errno, raised.value.filename) == (errno.EBUSY, str(target))
        umount2(target, MNT_DETACH)
        assert not is_mount_root(target)


def test_a_mount_is_built_piece_by_piece_and_exists_before_it_has_a_place(target: Path) -> None:
    with closing(fsopen("tmpfs")) as context:
        fsconfig_set_string(context, "size", "64k")
        fsconfig_set_flag(context, "noswap")
        fsconfig_create(context)
        with closing(fsmount(context, MOUNT_ATTR_NODEV)) as mount_fd:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=mount_fd))
            assert not is_mount_root(target)
            move_mount(mount_fd, target)
    assert [path.name for path in target.iterdir()] == ["file"]
    assert os.statvfs(target).f_flag & os.ST_NODEV


def test_a_mount_without_a_place_goes_with_its_descriptor(target: Path) -> None:
    with closing(fsopen("tmpfs")) as context:
        fsconfig_create(context)
        os.close(fsmount(context, MOUNT_ATTR_RDONLY))
    assert not is_mount_root(target)


def test_no_descriptor_is_inherited() -> None:
    with closing(fsopen("tmpfs")) as context:
        fsconfig_create(context)
        with closing(fsmount(context)) as mount_fd:
            assert not any(os.get_inheritable(fd) for fd in (context, mount_fd))


def test_a_refusal_is_in_the_kernel_s_own_words() -> None:
    with closing(fsopen("tmpfs")) as context:
        with pytest.raises(OSError, match="Invalid argument: tmpfs: Unknown parameter 'nonsense'"):
            fsconfig_set_string(context, "nonsense", "1")
        # Its words are used up: the next refusal has its own.
        with pytest.raises(OSError, match="tmpfs: Bad value for 'size'"):
            fsconfig_set_string(context, "size", "many")


def test_a_refusal_without_words_names_the_option(tmp_path: Path) -> None:
    with closing(fsopen("overlay")) as context:
        with pytest.raises(FileNotFoundError) as raised:
            fsconfig_set_string(context, "lowerdir+", tmp_path / "none")
        assert raised.value.filename == f"lowerdir+={tmp_path}/none"


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda path: fsopen("nosuchfs"), errno.ENODEV),
        (lambda path: mount("x", path / "none", fstype="tmpfs"), errno.ENOENT),
        (lambda path: umount2(path), errno.EINVAL),
    ],
)
def test_errors_have_the_kernel_s_number(
    call: Callable[[Path], object], number: int, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        call(tmp_path)
    assert raised.value.errno == number


def test_a_loop_device_clears_itself(tmp_path: Path) -> None:
    backing = tmp_path / "image"
    backing.write_bytes(b"innkeep!" * 1024)
    with loop_device(backing) as device:
        with Path(device).open("rb") as opened:
            assert opened.read(8) == b"innkeep!"
        name = Path(device).name
        assert Path(f"/sys/block/{name}/loop/backing_file").read_text().strip() == str(backing)
    assert not Path(f"/sys/block/{name}/loop/backing_file").exists()
