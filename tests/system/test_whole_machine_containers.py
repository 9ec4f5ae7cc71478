"""`unprivileged: false`: containers that are machines of their own, for systemd and FUSE."""

import base64
import errno
from pathlib import Path
from typing import Any

import pytest

from initramfs.local_registry import LocalRegistry
from protocol import requests, responses
from protocol.client import AgentClient, open_client
from tests.support import tiny_programs
from tests.support.crash import kill_agent
from tests.support.execution import execute, pull, shell
from tests.support.images import Images
from tests.support.lifelines import lifeline_in
from tests.support.machine import booted
from tests.support.standing import WORKSPACE, Persistent, cgroup_of_container
from tests.support.wire import open_wire

WHOLE = {"unprivileged": False}
DOCKERS_CAPABILITIES = "00000000a80425fb"
MODES = ["ephemeral", "first", "joined"]

STATUS = "grep -E '^(CapEff|CapPrm|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status"


async def printed(overlay: Persistent, mode: str, script: str, **fields: Any) -> str:
    """What a script prints in a whole-machine container of its own, or in one that stays."""
    fields = {**WHOLE, **fields}
    if mode == "ephemeral":
        fields["persistent_overlay_id"] = None
    elif mode == "joined":
        await overlay.shell("true", **WHOLE)
    return await overlay.shell(script, **fields)


async def capabilities(client: AgentClient) -> str:
    """All that the machine has, and so can give."""
    return (await shell(client, "grep ^CapBnd: /proc/self/status")).split()[1]


@pytest.mark.parametrize("mode", MODES)
async def test_it_has_all_capabilities_that_the_machine_has(
    persistent: Persistent, mode: str
) -> None:
    known = await capabilities(persistent.client)
    lines = (await printed(persistent, mode, STATUS)).splitlines()
    status = dict(line.split(":\t") for line in lines)
    assert status == {
        "CapPrm": known,
        "CapEff": known,
        "CapBnd": known,
        "NoNewPrivs": "0",
        "Seccomp": "2",
    }
    assert int(known, 16) > int(DOCKERS_CAPABILITIES, 16)
    # Another user than root has them to gain, and has not gained them.
    of_guest = await printed(persistent, mode, STATUS, user="guest")
    assert "CapEff:\t0000000000000000" in of_guest
    assert f"CapBnd:\t{known}" in of_guest


@pytest.mark.parametrize("mode", MODES)
async def test_it_can_mount_and_change_its_own_names_and_switches(
    persistent: Persistent, mode: str
) -> None:
    script = (
        "mkdir /tmp/on && mount -t tmpfs none /tmp/on && touch /tmp/on/file && umount /tmp/on &&"
        "hostname changed && hostname && cat /proc/sys/kernel/hostname &&"
        "test -w /proc/sys/kernel/shmmax && echo 4096 >/proc/sys/kernel/shmmax &&"
        "cat /proc/sys/kernel/shmmax"
    )
    assert await printed(persistent, mode, script) == "changed\nchanged\n4096\n"
    assert "changed" not in await shell(persistent.client, "hostname")


@pytest.mark.parametrize("mode", MODES)
async def test_its_cgroup_is_its_own_to_divide(persistent: Persistent, mode: str) -> None:
    script = (
        "own=$(cut -d: -f3 /proc/self/cgroup); cd /sys/fs/cgroup$own && mkdir part &&"
        "sh -c 'echo 0 >part/cgroup.procs && cat /proc/self/cgroup' && rmdir part && echo divided"
    )
    assert (await printed(persistent, mode, script)).splitlines()[-1] == "divided"


async def test_what_it_made_of_its_cgroup_goes_with_it(persistent: Persistent) -> None:
    async with persistent.lifeline() as line:
        script = "mkdir -p /sys/fs/cgroup/a/b && echo 0 >/sys/fs/cgroup/a/b/cgroup.procs; "
        container_id = await persistent.detach(script + line.script("exec sleep 1000"), **WHOLE)
        await line.started()
        cgroup = cgroup_of_container(persistent.machine, container_id)
        assert cgroup.path.parent.name == "privileged"
        assert (cgroup.path / "first" / "a" / "b").is_dir()
        # A command still joins, and the container is still known to be in use.
        assert "sleep" in await persistent.shell("cat /proc/1/cmdline", **WHOLE)
        assert (await persistent.cleanup_refusal()).code == "CLEANUP_FAILED"
        await persistent.end()
        await persistent.cleanup()
        assert not cgroup.path.exists()


async def test_the_cgroups_that_it_made_are_left_to_it_whatever_becomes_of_the_agent(
    registry: LocalRegistry, images: Images, tmp_path: Path
) -> None:
    image = images.busybox.reference
    seen = "cd /sys/fs/cgroup; ls -d a/b; echo 0 >a/b/cgroup.procs && echo usable"
    with booted(tmp_path, insecure_registries=[registry.address]) as machine:
        async with open_client(machine.address) as client:
            await pull(client, image)
            overlay = Persistent(machine, client, image, "whole")
            with lifeline_in(machine, WORKSPACE, "/workspace") as line:
                script = f"mkdir -p /sys/fs/cgroup/a/b; {line.script('exec sleep 1000')}"
                await overlay.detach(script, **WHOLE)
                await line.heard()
            assert await overlay.shell(seen, **WHOLE) == "a/b\nusable\n"
            await kill_agent(machine)
        async with open_client(machine.address) as client:
            assert await overlay.over(client).shell(seen, **WHOLE) == "a/b\nusable\n"
            await client.request(requests.Shutdown())


async def test_a_process_that_it_moved_elsewhere_in_its_cgroup_is_no_idle_container(
    persistent: Persistent,
) -> None:
    async with persistent.lifeline() as line:
        script = (
            "own=$(cut -d: -f3 /proc/self/cgroup); mkdir /sys/fs/cgroup$own/a;"
            "echo 0 >/sys/fs/cgroup$own/a/cgroup.procs; "
        )
        await persistent.shell(f"({script} {line.script('exec sleep 1000')}) &", **WHOLE)
        await line.started()
        assert (await persistent.cleanup_refusal()).code == "CLEANUP_FAILED"
        assert "sleep 1000" in await persistent.shell("ps", **WHOLE)


@pytest.mark.parametrize("mode", MODES)
async def test_it_has_fuse(persistent: Persistent, mode: str) -> None:
    script = "stat -c '%F %t %T %a' /dev/fuse && exec 3<>/dev/fuse && echo open"
    answer = await printed(persistent, mode, script)
    assert answer == "character special file a e5 666\nopen\n"
    # It is a file system: a mount with an open descriptor of the device.
    script = (
        "mkdir -p /mnt; exec 3<>/dev/fuse && mount -t fuse -o"
        " fd=3,rootmode=40000,user_id=0,group_id=0 f /mnt && grep -c ' /mnt fuse ' /proc/mounts"
    )
    assert await printed(persistent, mode, script) == "1\n"


@pytest.mark.parametrize("mode", MODES)
async def test_disks_are_as_far_away_as_for_any_container(
    persistent: Persistent, mode: str
) -> None:
    script = (
        "cd /tmp; mknod loop b 7 0; mknod vda b 254 0; mknod mem c 1 1; mknod null c 1 3;"
        "for node in loop vda mem; do dd if=/tmp/$node of=/dev/null count=1 2>&1 |"
        " grep -o 'Operation not permitted'; done; cat /tmp/null && echo null"
    )
    refused = "Operation not permitted\n"
    assert await printed(persistent, mode, script) == refused * 3 + "null\n"
    hidden = await printed(persistent, mode, "cat /proc/cmdline /proc/kcore /proc/keys | wc -c")
    assert hidden == "0\n"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [True, False], ids=["whole machine", "ordinary"])
async def test_the_hosts_sockets_are_out_of_its_reach(
    persistent: Persistent, mode: str, whole: bool
) -> None:
    programs = {
        "inet": (tiny_programs.socket_program(2), 0),
        "vsock": (tiny_programs.socket_program(40), errno.ENOSYS),
        "vsock-bit-32": (tiny_programs.socket_program(2**32 + 40), errno.ENOSYS),
        "vsock-of-32-bits": (tiny_programs.socket_program_of_32_bits(40), errno.ENOSYS),
        "socketcall": (tiny_programs.socketcall_program_of_32_bits(40), errno.EAFNOSUPPORT),
    }
    workspace = persistent.machine.storage / "workspace"
    for name, (program, _) in programs.items():
        (workspace / name).write_bytes(program)
        (workspace / name).chmod(0o755)
    script = "for name in $*; do /workspace/$name; echo $name $?; done".replace(
        "$*", " ".join(programs)
    )
    answer = await printed(persistent, mode, script, unprivileged=not whole)
    codes = dict(line.split() for line in answer.splitlines())
    assert codes == {name: str(expected) for name, (_, expected) in programs.items()}
    for name in programs:
        (workspace / name).unlink()


async def test_only_what_is_explicitly_false_is_a_whole_machine(persistent: Persistent) -> None:
    known = await capabilities(persistent.client)
    expected = {"absent": DOCKERS_CAPABILITIES, True: DOCKERS_CAPABILITIES, False: known}
    async with open_wire(persistent.machine.address) as wire:
        for value, mask in expected.items():
            more: dict[str, Any] = {} if value == "absent" else {"unprivileged": value}
            command = ["grep", "^CapEff:", "/proc/self/status"]
            answer = await wire.ask("run", image=persistent.image, command=command, **more)
            assert answer["status"] == "completed", answer
            assert mask in base64.b64decode(str(answer["stdout"])).decode()


async def test_an_ordinary_container_has_none_of_it(persistent: Persistent) -> None:
    script = (
        "for refused in 'test -e /dev/fuse' 'mknod /tmp/fuse c 10 229 && exec 3<>/tmp/fuse'"
        " 'mkdir /sys/fs/cgroup/part' 'hostname changed' 'mount -t tmpfs none /tmp'"
        " 'echo 4096 >/proc/sys/kernel/shmmax'; do"
        ' sh -c "$refused" >/dev/null 2>&1 && echo "allowed: $refused"; done; true'
    )
    for fields in ({"persistent_overlay_id": None}, {}, {}):
        assert await persistent.shell(script, **fields) == ""


@pytest.mark.parametrize("mode", ["detached", "background", "interactive", "tty"])
async def test_every_way_to_run_a_command_can_be_a_whole_machines(
    persistent: Persistent, mode: str
) -> None:
    known = await capabilities(persistent.client)
    workspace = persistent.machine.storage / "workspace"
    script = "grep ^CapEff: /proc/self/status >/workspace/status; sync; exit 7"
    async with persistent.lifeline() as line:
        request = persistent.request("sh", "-c", line.script(script), **WHOLE, **{mode: True})
        answer = await persistent.client.request(request)
        in_session = mode in ("interactive", "tty")
        assert isinstance(answer, responses.Exited if in_session else responses.Completed)
        assert answer.exit_code == (7 if in_session else 0)
        await line.ended()
    assert (workspace / "status").read_text().split()[1] == known
    (workspace / "status").unlink()


async def test_a_whole_machine_may_have_an_init_that_makes_cgroups_and_sessions(
    persistent: Persistent,
) -> None:
    """What systemd does before it starts its first service."""
    script = (
        "set -e; cgroups=/sys/fs/cgroup; mkdir -p /run; mount -t tmpfs tmpfs /run;"
        "mkdir $cgroups/init.scope; echo 1 >$cgroups/init.scope/cgroup.procs;"
        "mkdir -p $cgroups/system.slice/one.service;"
        "(echo 0 >$cgroups/system.slice/one.service/cgroup.procs; exec setsid sleep 1000) & "
    )
    async with persistent.lifeline() as line:
        container_id = await persistent.detach(script + line.script("wait"), **WHOLE)
        await line.started()
        assert container_id in persistent.containers()
        seen = await persistent.shell("cat /proc/1/cgroup; ls /sys/fs/cgroup", **WHOLE)
        assert "init.scope" in seen
        assert "system.slice" in seen
        done = await execute(persistent.client, "test", "-d", "/sys/fs/cgroup/init.scope")
        assert done.exit_code == 1
