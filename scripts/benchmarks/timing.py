# SPDX-License-Identifier: Apache-2.0
"""Several ways to do the same, timed in turns, so that whatever else the machine does hits all of them."""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import features

from modeling_vit_scratch.common.files import write_text


# What a table calls our way, where there is one.
OURS = "ours"
# Packages that are used or compared with where they are installed.
_OTHERS = ("datasets", "triton", "timm", "torchvision", "vit-pytorch", "openvino", "nncf", "onnxruntime")


def time_in_turns(
    functions: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[dict[str, list[float]]], Any] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """
    Runs each function once to warm up, then once in each round, starting with another one each time.

    `clock` returns seconds; `time.process_time` excludes other programs. `after_round` gets the seconds so far.

    Returns:
        The seconds of each function in each round.
    """
    names, seconds = list(functions), {name: [] for name in functions}
    for function in functions.values():
        function()
    for start in range(rounds):
        for name in [*names[start % len(names) :], *names[: start % len(names)]]:
            begin = clock()
            functions[name]()
            seconds[name].append(clock() - begin)
        if after_round is not None:
            after_round(seconds)
    return seconds


def summarize(seconds: dict[str, list[float]], items: int, ours: str) -> dict[str, dict[str, Any]]:
    """
    For each function its median milliseconds per image, and how many times faster ours is: the median and the quartiles
    of the ratios within a round. `seconds` are those of each round, in which a function processes `items` images.
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
    """The summary as a table. `ours`: the title of the function compared with; `item`: what a function processes."""
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


def processor_seconds() -> float:
    """Of this process and of those that it has started and seen end: what other programs take does not count."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def describe_machine() -> dict[str, Any]:
    """Hardware, load, versions and command: what it takes to find the same numbers again."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip() for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]  # fmt: skip
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "pillow", "numpy")},
            **{name: version(name) for name in _OTHERS if find_spec(name.replace("-", "_")) is not None},
            "libjpeg-turbo": features.version("libjpeg_turbo"),
        },
        "command": shlex.join(["python", *sys.argv]),
    }


def write_numbers(record: dict[str, Any], folder: Path, task: str) -> Path:
    """Writes the numbers as TASK.json, whole or not at all: also while they are still being measured."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{task}.json"
    write_text(file, json.dumps(record, indent=2) + "\n")
    return file


def write_benchmark(record: dict[str, Any], folder: Path, task: str) -> None:
    """Writes the numbers as TASK.json, and a picture of them where matplotlib is; tells where."""
    print(f"All numbers: {write_numbers(record, folder, task)}")
    try:
        from benchmarks.figures import draw_benchmark
    except ImportError:
        print('No picture: it is drawn with matplotlib, pip install -e ".[plot]"')
        return
    print(f"Picture: {draw_benchmark(record, folder / f'{task}.png')}")
