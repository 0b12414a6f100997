# SPDX-License-Identifier: Apache-2.0
"""The run itself: batches through the model, rows to the disk every so often, and an end at any moment."""

import itertools
import math
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..common.errors import InputError, TrainingInterrupted, TrainingStopped, lost_worker
from ..common.processes import Processes, StopSignals
from .arguments import PredictionArguments
from .inputs import Rows, list_inputs
from .job import BLOCK, Job
from .model import Prediction, Predictor, fingerprint
from .reading import Batch, Batches, ItemDataset, build_loader
from .tables import output_columns, part_rows, printable, to_output, write_errors, write_output


# What a kill can cost: rows are written after so many images or seconds, whichever comes first.
SECONDS = 30.0


class Writer:
    """Collects what follows one another, and writes it as a part of the job."""

    def __init__(self, job: Job) -> None:
        self._job, self._rows, self._first, self._end, self._since = job, [], 0, 0, time.monotonic()

    @property
    def waiting(self) -> int:
        """Batches that are not on the disk yet."""
        return self._end - self._first

    def add(self, batch: Batch, prediction: Prediction) -> None:
        if batch.number != self._end:
            self.flush()
            self._first = batch.number
        self._rows.append((batch.names, batch.faults, *prediction))
        self._end = batch.number + 1
        is_full = self.waiting * self._job.batch_size >= BLOCK
        if is_full or time.monotonic() - self._since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            names, faults, labels, scores, embeddings = zip(*self._rows)
            vectors = None if embeddings[0] is None else np.concatenate(embeddings)
            rows = part_rows(
                list(itertools.chain(*names)), list(itertools.chain(*faults)), np.concatenate(labels),
                np.concatenate(scores), vectors,
            )  # fmt: skip
            self._job.write_part(self._first, self._end, rows)
        self._rows, self._first, self._since = [], self._end, time.monotonic()


def run_job(
    job: Job,
    gaps: list[tuple[int, int]],
    predictor: Predictor,
    rows: Rows,
    arguments: PredictionArguments,
    accelerator: Accelerator,
) -> None:
    """
    Predicts this process's share of what is missing, and writes it into the job.

    Args:
        job: open.
        gaps: what is missing, the same for all processes.
        predictor, rows, arguments, accelerator: of this process.

    Raises:
        TrainingInterrupted: after Ctrl-C or SIGTERM, when what is done is on the disk.
        TrainingStopped: if a process that reads images was lost.
    """
    share = job.share(gaps, accelerator.process_index, accelerator.num_processes)
    writer, bar, is_alone = Writer(job), _bar(job, accelerator), accelerator.num_processes == 1
    with StopSignals() as stop, bar:
        loader = _loader(predictor, Batches(share, rows), arguments, accelerator.device.type == "cuda")
        try:
            for batch in loader:
                writer.add(batch, predictor(batch.pixels))
                _advance(bar, job, writer)
                if stop.poll():
                    break
            else:
                bar.update(job.count - bar.n if is_alone else 0)
        except RuntimeError as error:
            writer.flush()
            raise _explained(error, arguments) from error
        writer.flush()
    # With several processes the others may have stopped before their end.
    if stop.poll() and not (is_alone and not job.missing()):
        raise TrainingInterrupted(
            f"Interrupted with {_done(job):,} of {job.count:,} images predicted, which are in {job.folder}. To go on, "
            "run the same command again.",
            stop.number,
        )


def _loader(
    predictor: Predictor, batches: Batches, arguments: PredictionArguments, pin_memory: bool
) -> Iterator[Batch]:
    # A large photo is no news while a bar is on the screen; one that is too large is an error.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    dataset = ItemDataset(predictor.processor, arguments.fast_decode)
    # As they are read, and as the network takes them.
    needed = 5 * arguments.per_device_eval_batch_size * math.prod(dataset.shape)
    memory = psutil.virtual_memory().total
    if needed > memory / 2:
        raise InputError(
            f"MODEL takes images of {dataset.shape[1]} x {dataset.shape[2]} pixels, and "
            f"--per_device_eval_batch_size {arguments.per_device_eval_batch_size} of them {needed / 1e9:,.1f} GB; this "
            f"machine has {memory / 1e9:,.1f} GB. Take fewer, or another size in its preprocessor_config.json."
        )
    return build_loader(batches, dataset, arguments.dataloader_num_workers, pin_memory)


def _explained(error: RuntimeError, arguments: PredictionArguments) -> Exception:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return TrainingStopped(
            "The memory of the device is full. Take a lower --per_device_eval_batch_size "
            f"({arguments.per_device_eval_batch_size} now), and --overwrite."
        )
    if lost := lost_worker(error):
        return TrainingStopped(
            f"{lost} Go on with the same command and a lower --dataloader_num_workers "
            f"({arguments.dataloader_num_workers} now)."
        )
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def _done(job: Job) -> int:
    """Images whose rows are on the disk."""
    missing = sum(min(end * job.batch_size, job.count) - first * job.batch_size for first, end in job.missing())
    return job.count - missing


def _bar(job: Job, accelerator: Accelerator) -> tqdm:
    done = _done(job)
    is_shown = accelerator.is_main_process
    return tqdm(total=job.count, initial=done, desc="predicting", unit=" images", disable=not is_shown, smoothing=0.05)


def _advance(bar: tqdm, job: Job, writer: Writer) -> None:
    """What all processes have written, and what this one has not written yet; looked up once a second."""
    if bar.disable or time.monotonic() - getattr(bar, "looked", 0.0) < 1.0:
        return
    bar.looked = time.monotonic()
    bar.update(min(job.count, _done(job) + writer.waiting * job.batch_size) - bar.n)


# ---------------------------------------------------------------------------------------------------------------------
# Without a file


def print_table(predictor: Predictor, rows: Rows, arguments: PredictionArguments) -> int:
    """
    One row for each label of each image, as they come; broken images on the standard error. Returns how many of these
    there are.
    """
    items, size = list_inputs(arguments, rows), arguments.per_device_eval_batch_size
    first = list(itertools.islice(items, size))
    width = max([len("image"), *(len(on_screen(item.name)) for item in first)])
    label_width = max(len("label"), *map(len, predictor.label_names))
    print(f"{'image':<{width}}  {'label':<{label_width}}  score")
    chunks = itertools.chain([first], iter(lambda: list(itertools.islice(items, size)), []))
    broken = 0
    for batch in _loader(predictor, Batches(enumerate(chunks), rows), arguments, pin_memory=False):
        prediction = predictor(batch.pixels)
        for name, fault, labels, scores in zip(batch.names, batch.faults, prediction.labels, prediction.scores):
            if fault is not None:
                broken += 1
                tell_broken(name, fault)
                continue
            for label, score in zip(labels, scores):
                print(f"{on_screen(name):<{width}}  {predictor.label_names[label]:<{label_width}}  {score:.4f}")
    return broken


def tell_broken(name: str, fault: str) -> None:
    """One line on the standard error."""
    print(f"error: {on_screen(name)}: {on_screen(fault)}", file=sys.stderr)


def on_screen(text: str) -> str:
    """In one line, and with no character that a terminal obeys: names of files can have any."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in printable(text))


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
