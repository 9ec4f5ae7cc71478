"""Loop devices, several at once."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[3]
# In a /dev of its own, which has no node of any loop device.
TAKE_AT_ONCE = """
import os, sys
from threading import Barrier, Thread
from agent.linux.loop import loop_device
barrier = Barrier(8)
names, failures = [], []
def take(path):
    barrier.wait()
    try:
        with loop_device(path) as name:
            barrier.wait()
            names.append(name)
            barrier.wait()
    except OSError as error:
        failures.append(error)
        barrier.abort()
threads = [Thread(target=take, args=(path,)) for path in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
assert len(set(names)) == len(threads), names
"""
IN_OWN_DEV = (
    "mount -t tmpfs dev /dev && mknod /dev/loop-control c 10 237 && mknod /dev/null c 1 3 && "
    'exec "$@"'
)


def test_several_threads_take_loop_devices_that_have_no_nodes_yet(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(8)]
    for file in files:
        file.write_bytes(bytes(4096))
    own_dev = ("unshare", "-m", "sh", "-c", IN_OWN_DEV, "sh")
    take = (sys.executable, "-c", TAKE_AT_ONCE, *map(str, files))
    for _ in range(5):
        subprocess.run([*own_dev, *take], check=True, cwd=PROJECT)
