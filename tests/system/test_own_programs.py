"""The programs that the agent runs for itself, while a command is long about being started."""

from pathlib import Path

from protocol.client import open_client
from tests.support.execution import execute
from tests.support.machine import booted

# A posix_spawn(3) that goes on until somebody writes to its FIFO, as one whose program lies on a
# share that does not answer; then all that the agent has others do, in the image's own Python. A
# program that waits for that spawn keeps the interpreter's lock: only a time limit ends it.
SCRIPT = """\
import ctypes, os, sys, threading
from pathlib import Path
sys.path.insert(0, "/usr/lib/innkeep")
from agent.errors import AgentError
from agent.images.mkfs_erofs import MkfsErofs
from agent.machine.versions import KnownVersions
from agent.network.link_process import open_links
from agent.storage import device, ext4
import trio

os.chdir("/tmp")
os.mkfifo("held")
libc = ctypes.CDLL(None)

def spawn():
    actions = ctypes.create_string_buffer(512)
    assert libc.posix_spawn_file_actions_init(actions) == 0
    assert libc.posix_spawn_file_actions_addopen(actions, 0, b"held", os.O_RDONLY, 0) == 0
    pid = ctypes.c_int()
    none = (ctypes.c_char_p * 1)(None)
    assert libc.posix_spawn(ctypes.byref(pid), b"/bin/true", actions, None, none, none) == 0
    os.waitpid(pid.value, 0)

def is_held():
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            if Path(f"/proc/{child}/wchan").read_text() == "wait_for_partner":
                return True
    return False

def make_erofs():
    Path("tar").write_bytes(bytes(10240))
    mkfs = MkfsErofs("mkfs.erofs", Path("tar"), Path("image"), 1 << 30)
    mkfs.finish()
    mkfs.close()

def use_ext4():
    with open("disk", "wb") as disk:
        disk.truncate(32 << 20)
    ext4.make("disk")
    assert device.signature("disk") == "ext4"
    with open("disk", "r+b") as disk:
        disk.truncate(128 << 20)
    ext4.grow("disk")
    assert ext4.Superblock.read("disk").size_bytes == 128 << 20
    with open("disk", "r+b") as disk:
        disk.seek(1024 + 0x3A)  # its state, of which the checksum then says that it is damaged
        disk.write(bytes(2))
    try:
        ext4.check("disk")
    except AgentError as error:
        assert "e2fsck -p" in error.message

def ask_versions():
    versions, causes = KnownVersions("crun", "mkfs.erofs", None).read()
    assert versions.crun and versions.erofs_utils, causes

async def use_links():
    async with open_links():
        pass

spawning = threading.Thread(target=spawn)
spawning.start()
while not is_held():
    pass
make_erofs()
use_ext4()
ask_versions()
trio.run(use_links)
assert is_held()
os.close(os.open("held", os.O_WRONLY))
spawning.join()
print("done")
"""


async def test_none_waits_for_a_command_whose_start_takes_long(tmp_path: Path) -> None:
    with booted(tmp_path) as machine:
        async with open_client(machine.address) as client:
            done = await execute(
                client, "/usr/bin/python3", "-I", "-S", "-c", SCRIPT, timeout_ms=60_000
            )
    assert done.stdout == b"done\n", done.stderr.decode()
