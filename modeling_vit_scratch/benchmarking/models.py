# SPDX-License-Identifier: Apache-2.0
"""Inference and training steps of our network and of everybody else's, on the same weights and the same batch."""

import contextlib
import copy
import ctypes
import gc
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from ..checkpoint.verification import model_output
from ..configuration_vit_scratch import ViTScratchConfig
from ..modeling_vit_scratch import ViTScratchForImageClassification
from ..training.errors import InputError
from .peers import build_peers, random_batch
from .timing import OURS, summarize, time_in_turns


TASKS = ("inference", "training")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Sides of the matrices whose product is timed for the peak, in elements.
_MATRICES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


def plain_model(variant: str, image_size: int, num_labels: int = 1000) -> ViTScratchForImageClassification:
    """A network of random weights, the same each time. Raises InputError for an unknown variant."""
    try:
        config = ViTScratchConfig.from_variant(
            variant, image_size=image_size, num_labels=num_labels, zero_init_head=False
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    torch.manual_seed(0)
    return ViTScratchForImageClassification(config).eval()


@dataclass(frozen=True)
class ModelBenchmark:
    """
    What is compared.

    Attributes:
        task: "inference", logits without gradients; "training", a whole step: forward, backward, fused AdamW.
        variant: e.g. "S/16".
        image_size: side in pixels.
        dtype: a name in `DTYPES`. In training the weights stay float32, and bfloat16 is autocast's.
        device: "cpu" or "cuda".
        compile: whether every model is compiled.
        num_labels: K of the classifier.
    """

    task: str
    variant: str
    image_size: int
    dtype: str = "float32"
    device: str = "cpu"
    compile: bool = False
    num_labels: int = 1000

    def models(self) -> tuple[dict[str, nn.Module], dict[str, str]]:
        """Ours first, then everybody else's, whose logits are ours; and why others are missing: see `build_peers`."""
        ours = plain_model(self.variant, self.image_size, self.num_labels)
        with tempfile.TemporaryDirectory() as folder:
            theirs, missing = build_peers(ours, folder)
            return {name: self._prepare(model) for name, model in {OURS: ours, **theirs}.items()}, missing

    def _prepare(self, model: nn.Module) -> nn.Module:
        if self.task == "inference":
            return model.to(self.device, DTYPES[self.dtype]).eval()
        return model.to(self.device).train()

    def way(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What is timed: it returns the logits, or the loss before the step."""
        run = torch.compile(model) if self.compile else model
        if self.task == "inference":
            images = images.to(DTYPES[self.dtype])

            def infer() -> torch.Tensor:
                with torch.inference_mode():
                    return self._finished(model_output(run, images))

            return infer
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        is_half = self.dtype != "float32"
        precision = torch.autocast(self.device, DTYPES[self.dtype]) if is_half else contextlib.nullcontext()

        def step() -> torch.Tensor:
            with precision:
                loss = F.cross_entropy(model_output(run, images).float(), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return self._finished(loss.detach())

        return step

    def _finished(self, result: torch.Tensor) -> torch.Tensor:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return result

    def ways(self, models: dict[str, nn.Module], batch_size: int) -> dict[str, Callable[[], torch.Tensor]]:
        """By name, each on the same batch. Training steps are those of copies, which end with the other weights."""
        images, labels = random_batch(models[OURS], batch_size, self.device)
        is_training = self.task == "training"
        return {
            name: self.way(copy.deepcopy(model) if is_training else model, images, labels)
            for name, model in models.items()
        }

    def operations(self) -> int:
        """
        Of an image: multiplications and additions of the matrix products of the whole network, as published, and three
        times as many for a training step (a product has two in its backward pass). The same for everybody, so that who
        leaves something out gets a higher share of the peak.
        """
        config = ViTScratchConfig.from_variant(self.variant, image_size=self.image_size)
        rows, columns = config.grid_hw
        patches, width, mlp = rows * columns, config.hidden_size, config.intermediate_size
        tokens = patches + config.num_prefix_tokens
        layer = tokens * (4 * width**2 + 2 * width * mlp) + 2 * tokens**2 * width
        patch_area = config.patch_hw[0] * config.patch_hw[1]
        products = patches * patch_area * config.num_channels * width + config.num_hidden_layers * layer
        forward = 2 * (products + width * self.num_labels)
        return forward if self.task == "inference" else 3 * forward


def measure_peak(dtype: str, device: str, seconds: float = 0.4) -> float:
    """Operations in a second of the fastest square matrix product that was found, the roof for everybody."""
    best = 0.0
    for side in _MATRICES[device]:
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        a @ b
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * side**3 / (time.perf_counter() - begin))
    return best


# Memory --------------------------------------------------------------------------------------------------------------


def measure_memory(benchmark: ModelBenchmark, name: str, batch_size: int, threads: int) -> int:
    """
    The highest number of bytes that three runs of one model's way take above what the model took before the first, in
    a process of its own: on a GPU what torch allocates, on a CPU what the system gives the process.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory_in_this_process, benchmark, name, batch_size, threads).result()


def _memory_in_this_process(benchmark: ModelBenchmark, name: str, batch_size: int, threads: int) -> int:
    torch.set_num_threads(threads)
    logging.disable_progress_bar()
    models, _ = benchmark.models()
    images, labels = random_batch(models[OURS], batch_size, benchmark.device)
    model = models.pop(name)
    models.clear()
    gc.collect()
    run = benchmark.way(model, images, labels)
    if benchmark.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what building the models has left in the heap
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: forget the highest so far
    for _ in range(3):
        run()
    return (torch.cuda.max_memory_allocated() if benchmark.device == "cuda" else _resident("VmHWM")) - before


def _resident(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"There is no {field} in /proc/self/status.")


# All of it -----------------------------------------------------------------------------------------------------------


def measure(benchmark: ModelBenchmark, batch_sizes: list[int], rounds: int, has_memory: bool) -> dict[str, Any]:
    """
    Times everybody's way at each batch size, in turns.

    Args:
        benchmark: what to compare.
        batch_sizes: B, one or several; 1 gives the latency of an image.
        rounds: how often each way is timed.
        has_memory: whether to measure the memory too, at the largest batch: a process for each model.

    Returns:
        `missing`: who is not in it, and why; `operations_per_image`; `peak_operations_per_second`, before and after;
        and for each of `batches` the seconds of every round and a summary of them.
    """
    models, missing = benchmark.models()
    peaks, batches = [measure_peak(benchmark.dtype, benchmark.device)], {}
    for batch_size in batch_sizes:
        seconds = time_in_turns(benchmark.ways(models, batch_size), rounds)
        batches[str(batch_size)] = {"seconds": seconds, "summary": summarize(seconds, batch_size, OURS)}
    peaks.append(measure_peak(benchmark.dtype, benchmark.device))
    for batch in batches.values():
        for row in batch["summary"].values():
            row["share_of_peak"] = row["images_per_second"] * benchmark.operations() / max(peaks)
    if has_memory:
        largest = max(batch_sizes)
        for name, row in batches[str(largest)]["summary"].items():
            row["memory_bytes"] = measure_memory(benchmark, name, largest, torch.get_num_threads())
    return {
        "missing": missing,
        "operations_per_image": benchmark.operations(),
        "peak_operations_per_second": peaks,
        "batches": batches,
    }
