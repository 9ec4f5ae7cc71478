"""What hosts are told of the images, written once and not for every answer."""

from __future__ import annotations

from agent.images.content_store import ContentStore, StoredImage, Tag
from protocol.codec import encoded


class ImageAnswers:
    """The images of a store as ``ok.data``.

    Hosts ask for all of them again and again, and to describe and write one takes as long as to
    answer a ping.
    """

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._tags: tuple[Tag, ...] = ()
        self._each: dict[str, tuple[StoredImage, object]] = {}
        self._all: object = None

    def of(self, image: StoredImage) -> object:
        """One image's ImageInfo."""
        self._keep_up()
        known = self._each.get(image.reference)
        if known is None or known[0] is not image:
            known = self._each[image.reference] = image, encoded(image.info())
        return known[1]

    def of_all(self) -> object:
        """The array of those of all images."""
        self._keep_up()
        if self._all is None:
            self._all = encoded([self.of(tag.image) for tag in self._tags])
        return self._all

    def _keep_up(self) -> None:
        """Drop what is no longer so."""
        tags = self._store.tags()
        if tags is not self._tags:
            names = {tag.entry.reference for tag in tags}
            self._each = {name: one for name, one in self._each.items() if name in names}
            self._tags, self._all = tags, None
