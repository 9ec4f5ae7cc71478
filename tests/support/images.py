"""Images built on the spot from Debian's busybox, pushed to the registry when first asked for."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import attrs
import pytest

from initramfs.local_registry import LocalRegistry
from tests.support import trees
from tests.support.commands import run
from tests.support.layout import (
    LayerBlob,
    Layout,
    digest_of,
    gzip_layer,
    plain_layer,
    zstd_layer,
)
from tests.support.registry import push
from tests.support.tree import Tree, describe

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
OTHER_ARCHITECTURE = {"amd64": "arm64", "arm64": "amd64"}[ARCHITECTURE]

Config = Mapping[str, object]


@attrs.frozen
class PushedImage:
    """An image in the registry, and the same one as `layout:tag` for skopeo and umoci.

    The digests are those of the platform of this machine. `umoci_tag` names an image of the
    same tree that umoci can unpack; see `Images.tree`.
    """

    reference: str
    layout: Path
    tag: str
    manifest_digest: str
    config_digest: str
    diff_ids: tuple[str, ...]
    layers: tuple[str, ...]
    umoci_tag: str

    def reference_from(self, host: str) -> str:
        """The reference as a machine writes it to which the registry's host is `host`."""
        return self.reference.replace("127.0.0.1", host, 1)


class Images:
    """One small image for each thing that an image may hold; built once a session."""

    def __init__(self, registry: LocalRegistry, directory: Path) -> None:
        self._registry = registry
        self._layout = Layout(directory / "layout")
        self._unpacked = directory / "unpacked"
        self._unpacked.mkdir()
        self._trees: dict[str, Tree] = {}

    @cached_property
    def busybox(self) -> PushedImage:
        """Static busybox, `cmd` only: it prints `hello from $GREETER`."""
        config = {
            "Env": ["PATH=/bin", "GREETER=busybox"],
            "Cmd": ["/bin/sh", "-c", 'echo "hello from $GREETER"'],
        }
        return self._push("busybox", [self._base], config)

    @cached_property
    def configured(self) -> PushedImage:
        """Entrypoint and cmd, a user of two groups, a workdir, an environment."""
        config = {
            "Entrypoint": ["/bin/sh", "-c", 'echo "$0 $*"; id; pwd; env'],
            "Cmd": ["default", "arguments"],
            "User": "guest",
            "WorkingDir": "/home/guest",
            "Env": ["PATH=/bin:/usr/bin", "FROM_IMAGE=image", "OVERRIDDEN=image"],
        }
        return self._push("configured", [self._base], config)

    @cached_property
    def silent(self) -> PushedImage:
        """Neither entrypoint nor cmd, and no PATH."""
        return self._push("silent", [self._base], {})

    @cached_property
    def sixty_layers(self) -> PushedImage:
        layers = [gzip_layer(trees.archive(trees.numbered(n))) for n in range(1, 60)]
        return self._push("sixty-layers", [self._base, *layers], {"Cmd": ["cat", "/layers/top"]})

    @cached_property
    def whiteouts(self) -> PushedImage:
        """Files, directories and links removed, replaced and made opaque by later layers."""
        builders = (trees.before_whiteouts, trees.whiteouts, trees.after_whiteouts)
        layers = [gzip_layer(trees.archive(build)) for build in builders]
        config = {"Cmd": ["/bin/ls", "/opaque"]}
        return self._push("whiteouts", [self._base, *layers], config)

    @cached_property
    def zstd(self) -> PushedImage:
        # umoci 0.4.7 knows no zstd ("blob is not correct mediatype"); the busybox image has the
        # same tar in gzip, and the same diff_id.
        assert self.busybox.diff_ids == (self._base.diff_id,)
        layer = zstd_layer(self._base_tar)
        return self._push("zstd", [layer], {"Cmd": ["/bin/uname"]}, umoci_tag="busybox")

    @cached_property
    def uncompressed(self) -> PushedImage:
        return self._push("uncompressed", [plain_layer(self._base_tar)], {"Cmd": ["/bin/uname"]})

    @cached_property
    def docker_schema2(self) -> PushedImage:
        """The same layers, described by docker's own media types."""
        pushed = self._push("schema2", [self._base], {"Cmd": ["/bin/uname"]}, schema="v2s2")
        raw = run(
            "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{pushed.reference}"
        )
        # skopeo rewrites the configuration on its way to the other format.
        config_digest = json.loads(raw)["config"]["digest"]
        return attrs.evolve(pushed, manifest_digest=digest_of(raw), config_digest=config_digest)

    @cached_property
    def multi_platform(self) -> PushedImage:
        """An index: this machine's platform, another one, and what buildkit adds for none."""
        return self._multi_platform("multi-platform")

    @cached_property
    def multi_platform_too(self) -> PushedImage:
        """As `multi_platform`, with other manifests."""
        return self._multi_platform("multi-platform-too")

    @cached_property
    def odd_entries(self) -> PushedImage:
        """Hard links over directories, devices, capabilities, ACLs, attributes, names, owners."""
        layer = gzip_layer(trees.archive(trees.odd_entries))
        return self._push("odd-entries", [self._base, layer], {"Cmd": ["/bin/ls", "/names"]})

    @cached_property
    def sparse_gnu(self) -> PushedImage:
        """Sparse files as old GNU tar writes them (type `S`)."""
        # umoci 0.4.7 refuses these ("unknown typeflag"): it unpacks the same files unsparse.
        layer = gzip_layer(trees.archive(trees.sparse_files, "--sparse", gnu=True))
        config = {"Cmd": ["/bin/wc", "-c", "/many"]}
        return self._push("sparse-gnu", [self._base, layer], config, umoci_tag=self._dense_gnu)

    @cached_property
    def sparse_pax(self) -> PushedImage:
        """Sparse files as PAX headers (`GNU.sparse.*`), format 1.0."""
        layer = gzip_layer(trees.archive(trees.sparse_files, "--sparse"))
        return self._push("sparse-pax", [self._base, layer], {"Cmd": ["/bin/wc", "-c", "/many"]})

    @cached_property
    def large(self) -> PushedImage:
        """Four layers of 12 MiB each that no compression makes smaller."""
        return self._large("large")

    @cached_property
    def large_too(self) -> PushedImage:
        """As `large`, with other layers."""
        return self._large("large-too")

    @cached_property
    def clients(self) -> PushedImage:
        """busybox with OpenSSH's ssh-add and BIND's dig."""
        layer = gzip_layer(trees.archive(trees.programs("ssh-add", "dig")))
        return self._push("clients", [self._base, layer], {"Env": ["PATH=/usr/bin:/bin"]})

    @cached_property
    def bare(self) -> PushedImage:
        """busybox and nothing else: no /tmp, no /etc, no user."""
        layer = gzip_layer(trees.archive(trees.busybox_alone))
        return self._push("bare", [layer], {"Entrypoint": ["/usr/bin/busybox"]})

    def variant(self, tag: str, config: Config, *layers: LayerBlob) -> PushedImage:
        """busybox, `layers` above it, and a configuration; pushed under a name of its own."""
        return self._push(tag, [self._base, *layers], config)

    def noise_layer(
        self, name: str, size: int = 1 << 20, pack: Callable[[bytes], LayerBlob] = plain_layer
    ) -> LayerBlob:
        """A layer that no other image has, of a size that no compression makes smaller."""
        return pack(trees.archive(_noise(name, size)))

    def push_manifest(
        self,
        tag: str,
        layers: Sequence[LayerBlob],
        config: Config,
        *,
        more_diff_ids: Sequence[str] = (),
    ) -> str:
        """Push any image, also one whose layers are not what it says; its reference.

        skopeo checks what it copies: a layer that is not its diff_id passes, a wrong blob not.
        """
        manifest = self._layout.add_manifest(
            layers, config, architecture=ARCHITECTURE, more_diff_ids=more_diff_ids
        )
        self._layout.tag(tag, manifest)
        return push(self._registry, self._layout.directory, tag, tag)

    def tree(self, image: PushedImage) -> Tree:
        """What `umoci unpack` makes of the image."""
        if image.umoci_tag not in self._trees:
            bundle = self._unpacked / image.umoci_tag
            run("umoci", "unpack", "--image", f"{image.layout}:{image.umoci_tag}", bundle)
            self._trees[image.umoci_tag] = describe(bundle / "rootfs")
        return self._trees[image.umoci_tag]

    @cached_property
    def _base_tar(self) -> bytes:
        return trees.archive(trees.busybox)

    @cached_property
    def _base(self) -> LayerBlob:
        return gzip_layer(self._base_tar)

    @cached_property
    def _dense_gnu(self) -> str:
        layers = [self._base, gzip_layer(trees.archive(trees.sparse_files, gnu=True))]
        self._layout.tag("dense-gnu", self._layout.add_manifest(layers, {}))
        return "dense-gnu"

    def _multi_platform(self, tag: str) -> PushedImage:
        here = gzip_layer(trees.archive(_architecture_file(ARCHITECTURE)))
        there = gzip_layer(trees.archive(_architecture_file(OTHER_ARCHITECTURE)))
        config = {"Cmd": ["cat", "/architecture"], "Labels": {"tag": tag}}
        variant = "v8" if OTHER_ARCHITECTURE == "arm64" else None
        attestation = self._layout.add_manifest([there], {}, architecture="unknown", os="unknown")
        other = self._layout.add_manifest(
            [self._base, there], config, architecture=OTHER_ARCHITECTURE, variant=variant
        )
        manifest = self._layout.add_manifest([self._base, here], config, architecture=ARCHITECTURE)
        self._layout.tag(tag, self._layout.add_index([other, attestation, manifest]))
        # umoci 0.4.7 picks no platform from an index: the same manifest with a tag of its own.
        self._layout.tag(f"{tag}-here", manifest)
        return self._pushed(tag, manifest["digest"], umoci_tag=f"{tag}-here")

    def _large(self, tag: str) -> PushedImage:
        layers = [self.noise_layer(f"{tag}-{n}", 12 << 20) for n in range(4)]
        return self._push(tag, [self._base, *layers], {"Cmd": ["/bin/ls", "/noise"]})

    def _push(
        self,
        tag: str,
        layers: Sequence[LayerBlob],
        config: Config,
        *,
        schema: str | None = None,
        umoci_tag: str | None = None,
    ) -> PushedImage:
        manifest = self._layout.add_manifest(layers, config, architecture=ARCHITECTURE)
        self._layout.tag(tag, manifest)
        return self._pushed(tag, manifest["digest"], schema=schema, umoci_tag=umoci_tag)

    def _pushed(
        self, tag: str, digest: str, *, schema: str | None = None, umoci_tag: str | None = None
    ) -> PushedImage:
        manifest = self._layout.read_json(digest)
        config = self._layout.read_json(manifest["config"]["digest"])
        directory = self._layout.directory
        return PushedImage(
            reference=push(self._registry, directory, tag, tag, manifest_format=schema),
            layout=directory,
            tag=tag,
            manifest_digest=digest,
            config_digest=manifest["config"]["digest"],
            diff_ids=tuple(config["rootfs"]["diff_ids"]),
            layers=tuple(layer["digest"] for layer in manifest["layers"]),
            umoci_tag=umoci_tag or tag,
        )


@pytest.fixture(scope="session")
def images(registry: LocalRegistry, tmp_path_factory: pytest.TempPathFactory) -> Images:
    return Images(registry, tmp_path_factory.mktemp("images"))


def _architecture_file(architecture: str) -> trees.Builder:
    return lambda root: _write(root / "architecture", f"{architecture}\n".encode())


def _noise(name: str, size: int) -> trees.Builder:
    def build(root: Path) -> None:
        (root / "noise").mkdir()
        _write(root / "noise" / name, hashlib.shake_128(name.encode()).digest(size))

    return build


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
