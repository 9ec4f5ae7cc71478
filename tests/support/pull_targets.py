"""Images to be pulled while something happens to the machine that pulls them."""

import random

from attrs import frozen

from tests.support.counting_proxy import CountingProxy
from tests.support.images import Images, PushedImage
from tests.support.layout import gzip_layer, plain_layer, zstd_layer


@frozen
class Target:
    """An image to be pulled, and what each of its layers has to come to."""

    image: PushedImage
    reference: str
    sizes: dict[str, int]
    contents: dict[str, str]
    """By layer: the name of its only file, which is the seed of its content, too."""

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())


def make_target(
    images: Images,
    proxy: CountingProxy,
    tag: str,
    names: list[str],
    chances: random.Random,
    host: str = "127.0.0.1",
) -> Target:
    """An image of one noisy layer a name, of 0.1 to 5 MiB each, packed this way and that.

    It is pulled through the proxy, by a machine that calls this one `host`.
    """
    packs = [gzip_layer, plain_layer, zstd_layer]
    layers = {
        name: images.noise_layer(
            name,
            random.Random(name).randrange(100 << 10, 5 << 20),
            packs[len(name) % 3 if name.startswith("shared") else chances.randrange(3)],
        )
        for name in names
    }
    image = images.variant(tag, {"Cmd": ["/bin/true"], "Env": ["PATH=/bin"]}, *layers.values())
    sizes = {layer.digest: len(layer.blob) for layer in layers.values()}
    base = image.layers[0]
    sizes[base] = (image.layout / "blobs/sha256" / base.removeprefix("sha256:")).stat().st_size
    contents = {layer.digest: name for name, layer in layers.items()}
    return Target(image, proxy.reference(image.reference, host), sizes, contents)
