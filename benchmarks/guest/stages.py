"""The stages of a pull, each alone on an image's data and on one processor: REGISTRY TAG FOLDER

Prints one line of JSON: seconds by stage. The parts are the agent's own, put together otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests

from agent.images.decompression import Decompression
from agent.images.layer_tar import LayerTarWriter
from agent.images.mkfs_erofs import MkfsErofs
from agent.images.tar_rewriter import TarRewriter

BLOCK = 1 << 20
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def measure(registry: str, tag: str, folder: Path) -> dict[str, float]:
    """Seconds that each stage takes for all layers, one after the other."""
    url = f"http://{registry}/v2/benchmark"
    with requests.Session() as session:
        manifest = session.get(f"{url}/manifests/{tag}", headers={"Accept": OCI_MANIFEST}).json()
        layers = manifest["layers"]
        urls = [f"{url}/blobs/{layer['digest']}" for layer in layers]
        seconds = {"download": _seconds(lambda: _download(session, urls))}
        blobs = []
        for number, address in enumerate(urls):
            blobs.append(folder / f"blob{number}")
            with blobs[-1].open("wb") as file:
                file.writelines(session.get(address, stream=True).iter_content(BLOCK))
    tars = _decompressed(blobs, layers, folder)
    seconds["sha256 of the blobs"] = _seconds(lambda: _hash(blobs))
    seconds["decompression"] = _seconds(lambda: _decompress(blobs, layers))
    seconds["sha256 of the tars"] = _seconds(lambda: _hash(tars))
    seconds["reading the tars"] = _seconds(lambda: _rewrite(tars))
    seconds["keeping the blobs"] = _seconds(lambda: _copy(blobs, folder / "copy"))
    seconds["keeping the tars"] = _seconds(lambda: _copy(tars, folder / "copy"))
    seconds["mkfs.erofs"] = _make(tars, folder / "layer", folder / "image")
    return seconds


def _seconds(action: Callable[[], object]) -> float:
    os.sync()
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _download(session: requests.Session, urls: list[str]) -> None:
    for url in urls:
        with session.get(url, stream=True) as response:
            while response.raw.read1(BLOCK):
                pass


def _decompressed(blobs: list[Path], layers: list[Any], folder: Path) -> list[Path]:
    tars = []
    for number, (blob, layer) in enumerate(zip(blobs, layers, strict=True)):
        tars.append(folder / f"tar{number}")
        with tars[-1].open("wb") as file:
            decompression = Decompression(layer["mediaType"])
            for block in _blocks(blob):
                file.writelines(decompression.feed(block))
    return tars


def _hash(paths: list[Path]) -> None:
    for path in paths:
        sha256 = hashlib.sha256()
        for block in _blocks(path):
            sha256.update(block)


def _decompress(blobs: list[Path], layers: list[Any]) -> None:
    for blob, layer in zip(blobs, layers, strict=True):
        decompression = Decompression(layer["mediaType"])
        for block in _blocks(blob):
            for _ in decompression.feed(block):
                pass


def _rewrite(tars: list[Path]) -> None:
    for tar in tars:
        rewriter = TarRewriter()
        for block in _blocks(tar):
            for _ in rewriter.feed(block):
                pass


def _copy(blobs: list[Path], copy: Path) -> None:
    for blob in blobs:
        with copy.open("wb") as file:
            file.writelines(_blocks(blob))
            file.flush()
            os.fsync(file.fileno())


def _make(tars: list[Path], layer: Path, image: Path) -> float:
    seconds = 0.0
    for tar in tars:
        # As it gets them, which is no part of this stage.
        _write(tar, layer)
        seconds += _seconds(lambda: _build(layer, image))
    return seconds


def _write(tar: Path, layer: Path) -> None:
    rewriter = TarRewriter()
    writer = LayerTarWriter(layer)
    for block in _blocks(tar):
        writer.count(block)
        for own, piece in rewriter.feed(block):
            writer.write(piece, own=own)
    for own, piece in rewriter.finish():
        writer.write(piece, own=own)
    writer.finish()
    writer.close()


def _build(layer: Path, image: Path) -> None:
    mkfs = MkfsErofs("mkfs.erofs", layer, image, 1 << 30)
    try:
        mkfs.finish()
    finally:
        mkfs.close()
    with image.open("rb") as file:
        os.fsync(file.fileno())
    image.unlink()


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
