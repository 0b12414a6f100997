# SPDX-License-Identifier: Apache-2.0
"""Where the time of a step goes: torch's profiler, its kernels put into groups."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


# The first that is found in the name of a kernel or, on a CPU, of an operator.
_GROUPS = (
    ("attention", r"flash|fmha|sdpa|attention"),
    ("optimizer", r"adam|multi_tensor"),
    ("layer norm", r"layer_?norm"),
    ("activation", r"gelu"),
    (
        "matrix products",
        r"gemm|nvjet|cutlass|cublas|xmma|triton_tem|splitk|conv|dgrad|wgrad|mkldnn|::(add|b)?mm|linear",
    ),
    ("copies and casts", r"memcpy|memset|copy|clone|cat(_|array|$)|fill|zero"),
)
# A kernel that inductor makes bears the operators that are fused in it: one that only moves numbers has no others.
_FUSED = r"triton_(poi|red|per|mix)"
_MOVES = r"to_copy|clone|cat|stack|unbind|select|slice|permute|transpose|view|unsafe_view|reshape|expand|t|copy|full"
_ONLY_MOVES = rf"triton_poi_fused(_+({_MOVES}|convolution|\w*attention)(_backward)?)+_+\d+$"
IDLE, ELEMENTWISE = "idle", "other elementwise and sums"


def group_of(name: str) -> str:
    """The group of a kernel, or on a CPU of an operator, by its name."""
    lower = name.lower()
    if re.match(_FUSED, lower):
        for group, words in (("layer norm", r"layer_?norm"), ("activation", r"gelu"), ("optimizer", r"adam")):
            if re.search(words, lower):
                return group
        return "copies and casts" if re.match(_ONLY_MOVES, lower) else ELEMENTWISE
    return next((group for group, words in _GROUPS if re.search(words, lower)), ELEMENTWISE)


def profile_steps(step: Callable[[], Any], device: str, steps: int = 5) -> dict[str, Any]:
    """
    Runs a step that is warm, `steps` times under the profiler.

    Returns:
        milliseconds of a step: `milliseconds`, of all of it; `groups`, by group, on a GPU with the time in which
        nothing runs there; `kernels`, the 25 that take longest, each with how often it runs in a step. On a CPU,
        compiled code is one of `other elementwise and sums`.
    """
    if device == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]):  # the first one takes long to start
            step()
            torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(str(file := Path(folder, "trace.json")))
            return summarize_kernels(*device_kernels(json.loads(file.read_text())["traceEvents"]), steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    rows = [(row.key, row.self_cpu_time_total, row.count) for row in profiler.key_averages()]
    return summarize_kernels(rows, sum(microseconds for _, microseconds, _ in rows), steps)


def device_kernels(events: list[dict[str, Any]]) -> tuple[list[tuple[str, float, int]], float]:
    """From a trace in Chrome's format: (name, microseconds, count) of each kernel; and from the first's start to the
    last's end in microseconds."""
    events = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    totals: dict[str, tuple[float, int]] = {}
    for event in events:
        time, count = totals.get(event["name"], (0.0, 0))
        totals[event["name"]] = (time + event["dur"], count + 1)
    ends = [event["ts"] + event["dur"] for event in events]
    span = max(ends) - min(event["ts"] for event in events) if events else 0.0
    return [(name, time, count) for name, (time, count) in totals.items()], span


def summarize_kernels(rows: list[tuple[str, float, int]], span: float, steps: int) -> dict[str, Any]:
    """As `profile_steps` returns it, of (name, microseconds, count) of all steps and what they took together."""
    if not rows:
        raise RuntimeError("The profiler saw nothing run.")
    groups: dict[str, float] = {}
    for name, microseconds, _ in rows:
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + microseconds / 1000 / steps
    groups[IDLE] = max(span / 1000 / steps - sum(groups.values()), 0.0)
    longest = sorted(rows, key=lambda row: -row[1])[:25]
    return {
        "milliseconds": span / 1000 / steps,
        "groups": dict(sorted(groups.items(), key=lambda item: -item[1])),
        "kernels": [
            {"name": name[:160], "group": group_of(name), "milliseconds": time / 1000 / steps, "count": count / steps}
            for name, time, count in longest
        ],
    }


def format_profiles(profiles: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a step by group, a column for each model."""
    groups = {group: None for one in profiles.values() for group in one.get("groups", {})}
    lines = [f"    {'milliseconds of a step, profiled':34}" + "".join(f"{name:>16}" for name in profiles)]
    for group in groups:
        times = [one.get("groups", {}).get(group, 0.0) for one in profiles.values()]
        lines.append(f"    {group:34}" + "".join(f"{time:16.3f}" for time in times))
    totals = [one.get("milliseconds", 0.0) for one in profiles.values()]
    lines.append(f"    {'all':34}" + "".join(f"{time:16.3f}" for time in totals))
    return "\n".join(lines)
