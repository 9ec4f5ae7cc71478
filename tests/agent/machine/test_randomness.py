"""Reseeding: with whose bytes, and in which order. The calls go to a plain file, or are noted."""

import errno
import os
from pathlib import Path

import pytest
from attrs import define, evolve, field

from agent.machine.randomness import Randomness
from protocol.values import Reseeding


@define
class Generator:
    """What would be /dev/random, and what was asked of it."""

    directory: Path
    asked: list[object] = field(factory=list)

    def randomness(self) -> Randomness:
        (self.directory / "random").touch()
        return Randomness(
            random=self.directory / "random",
            hardware=self.directory / "hwrng",
            add=lambda descriptor, data: self.note(descriptor, data),
            reseed=lambda descriptor: self.note(descriptor, "reseed"),
        )

    def note(self, descriptor: int, what: object) -> None:
        assert Path(f"/proc/self/fd/{descriptor}").readlink() == self.directory / "random"
        self.asked.append(what)


@pytest.fixture
def generator(tmp_path: Path) -> Generator:
    return Generator(tmp_path)


def test_the_bytes_of_a_request_are_credited_and_count_at_once(generator: Generator) -> None:
    (generator.directory / "hwrng").write_bytes(bytes(100))
    done = generator.randomness().renew(b"k" * 48)
    assert done == Reseeding(ok=True, source="request", credited_bytes=48)
    assert generator.asked == [b"k" * 48, "reseed"]


@pytest.mark.parametrize("told", [None, b""])
def test_without_them_those_of_a_virtio_rng_are(generator: Generator, told: bytes | None) -> None:
    data = os.urandom(200)
    (generator.directory / "hwrng").write_bytes(data)
    done = generator.randomness().renew(told)
    assert done == Reseeding(ok=True, source="hwrng", credited_bytes=64)
    assert generator.asked == [data[:64], "reseed"]


def test_without_either_nothing_is_credited_and_the_answer_says_so(generator: Generator) -> None:
    done = generator.randomness().renew(None)
    assert (done.ok, done.source, done.credited_bytes) == (False, None, 0)
    assert done.error == "no bytes from the host: give `entropy`, or the VM a virtio-rng"
    assert generator.asked == ["reseed"]


def test_a_virtio_rng_that_fails_is_named_and_the_generator_reseeded_all_the_same(
    generator: Generator,
) -> None:
    (generator.directory / "hwrng").mkdir()
    done = generator.randomness().renew(None)
    assert not done.ok
    assert done.error == f"read {generator.directory}/hwrng: Is a directory"
    assert generator.asked == ["reseed"]


def test_a_generator_that_refuses_is_told_with_the_cause(generator: Generator) -> None:
    def refuse(descriptor: int, data: bytes) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    done = evolve(generator.randomness(), add=refuse).renew(b"secret")
    assert (done.ok, done.credited_bytes) == (False, 0)
    assert done.error == f"reseed {generator.directory}/random: Operation not permitted"
    assert generator.asked == []
