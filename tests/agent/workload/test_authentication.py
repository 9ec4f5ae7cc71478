"""Who is let in, and how little anybody else learns."""

import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.workload.token import Attempts, InvalidToken, Token
from protocol import Port, encode_frame, workload
from tests.support.rounds import rounds
from tests.support.workload import TOKEN, Served, frames, open_peer, open_raw, served

FAILED = {"type": "auth_failed"}
RIGHT: dict[str, object] = {"type": "auth", "token": TOKEN, "protocol_version": 1}
PORTS = [Port.WORKLOAD_CONTROL, Port.WORKLOAD_LOGS]


def auth(token: str, version: int = 1) -> bytes:
    return frames({"type": "auth", "token": token, "protocol_version": version})


async def answer(address: str, said: bytes, port: Port, *, end: bool = False) -> object:
    """What is answered to the first bytes of a connection, which is closed then."""
    async with open_raw(address, port) as wire:
        await wire.stream.send_all(said)
        if end:
            await wire.stream.send_eof()
        told = await wire.receive()
        assert await wire.receive() is None
        return told


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize(
    "said",
    [
        auth("wrong-wrong-wrong-wrong"),
        auth(TOKEN[:-1]),
        auth(TOKEN + "0"),
        auth(""),
        auth(TOKEN, version=2),
        auth(TOKEN, version=0),
        frames({"type": "exec", "request_id": 1, "command": ["true"], "tty": False}),
        frames({"type": "auth", "token": 5, "protocol_version": 1}),
        frames({"method": "ping"}),
        encode_frame(b""),
        encode_frame(b"\xff\xfe"),
        b"\x02\x00\x00\x00",
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_wrong_is_auth_failed_and_the_end(
    ports: Served, said: bytes, port: Port
) -> None:
    assert await answer(ports.address, said, port) == FAILED


@pytest.mark.parametrize("port", PORTS)
async def test_half_a_frame_and_then_no_more_is_auth_failed(ports: Served, port: Port) -> None:
    assert await answer(ports.address, auth(TOKEN)[:-1], port, end=True) == FAILED


async def test_what_comes_too_late_is_auth_failed(ports: Served) -> None:
    async def be_late(port: Port, said: bytes) -> None:
        async with open_raw(ports.address, port) as wire:
            await wire.stream.send_all(said)
            begun = time.monotonic()
            assert await wire.receive() == FAILED
            assert time.monotonic() - begun >= 4.9
            assert await wire.receive() is None

    async with trio.open_nursery() as nursery:
        for port in PORTS:
            for said in (b"", auth(TOKEN)[:-1]):
                nursery.start_soon(be_late, port, said)


async def test_without_a_token_configured_nobody_is_let_in(
    tmp_path: Path, cgroup_root: Path
) -> None:
    for token_file in (tmp_path / "absent", None):
        async with served(tmp_path, cgroup_root, token_file=token_file) as service:
            for said in (auth(TOKEN), auth("")):
                for port in PORTS:
                    assert await answer(service.address, said, port) == FAILED


@pytest.mark.parametrize("text", ["short", "0" * 31, "x" * 21, "t" * 1025, "with space" * 5, "ü"])
async def test_a_file_without_a_token_of_128_bits_lets_nobody_in_and_is_not_shown(
    tmp_path: Path, cgroup_root: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weak"
    file.write_text(text)
    async with served(tmp_path, cgroup_root, token_file=file) as service:
        assert await answer(service.address, auth(text), Port.WORKLOAD_CONTROL) == FAILED
    assert str(file) in caplog.text
    assert text not in caplog.text.replace(str(tmp_path), "")


async def test_the_right_token_and_version_are_auth_ok_and_requests_may_follow_at_once(
    ports: Served,
) -> None:
    request: dict[str, object] = {
        "type": "exec",
        "request_id": 1,
        "command": ["true"],
        "tty": False,
    }
    async with open_raw(ports.address) as wire:
        await wire.stream.send_all(frames(RIGHT, request))
        kinds = [(await wire.receive() or {})["type"] for _ in range(4)]
    assert kinds == ["auth_ok", "ready", "started", "exit"]


async def test_a_peer_that_leaves_without_a_word_has_guessed_nothing(ports: Served) -> None:
    for _ in range(20):
        async with open_raw(ports.address):
            pass
    async with open_peer(ports.address) as peer:
        assert peer.is_ready


async def test_after_ten_failures_in_a_minute_nobody_is_compared_any_more(ports: Served) -> None:
    async with open_peer(ports.address) as early, open_raw(ports.address) as waiting:
        for number in range(10):
            port = PORTS[number % 2]
            assert await answer(ports.address, auth(f"{number:032x}"), port) == FAILED
        # One that connects is refused before it has said anything, and one that waits when it does.
        async with open_raw(ports.address) as wire:
            assert await wire.receive() == FAILED
            assert await wire.receive() is None
        assert await answer(ports.address, auth(TOKEN), Port.WORKLOAD_LOGS) == FAILED
        await waiting.stream.send_all(auth(TOKEN))
        assert await waiting.receive() == FAILED
        # Who was let in before goes on.
        await early.exec(1, "true")
        assert (await early.over(1)).exit == (0, "exited")


def test_ten_failures_are_forgotten_after_a_minute() -> None:
    now = 1000.0
    attempts = Attempts(clock=lambda: now)
    for _ in range(10):
        assert not attempts.are_exhausted()
        attempts.count_failure()
        now += 1
    assert attempts.are_exhausted()
    now = 1059.9
    assert attempts.are_exhausted()
    now = 1060.0
    assert not attempts.are_exhausted()
    attempts.count_failure()
    assert attempts.are_exhausted()


async def test_ten_thousand_guesses_are_all_refused_and_leave_nothing(ports: Served) -> None:
    count = rounds(400, 10_000)

    async def guess(number: int) -> None:
        said = [auth(f"{number:032x}"), auth(TOKEN, version=2), auth(TOKEN)[:20], b"\xff" * 64]
        async with open_raw(ports.address, PORTS[number % 2]) as wire:
            await wire.stream.send_all(said[number % 4])
            assert await wire.receive() == FAILED

    for number in range(100):
        await guess(number)
    files, memory = open_files(), resident_bytes()
    for number in range(count):
        await guess(number)
    # The agent closes what its peer has closed, and nobody tells of that: one more comes after it.
    await guess(0)
    assert open_files() <= files + 1
    assert resident_bytes() - memory < 2 << 20


async def test_nobody_who_was_not_let_in_makes_the_agent_keep_what_he_sends(
    ports: Served,
) -> None:
    memory = resident_bytes()
    async with open_raw(ports.address) as wire:
        await wire.stream.send_all((30 << 20).to_bytes(4, "big"))
        assert await wire.receive() == FAILED
        # Whatever he sends now is read to nobody.
        with trio.move_on_after(0.5):
            for _ in range(30):
                await wire.stream.send_all(bytes(1 << 20))
    assert resident_bytes() - memory < 8 << 20


def test_the_comparison_takes_a_time_that_tells_nothing() -> None:
    """Of tries with a long common beginning and with none, neither is the quicker: the ranks of
    their times are no further apart than chance puts them. A comparison that stops at the first
    difference shows at once, by the same measure."""
    token = Token.of(TOKEN)
    assert abs(difference(token.matches, 20_000)) < 6

    def naive(presented: str) -> bool:
        return all(one == other for one, other in zip(presented, TOKEN, strict=True))

    assert abs(difference(naive, 2_000)) > 6


def difference(matches: Callable[[str], bool], tries: int) -> float:
    """Mann and Whitney's U of the times that two kinds of tries take, in standard deviations: of
    those that differ from the token in their last digit, and in their first."""
    choice = random.Random(5)
    kinds = [0, 1] * (tries // 2)
    choice.shuffle(kinds)
    # All are made before, in the order of their use: what was done just before a try, and where it
    # lies in memory, have an influence of their own.
    tries_made = []
    for kind in kinds:
        digits = [*TOKEN]
        where = (len(TOKEN) - 1, 0)[kind]
        others = [digit for digit in "0123456789abcdef" if digit != digits[where]]
        digits[where] = choice.choice(others)
        tries_made.append("".join(digits))
    timed = []
    for kind, presented in zip(kinds, tries_made, strict=True):
        begun = time.perf_counter_ns()
        matches(presented)
        timed.append((time.perf_counter_ns() - begun, kind))
    # Equal times share their rank.
    by_time: dict[int, list[int]] = {}
    for took, kind in timed:
        by_time.setdefault(took, []).append(kind)
    rank_sum, before, ties = 0.0, 0, 0.0
    for took in sorted(by_time):
        group = by_time[took]
        rank_sum += group.count(0) * (before + (len(group) + 1) / 2)
        before += len(group)
        ties += len(group) ** 3 - len(group)
    half = tries / 2
    u = rank_sum - half * (half + 1) / 2
    variance = half * half / 12 * (tries + 1 - ties / (tries * (tries - 1)))
    return (u - half * half / 2) / math.sqrt(variance)


def test_a_token_is_shown_by_nothing_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes(TOKEN.encode() + b"\n" + bytes(512))
    token = Token.read(path)
    assert token.matches(TOKEN)
    assert TOKEN not in f"{token!r} {token} {workload.Auth(TOKEN, 1)!r}"
    path.write_text("not a token")
    with pytest.raises(InvalidToken) as caught:
        Token.read(path)
    assert "not a token" not in str(caught.value)


async def test_the_token_is_not_in_the_environment_or_the_open_files_of_commands(
    ports: Served,
) -> None:
    async with open_peer(ports.address) as peer:
        await peer.shell(1, "env; cat /proc/self/cmdline; ls -l /proc/self/fd")
        told = await peer.over(1)
        await peer.run(
            2, "/bin/sh", "-c", "env; tr '\\0' ' ' </proc/$PPID/cmdline; ls -l /proc/self/fd"
        )
        told_of_run = await peer.over(2)
    for output in (told.stdout, told_of_run.stdout):
        assert b"PATH=" in output
        assert TOKEN.encode() not in output
        assert str(ports.run_dir.parent / "token").encode() not in output


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
