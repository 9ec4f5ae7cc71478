"""What is told of a pull while it goes on."""

import itertools
import math
import re

import pytest
import trio
import trio.testing

from agent.images.progress import PullProgress
from tests.agent.images.pulling import Pulling, blob, event, noise
from tests.support.misbehaving_registry import (
    Exchange,
    MisbehavingRegistry,
    cut,
    slow,
    stalled,
    status,
)


async def test_progress_is_told_between_once_and_ten_times_a_second_and_only_rises(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layers = [noise(str(n), 400_000) for n in range(3)]
    server.add_image("latest", layers)
    server.misbehave(blob(layers[0]), slow(4_000, 0.02))
    server.misbehave(blob(layers[2]), slow(100_000, 0.5))
    await pulling.pull(server.reference())
    times = [time for time, _ in pulling.frames]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 1
    for start in times:
        assert sum(start <= time < start + 1 for time in times) <= 10

    numbers, percents = [], []
    for _, frame in pulling.frames:
        found = re.fullmatch(r"Pulling layer (\d)/3", frame.message)
        assert found, frame.message
        numbers.append(int(found[1]))
        percents.append(frame.percent)
        assert frame.layer in {layer.digest.removeprefix("sha256:") for layer in layers}
    assert numbers == sorted(numbers)
    assert numbers[0] == 1
    assert numbers[-1] == 3
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 5


async def test_that_a_registry_is_slow_to_say_what_an_image_is_is_told(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    server.add_image("latest", [noise("one")])

    def late(exchange: Exchange) -> None:
        exchange.registry.released.wait(1.8)
        exchange.answer()

    server.misbehave("manifests/latest", late)
    begun = trio.current_time()
    await pulling.pull(server.reference())
    times = [begun, *(time for time, _ in pulling.frames)]
    assert max(after - before for before, after in itertools.pairwise(times)) <= 1
    resolving = [frame for _, frame in pulling.frames if frame.percent is None]
    assert {frame.message for frame in resolving} == {f"Resolving {server.reference()}"}
    assert pulling.frames[-1][1].percent == 100


async def test_a_listener_in_the_middle_of_a_frame_is_not_cut_off_by_the_end_of_the_work(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    """What is cut off there would leave half a frame on the wire."""
    layer = noise("one")
    server.add_image("latest", [layer])
    go_on = trio.Event()
    heard: list[PullProgress] = []

    async def slow_to_listen(frame: PullProgress) -> None:
        await go_on.wait()
        heard.append(frame)

    async with trio.open_nursery() as nursery:

        async def pull() -> None:
            await pulling.pull(server.reference(), on_progress=slow_to_listen)

        nursery.start_soon(pull)
        await pulling.layers_until(lambda: pulling.layers.has(layer.diff_id))
        await trio.testing.wait_all_tasks_blocked(0.1)
        go_on.set()
    assert [frame.percent for frame in heard] == [0, 100]


async def test_a_layer_that_is_refused_ends_the_pull_at_once_though_others_keep_it_waiting(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    stuck, missing = noise("stuck"), noise("missing")
    server.add_image("latest", [stuck, missing])
    server.misbehave(blob(stuck), stalled(100_000))

    def refused(exchange: Exchange) -> None:
        assert exchange.registry.stalled.wait(10)
        pulling.layers.wait_until(lambda: pulling.layers.written.get(stuck.diff_id) == 100_000)
        status(404)(exchange)

    server.misbehave(blob(missing), refused)
    with trio.move_on_after(5) as patience:
        message = await pulling.refused(server.reference())
    assert not patience.cancel_called
    assert message.startswith(f"layer {missing.digest}: {server.address} answered 404 ")
    await pulling.pull(server.reference())
    assert server.requests_for(blob(stuck))[-1].headers["Range"] == "bytes=100000-"


async def test_progress_goes_on_while_nothing_comes(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), stalled(150_000))
    with trio.move_on_after(2.5):
        await pulling.pull(server.reference())
    assert 3 <= len(pulling.frames) <= 10
    assert pulling.frames[-1][1].percent == 50


async def test_percent_does_not_fall_where_a_registry_begins_anew(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), cut(250_000), slow(10_000, 0.03))
    await pulling.pull(server.reference())
    percents = [frame.percent for _, frame in pulling.frames]
    assert percents == sorted(percents)


async def test_bytes_their_rate_and_the_time_left_are_told(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layers = [noise("one"), noise("two")]
    server.add_image("latest", layers)
    server.misbehave(blob(layers[0]), slow(30_000, 0.2))
    await pulling.pull(server.reference())
    frames = [frame for _, frame in pulling.frames]
    assert {frame.total_bytes for frame in frames} == {600_000}
    assert (frames[0].bytes_per_s, frames[0].seconds_left) == (None, None)
    done = [frame.done_bytes or 0 for frame in frames]
    assert done == sorted(done)
    assert (done[-1], frames[-1].seconds_left) == (600_000, 0)
    for frame in frames:
        if frame.bytes_per_s:
            left = 600_000 - (frame.done_bytes or 0)
            assert frame.seconds_left == math.ceil(left / frame.bytes_per_s)
    assert any(frame.seconds_left for frame in frames)


async def test_layers_that_are_there_count_as_pulled(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    base, top = noise("base"), noise("top")
    server.add_image("base", [base])
    server.add_image("latest", [base, top])
    await pulling.pull(server.reference("base"))
    pulling.frames.clear()
    await pulling.pull(server.reference())
    assert {frame.message for _, frame in pulling.frames} == {"Pulling layer 2/2"}


async def test_a_listener_that_is_gone_ends_the_pull(
    pulling: Pulling, server: MisbehavingRegistry
) -> None:
    layer = noise("one")
    server.add_image("latest", [layer])
    server.misbehave(blob(layer), stalled(1000))

    async def gone(frame: PullProgress) -> None:
        await event(server.stalled)
        raise trio.BrokenResourceError("nobody listens")

    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError, match="nobody listens"):
        await pulling.pull(server.reference(), on_progress=gone)
