# SPDX-License-Identifier: Apache-2.0
"""Long runs with processes that read images: what their memory and their open files come to over time."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil


def commands(
    scripts: Path, photos: list[Path], model: str, folder: Path, num_workers: int, minutes: int
) -> dict[str, list[str]]:
    """
    Runs that take longer than that, by name: predict.py on a list that names the photos again and again, and
    finetune.py, which evaluates and saves a checkpoint every 200 steps.

    Args:
        scripts: the folder of the scripts.
        photos: of two classes or more, by their folders: CLASS/NAME.
        model: the folder of a classifier.
        folder: for what the runs write.
        num_workers: processes that read, of each run.
        minutes: that they have to do.
    """
    with open(folder / "photos.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{photo}\n" for photo in itertools.islice(itertools.cycle(photos), 60_000 * minutes))
    workers = ["--dataloader_num_workers", str(num_workers)]
    predict = [model, str(folder / "photos.txt"), "--output", str(folder / "labels.csv"), *workers]
    train = [
        "--train_dir",
        str(photos[0].parents[1]),
        "--variant",
        "Mi/8",
        "--image_size",
        "32",
        "--max_steps",
        "9999999",
    ]
    train += ["--eval_strategy", "steps", "--eval_steps", "200", "--save_strategy", "steps", "--save_steps", "200"]
    train += ["--save_total_limit", "2", "--output_dir", str(folder / "trained"), *workers]
    lines = {"predict.py": predict, "finetune.py": train}
    return {name: [sys.executable, str(scripts / name), *words] for name, words in lines.items()}


def sample(process: psutil.Process) -> dict[str, float]:
    """Of a process and all that it has started: how many there are, their memory and their open files."""
    processes = memory = files = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            facts = one.memory_full_info()
            found = getattr(facts, "pss", facts.uss)  # what processes share counts once
            files += one.num_fds() if hasattr(one, "num_fds") else one.num_handles()
        except psutil.Error:  # it has ended meanwhile
            continue
        processes, memory = processes + 1, memory + found
    return {"processes": processes, "megabytes": memory / 1e6, "open_files": files}


def watch(
    lines: dict[str, list[str]], seconds: float, interval: float, log: TextIO
) -> dict[str, list[dict[str, float]]]:
    """
    Runs commands side by side, and stops them with SIGTERM.

    Args:
        lines: command lines by name.
        seconds: for how long.
        interval: seconds between two looks at them.
        log: for what they print.

    Returns:
        By name, a sample with its "seconds" since the start for each look.

    Raises:
        RuntimeError: if one of them ends by itself.
    """
    runs = {name: subprocess.Popen(line, stdout=log, stderr=log) for name, line in lines.items()}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    begin = time.monotonic()
    try:
        while time.monotonic() - begin < seconds:
            time.sleep(interval)
            for name, run in runs.items():
                if run.poll() is not None:
                    raise RuntimeError(f"{name} ended with exit status {run.returncode}: see {log.name}.")
                samples[name].append({"seconds": time.monotonic() - begin, **sample(psutil.Process(run.pid))})
    finally:
        for run in runs.values():
            run.send_signal(signal.SIGTERM)
        for run in runs.values():
            run.wait()
    return samples


def summarize_samples(samples: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For each quantity the median of every quarter of the time, and the most; the first two minutes do not count."""
    settled = [one for one in samples if one["seconds"] > 120] or samples
    summary = {}
    for name in ("processes", "megabytes", "open_files"):
        values = [one[name] for one in settled]
        quarters = [float(np.median(part)) for part in np.array_split(values, 4) if len(part)]
        summary[name] = {"quarters": quarters, "most": max(values)}
    return summary
