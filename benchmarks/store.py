"""What it costs to have the agent give away what it stores: layers, and the list of its images."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import trio

from benchmarks import images
from benchmarks.guest.python import python
from benchmarks.guest.row import Ratio
from benchmarks.machine import Machine, booted
from benchmarks.pulls import Setting
from initramfs.demo import push_busybox
from initramfs.local_registry import local_registry
from protocol import decode_value, requests, responses
from protocol.client import expect, open_client
from protocol.values import ImageInfo

IMAGES = 200
_OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def export(form: str, setting: Setting) -> Iterator[str]:
    """The largest layer of an image as it arrives, and as its blob is read and decompressed."""
    rounds = setting.count(full=11, quick=3)
    # One of its own: where a registry has the layers as gzip, skopeo copies nothing else there.
    with setting.empty_folder() as scratch, local_registry() as registry:
        reference = images.reference(registry.address, form)
        _copy_as(form, setting.reference(images.MANY_FILES), reference)
        with booted(scratch, setting.image_folder, registry.address) as machine:
            machine.pull(reference)
            info = _query(machine, reference)
            words = ("benchmarks.guest.exports", info.digest, form, str(rounds), *info.layers)
            ours, bare, size = json.loads(machine.output(python(*words)))
    yield str(
        Ratio(
            name=f"export, {form}, {size / 1e6:.0f} MB",
            ours=ours,
            reference=bare,
            against="reading and decompressing the blob",
            unit="MB/s",
            limit=0.7,
            at_least=True,
        )
    )


def _copy_as(form: str, source: str, target: str) -> None:
    tls = ("--src-tls-verify=false", "--dest-tls-verify=false")
    how = ("copy", "--quiet", "--dest-compress", f"--dest-compress-format={form}", *tls)
    subprocess.run(
        ["skopeo", "--insecure-policy", *how, f"docker://{source}", f"docker://{target}"],
        check=True,
    )


def asking(method: str, setting: Setting) -> Iterator[str]:
    """The median of a question about images, and of a ping."""
    with setting.empty_folder() as scratch, local_registry() as registry:
        references = list(_references(push_busybox(scratch, registry.address)))
        with booted(scratch, setting.image_folder, registry.address) as machine:
            for reference in references:
                machine.pull(reference)
            rounds = setting.count(full=40, quick=5)
            words = ("benchmarks.guest.questions", method, references[-1], str(rounds))
            ours, ping, size = json.loads(machine.output(python(*words)))
    yield str(
        Ratio(
            name=f"{method}, {IMAGES} images, p50",
            ours=ours * 1e6,
            reference=ping * 1e6,
            against="ping, p50",
            unit="µs",
            limit=10,
            note=f" (an answer of {size / 1e3:.1f} kB)",
        )
    )


def _references(image: str) -> Iterator[str]:
    """Many names for the same image."""
    name, _, tag = image.rpartition(":")
    registry, _, repository = name.partition("/")
    url = f"http://{registry}/v2/{repository}/manifests"
    wanted = urllib.request.Request(f"{url}/{tag}", headers={"Accept": _OCI_MANIFEST})
    with urllib.request.urlopen(wanted) as answer:
        manifest = answer.read()
    for number in range(IMAGES):
        put = urllib.request.Request(
            f"{url}/tag{number}",
            data=manifest,
            method="PUT",
            headers={"Content-Type": _OCI_MANIFEST},
        )
        urllib.request.urlopen(put).close()
        yield f"{name}:tag{number}"


def _query(machine: Machine, reference: str) -> ImageInfo:
    async def query() -> ImageInfo:
        async with open_client(machine.address) as client:
            answer = expect(await client.request(requests.Query(reference)), responses.Ok)
            return decode_value(answer.data, ImageInfo)

    return trio.run(query)


ROWS: Mapping[str, Callable[[Setting], Iterator[str]]] = {
    "export-gzip": lambda setting: export("gzip", setting),
    "export-zstd": lambda setting: export("zstd", setting),
    "list": lambda setting: asking("list_images", setting),
    "query": lambda setting: asking("query", setting),
}


def measure(rootfs: Path, rows: Sequence[str] = (), *, quick: bool = False) -> None:
    """Print the table, or the named rows; ``quick`` is for trying, its figures mean little."""
    storage = images.registry_storage((rootfs.parent / "cache").absolute())
    # SIGTERM unwinds like ^C, so that neither a machine nor the registry is left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            registry = stack.enter_context(local_registry(storage_dir=storage))
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="store-", dir=rootfs.parent.absolute())
            )
            setting = Setting(rootfs.parent, registry.address, Path(folder), quick)
            for row in rows or ROWS:
                for line in ROWS[row](setting):
                    print(line, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
