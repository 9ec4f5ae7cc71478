"""Directories of the host in a VM's containers: virtiofs, from QEMU's device to the command."""

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio
from attrs import frozen

from protocol import requests, responses
from protocol.client import AgentClient, open_client
from protocol.values import Mount
from tests.support.crash import kill_agent
from tests.support.execution import pull, refusal, run, shell
from tests.support.files import begin, read, send, upload
from tests.support.images import Images
from tests.support.machine import LOOPBACK_IN_VM, PROJECT, Machine, booted
from tests.support.watch import until

pytestmark = pytest.mark.timeout(180)

# Every test may use the first two; each of the others has its first mount in a test of its own.
TAGS = ("code", "data,set", "many-at-once")
CODE = Mount("code", "/code", read_only=False)
READ_ONLY = Mount("code", "/code", read_only=True)


@frozen
class Sharing:
    """A VM with the shares, and an image to run."""

    machine: Machine
    image: str
    directory: Path

    def path(self, tag: str, name: str) -> Path:
        """A share's file as this machine has it."""
        return self.directory / tag / name


@pytest.fixture(scope="module")
def sharing(
    vm_registry: str, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sharing]:
    directory = tmp_path_factory.mktemp("sharing")
    for tag in TAGS:
        (directory / tag).mkdir()
        (directory / tag / "name").write_text(f"{tag}\n")
    image = images.busybox.reference_from(LOOPBACK_IN_VM)

    async def pull_image(address: str) -> None:
        async with open_client(address) as client:
            await pull(client, image)

    with booted(
        directory,
        kind="auto",
        in_memory=True,
        insecure_registries=[vm_registry],
        options=[f"--share={tag}={directory / tag}" for tag in TAGS],
    ) as machine:
        trio.run(pull_image, machine.address)
        yield Sharing(machine, image, directory)


@pytest.fixture
async def client(sharing: Sharing) -> AsyncIterator[AgentClient]:
    async with open_client(sharing.machine.address) as connection:
        yield connection


@pytest.fixture
def overlay(request: pytest.FixtureRequest) -> str:
    """The name of a persistent overlay that no other test has."""
    return str(request.node.name)


async def mounts_of(client: AgentClient, tag: str) -> list[str]:
    """Where the VM has a share mounted."""
    mounts = await shell(client, "cat /proc/self/mounts")
    lines = [line.split() for line in mounts.splitlines()]
    return [where for what, where, kind, *_ in lines if (what, kind) == (tag, "virtiofs")]


async def test_a_container_reads_and_writes_a_share(sharing: Sharing, client: AgentClient) -> None:
    sent = bytes(range(256)) * 8192
    sharing.path("code", "sent").write_bytes(sent)
    script = "cat /code/name && cat /code/sent /code/sent >/code/back && rm /code/sent"
    done = await run(client, sharing.image, "sh", "-c", script, mounts=(CODE,))
    assert (done.exit_code, done.stdout, done.stderr) == (0, b"code\n", b"")
    assert sharing.path("code", "back").read_bytes() == sent + sent
    assert not sharing.path("code", "sent").exists()


async def test_files_of_a_share_keep_their_owners_and_modes(
    sharing: Sharing, client: AgentClient
) -> None:
    script = "umask 027; mkdir /code/of-guest && echo >/code/of-guest/file; stat -c %u:%a /code/*/*"
    sharing.directory.joinpath("code").chmod(0o777)
    done = await run(client, sharing.image, "sh", "-c", script, mounts=(CODE,), user="guest")
    assert (done.exit_code, done.stdout) == (0, b"1000:640\n"), done
    status = sharing.path("code", "of-guest/file").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (1000, 0o640)


async def test_a_read_only_share_is_one(
    sharing: Sharing, client: AgentClient, overlay: str
) -> None:
    script = "cat /code/name; echo >/code/forbidden"
    for persistent in (None, overlay):
        done = await run(
            client,
            sharing.image,
            *("sh", "-c", script),
            mounts=(READ_ONLY,),
            persistent_overlay_id=persistent,
        )
        assert done.exit_code != 0
        assert done.stdout == b"code\n"
        assert b"Read-only file system" in done.stderr
    assert not sharing.path("code", "forbidden").exists()


async def test_a_container_that_runs_already_gets_a_share_and_keeps_it(
    sharing: Sharing, client: AgentClient, overlay: str
) -> None:
    detached = requests.Run(
        image=sharing.image,
        command=("sleep", "1000"),
        persistent_overlay_id=overlay,
        detached=True,
    )
    assert isinstance(await client.request(detached), responses.Completed)

    async def joined(script: str, *mounts: Mount) -> responses.Completed:
        return await run(
            client,
            sharing.image,
            *("sh", "-c", script),
            mounts=mounts,
            persistent_overlay_id=overlay,
        )

    assert (await joined("ls /code")).exit_code != 0
    # Hosts send the mounts with each command.
    for number in (b"1\n", b"2\n"):
        done = await joined("cat /code/name; echo . >>/code/runs; wc -l </code/runs", CODE)
        assert (done.exit_code, done.stdout) == (0, b"code\n" + number), done
    assert sharing.path("code", "runs").read_text() == ".\n.\n"
    assert (await joined("cat /code/name; pidof sleep")).stdout == b"code\n1\n"


async def test_two_shares_are_told_apart(sharing: Sharing, client: AgentClient) -> None:
    mounts = (CODE, Mount("data,set", "/srv/data", read_only=True))
    script = "cat /code/name /srv/data/name"
    done = await run(client, sharing.image, "sh", "-c", script, mounts=mounts)
    assert (done.exit_code, done.stdout) == (0, b"code\ndata,set\n")


async def test_a_share_is_mounted_once_in_the_vm_whoever_asks_first(
    sharing: Sharing, client: AgentClient
) -> None:
    tag = "many-at-once"
    assert await mounts_of(client, tag) == []

    async def use(number: int) -> None:
        where = f"/mnt/{number}"
        mounts = (Mount(tag, where, read_only=False),)
        async with open_client(sharing.machine.address) as connection:
            done = await run(connection, sharing.image, "cat", f"{where}/name", mounts=mounts)
            assert done.stdout == f"{tag}\n".encode()

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(use, number)
    assert await mounts_of(client, tag) == [f"/mnt/virtiofs/{tag}"]
    assert await shell(client, f"cat /mnt/virtiofs/{tag}/name") == f"{tag}\n"


async def test_a_tag_that_the_vm_has_not_is_an_error_that_names_it_and_nothing_runs(
    sharing: Sharing, client: AgentClient, overlay: str
) -> None:
    request = requests.Run(
        image=sharing.image,
        command=("touch", "/code/ran"),
        mounts=(CODE, Mount("absent", "/absent", read_only=False)),
    )
    error = await refusal(client, request)
    assert error.code == "MOUNT_FAILED"
    assert "'absent'" in error.message
    assert "no virtiofs share of that tag" in error.message
    assert not sharing.path("code", "ran").exists()
    assert "absent" not in await shell(client, "ls /mnt/virtiofs")
    done = await run(client, sharing.image, "cat", "/code/name", mounts=(CODE,))
    assert done.stdout == b"code\n"


async def test_shares_outlive_the_agent_with_the_containers_that_have_them(
    sharing: Sharing, overlay: str
) -> None:
    first = "cat /code/name; echo 1 >/code/before"
    then = "cat /code/name /code/new; ls /code/before"

    async def joined(client: AgentClient, script: str) -> responses.Completed:
        return await run(
            client,
            sharing.image,
            *("sh", "-c", script),
            mounts=(CODE,),
            persistent_overlay_id=overlay,
        )

    async with open_client(sharing.machine.address) as client:
        assert (await joined(client, first)).exit_code == 0
        container = await shell(client, "ls /run/innkeep/containers")
    await kill_agent(sharing.machine)
    sharing.path("code", "new").write_text("written meanwhile\n")
    expected = b"code\nwritten meanwhile\n"
    async with open_client(sharing.machine.address) as client:
        assert (await joined(client, then)).stdout == expected + b"/code/before\n"
        assert await shell(client, "ls /run/innkeep/containers") == container
        done = await run(client, sharing.image, "cat", "/code/name", "/code/new", mounts=(CODE,))
        assert done.stdout == expected
        assert await mounts_of(client, "code") == ["/mnt/virtiofs/code"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--share=a=/no/such"], "/no/such: there is no such directory to share"),
        (["--share=a=/etc/passwd"], "/etc/passwd: there is no such directory to share"),
        (["--share=a=/", "--share=b=/", "--share=a=/usr"], "--share: a is the tag of two"),
    ],
)
def test_a_share_that_cannot_be_made_is_said_in_one_line(options: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "initramfs.boot", "--machine=tcg", *options],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"initramfs.boot: {said}\n"


async def test_a_file_appears_whole_on_a_share_and_its_beginnings_go(
    sharing: Sharing, client: AgentClient, overlay: str
) -> None:
    """A share has no files without names: they have hidden ones, also while the agent is killed."""
    data = bytes(range(256)) * 8192
    place = sharing.directory / "code"
    where = {"persistent_overlay_id": overlay}

    def hidden() -> list[str]:
        return [path.name for path in place.glob(".innkeep-*")]

    done = await run(client, sharing.image, "true", mounts=(CODE,), **where)
    assert done.exit_code == 0, done
    for end in ("hang-up", "crash"):
        async with open_client(sharing.machine.address) as other:
            await begin(other, "/code/uploaded", len(data), **where)
            await send(other, data[:1000])
            (name,) = hidden()
            assert name.startswith(".innkeep-upload-")
            if end == "crash":
                await kill_agent(sharing.machine)
        await until(lambda: not hidden(), place, within_s=60)
        assert not (place / "uploaded").exists()
    async with open_client(sharing.machine.address) as fresh:
        await upload(fresh, "/code/uploaded", data, mode=0o640, uid=1000, **where)
        assert await read(fresh, "/code/uploaded", **where) == data
    found = (place / "uploaded").stat()
    assert (found.st_mode & 0o7777, found.st_uid) == (0o640, 1000)
    assert (place / "uploaded").read_bytes() == data
    assert hidden() == []
