# SPDX-License-Identifier: Apache-2.0
"""Several ways to do the same, timed in turns, so that whatever else the machine does hits all of them."""

import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import features

from modeling_vit_scratch.common.files import write_text


# What a table calls our way, where there is one.
OURS = "ours"
# Packages that are used or compared with where they are installed.
_OTHERS = ("datasets", "triton", "timm", "torchvision", "vit-pytorch")


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
