"""The channel shuffle of a stage, worked out beforehand: who makes a channel, who uses it, and in which order.

If every convolution emits its channels sorted by the block that will use them, a block's input is a concatenation of
slices, and the shuffle itself is gone. Nothing here computes on tensors.

Source: the idea is derived in docs/static.md.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Slice(NamedTuple):
    """Channels `start` to `stop` of what producer number `producer` of the stage emits."""

    producer: int
    start: int
    stop: int


class Use(NamedTuple):
    """What a consumer takes: for each of its input tensors the slices that make it, and the channels they bring.

    `pooled` has, for each producer that it takes from, which of its channels each of the producer's is; -1 is none.
    """

    slices: list[list[Slice]]
    channels: list[list[int]]
    pooled: dict[int, list[int]]


class Routes(NamedTuple):
    """Who consumes what within a stage, with the channel shuffle worked out beforehand.

    `emitted` has, for each producer, its channels in the order in which it emits them; `uses` has one entry for each
    consumer: the blocks after the first, then the stage's end.
    """

    emitted: list[list[int]]
    uses: list[Use]


def plan_routes(produced: tuple[int, int], groups: Sequence[int]) -> Routes:
    """Follow every channel of a stage from the convolution that makes it to the block that uses it.

    Args:
        produced: channels of the first block's two producers (projection, branch); their sum is the stage's width.
        groups: for each block after the first, and then for the stage's end, into how many tensors its input is split.

    Example:
        >>> plan_routes((2, 2), [1, 1]).uses[0].slices
        [[Slice(producer=0, start=0, stop=1), Slice(producer=1, start=0, stop=1)]]
    """
    width, blocks = sum(produced), len(groups) - 1
    sizes = [*produced, *[width // 2] * blocks]
    live = [(producer, channel) for producer in (0, 1) for channel in range(produced[producer])]
    taken = []  # for each consumer, the sources of its input channels
    for block in range(blocks):
        taken.append(live[1::2])
        live = live[0::2] + [(block + 2, channel) for channel in range(width // 2)]
    taken.append(live)

    place: dict[tuple[int, int], tuple[int, int, int]] = {}  # source -> consumer, input tensor, input channel
    for consumer, sources in enumerate(taken):
        for channel, source in enumerate(sources):
            place[source] = (consumer, channel * groups[consumer] // len(sources), channel)
    emitted = [sorted(range(size), key=lambda c, p=p: place[p, c]) for p, size in enumerate(sizes)]  # type: ignore[misc]
    uses = [_use(emitted, place, consumer, count) for consumer, count in enumerate(groups)]
    return Routes(emitted, uses)


def _use(
    emitted: list[list[int]], place: dict[tuple[int, int], tuple[int, int, int]], consumer: int, count: int
) -> Use:
    use = Use([[] for _ in range(count)], [[] for _ in range(count)], {})
    for producer, order in enumerate(emitted):
        targets = [place[producer, channel] for channel in order]
        if any(target[0] == consumer for target in targets):
            use.pooled[producer] = [target[2] if target[0] == consumer else -1 for target in targets]
    for tensor in range(count):
        for producer, order in enumerate(emitted):
            rows = [row for row, channel in enumerate(order) if place[producer, channel][:2] == (consumer, tensor)]
            if rows:
                use.slices[tensor].append(Slice(producer, rows[0], rows[-1] + 1))
                use.channels[tensor] += [place[producer, order[row]][2] for row in rows]
    return use


def whole_use(channels: int, groups: int) -> Use:
    """Return the use of all channels of a single producer, in so many tensors of equal size."""
    runs = channel_runs(channels, groups)
    return Use([[Slice(0, run[0], run[-1] + 1)] for run in runs], runs, {0: list(range(channels))})


def join_slices(slices: list[list[Slice]], *, matmul: bool) -> list[list[Slice]]:
    """Return the slices of each input tensor: one for a matrix product, one for each block of inputs otherwise."""
    if not matmul:
        return slices
    joined: list[Slice] = []
    for piece in itertools.chain(*slices):
        if joined and joined[-1].producer == piece.producer and joined[-1].stop == piece.start:
            piece = Slice(piece.producer, joined.pop().start, piece.stop)
        joined.append(piece)
    return [joined]


def channel_runs(channels: int, groups: int) -> list[list[int]]:
    """Return the channels of each of so many equal groups."""
    size = channels // groups
    return [list(range(group * size, (group + 1) * size)) for group in range(groups)]
