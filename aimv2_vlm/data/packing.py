"""How the rows of a step lie on processes and micro-batches: a pure function of their lengths, the budget and the world.

A step has the same rows for every world. Rows that share a micro-batch are concatenated, so nothing is spent on padding;
what is left of waste is that processes wait for each other, at the end of a step or, with sharded weights, in every
micro-batch. So every process gets as many micro-batches, and those that run at the same time are about as long.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], world: int, budget: int, max_rows: int | None = None) -> list[list[list[int]]]:
    """plan[process][micro-batch] = numbers of its rows, rising; every process has as many micro-batches.

    lengths: tokens of each row. budget: most tokens of a micro-batch; a row above it stands alone. max_rows: most rows
    of one. A micro-batch may be empty where there are fewer rows than processes.
    """
    if world < 1 or budget < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"world {world}, budget {budget} and max_rows {max_rows} must be at least 1")
    most = max_rows or max(1, len(lengths))
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    tokens = sum(min(length, budget) for length in lengths)
    count = max(1, -(-tokens // (world * budget)), -(-len(lengths) // (world * most)))
    while True:
        bins = _fill(order, lengths, world * count)
        if all(len(rows) <= 1 or (len(rows) <= most and sum(lengths[row] for row in rows) <= budget) for rows in bins):
            break
        count += 1
    load = [sum(lengths[row] for row in rows) for rows in bins]
    by_load = sorted(range(len(bins)), key=lambda number: (-load[number], number))
    plan: list[list[list[int]]] = [[] for _ in range(world)]
    total = [0] * world
    for start in range(0, len(by_load), world):
        # Of the micro-batches that run together the longest goes to the process that has had least so far.
        processes = sorted(range(world), key=lambda process: (total[process], process))
        for process, number in zip(processes, by_load[start : start + world], strict=True):
            plan[process].append(sorted(bins[number]))
            total[process] += load[number]
    return plan


def _fill(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Longest row first, each into the emptiest of `count` bins; then rows change places until that evens nothing out."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for row in order:
        load, number = heapq.heappop(heap)
        bins[number].append(row)
        heapq.heappush(heap, (load + lengths[row], number))
    load = [sum(lengths[row] for row in rows) for rows in bins]
    for _ in range(8 * count):
        low, *_, high = sorted(range(count), key=lambda number: (load[number], number)) if count > 1 else (0, 0)
        gap = load[high] - load[low]
        # A row from the fullest to the emptiest bin, for one that comes back (or none): what leaves the two nearest to each other.
        best = min(
            ((abs(gap - 2 * (lengths[a] - (lengths[b] if b >= 0 else 0))), a, b) for a in bins[high] for b in (-1, *bins[low])),
            default=(gap, -1, -1),
        )
        if best[0] >= gap:
            break
        _, a, b = best
        moved = lengths[a] - (lengths[b] if b >= 0 else 0)
        bins[high].remove(a)
        bins[low].append(a)
        if b >= 0:
            bins[low].remove(b)
            bins[high].append(b)
        load[high], load[low] = load[high] - moved, load[low] + moved
    return bins


def idle_share(plan: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], together: bool = False) -> float:
    """Share of all processes' time, in tokens, spent waiting: for the slowest process of a step, or, `together`, for the slowest
    in every micro-batch (sharded weights)."""
    loads = [[sum(lengths[row] for row in rows) for rows in process] for process in plan]
    work = sum(sum(process) for process in loads)
    if not work:
        return 0.0
    slowest = sum(map(max, zip(*loads, strict=True))) if together else max(map(sum, loads))
    return 1 - work / (len(plan) * slowest)
