"""Files that come in: whole, with their owner and mode, or not at all."""

import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from agent.errors import AgentError
from agent.files.guest_path import GuestRoot
from agent.files.journal import RESUME, UPLOAD, Journal
from agent.files.temporary import Hidden, Nameless, Site
from agent.files.upload import Plan, Upload, Written
from agent.linux.mount import MS_RDONLY, MS_REMOUNT, mount, umount2
from protocol.constants import FILE_TRANSFER_MAX_TOTAL
from protocol.errors import ErrorCode
from tests.support.rounds import rounds

OLD = b"old" * 1000
NEW = b"new!" * 1000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def begun(site: Site, path: str = "/file", size: int = len(NEW), **fields: Any) -> Upload:
    return Upload.begin(Plan.of(path, size, **fields), site)


def write(site: Site, data: bytes = NEW, path: str = "/file", **fields: Any) -> Written:
    with closing(begun(site, path, len(data), **fields)) as upload:
        upload.write(data)
        return upload.finish()


def refused(code: ErrorCode, words: str, *arguments: Any, **fields: Any) -> str:
    with pytest.raises(AgentError, match=words) as refusal:
        write(*arguments, **fields)
    assert refusal.value.code is code
    return refusal.value.message


def facts(path: Path) -> tuple[bytes, int, int, int]:
    found = path.stat()
    return path.read_bytes(), stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid


def test_a_file_has_its_content_and_0644_whatever_the_umask(site: Site, directory: Path) -> None:
    umask = os.umask(0o077)
    try:
        write(site)
    finally:
        os.umask(umask)
    assert facts(directory / "file") == (NEW, 0o644, 0, 0)
    assert [path.name for path in directory.iterdir()] == ["file"]


def test_a_file_has_the_mode_and_owner_that_were_asked_for(site: Site, directory: Path) -> None:
    write(site, mode=0o104750, uid=1000, gid=1001)
    assert facts(directory / "file") == (NEW, 0o4750, 1000, 1001)


@pytest.mark.parametrize("when", [0, 1_600_000_000_123_456_789, -1, 2**61])
def test_a_file_has_the_time_that_was_asked_for(site: Site, directory: Path, when: int) -> None:
    seconds, nanoseconds = divmod(when, 10**9)
    write(site, mtime_s=seconds, mtime_ns=nanoseconds)
    assert (directory / "file").stat().st_mtime_ns == when
    write(site, mtime_s=seconds)
    assert (directory / "file").stat().st_mtime_ns == seconds * 10**9


def test_a_time_beyond_what_the_file_system_has_is_its_last(site: Site, directory: Path) -> None:
    write(site, mtime_s=2**63 - 1)
    assert (directory / "file").read_bytes() == NEW


@pytest.mark.parametrize("fields", [{"mtime_ns": 1}, {"mtime_s": 1, "mtime_ns": 10**9}])
def test_what_is_no_time_is_refused(site: Site, fields: dict[str, int]) -> None:
    refused(ErrorCode.INVALID_REQUEST, "mtime_ns", site, **fields)


def test_an_empty_file_is_a_file(site: Site, directory: Path) -> None:
    write(site, b"")
    assert (directory / "file").read_bytes() == b""


def test_missing_parents_are_made_0755_and_owned_as_the_file_is(
    site: Site, directory: Path
) -> None:
    write(site, path="/a/b/file", uid=1000, gid=1001, mode=0o600)
    for name in ("a", "a/b"):
        found = (directory / name).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o755, 1000, 1001)


def test_nothing_is_seen_before_the_end(site: Site, directory: Path) -> None:
    (directory / "file").write_bytes(OLD)
    with closing(begun(site, "/a/b/file")) as deep, closing(begun(site)) as upload:
        for each in (deep, upload):
            each.write(NEW)
        assert [path.name for path in directory.iterdir()] == ["file"]
        assert (directory / "file").read_bytes() == OLD
        upload.finish()
        assert (directory / "file").read_bytes() == NEW
        deep.finish()
        assert (directory / "a" / "b" / "file").read_bytes() == NEW


def test_an_upload_that_is_left_leaves_nothing(site: Site, directory: Path, notes: Path) -> None:
    (directory / "file").write_bytes(OLD)
    for path in ("/file", "/a/b/file"):
        with closing(begun(site, path)) as upload:
            upload.write(NEW[:10])
    assert [path.name for path in directory.iterdir()] == ["file"]
    assert facts(directory / "file") == (OLD, 0o644, 0, 0)
    assert list(notes.iterdir()) == []


def test_a_symlink_at_the_target_is_replaced(site: Site, directory: Path) -> None:
    (directory / "elsewhere").write_bytes(OLD)
    (directory / "file").symlink_to("elsewhere")
    (directory / "dangling").symlink_to("nowhere")
    for name in ("file", "dangling"):
        write(site, path=name)
        assert not (directory / name).is_symlink()
        assert (directory / name).read_bytes() == NEW
    assert (directory / "elsewhere").read_bytes() == OLD


def test_a_file_in_use_keeps_its_content_for_those_who_use_it(site: Site, directory: Path) -> None:
    (directory / "file").write_bytes(OLD)
    with (directory / "file").open("rb") as reader:
        write(site)
        assert reader.read() == OLD


def test_what_is_no_regular_file_is_not_written_over(site: Site, directory: Path) -> None:
    (directory / "directory").mkdir()
    os.mkfifo(directory / "fifo")
    os.mknod(directory / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(directory / "socket", stat.S_IFSOCK | 0o600)
    for name, words in (
        ("directory", "Is a directory"),
        ("fifo", "fifo"),
        ("device", "character device"),
        ("socket", "socket"),
    ):
        message = refused(ErrorCode.FILE_IO_FAILED, words, site, path=name)
        assert message.startswith(f"write /{name}: ")
    assert len(list(directory.iterdir())) == 4


def test_more_bytes_than_a_file_may_have_are_refused_before_anything_is_made(
    site: Site, directory: Path
) -> None:
    with pytest.raises(AgentError, match="4294967297 bytes") as refusal:
        begun(site, "/a/file", FILE_TRANSFER_MAX_TOTAL + 1)
    assert refusal.value.code is ErrorCode.INVALID_REQUEST
    assert list(directory.iterdir()) == []


def test_fewer_bytes_than_announced_leave_the_target_untouched(site: Site, directory: Path) -> None:
    (directory / "file").write_bytes(OLD)
    with closing(begun(site)) as upload:
        upload.write(NEW[:-1])
        with pytest.raises(AgentError, match="3999 bytes came, 4000 were announced") as refusal:
            upload.finish()
    assert refusal.value.code is ErrorCode.INVALID_REQUEST
    assert (directory / "file").read_bytes() == OLD
    assert [path.name for path in directory.iterdir()] == ["file"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Site]:
    """A file system with room for 1 MiB."""
    root = tmp_path / "small"
    root.mkdir()
    mount("tmpfs", root, fstype="tmpfs", data="size=1m")
    with GuestRoot.opened(root) as opened:
        yield Site(opened, None, Journal(tmp_path / "journal"))
    umount2(root)


def test_an_upload_that_does_not_fit_the_disk_is_refused_at_its_beginning(small: Site) -> None:
    with pytest.raises(AgentError, match="2097152 bytes are needed, 1048576 are free") as refusal:
        begun(small, size=2 << 20)
    assert refusal.value.code is ErrorCode.FILE_IO_FAILED
    assert "No space left on device" in refusal.value.message


def test_a_disk_that_fills_up_meanwhile_leaves_the_target_untouched(
    small: Site, tmp_path: Path
) -> None:
    root = tmp_path / "small"
    (root / "file").write_bytes(OLD)
    with closing(begun(small, size=700_000)) as upload:
        (root / "other").write_bytes(bytes(800_000))
        with pytest.raises(AgentError, match="write /file: No space left on device"):
            upload.write(bytes(700_000))
    assert (root / "file").read_bytes() == OLD
    (root / "other").unlink()
    write(small, bytes(700_000))


def test_a_read_only_root_says_so(small: Site, tmp_path: Path) -> None:
    mount(None, tmp_path / "small", flags=MS_REMOUNT | MS_RDONLY)
    for path in ("/file", "/a/file"):
        refused(ErrorCode.FILE_IO_FAILED, "Read-only file system", small, path=path)


@pytest.fixture(params=["full", "read-only"])
def noted_elsewhere(request: pytest.FixtureRequest, site: Site, tmp_path: Path) -> Iterator[Site]:
    """Files whose journal's file system takes no note, and another journal's directory."""
    storage, otherwise = tmp_path / "storage", tmp_path / "otherwise"
    storage.mkdir()
    otherwise.mkdir()
    is_full = request.param == "full"
    mount(
        "tmpfs",
        storage,
        fstype="tmpfs",
        flags=0 if is_full else MS_RDONLY,
        # The one that its root has.
        data="nr_inodes=1" if is_full else None,
    )
    yield attrs.evolve(site, journal=Journal(storage, otherwise))
    umount2(storage)


def test_a_file_of_the_vm_is_replaced_whatever_the_storage_takes(
    noted_elsewhere: Site, directory: Path, tmp_path: Path
) -> None:
    (directory / "file").write_bytes(OLD)
    write(noted_elsewhere)
    assert (directory / "file").read_bytes() == NEW
    assert hidden(directory) == []
    assert list((tmp_path / "otherwise").iterdir()) == []


def test_and_one_that_is_resumed_is_known_to_the_other_journal(
    noted_elsewhere: Site, directory: Path, tmp_path: Path
) -> None:
    with closing(resumable(noted_elsewhere)) as upload:
        upload.write(NEW[:1000])
    (name,) = hidden(directory)
    (note,) = Journal(tmp_path / "otherwise").notes()
    assert (note.name, note.is_resumable) == (name, True)
    with closing(resumable(noted_elsewhere)) as upload:
        assert upload.received == 1000
        upload.write(NEW[1000:])
        upload.finish()
    assert (directory / "a" / "file").read_bytes() == NEW
    assert hidden(directory) == []
    assert list((tmp_path / "otherwise").iterdir()) == []


def test_so_is_what_a_killed_agent_left_there(
    noted_elsewhere: Site, directory: Path, tmp_path: Path
) -> None:
    where = os.open(directory, os.O_RDONLY)
    os.close(Hidden.make(noted_elsewhere, where).file)
    os.close(where)
    assert len(hidden(directory)) == 1
    successor = Journal(tmp_path / "otherwise")
    successor.clean(noted_elsewhere.root, successor.left_behind(None))
    assert hidden(directory) == []
    assert list((tmp_path / "otherwise").iterdir()) == []


def test_a_file_of_an_overlay_which_lies_there_too_is_refused(
    noted_elsewhere: Site, directory: Path, tmp_path: Path
) -> None:
    (directory / "file").write_bytes(OLD)
    overlays = attrs.evolve(noted_elsewhere, workload="some")
    refused(ErrorCode.FILE_IO_FAILED, "No space left|Read-only file system", overlays)
    assert (directory / "file").read_bytes() == OLD
    assert hidden(directory) == []
    assert list((tmp_path / "otherwise").iterdir()) == []


def test_a_digest_is_told_where_it_is_asked_for(site: Site) -> None:
    assert write(site, digest=True) == Written(len(NEW), sha256(NEW))
    assert write(site) == Written(len(NEW), None)


def test_content_with_another_digest_leaves_the_target_untouched(
    site: Site, directory: Path
) -> None:
    (directory / "file").write_bytes(OLD)
    message = refused(ErrorCode.FILE_IO_FAILED, "sha256", site, sha256=sha256(OLD))
    assert sha256(OLD) in message
    assert sha256(NEW) in message
    assert (directory / "file").read_bytes() == OLD
    write(site, sha256=sha256(NEW))
    assert (directory / "file").read_bytes() == NEW


@pytest.mark.parametrize("text", ["", "abc", "A" * 64, "0" * 65, "g" * 64])
def test_what_is_no_digest_is_refused(site: Site, text: str) -> None:
    refused(ErrorCode.INVALID_REQUEST, "sha256: expected 64", site, sha256=text)


def test_resuming_needs_a_digest(site: Site) -> None:
    refused(ErrorCode.INVALID_REQUEST, "resume: needs sha256", site, resume=True)


def resumable(site: Site, **fields: Any) -> Upload:
    return begun(site, "/a/file", resume=True, **({"sha256": sha256(NEW)} | fields))


def hidden(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.name.startswith(".innkeep-")]


def test_what_arrived_of_a_resumable_upload_is_there_for_the_next(
    site: Site, directory: Path, notes: Path
) -> None:
    with closing(resumable(site)) as upload:
        assert upload.received == 0
        upload.write(NEW[:1000])
    (name,) = hidden(directory)
    assert name.startswith(RESUME)
    assert not (directory / "a" / "file").exists()
    with closing(resumable(site, mode=0o600, uid=7)) as upload:
        assert upload.received == 1000
        upload.write(NEW[1000:])
        assert upload.finish() == Written(len(NEW), sha256(NEW))
    assert facts(directory / "a" / "file") == (NEW, 0o600, 7, 0)
    assert hidden(directory) == []
    assert list(notes.iterdir()) == []


def test_another_size_or_digest_or_path_is_another_upload(site: Site, directory: Path) -> None:
    with closing(resumable(site)) as upload:
        upload.write(NEW[:1000])
    with closing(resumable(site, sha256=sha256(OLD))) as upload:
        assert upload.received == 0
    assert len(hidden(directory)) == 2


def test_one_upload_is_resumed_by_one_connection_at_a_time(site: Site) -> None:
    with closing(resumable(site)), pytest.raises(AgentError, match="another connection"):
        resumable(site)


def test_what_turns_out_to_have_another_digest_is_not_kept(site: Site, directory: Path) -> None:
    with closing(resumable(site)) as upload:
        upload.write(OLD[:1000] + NEW[1000:])
        with pytest.raises(AgentError, match="sha256"):
            upload.finish()
    assert hidden(directory) == []


def test_a_partial_file_that_somebody_has_put_there_is_not_written_to(
    site: Site, directory: Path
) -> None:
    victim = directory / "victim"
    victim.write_bytes(OLD)
    resumable(site).close()
    (name,) = hidden(directory)
    partial = directory / "a" / name
    for put in (partial.symlink_to, partial.hardlink_to):
        partial.unlink()
        put(victim)
        with pytest.raises(AgentError) as refusal:
            resumable(site)
        assert refusal.value.code is ErrorCode.FILE_IO_FAILED
    assert victim.read_bytes() == OLD


def test_the_target_is_whole_at_every_moment(site: Site, directory: Path) -> None:
    (directory / "file").write_bytes(OLD)
    wrong: list[object] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            with (directory / "file").open("rb") as file:
                found = os.fstat(file.fileno())
                seen = file.read(), stat.S_IMODE(found.st_mode), found.st_uid
            if seen not in ((OLD, 0o644, 0), (NEW, 0o600, 1000)):
                wrong.append(seen)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(rounds(quick=40, soak=3_000)):
            write(site, NEW, mode=0o600, uid=1000)
            write(site, OLD)
    finally:
        stop.set()
        watcher.join()
    assert wrong == []


def test_no_link_that_is_swapped_meanwhile_leads_a_file_out(
    site: Site, directory: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (directory / "inside").mkdir()
    (directory / "outside").mkdir()
    (directory / "link").symlink_to("inside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for target in ("inside", "../outside", str(outside)):
                (directory / "new").symlink_to(target)
                (directory / "new").replace(directory / "link")

    racer = threading.Thread(target=swap)
    racer.start()
    try:
        for _ in range(rounds(quick=100, soak=10_000)):
            # The absolute one leads nowhere inside.
            with suppress(AgentError):
                write(site, path="/link/file")
    finally:
        stop.set()
        racer.join()
    assert list(outside.iterdir()) == []
    # Whatever it led to at those moments.
    (directory / "link").unlink()
    (directory / "link").symlink_to("inside")
    write(site, path="/link/file")
    assert (directory / "inside" / "file").read_bytes() == NEW


def test_what_a_crash_left_before_a_rename_is_removed_by_the_next_agent(
    site: Site, directory: Path, notes: Path
) -> None:
    """Replacing a file takes a name for a moment, and so does a file system without O_TMPFILE."""
    (directory / "sub").mkdir()
    where = os.open(directory / "sub", os.O_RDONLY)
    left = Hidden.make(site, where)
    os.write(left.file, NEW)
    os.close(left.file)
    os.close(where)
    (name,) = hidden(directory)
    assert name.startswith(UPLOAD)
    successor = attrs.evolve(site, journal=Journal(notes))
    successor.journal.clean(successor.root, successor.journal.left_behind(None))
    assert hidden(directory) == []
    assert list(notes.iterdir()) == []


def test_what_can_be_resumed_survives_a_crash_for_a_day(
    site: Site, directory: Path, notes: Path
) -> None:
    upload = resumable(site)
    upload.write(NEW[:1000])
    os.close(upload._temporary.file)  # as the kernel would
    os.close(upload._directory)
    journal = Journal(notes)
    assert journal.left_behind(None) == []
    (note,) = journal.notes()
    assert 86_300 < journal.expires_in_s(note) <= 86_400
    (link,) = notes.iterdir()
    yesterday = link.lstat().st_mtime - 86_400
    os.utime(link, (yesterday, yesterday), follow_symlinks=False)
    assert journal.expires_in_s(note) <= 0
    journal.clean(site.root, [note])
    assert hidden(directory) == []
    assert list(notes.iterdir()) == []


def test_an_upload_that_goes_on_does_not_expire(site: Site, directory: Path, notes: Path) -> None:
    with closing(resumable(site)):
        (note,) = site.journal.notes()
        os.utime(note._link, (0, 0), follow_symlinks=False)
        site.journal.clean(site.root, [note])
        assert len(hidden(directory)) == 1
        assert site.journal.expires_in_s(note) > 86_300


def test_where_files_can_be_nameless_they_are(site: Site, directory: Path) -> None:
    where = os.open(directory, os.O_RDONLY)
    nameless = Nameless.make(site, where)
    os.close(where)
    assert nameless is not None
    os.close(nameless.file)


def capabilities() -> str:
    status = Path("/proc/thread-self/status").read_text()
    (effective,) = (line for line in status.splitlines() if line.startswith("CapEff"))
    return effective


def test_a_thread_has_its_privileges_again_when_it_has_written(small: Site) -> None:
    # What quotas do is tried in a VM: the kernel has none here.
    before = capabilities()
    with closing(begun(small)) as upload:
        upload.write(NEW)
    assert capabilities() == before
