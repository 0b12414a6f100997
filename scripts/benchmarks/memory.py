# SPDX-License-Identifier: Apache-2.0
"""What three runs of a model take beside its weights, on a CPU, where only the system knows."""

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.models import ModelBenchmark
from benchmarks.peers import random_batch
from benchmarks.timing import OURS


def measure_memory(benchmark: ModelBenchmark, name: str, batch_size: int, threads: int) -> int:
    """
    The highest number of bytes that the system gives a process for three runs of one model's way, above what it had
    before the first: in a process of its own. On a GPU torch knows, see `models.measure`.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory_in_this_process, benchmark, name, batch_size, threads).result()


def memory_in_this_process(benchmark: ModelBenchmark, name: str, batch_size: int, threads: int) -> int:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    models, _ = benchmark.models()
    images, labels = random_batch(models[OURS], batch_size, benchmark.device)
    model = models.pop(name)
    models.clear()
    gc.collect()
    run = benchmark.way(model, images, labels)
    ctypes.CDLL(None).malloc_trim(0)  # what building the models has left in the heap
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the highest so far
    for _ in range(3):
        run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"There is no {field} in /proc/self/status.")
