"""What it takes until an image of a registry on loopback is ready to run, ours and others' way.

Every pull begins with an empty store on the same file system, and nothing left to be written to
it, and all have the same turn at the processors. Ours is done when everything is verified, mounted
and synced; what the others sync, `peers` says. The agent has pulled a small image before, as
containerd has started before; podman and skopeo are programs, and their start counts.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import attrs

from benchmarks import images, peers
from benchmarks.guest.python import python
from benchmarks.guest.row import Ratio, verdict
from benchmarks.machine import Machine, booted
from benchmarks.resident import Watch
from initramfs.local_registry import local_registry

MOST_GROWTH_MB = 60
_GUEST_FOLDER = "/storage/workspace"

_Peer = Callable[[str, Path], float]
_PEERS: Sequence[tuple[str, _Peer, float]] = (
    ("skopeo copy, umoci unpack", peers.unpack_with_umoci, 0.25),
    ("podman pull", peers.pull_with_podman, 0.6),
    ("ctr image pull", peers.pull_with_containerd, 0.6),
)


@attrs.frozen
class Setting:
    """The image's folder, a registry's address, where everything is kept, how much is measured."""

    image_folder: Path
    registry: str
    folder: Path
    quick: bool

    def count(self, full: int, quick: int) -> int:
        """How often something is done."""
        return quick if self.quick else full

    def reference(self, tag: str) -> str:
        """One of the images."""
        return images.reference(self.registry, tag)

    @contextmanager
    def empty_folder(self) -> Iterator[Path]:
        """For one pull; nothing of others is still to be written."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            os.sync()
            yield Path(scratch)

    @contextmanager
    def machine(self, *, warm: bool = True) -> Iterator[Machine]:
        """One with an empty store, whose agent, if ``warm``, has pulled before."""
        with (
            self.empty_folder() as folder,
            booted(folder, self.image_folder, self.registry) as machine,
        ):
            if warm:
                machine.pull(images.smallest(self.registry))
            os.sync()
            yield machine


def against_peers(tag: str, setting: Setting) -> Iterator[str]:
    """Our pull, and each peer's that can take the image."""
    # umoci knows no zstd.
    taking = [peer for peer in _PEERS if peer[0] != _PEERS[0][0] or tag != images.MANY_FILES_ZSTD]
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name, _, _ in taking}
    for _ in range(setting.count(full=3, quick=1)):
        with setting.machine() as machine:
            ours.append(machine.pull(setting.reference(tag)))
        for name, pull, _ in taking:
            with setting.empty_folder() as folder:
                theirs[name].append(pull(setting.reference(tag), folder))
    for name, _, limit in taking:
        yield str(
            Ratio(
                name=f"pull, {tag}",
                ours=statistics.median(ours),
                reference=statistics.median(theirs[name]),
                against=name,
                unit="s",
                limit=limit,
            )
        )


def against_stages(tag: str, setting: Setting) -> Iterator[str]:
    """Our pull, and its slowest stage alone, on one processor."""
    ours: list[float] = []
    stages: list[dict[str, float]] = []
    for _ in range(setting.count(full=5, quick=1)):
        with setting.machine() as machine:
            ours.append(machine.pull(setting.reference(tag)))
            words = ("benchmarks.guest.stages", setting.registry, tag, _GUEST_FOLDER)
            stages.append(json.loads(machine.output(python(*words))))
    medians = {name: statistics.median(it[name] for it in stages) for name in stages[0]}
    slowest = max(medians, key=lambda name: medians[name])
    yield str(
        Ratio(
            name=f"pull, {tag}",
            ours=statistics.median(ours),
            reference=medians[slowest],
            against=f"{slowest}, alone on one processor",
            unit="s",
            limit=1.6,
            note="".join(f"\n    {name}: {taken:.2f} s" for name, taken in medians.items()),
        )
    )


def unchanged(setting: Setting) -> Iterator[str]:
    """Pulling again what has not changed."""
    rounds = setting.count(full=200, quick=20)
    with setting.machine() as machine:
        machine.pull(setting.reference(images.FORTY_LAYERS))
        words = ("benchmarks.guest.unchanged", setting.registry, images.FORTY_LAYERS, str(rounds))
        ours, reference = json.loads(machine.output(python(*words)))
    yield str(
        Ratio(
            name="pull, unchanged",
            ours=ours * 1000,
            reference=reference * 1000,
            against="a HEAD request by requests",
            unit="ms",
            limit=3,
        )
    )


def changed_layer(setting: Setting) -> Iterator[str]:
    """Pulling an image of forty layers, one of which is new."""
    first, again = [], []
    for _ in range(setting.count(full=5, quick=1)):
        with setting.machine() as machine:
            first.append(machine.pull(setting.reference(images.FORTY_LAYERS)))
            os.sync()
            again.append(machine.pull(setting.reference(images.FORTY_LAYERS_CHANGED)))
    yield str(
        Ratio(
            name="pull, one layer of forty changed",
            ours=statistics.median(again),
            reference=statistics.median(first),
            against="the first pull",
            unit="s",
            limit=0.2,
        )
    )


def memory(setting: Setting) -> Iterator[str]:
    """How much the agent grows, from its start to the most while it pulls, and its children."""
    with setting.machine(warm=False) as machine:
        watch = Watch(machine.agent_pid)
        before_mb = watch.resident_mb()
        with watch.running():
            machine.pull(setting.reference(images.TWO_GIBIBYTES))
        growth_mb = watch.peak_mb - before_mb
    yield (
        f"{'resident, pulling 2 GiB':34} {watch.peak_mb:8.1f} MB   before: {before_mb:.1f} MB; "
        f"{watch.most_children} children, together {watch.children_mb:.1f} MB"
        f"   <= +{MOST_GROWTH_MB} MB  {verdict(growth_mb <= MOST_GROWTH_MB)}"
    )


ROWS: Mapping[str, Callable[[Setting], Iterator[str]]] = {
    **{
        tag: lambda setting, tag=tag: against_peers(tag, setting)
        for tag in (
            *(images.MANY_FILES, images.BIG_FILES),
            *(images.FORTY_LAYERS, images.MANY_FILES_ZSTD),
        )
    },
    **{
        f"stages-{tag}": lambda setting, tag=tag: against_stages(tag, setting)
        for tag in (images.MANY_FILES, images.BIG_FILES)
    },
    "unchanged": unchanged,
    "changed-layer": changed_layer,
    "memory": memory,
}


def measure(rootfs: Path, rows: Sequence[str] = (), *, quick: bool = False) -> None:
    """Print the table, or the named rows; ``quick`` is for trying, its figures mean little.

    Beside the image's folder, so that all is on one file system.
    """
    peers.check_installed()
    storage = images.registry_storage((rootfs.parent / "cache").absolute())
    # SIGTERM unwinds like ^C, so that neither a machine nor the registry is left behind.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            registry = stack.enter_context(local_registry(storage_dir=storage))
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="pulls-", dir=rootfs.parent.absolute())
            )
            setting = Setting(rootfs.parent, registry.address, Path(folder), quick)
            for row in rows or ROWS:
                for line in ROWS[row](setting):
                    print(line, flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
