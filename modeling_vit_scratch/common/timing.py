# SPDX-License-Identifier: Apache-2.0
"""Several ways to do the same, timed in turns, so that whatever else the machine does hits all of them."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def time_in_turns(
    ways: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[dict[str, list[float]]], Any] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """
    Runs each way once to warm up, and then once in each round, beginning with another one each time.

    Args:
        ways: by name.
        rounds: how often.
        clock: of seconds. `time.process_time` leaves out what other programs take of a core.
        after_round: gets the seconds so far.

    Returns:
        The seconds of each way in each round.
    """
    names, seconds = list(ways), {name: [] for name in ways}
    for way in ways.values():
        way()
    for start in range(rounds):
        for name in [*names[start % len(names) :], *names[: start % len(names)]]:
            begin = clock()
            ways[name]()
            seconds[name].append(clock() - begin)
        if after_round is not None:
            after_round(seconds)
    return seconds


def summarize(seconds: dict[str, list[float]], items: int, ours: str) -> dict[str, dict[str, Any]]:
    """
    Args:
        seconds: of each way in each round.
        items: how many images a way goes through in a round.
        ours: the way that the others are compared with.

    Returns:
        For each way: the median of its milliseconds for an image, and how many times faster ours is: the median of the
        ratios within a round, and their quartiles.
    """
    summary = {}
    for name, times in seconds.items():
        ratios = np.divide(times, seconds[ours])
        summary[name] = {
            "milliseconds_per_image": 1000 * float(np.median(times)) / items,
            "images_per_second": items / float(np.median(times)),
            "times_faster": float(np.median(ratios)),
            "times_faster_quartiles": np.percentile(ratios, [25, 75]).tolist(),
            "rounds": len(times),
        }
    return summary


def format_table(title: str, summary: dict[str, dict[str, Any]], ours: str = "ours", item: str = "image") -> str:
    """
    The summary for people; `ours` is what the table calls the way that the others are compared with, and `item` what a
    way makes.
    """
    head = f"    {'':46} {f'ms / {item}':>10} {f'{item}s / s':>10}   {ours} is faster by (quartiles)"
    has_share = any("share_of_peak" in row for row in summary.values())
    has_memory = any("memory_bytes" in row for row in summary.values())
    lines = [title, head + ("  of the peak" if has_share else "") + ("  memory" if has_memory else "")]
    for name, row in summary.items():
        low, high = row["times_faster_quartiles"]
        faster = f"{row['times_faster']:.2f} ({low:.2f} to {high:.2f})"
        line = f"    {name:46} {row['milliseconds_per_image']:10.2f} {row['images_per_second']:10.1f}   {faster:28}"
        if has_share:
            line += f"  {100 * row['share_of_peak']:9.1f} %"
        if has_memory:
            line += f"  {row['memory_bytes'] / 1e6:,.0f} MB"
        lines.append(line.rstrip())
    return "\n".join(lines)
