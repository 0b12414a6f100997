# SPDX-License-Identifier: Apache-2.0
"""Everybody's network side by side: compiled, warmed up, timed in turns, and told where the time goes."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels import format_profiles, profile_steps
from benchmarks.memory import measure_memory
from benchmarks.models import DTYPES, ModelBenchmark
from benchmarks.timing import OURS, summarize, time_in_turns
from modeling_vit_scratch.acceleration.speed_up import speed_up


# Sides of the matrices whose product is timed for the peak, in elements, and how many products without a wait.
_MATRICES = {"cpu": ((512, 1024, 2048), 1), "cuda": ((4096, 8192), 10)}


def measure_peak(dtype: str, device: str, seconds: float = 0.4) -> float:
    """Operations in a second of the fastest square matrix product that was found, the roof for everybody."""
    best, (sides, products) = 0.0, _MATRICES[device]
    for side in sides:
        layer = torch.nn.Linear(side, side, bias=False, device=device, dtype=DTYPES[dtype])
        matrix = torch.randn(side, side, device=device, dtype=DTYPES[dtype])
        # On a CPU, PyTorch has two libraries for it, of which either may be the faster one.
        for one in [layer] if device == "cuda" else [layer, speed_up(copy.deepcopy(layer))]:
            best = max(best, _products_per_second(one, matrix, products, seconds) * 2 * side**3)
    return best


@torch.inference_mode()
def _products_per_second(layer: torch.nn.Module, matrix: torch.Tensor, products: int, seconds: float) -> float:
    """At best, of so many products between two waits."""
    device = matrix.device.type
    layer(matrix)
    wait(device)
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(products):
            layer(matrix)
        wait(device)
        best = max(best, products / (time.perf_counter() - begin))
    return best


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Comparison:
    """
    Times everybody's steps at each batch size. Whoever fails is told of and left out; the others are measured.

    Args:
        benchmark: what to compare.
        rounds: how often each model is timed.
        steps: how many steps are timed together, between two waits for the device.
        has_memory: whether to measure the memory too, at the largest batch: on a CPU in a process for each model.
        is_profiled: whether to profile some steps of ours and of the fastest other, at the largest batch.
        write: gets the record whenever there is more in it.
    """

    def __init__(
        self, benchmark: ModelBenchmark, rounds: int, steps: int = 1, has_memory: bool = False,
        is_profiled: bool = False, write: Callable[[dict[str, Any]], Any] = lambda record: None,
    ) -> None:  # fmt: skip
        self.benchmark, self.rounds, self.steps, self.write = benchmark, rounds, steps, write
        self.has_memory, self.is_profiled, self.begin = has_memory, is_profiled, time.perf_counter()

    def tell(self, what: str) -> None:
        print(f"[{time.perf_counter() - self.begin:6.1f} s] {what}", flush=True)

    def run(self, batch_sizes: list[int]) -> dict[str, Any]:
        """
        Args:
            batch_sizes: B, one or several; 1 gives the latency of an image.

        Returns:
            `missing`: who is not in it, and why; `operations_per_image`; `peak_operations_per_second`, before and
            after; and for each of `batches` the seconds of every round for `steps` steps, the seconds that `first_step`
            took with its compilation, a summary, and what was asked for.
        """
        models, missing = self.benchmark.models()
        for name, reason in missing.items():
            self.tell(f"not measured: {name} ({reason})")
        peaks = [measure_peak(self.benchmark.dtype, self.benchmark.device)]
        self.tell(f"matrix product: {peaks[0] / 1e12:.4g} TFLOP/s")
        record = {
            "missing": missing,
            "operations_per_image": self.benchmark.operations(),
            "peak_operations_per_second": peaks,
            "steps": self.steps,
            "batches": {},
        }
        for size in batch_sizes:
            batch = record["batches"][str(size)] = {}
            self._measure_batch(models, size, record, batch, is_last=size == max(batch_sizes))
        peaks.append(measure_peak(self.benchmark.dtype, self.benchmark.device))
        self.tell(f"matrix product: {peaks[1] / 1e12:.4g} TFLOP/s")
        for size, batch in record["batches"].items():
            self._summarize(record, batch, int(size))
        return record

    def _measure_batch(self, models: dict, size: int, record: dict, batch: dict, is_last: bool) -> None:
        if self.benchmark.compile:  # the code of the size before is not needed any more
            torch.compiler.reset()
        device, batch["first_step"], memory = self.benchmark.device, {}, {}
        steps = self.benchmark.ways(models, size)
        for name in list(steps):
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            begin = time.perf_counter()
            try:
                steps[name]()
                wait(device)
                batch["first_step"][name] = time.perf_counter() - begin
                if device == "cuda":  # without what compiling takes
                    torch.cuda.reset_peak_memory_stats()
                for _ in range(3):
                    steps[name]()
                wait(device)
            except Exception as error:  # whatever other people's code raises here, the rest can be measured
                if name == OURS:
                    raise
                record["missing"][name] = f"{type(error).__name__}: {str(error).strip() or '-'}".splitlines()[0]
                self.tell(f"batch {size}: {name} fails: {record['missing'][name]}")
                del steps[name]
                continue
            if device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() - before
            self.tell(f"batch {size}: the first step of {name} took {batch['first_step'][name]:.1f} s")

        def after_round(seconds: dict[str, list[float]]) -> None:
            batch["seconds"] = seconds
            self._summarize(record, batch, size)
            ours = batch["summary"][OURS]
            done, rate = len(seconds[OURS]), f"{ours['images_per_second']:.1f} images / s"
            others = ", ".join(f"{row['times_faster']:.3f}" for name, row in batch["summary"].items() if name != OURS)
            share = f"{100 * ours['share_of_peak']:.1f} % of the peak"
            self.tell(f"batch {size}: round {done} of {self.rounds}, {rate}, {share}, faster by {others}")

        blocks = {name: self.benchmark.block(step, self.steps) for name, step in steps.items()}
        time_in_turns(blocks, self.rounds, after_round=after_round)
        if self.is_profiled and is_last:
            self._profile(steps, record, batch)
        if self.has_memory and is_last:
            for name, row in batch["summary"].items():
                threads = torch.get_num_threads()
                row["memory_bytes"] = memory.get(name) or measure_memory(self.benchmark, name, size, threads)
            self.write(record)

    def _summarize(self, record: dict, batch: dict, size: int) -> None:
        """From the seconds; keeps what else is known of each model."""
        old, peak = batch.get("summary", {}), max(record["peak_operations_per_second"])
        batch["summary"] = summarize(batch["seconds"], size * self.steps, OURS)
        for name, row in batch["summary"].items():
            row["share_of_peak"] = row["images_per_second"] * record["operations_per_image"] / peak
            row.update({key: value for key, value in old.get(name, {}).items() if key not in row})
        self.write(record)

    def _profile(self, steps: dict[str, Callable], record: dict, batch: dict) -> None:
        rates = {name: row["images_per_second"] for name, row in batch["summary"].items() if not name.startswith(OURS)}
        batch["profiles"] = {}
        for name in [OURS, *([max(rates, key=rates.get)] if rates else [])]:
            try:
                batch["profiles"][name] = profile_steps(steps[name], self.benchmark.device)
            except Exception as error:  # the times are worth more than what explains them
                self.tell(f"no profile of {name}: {type(error).__name__}: {error}")
        self.write(record)
        print(format_profiles(batch["profiles"]), flush=True)
