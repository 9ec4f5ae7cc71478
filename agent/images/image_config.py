"""The image config: what a container of the image is started with, and its layers' diff_ids.

https://github.com/opencontainers/image-spec/blob/main/config.md
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from agent.images.manifest import DIGEST, InvalidManifest, json_object
from agent.images.platform import Platform, normalize


@attrs.frozen
class ImageConfig:
    """An image config's fields, each of the type that the specification gives it.

    ``diff_ids`` are ``sha256:<hex>``, bottom first. Empty and absent are the same, as in docker.
    """

    diff_ids: tuple[str, ...]
    created: str | None
    architecture: str
    os: str
    variant: str | None
    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: tuple[str, ...] = attrs.field(repr=False)
    workdir: str | None
    user: str | None

    @classmethod
    def of(cls, document: Mapping[str, object]) -> ImageConfig:
        """The fields of a config document. Raises InvalidManifest, naming the field."""
        rootfs = _object(document, "rootfs")
        diff_ids = _texts(rootfs, "diff_ids")
        if not all(map(DIGEST.fullmatch, diff_ids)):
            raise InvalidManifest("the config's rootfs.diff_ids are not all sha256 digests")
        process = _object(document, "config")
        return cls(
            diff_ids=diff_ids,
            created=_text(document, "created"),
            architecture=_text(document, "architecture") or "",
            os=_text(document, "os") or "",
            variant=_text(document, "variant"),
            entrypoint=_texts(process, "Entrypoint"),
            cmd=_texts(process, "Cmd"),
            env=_texts(process, "Env"),
            workdir=_text(process, "WorkingDir"),
            user=_text(process, "User"),
        )

    @property
    def platform(self) -> Platform | None:
        """The platform that the image is for, where the config names one."""
        if not (self.os and self.architecture):
            return None
        return normalize(self.os, self.architecture, self.variant)


def parse_config(data: bytes) -> dict[str, object]:
    """The config document in `data`, of which `ImageConfig.of` can be made.

    Raises:
        InvalidManifest: it is no JSON object, or a field is of another type than specified.
    """
    document = json_object(data, "the config")
    ImageConfig.of(document)
    return document


def _object(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidManifest(f"the config's {key} is not an object")
    return value


def _text(document: Mapping[str, object], key: str) -> str | None:
    value = document.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise InvalidManifest(f"the config's {key} is not a string")
    return value


def _texts(document: Mapping[str, object], key: str) -> tuple[str, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidManifest(f"the config's {key} is not an array of strings")
    return tuple(value)
