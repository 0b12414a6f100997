# SPDX-License-Identifier: Apache-2.0
"""Runs scripts side by side, each in a process and a folder of its own. A run is whole or not there."""

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from experiments.plan import Run
from modeling_vit_scratch.common.errors import InputError, TrainingInterrupted, TrainingStopped
from modeling_vit_scratch.common.files import write_text
from modeling_vit_scratch.common.processes import StopSignals


_RUN, _RESULTS, _PARTIAL = "run.json", "results.json", ".part"


def run_all(runs: list[Run], scripts: Path, folder: Path, jobs: int, keep_models: bool = False) -> list[dict[str, Any]]:
    """
    Runs what has not been run, and returns the records of all: the run's results.json and `process_seconds`.

    Args:
        runs: in the order in which they start.
        scripts: the folder of the scripts.
        folder: gets a folder for each run, and a file with what it has printed.
        jobs: how many at a time.
        keep_models: whether weights stay.

    Raises:
        InputError: if a finished run in the folder had other flags.
        TrainingStopped: if a run fails. All others are stopped, too; what is finished stays.
        TrainingInterrupted: after Ctrl-C or SIGTERM, in the same way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        _check_earlier(run, folder)
    crew = _Crew(scripts, folder, jobs, keep_models)
    records: dict[Run, dict[str, Any]] = {}
    with StopSignals(at_once=True), ThreadPoolExecutor(jobs) as pool:
        with tqdm(total=len(runs), unit="run", desc="transfer", smoothing=0) as progress:
            try:
                futures = {pool.submit(crew.run, run): run for run in runs}
                for future in as_completed(futures):
                    run = futures[future]
                    records[run] = future.result()
                    progress.update()
                    tqdm.write(f"{run.name}: {_headline(records[run])}")
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                crew.stop()
                if not isinstance(error, KeyboardInterrupt):
                    raise
                number = getattr(error, "number", signal.SIGINT)
                raise TrainingInterrupted(
                    f"Stopped: {len(records)} of {len(runs)} runs are finished. The same command goes on.", number
                ) from error
    return [records[run] for run in runs]


def _headline(record: dict[str, Any]) -> str:
    if "probes" in record:
        return ", ".join(f"{name} {100 * found['accuracy']:.1f} %" for name, found in record["probes"].items())
    return f"{record['metric']} {100 * record['value']:.2f} % of {record['n']:,} images, {record['process_seconds']} s"


def _check_earlier(run: Run, folder: Path) -> None:
    file = folder / run.name / _RUN
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["flags"] != list(run.flags):
        raise InputError(
            f"{folder / run.name} is of a run with other flags. Give another --output_dir, or remove that folder."
        )


def environment(jobs: int, device: int | None) -> dict[str, str]:
    """
    Of a run among so many: its share of the cores, and one GPU of several, since a process that sees several splits
    every batch among them.
    """
    variables = dict(os.environ)
    if jobs > 1:
        variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if device is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(device)
    return variables


class _Crew:
    def __init__(self, scripts: Path, folder: Path, jobs: int, keep_models: bool) -> None:
        self.scripts, self.folder, self.jobs, self.keep_models = scripts, folder, jobs, keep_models
        self.lock, self.is_stopped = threading.Lock(), False
        self.processes: set[subprocess.Popen] = set()
        # As many places as jobs, spread over the GPUs.
        count = torch.cuda.device_count()
        self.devices: queue.Queue[int | None] = queue.Queue()
        for job in range(jobs):
            self.devices.put(job % count if count > 1 and "CUDA_VISIBLE_DEVICES" not in os.environ else None)

    def run(self, run: Run) -> dict[str, Any]:
        final, partial = self.folder / run.name, self.folder / f"{run.name}{_PARTIAL}"
        if not final.exists():
            shutil.rmtree(partial, ignore_errors=True)
            device = self.devices.get()
            try:
                seconds = self._run(run, partial, device)
            finally:
                self.devices.put(device)
            if not self.keep_models:
                for file in partial.glob("model*.safetensors"):
                    file.unlink()
            write_text(partial / _RUN, json.dumps({"flags": run.flags, "process_seconds": round(seconds, 1)}) + "\n")
            partial.rename(final)
        told = json.loads((final / _RUN).read_text(encoding="utf-8"))
        record = json.loads((final / _RESULTS).read_text(encoding="utf-8"))
        return record | {"process_seconds": told["process_seconds"]}

    def _run(self, run: Run, partial: Path, device: int | None) -> float:
        command = [sys.executable, str(self.scripts / f"{run.kind}.py"), *run.flags, "--output_dir", str(partial)]
        log, begin = self.folder / f"{run.name}.log", time.perf_counter()
        with log.open("w", encoding="utf-8") as output:
            with self.lock:
                if self.is_stopped:
                    raise TrainingStopped("stopped")
                # A session of its own: Ctrl-C in the terminal reaches this process alone, which ends the others.
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                    start_new_session=True, env=environment(self.jobs, device),
                )  # fmt: skip
                self.processes.add(process)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
        if code != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise TrainingStopped("\n".join([f"{run.name} ended with status {code}; see {log}:", *lines[-15:]]))
        return time.perf_counter() - begin

    def stop(self) -> None:
        """Ends all processes and those that they have started. What they had made is not whole, and not kept."""
        with self.lock:
            self.is_stopped = True
            processes = list(self.processes)
        for process in processes:
            try:
                family = psutil.Process(process.pid)
                members = [*family.children(recursive=True), family]
            except psutil.NoSuchProcess:
                continue
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
