"""Image references as docker reads them.

https://github.com/distribution/reference/blob/main/reference.go has the grammar, and its
normalize.go the defaults: `alpine` is `docker.io/library/alpine:latest`.
"""

from __future__ import annotations

import re

import attrs

DOCKER_HUB = "docker.io"
_DEFAULT_TAG = "latest"

# Of the whole name, registry and repository, as in docker's grammar.
_LONGEST_NAME = 255

_HOST_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_HOST_LABEL}(?:\.{_HOST_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?")
_REPOSITORY_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")


class InvalidReference(ValueError):
    """The text names no image; the message quotes it and says what is wrong with it."""


@attrs.frozen
class Reference:
    """An image in a registry, in canonical form: every default is filled in.

    ``registry`` is ``HOST`` or ``HOST:PORT`` as it was written, ``repository`` the path below it.
    At least one of ``tag`` and ``digest`` is set; where both are, the digest decides what is
    pulled, and the tag is only part of the name.
    """

    registry: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest, or else the tag."""
        target = self.digest or self.tag
        assert target is not None
        return target

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.name}{tag}{digest}"


def parse_reference(text: str) -> Reference:
    """The reference that `text` spells.

    Raises:
        InvalidReference: docker would not take it either, or its digest is not a sha256.
    """
    try:
        return _parse(text)
    except InvalidReference as error:
        quoted = repr(text if len(text) <= 300 else text[:300] + "…")
        raise InvalidReference(f"{quoted} is not an image reference: {error}") from None


def _parse(text: str) -> Reference:
    if not text:
        raise InvalidReference("it is empty")
    name, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidReference("after '@' a digest is expected, 'sha256:' and 64 hex digits")
    name, tag = _split_tag(name)
    if tag is not None and not _TAG.fullmatch(tag):
        raise InvalidReference(
            "a tag is up to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'"
        )
    registry, repository = _split_registry(name)
    if len(registry) + 1 + len(repository) > _LONGEST_NAME:
        raise InvalidReference(f"the name is longer than {_LONGEST_NAME} characters")
    if not _REGISTRY.fullmatch(registry):
        raise InvalidReference(f"{registry!r} is not a registry's HOST or HOST:PORT")
    if not all(map(_REPOSITORY_PART.fullmatch, repository.split("/"))):
        raise InvalidReference(
            "a repository is lowercase letters and digits, with '.', '_', '__' or '-' only "
            "between them, in parts separated by '/'"
        )
    if not at and tag is None:
        # Docker keeps these for the ids of local images.
        if _IMAGE_ID.fullmatch(name):
            raise InvalidReference("64 hex digits are an image's id, not a name in a registry")
        tag = _DEFAULT_TAG
    return Reference(registry, repository, tag, digest or None)


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon before the last slash belongs to the registry's port."""
    before, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        return name, None
    return before, tag


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    looks_like_host = "." in first or ":" in first or first == "localhost" or first.lower() != first
    if not slash or not looks_like_host:
        first, rest = DOCKER_HUB, name
    if first == "index.docker.io":
        first = DOCKER_HUB
    if first == DOCKER_HUB and "/" not in rest:
        rest = f"library/{rest}"
    return first, rest
