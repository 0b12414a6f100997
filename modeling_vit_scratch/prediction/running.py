# SPDX-License-Identifier: Apache-2.0
"""The run: opens the job, predicts batch after batch with rows on the disk every so often, and writes the output."""

import functools
import itertools
import platform
import sys
import time
from importlib.metadata import version

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..common.errors import InputError, TrainingInterrupted, TrainingStopped, lost_worker, on_screen
from ..common.processes import Processes, StopSignals
from ..data.listing import left_out_line
from .arguments import PredictionArguments
from .job import Job, Writer, write_errors, write_output
from .model import Predictor, choose_backend, fingerprint
from .reading import Inputs, build_loader


def open_job(
    predictor: Predictor, inputs: Inputs, arguments: PredictionArguments, accelerator: Accelerator
) -> tuple[Job, list[tuple[int, int]], Processes]:
    """Begins or continues a job, in one process for all. The job, its missing batches, and who shares them."""
    job = Job(arguments.output, arguments.per_device_eval_batch_size)
    processes = Processes(timeout=7 * 24 * 3600)  # they wait for the slowest at the end of the run
    state: tuple[int, list[tuple[int, int]], int, str] | str | None = None
    if accelerator.is_main_process:
        names = ("top_k", "embeddings", "fast_decode", "calibrated", "dtype", "per_device_eval_batch_size")
        try:
            before = job.settings() or {}
            # Decides the last bits of a CPU's results: a job keeps the number that it began with.
            torch.set_num_threads(threads := before.get("threads", torch.get_num_threads()))
            known = "" if arguments.overwrite else before.get("backend", "")
            settings = {  # what decides the bytes of the output, beside the images
                **{f"--{name}": getattr(arguments, name) for name in names},
                "MODEL (SHA-256)": fingerprint(predictor),
                "device": str(predictor.device).partition(":")[0],
                "threads": threads,
                "python": platform.python_version(),
                "parts": "columns of the output",
                **{name: version(name) for name in ("torch", "pillow", "numpy", "pyarrow")},
            }
            choose = functools.partial(choose_backend, predictor, arguments.backend, known)
            if job.start(inputs.items(), settings, arguments.overwrite, arguments.inputs, choose):
                print(f"Going on with {job.folder}.")
            if line := left_out_line(inputs.left_out):
                print(line, file=sys.stderr)
            state = job.count, job.missing(), threads, job.settings()["backend"]
        except InputError as error:
            state = str(error)
    state = processes.gather(state)[0]
    if isinstance(state, str):
        raise InputError(state)
    job.count, missing, threads, backend = state
    torch.set_num_threads(threads)
    if backend != "torch" and not accelerator.is_main_process:
        predictor.use_openvino()
    return job, missing, processes


def run_job(
    job: Job, missing: list[tuple[int, int]], predictor: Predictor, inputs: Inputs, arguments: PredictionArguments,
    accelerator: Accelerator,
) -> None:  # fmt: skip
    """Predicts this process's share of the missing batches. After Ctrl-C, the finished ones are on the disk."""
    share = job.share(missing, accelerator.process_index, accelerator.num_processes)
    writer = Writer(job, predictor.label_names, predictor.is_regression)
    is_alone, shown_at = accelerator.num_processes == 1, 0.0
    bar = tqdm(
        total=job.count, initial=job.num_predicted(), desc="predicting", unit=" images", smoothing=0.05,
        disable=not accelerator.is_main_process, mininterval=0.1 if sys.stderr.isatty() else 60,
    )  # fmt: skip
    with StopSignals() as stop, bar:
        loader = build_loader(share, inputs, predictor.processor, arguments, accelerator.device.type == "cuda")
        try:
            for batch in loader:
                writer.add(batch, predictor(batch.pixels))
                if not bar.disable and time.monotonic() - shown_at >= 1.0:
                    shown_at = time.monotonic()
                    # All rows on the disk, also of other processes, and those of this process that wait.
                    bar.update(min(job.count, job.num_predicted() + writer.waiting * job.batch_size) - bar.n)
                if stop.poll():
                    break
            else:
                bar.update(job.count - bar.n if is_alone else 0)
        except RuntimeError as error:
            writer.flush()
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise TrainingStopped(
                    "The memory of the device is full. Take a lower --per_device_eval_batch_size "
                    f"({arguments.per_device_eval_batch_size} now), and --overwrite."
                ) from error
            if lost := lost_worker(error):
                raise TrainingStopped(
                    f"{lost} Go on with the same command and a lower --dataloader_num_workers "
                    f"({arguments.dataloader_num_workers} now)."
                ) from error
            raise
        writer.flush()
    # With several processes the others may have stopped before their end.
    if stop.poll() and not (is_alone and not job.missing()):
        raise TrainingInterrupted(
            f"Interrupted with {job.num_predicted():,} of {job.count:,} images predicted, which are in {job.folder}. "
            "To go on, run the same command again.",
            stop.number,
        )


def wait_for_all(processes: Processes) -> None:
    try:
        processes.wait()
    except RuntimeError as error:
        raise TrainingStopped(
            "Another process has ended before its share was done, see its message. To go on, run the same command."
        ) from error


def finish(job: Job) -> tuple[int, int]:
    """Writes OUTPUT and OUTPUT.errors.csv, says so, and removes the job. Returns the number of images in each."""
    predicted, broken = write_errors(job.errors, job.read_parts())
    if predicted + broken != job.count:
        raise RuntimeError(f"{job.folder} accounts for {predicted + broken} of {job.count} images: this is a bug.")
    write_output(job.output, job.read_parts())
    job.remove()
    print(f"Written: {job.output} ({predicted:,} images).")
    if broken:
        print(f"{broken:,} broken image{'s' if broken > 1 else ''}, with the reasons: {job.errors}")
    return predicted, broken


def print_table(predictor: Predictor, inputs: Inputs, arguments: PredictionArguments) -> int:
    """Prints a row for each label of each image; broken images go to the standard error. Returns their number."""
    if arguments.backend == "openvino":
        predictor.use_openvino()
    items, size, broken = inputs.items(), arguments.per_device_eval_batch_size, 0
    batches = iter(lambda: list(itertools.islice(items, size)), [])
    first = next(batches, [])
    width = max([len("image"), *(len(on_screen(item.name)) for item in first)])
    label_names = list(map(on_screen, predictor.label_names))
    label_width = max(len("label"), *map(len, label_names))
    print(f"{'image':<{width}}  {'label':<{label_width}}  score")
    numbered = enumerate(itertools.chain([first], batches))
    for batch in build_loader(numbered, inputs, predictor.processor, arguments):
        prediction = predictor(batch.pixels)
        for name, error, labels, scores in zip(batch.names, batch.errors, prediction.labels, prediction.scores):
            if error is not None:
                broken += 1
                print(f"error: {on_screen(name)}: {on_screen(error)}", file=sys.stderr)
                continue
            for label, score in zip(labels, scores):
                print(f"{on_screen(name):<{width}}  {label_names[label]:<{label_width}}  {score:.4f}")
    if line := left_out_line(inputs.left_out):
        print(line, file=sys.stderr)
    return broken
