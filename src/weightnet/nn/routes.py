"""The channel shuffle of a stage, worked out beforehand: who makes a channel, who uses it, and in which order.

There are two ways, and the shuffle itself is gone in both. If every convolution emits its channels sorted by the block
that will use them, a block's input is a concatenation of slices (`Routes`). If it emits each channel at a place where
the map that passes the block has one that is used up just then, a block's input takes each place from either map
(`Selection`). Nothing here computes on tensors.

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


class Selection(NamedTuple):
    """How the blocks of a stage choose from two maps, of half its width each.

    `identity` is the map that passes a block, `last` what the last block emitted. A block takes every second channel of
    both, and what it leaves of both passes. At each place one of the two maps has a channel that is taken, and the
    other one that is left.

    `emitted` has, for each producer, its channels in the order in which it emits them. `halves` has the slices of the
    first block's producers that make the first `identity` and the first `last`. For each block after the first,
    `masks` tells of each place whether `identity` has the channel that is taken, and `channels` which of its input
    channels that is. `end` has the stage's channels as they are in the two maps behind the last block.
    """

    emitted: list[list[int]]
    halves: list[list[Slice]]
    masks: list[list[bool]]
    channels: list[list[int]]
    end: list[int]


def plan_selection(produced: tuple[int, int], blocks: int) -> Selection:
    """Find an order of the channels in which a block's input is a selection from two maps.

    Args:
        produced: channels of the first block's two producers (projection, branch); their sum is the stage's width.
        blocks: how many come after the first.

    Example:
        >>> plan_selection((2, 2), 1).masks, plan_selection((2, 2), 1).emitted
        ([[False, True]], [[0, 1], [1, 0], [0, 1]])
    """
    width = sum(produced)
    half = width // 2
    identity, last = list(range(half)), list(range(half, width))  # at each place the channel of the shuffled stage
    orders, masks, channels = [], [], []
    for block in range(blocks):
        if block == 0 and produced[0] > half:  # then `last` is made of two slices, and `identity` of one
            identity = _matched(last, identity)
        else:
            last = _matched(identity, last)
        orders.append(identity + last if block == 0 else last)
        masks.append([channel % 2 == 1 for channel in identity])
        both = [(i, j) if i % 2 else (j, i) for i, j in zip(identity, last, strict=True)]
        channels.append([taken // 2 for taken, _ in both])
        identity, last = [left // 2 for _, left in both], list(range(half, width))
    orders.append(last if blocks else identity + last)

    first, split = orders[0], produced[0]
    emitted = [first[:split], [channel - split for channel in first[split:]]]
    emitted += [[channel - half for channel in order] for order in orders[1:]]
    edges = sorted({0, split, half, width})
    slices = [
        Slice(0, start, stop) if stop <= split else Slice(1, start - split, stop - split)
        for start, stop in itertools.pairwise(edges)
    ]
    cut = edges.index(half)
    return Selection(emitted, [slices[:cut], slices[cut:]], masks, channels, identity + last)


def _matched(places: list[int], channels: list[int]) -> list[int]:
    """Return channels in an order in which each that is taken is at the place of one that is left, and vice versa."""
    taken, left = ([channel for channel in channels if channel % 2 == odd] for odd in (1, 0))
    pools = iter(taken), iter(left)
    return [next(pools[place % 2]) for place in places]


def join_slices(slices: list[list[Slice]]) -> list[list[Slice]]:
    """Return the slices of several tensors as those of a single one."""
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
