"""What hosts are told of an image, where it does not matter which."""

import attrs

from protocol.values import ImageInfo

_INFO = ImageInfo(
    reference="docker.io/library/test:latest",
    digest="sha256:0",
    size=0,
    architecture="amd64",
    os="linux",
    layer_count=1,
    layers=("sha256:1",),
)


def image_info(**fields: object) -> ImageInfo:
    """One with the given fields."""
    return attrs.evolve(_INFO, **fields)
