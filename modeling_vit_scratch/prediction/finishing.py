# SPDX-License-Identifier: Apache-2.0
"""The two ends of a run with a file: the job is opened by one process for all, and its parts become the output."""

import platform
from importlib.metadata import version
from typing import Any

import torch
from accelerate import Accelerator

from ..common.errors import InputError, TrainingStopped
from ..common.processes import Processes
from .arguments import PredictionArguments
from .inputs import Rows, list_inputs
from .job import Job
from .model import Predictor, fingerprint
from .tables import output_columns, to_output, write_errors, write_output


THREADS = "threads"
# Processes wait for the slowest at the end of the run.
_PATIENCE_SECONDS = 7 * 24 * 3600


def open_job(
    predictor: Predictor, rows: Rows, arguments: PredictionArguments, accelerator: Accelerator
) -> tuple[Job, list[tuple[int, int]], Processes]:
    """
    The job of the command line, begun or found, what is missing in it, and the processes that share it.

    Raises:
        InputError: in all processes, for what is wrong with the inputs or the output.
    """
    job, processes = Job(arguments.output, arguments.per_device_eval_batch_size), Processes(_PATIENCE_SECONDS)
    found: tuple[int, list[tuple[int, int]], int] | None = None
    problem: str | None = None
    if accelerator.is_main_process:
        try:
            facts = _facts(predictor, arguments)
            # What a CPU computes depends in the last bits on how many threads do it: they are those of the beginning.
            facts[THREADS] = (job.facts() or facts)[THREADS]
            is_begun = job.start(list_inputs(arguments, rows), facts, arguments.overwrite)
            found = job.count, job.missing(), facts[THREADS]
            if is_begun:
                print(f"Going on with {job.folder}.")
        except InputError as error:
            problem = str(error)
    problem = processes.gather(problem)[0]
    if problem is not None:
        raise InputError(problem)
    job.count, gaps, threads = processes.gather(found)[0]
    torch.set_num_threads(threads)
    return job, gaps, processes


def _facts(predictor: Predictor, arguments: PredictionArguments) -> dict[str, Any]:
    """What decides the bytes of the output, beside the images."""
    names = ("top_k", "embeddings", "fast_decode", "calibrated", "dtype", "per_device_eval_batch_size")
    libraries = ("torch", "pillow", "numpy", "pyarrow")
    return {
        **{f"--{name}": getattr(arguments, name) for name in names},
        "MODEL (SHA-256)": fingerprint(predictor),
        "device": str(predictor.device).partition(":")[0],
        THREADS: torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in libraries},
    }


def wait_for_all(processes: Processes) -> None:
    """Returns when all processes have done their share. Raises TrainingStopped if one of them was lost."""
    try:
        processes.wait()
    except RuntimeError as error:
        raise TrainingStopped(
            "Another process has ended before its share was done, see its message. To go on, run the same command."
        ) from error


def finish(job: Job, predictor: Predictor) -> tuple[int, int]:
    """
    Writes OUTPUT and OUTPUT.errors.csv, and removes the job.

    Returns:
        How many images are in the one and in the other.
    """
    schema = output_columns(predictor.top_k, predictor.has_embeddings, predictor.width)
    broken = write_errors(job.errors, job.read_parts())
    tables = (to_output(rows, predictor.label_names, schema) for rows in job.read_parts())
    predicted = write_output(job.output, tables, schema)
    if predicted + broken != job.count:
        raise RuntimeError(f"{job.output} accounts for {predicted + broken} of {job.count} images: this is a bug.")
    job.remove()
    return predicted, broken


def tell(job: Job, predicted: int, broken: int) -> str:
    """The last lines for the screen."""
    lines = [f"Written: {job.output} ({predicted:,} images)."]
    if broken:
        lines.append(f"{broken:,} broken image{'s' if broken > 1 else ''}, with the reasons: {job.errors}")
    return "\n".join(lines)
