# SPDX-License-Identifier: Apache-2.0
"""The tasks of scripts/benchmark.py, each with its flags. Heavy imports come when it is known what to do."""

import argparse
import tempfile
from pathlib import Path


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command line: a task, and its flags. The namespace has the task as `measure`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    data = tasks.add_parser("data", help="reading photos for training", description=measure_data.__doc__)
    data.add_argument("--train_dir", help="Measure on the images in this folder. Default: photos that are made here.")
    data.add_argument("--count", type=int, default=8, help="Photos of each kind. Default: %(default)s")
    data.add_argument("--rounds", type=int, default=7, help="How often each way is timed. Default: %(default)s")
    data.add_argument("--image_size", type=int, default=224, help="Side of the result in pixels. Default: %(default)s")
    data.add_argument(
        "--smallest_area", type=float, default=0.35,
        help="Training takes random parts of at least this share of the area. Default: %(default)s, that of training",
    )  # fmt: skip
    data.add_argument("--output_dir", default="outputs/benchmark", help="For the numbers. Default: %(default)s")
    data.set_defaults(measure=measure_data)
    for task, what in (("inference", "logits, without gradients"), ("training", "training steps: forward to update")):
        add_model_task(tasks.add_parser(task, help=what, description=measure_models.__doc__))
    return parser


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a message where a number makes no sense."""
    for name, value in vars(arguments).items():
        if any(number < 1 for number in (value if isinstance(value, list) else [value]) if type(number) is int):
            parser.error(f"--{name} {value} must be at least 1.")
    if not 0 < getattr(arguments, "smallest_area", 1) <= 1:
        parser.error(f"--smallest_area {arguments.smallest_area:g} must be above 0 and at most 1.")


def add_model_task(task: argparse.ArgumentParser) -> None:
    """The flags of `inference` and `training`."""
    task.add_argument("--variant", default="S/16", help="Which network. Default: %(default)s. Example: B/16")
    task.add_argument("--image_size", type=int, default=224, help="Side of the images in pixels. Default: %(default)s")
    task.add_argument(
        "--batch_size", type=int, nargs="+", default=[1, 8],
        help="Images in a batch, one number or several. 1 gives the latency of an image. Default: 1 8",
    )  # fmt: skip
    task.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="Default: %(default)s")
    task.add_argument("--device", choices=("cpu", "cuda"), help="Default: cuda, where there is one.")
    task.add_argument("--num_threads", type=int, help="Of the CPU. Default: as torch chooses, usually all cores.")
    task.add_argument("--compile", action="store_true", help="Compile everybody's model with torch.compile.")
    task.add_argument("--no_memory", action="store_true", help="Leave out the memory, for which each model is run in "
                      "a process of its own.")  # fmt: skip
    task.add_argument("--rounds", type=int, default=9, help="How often each model is timed. Default: %(default)s")
    task.add_argument("--output_dir", default="outputs/benchmark", help="For the numbers. Default: %(default)s")
    task.set_defaults(measure=measure_models)


def measure_models(arguments: argparse.Namespace) -> None:
    """
    The same weights on the same batch in our network and in those of transformers, timm and torchvision, where they are
    installed; and vit-pytorch's, which has a few layers more. `of the peak` is the share of the fastest matrix product
    measured here that the operations of the whole network would need, the same for everybody. `memory` is what three
    runs take beside the weights.
    """
    import torch
    from transformers.utils import logging

    from .models import ModelBenchmark, measure
    from .peers import VIT_PYTORCH, VIT_PYTORCH_NOTE
    from .timing import describe_machine, format_table, write_benchmark

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = ModelBenchmark(
        arguments.task, arguments.variant, arguments.image_size, arguments.dtype, device, arguments.compile
    )
    logging.disable_progress_bar()
    machine = describe_machine()  # first, for the load
    measured = measure(benchmark, arguments.batch_size, arguments.rounds, not arguments.no_memory)
    for batch_size, batch in measured["batches"].items():
        how = f"{arguments.dtype}, {device}, {torch.get_num_threads()} threads" + arguments.compile * ", compiled"
        print(format_table(f"{arguments.task}, {arguments.variant}, batch {batch_size}, {how}", batch["summary"]), "\n")
    print(f"    {VIT_PYTORCH}: {VIT_PYTORCH_NOTE}.")
    for name, reason in measured["missing"].items():
        print(f"    not measured: {name} ({reason})")
    record = {"machine": machine, "benchmark": vars(benchmark), "vit_pytorch": VIT_PYTORCH_NOTE, **measured}
    write_benchmark(record, Path(arguments.output_dir), arguments.task)


def measure_data(arguments: argparse.Namespace) -> None:
    """
    From photo files to a normalised float32 batch, on one core. Ours is what training does: a random part, resized and
    mirrored half of the time, with JPEG files decoded at reduced scale, and normalised on the CPU. The others decode in
    full, and crop and resize with Pillow or transformers' ViTImageProcessorPil.
    """
    import torch

    from .data import OURS, PHOTO_SIZES, DataBenchmark, find_photos, make_photos, summarize_files
    from .timing import describe_machine, format_table, summarize, time_in_turns, write_benchmark  # fmt: skip

    torch.set_num_threads(1)
    record = {"machine": describe_machine(), "image_size": arguments.image_size, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.train_dir is not None:
            sets = {arguments.train_dir: find_photos(arguments.train_dir, arguments.count)}
        else:
            sets = {name: make_photos(Path(folder), size, arguments.count) for name, size in PHOTO_SIZES.items()}
        for name, files in sets.items():
            benchmark = DataBenchmark(files, arguments.image_size, arguments.smallest_area)
            seconds = time_in_turns(benchmark.ways(), arguments.rounds)
            summary, facts, levels = (
                summarize(seconds, len(files), OURS),
                summarize_files(files),
                benchmark.difference(),
            )
            record["sets"][name] = {**facts, "difference_in_levels": levels, "seconds": seconds, "summary": summary}
            title = (
                f"{name}: {facts['photos']} photos, {facts['megapixels']:.3g} megapixels, {facts['kilobytes']:.4g} kB"
            )
            print(format_table(title, summary))
            print(f"    Ours differs from full decoding by {levels['mean']:.2f} of 255 levels on average, "
                  f"{levels['maximum']:.0f} at most.\n")  # fmt: skip
    write_benchmark(record, Path(arguments.output_dir), "data")
