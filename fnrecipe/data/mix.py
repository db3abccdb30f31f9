"""A deterministic mix of several sources in given shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

from fnrecipe.data.stream import Cursor, Source, Stream, T

Finished: TypeAlias = Literal["drop", "repeat", "stop"]
Weights: TypeAlias = Callable[[int], Sequence[float]]


def mix(
    sources: Sequence[Callable[[int], Source[T]]],
    cursor: Cursor = None,
    *,
    weights: Weights,
    size: Callable[[T], int],
    epochs: int | None = None,
    finished: Finished = "drop",
) -> Stream[T]:
    """Items of several sources, always from the one that lags most behind its share; each is `source(epoch)` in turn.

    Shares are of the total `size(item)` (tokens, say), by `weights(total)` at the total so far: no source is ever ahead of its
    share by more than one item. A source that has been read `epochs` times is finished: it drops out and the others get its
    share, or it repeats until all are finished, or the stream stops. A source without any item is left out. Cursor: [[epoch,
    cursor in it] of each source, the lag of each, the total]; epoch -1: left out.
    """
    # `behind[i]` is what source i is owed: each item adds `size · share` to every source and takes `size` from the one that
    # gave it, so the sum stays 0. The chosen source is owed something, or nothing: it gets ahead by one item at most. Each
    # step uses the weights of that moment. Taking the least `used / weight` instead would make up for the past when weights
    # change, because it compares totals.
    #
    # A source without a share at the moment (finished, or of weight 0) has no claim: what it is owed goes to the others, or it
    # would come in a burst when its weight returns. What it is ahead by stays its debt. Python's floats survive JSON exactly,
    # so a resumed mix makes the same choices.
    before = cursor or ([(0, None)] * len(sources), [0.0] * len(sources), 0)
    positions, behind, total = list(map(tuple, before[0])), list(before[1]), before[2]

    def done(i: int) -> bool:
        return epochs is not None and positions[i][0] >= epochs

    live = [i for i in range(len(sources)) if positions[i][0] >= 0 and (finished == "repeat" or not done(i))]
    streams = {i: sources[i](positions[i][0])(positions[i][1]) for i in live}
    while live:
        shares = _shares(weights(total), live)
        if not shares:
            return
        owed = sum(max(lag, 0.0) for i, lag in enumerate(behind) if i not in shares)
        behind = [lag + shares[i] * owed if i in shares else min(lag, 0.0) for i, lag in enumerate(behind)]
        chosen = max(shares, key=lambda i: (behind[i], shares[i], -i))
        entry = next(streams[chosen], None)
        if entry is None:
            epoch, inner = positions[chosen]
            positions[chosen] = (-1 if inner is None else epoch + 1, None)
            if inner is None or (finished == "drop" and done(chosen)):
                live.remove(chosen)
            elif (finished == "stop" and done(chosen)) or (finished == "repeat" and all(map(done, shares))):
                return
            else:
                streams[chosen] = sources[chosen](epoch + 1)(None)
            continue
        item, position = entry
        amount = size(item)
        for i, share in shares.items():
            behind[i] += amount * (share - (i == chosen))
        positions[chosen] = (positions[chosen][0], position)
        total += amount
        yield item, (tuple(positions), tuple(behind), total)


def weights_between(points: Sequence[Sequence[tuple[int, float]]], scale: int = 1) -> Weights:
    """Weights by linear interpolation between each source's points (total, weight), flat beyond them, at `scale` · total."""

    def weights(total: int) -> list[float]:
        return [_between(line, total * scale) for line in points]

    return weights


def _between(line: Sequence[tuple[int, float]], x: int) -> float:
    for (a, left), (b, right) in pairwise(line):
        if x < b:
            return left if x <= a else left + (right - left) * (x - a) / (b - a)
    return line[-1][1]


def _shares(weights: Sequence[float], live: Sequence[int]) -> dict[int, float]:
    total = sum(weights[i] for i in live)
    return {i: weights[i] / total for i in live if weights[i] > 0}
