# SPDX-License-Identifier: Apache-2.0
"""The tasks of scripts/benchmark.py, each with its flags. Heavy imports come when it is known what to do."""

import argparse
import os
import tempfile
import time
from pathlib import Path

from modeling_vit_scratch.common.flags import PHOTO_SMALLEST_AREA


def build_parser(description: str) -> argparse.ArgumentParser:
    """The command line: a task, and its flags. The namespace has the task as `measure`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    data = tasks.add_parser("data", help="reading photos for training", description=measure_data.__doc__)
    add_photo_flags(data)
    data.add_argument(
        "--smallest_area", type=float, default=PHOTO_SMALLEST_AREA,
        help="Training takes random parts of at least this share of the area. Default: %(default)s, that of training",
    )  # fmt: skip
    data.set_defaults(measure=measure_data)
    processor = tasks.add_parser("processor", help="images for the network", description=measure_processor.__doc__)
    add_photo_flags(processor)
    processor.set_defaults(measure=measure_processor)
    packing = tasks.add_parser("packing", help="images of many sizes at once", description=measure_packing.__doc__)
    packing.add_argument("--variant", default="S/16", help="Which network. Default: %(default)s")
    packing.add_argument("--count", type=int, default=16, help="Images in a pass. Default: %(default)s")
    packing.add_argument("--num_threads", type=int, help="Of the CPU. Default: as torch chooses, usually all cores.")
    add_common_flags(packing, rounds=7)
    packing.set_defaults(measure=measure_packing)
    loading = tasks.add_parser("loading", help="imports and from_pretrained", description=measure_loading.__doc__)
    loading.add_argument("--variant", default="B/16", help="Which network. Default: %(default)s")
    add_common_flags(loading, rounds=7)
    loading.set_defaults(measure=measure_loading)
    prediction = tasks.add_parser(
        "prediction", help="photos to a table of labels", description=measure_prediction.__doc__
    )
    prediction.add_argument("--train_dir", help="Measure on the images in this folder. Default: photos made here.")
    prediction.add_argument("--count", type=int, default=16, help="Photos of each kind. Default: %(default)s")
    prediction.add_argument("--model", help="The folder of a classifier. Default: a fresh one of --variant.")
    prediction.add_argument("--variant", default="S/16", help="Which network. Default: %(default)s")
    prediction.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="Processes that read. Default: one for each core."
    )
    add_common_flags(prediction, rounds=7)
    prediction.set_defaults(measure=measure_prediction)
    finetune = tasks.add_parser("finetune", help="training on photos", description=measure_finetune.__doc__)
    finetune.add_argument("--train_dir", help="Measure on the images in this folder. Default: photos made here.")
    finetune.add_argument("--count", type=int, default=24, help="Photos of each kind. Default: %(default)s")
    finetune.add_argument("--variant", default="Mi/16", help="Which network. Default: %(default)s, so small that "
                          "reading photos takes longer, as beside a GPU.")  # fmt: skip
    finetune.add_argument("--batch_size", type=int, default=8, help="Photos in a step. Default: %(default)s")
    finetune.add_argument("--steps", type=int, default=16, help="Of a run, all of which is timed. Default: %(default)s")
    finetune.add_argument("--num_workers", type=int, default=2, help="Processes that read. Default: %(default)s")
    finetune.add_argument("--num_threads", type=int, help="Of the CPU. Default: as torch chooses, usually all cores.")
    add_common_flags(finetune, rounds=7)
    finetune.set_defaults(measure=measure_finetune)
    soak = tasks.add_parser("soak", help="memory and open files of long runs", description=measure_soak.__doc__)
    soak.add_argument("--minutes", type=int, default=15, help="How long the runs last. Default: %(default)s")
    soak.add_argument("--num_workers", type=int, default=2, help="Processes that read, of each. Default: %(default)s")
    soak.add_argument("--output_dir", default="outputs/benchmark", help="For the numbers. Default: %(default)s")
    soak.set_defaults(measure=measure_soak)
    for task, what in (("inference", "logits, without gradients"), ("training", "training steps: forward to update")):
        add_model_task(tasks.add_parser(task, help=what, description=measure_models.__doc__))
    return parser


def add_common_flags(task: argparse.ArgumentParser, rounds: int) -> None:
    task.add_argument("--rounds", type=int, default=rounds, help="How often each way is timed. Default: %(default)s")
    task.add_argument("--output_dir", default="outputs/benchmark", help="For the numbers. Default: %(default)s")


def add_photo_flags(task: argparse.ArgumentParser) -> None:
    """The flags of `data` and `processor`."""
    task.add_argument("--train_dir", help="Measure on the images in this folder. Default: photos that are made here.")
    task.add_argument("--count", type=int, default=8, help="Photos of each kind. Default: %(default)s")
    task.add_argument("--image_size", type=int, default=224, help="Side of the result in pixels. Default: %(default)s")
    add_common_flags(task, rounds=7)


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with a message where a number makes no sense."""
    for name, value in vars(arguments).items():
        if name == "num_workers" and value == 0:  # the process that computes reads too
            continue
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
    task.add_argument(
        "--steps", type=int,
        help="Steps that are timed together, between two waits for the device. Default: 10 on cuda, 1 on a CPU.",
    )  # fmt: skip
    task.add_argument(
        "--peers", nargs="+", choices=("transformers", "timm", "torchvision", "vit-pytorch", "openvino", "onnxruntime"),
        help="Whom to compare with. Default: everybody who is installed.",
    )  # fmt: skip
    task.add_argument("--profile", action="store_true", help="Tell where the time of ours and of the fastest other "
                      "goes, by kind of kernel.")  # fmt: skip
    task.add_argument("--no_memory", action="store_true", help="Leave out the memory, for which on a CPU each model is "
                      "run in a process of its own.")  # fmt: skip
    add_common_flags(task, rounds=9)
    task.set_defaults(measure=measure_models)


def measure_models(arguments: argparse.Namespace) -> None:
    """
    The same weights on the same batch in our network and in those of transformers, timm and torchvision, where they are
    installed; and vit-pytorch's, which has a few layers more. `of the peak` is the share of the fastest matrix product
    measured here that the operations of the whole network would need, the same for everybody. `memory` is what three
    runs take beside the weights. With --dtype bfloat16 training is autocast's: ours adds up the branches of layers in
    bfloat16, as big_vision does, the others in float32, which is what their class token makes of them.
    """
    import torch
    from transformers.utils import logging

    from benchmarks.comparison import Comparison
    from benchmarks.deployed import RUNTIMES
    from benchmarks.models import ModelBenchmark
    from benchmarks.peers import PEERS, VIT_PYTORCH, VIT_PYTORCH_NOTE
    from benchmarks.timing import describe_machine, format_table, write_benchmark, write_numbers

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    benchmark = ModelBenchmark(
        arguments.task, arguments.variant, arguments.image_size, arguments.dtype, device, arguments.compile,
        peers=tuple(arguments.peers or (*PEERS, *RUNTIMES)),
    )  # fmt: skip
    logging.disable_progress_bar()
    folder = Path(arguments.output_dir)
    # The machine first, for the load.
    record = {"machine": describe_machine(), "benchmark": vars(benchmark), "vit_pytorch": VIT_PYTORCH_NOTE}
    comparison = Comparison(
        benchmark, arguments.rounds, arguments.steps or (10 if device == "cuda" else 1), not arguments.no_memory,
        arguments.profile, write=lambda measured: write_numbers({**record, **measured}, folder, arguments.task),
    )  # fmt: skip
    record.update(comparison.run(arguments.batch_size))
    for batch_size, batch in record["batches"].items():
        how = f"{arguments.dtype}, {device}, {torch.get_num_threads()} threads" + arguments.compile * ", compiled"
        print(format_table(f"{arguments.task}, {arguments.variant}, batch {batch_size}, {how}", batch["summary"]), "\n")
    print(f"    {VIT_PYTORCH}: {VIT_PYTORCH_NOTE}.")
    for name, reason in record["missing"].items():
        print(f"    not measured: {name} ({reason})")
    write_benchmark(record, folder, arguments.task)


def measure_data(arguments: argparse.Namespace) -> None:
    """
    From photo files to a normalised float32 batch, on one core. Ours is what training does: a random part, resized and
    mirrored half of the time, with JPEG files decoded at reduced scale, and normalised on the CPU. The others decode in
    full, and crop and resize with Pillow or transformers' ViTImageProcessorPil. Times are the processor's, for this
    process alone: what other programs take of a core in between does not count.
    """
    import torch

    from benchmarks.data import DataBenchmark, photo_sets, summarize_files
    from benchmarks.timing import OURS, describe_machine, format_table, summarize, time_in_turns, write_benchmark

    torch.set_num_threads(1)
    record = {"machine": describe_machine(), "image_size": arguments.image_size, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, files in photo_sets(arguments.train_dir, Path(folder), arguments.count).items():
            benchmark = DataBenchmark(files, arguments.image_size, arguments.smallest_area)
            seconds = time_in_turns(benchmark.ways(), arguments.rounds, time.process_time)
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


def measure_processor(arguments: argparse.Namespace) -> None:
    """
    The image processor as a model's user calls it, image by image, on one core: ours, exact and with do_fast_resize,
    beside transformers' ViTImageProcessorPil with the same settings. From images that are decoded already, and from
    JPEG files. Times are the processor's, for this process alone.
    """
    import torch
    from PIL import Image

    from benchmarks.data import photo_sets, summarize_files
    from benchmarks.processor import differences, processor_ways, resizing_alone, times_faster, to_time
    from benchmarks.timing import OURS, describe_machine, format_table, summarize, time_in_turns, write_benchmark

    torch.set_num_threads(1)
    record = {"machine": describe_machine(), "image_size": arguments.image_size, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, files in photo_sets(arguments.train_dir, Path(folder), arguments.count).items():
            decoded = [Image.open(file).convert("RGB") for file in files]
            for title, images in ((f"{name}, decoded", decoded), (f"{name}, JPEG files", files)):
                ways = processor_ways(images, arguments.image_size)
                differs = differences(ways)
                if images is decoded:
                    ways |= resizing_alone(decoded, arguments.image_size)
                seconds = time_in_turns(to_time(ways), arguments.rounds, time.process_time)
                summary, faster = summarize(seconds, len(files), OURS), times_faster(seconds)
                facts = {**summarize_files(files), **differs, **faster}
                record["sets"][title] = {**facts, "seconds": seconds, "summary": summary}
                print(format_table(title, summary))
                (low, high), ratio = faster["fast_times_faster_quartiles"], faster["fast_times_faster"]
                print(f"    Of values from -1 to 1, the largest difference is {differs['largest_difference']:.1e}. "
                      f"With do_fast_resize {ratio:.2f} times as fast as transformers ({low:.2f} to "
                      f"{high:.2f}), and {differs['fast_mean_levels']:.3f} of 255 levels away on average, "
                      f"{differs['fast_largest_levels']:.0f} at most.\n")  # fmt: skip
    write_benchmark(record, Path(arguments.output_dir), "processor")


def measure_loading(arguments: argparse.Namespace) -> None:
    """
    How long it takes until there is a model, ours and transformers' ViT with the same weights: a fresh process that
    imports the class; one that loads the weights too; and from_pretrained alone. Times are the processor's: what other
    programs take of a core does not count.
    """
    from transformers.utils import logging

    from benchmarks.loading import import_ways, in_process_ways, load_ways, save_models
    from benchmarks.timing import (
        OURS,
        describe_machine,
        format_table,
        processor_seconds,
        summarize,
        time_in_turns,
        write_benchmark,
    )

    logging.disable_progress_bar()
    record = {
        "machine": describe_machine(),
        "variant": arguments.variant,
        "clock": "processor",
        "item": "model",
        "sets": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        folders = save_models(Path(folder), arguments.variant)
        for title, ways in (
            ("a process that imports the class", import_ways()),
            (f"a process that loads {arguments.variant}", load_ways(folders)),
            (f"from_pretrained of {arguments.variant} alone", in_process_ways(folders)),
        ):
            seconds = time_in_turns(ways, arguments.rounds, processor_seconds)
            summary = summarize(seconds, 1, OURS)
            record["sets"][title] = {"seconds": seconds, "summary": summary}
            print(format_table(title, summary, item=record["item"]), "\n", flush=True)
    write_benchmark(record, Path(arguments.output_dir), "loading")


def measure_packing(arguments: argparse.Namespace) -> None:
    """
    Images with the aspect ratios of photos and areas from 64 x 64 to 288 x 288 pixels, in one pass: packed into one
    sequence (benchmarks/packed.py), padded to the longest and masked, and one by one. In float32, on the
    CPU; the logits of all ways are compared first.
    """
    import torch

    from benchmarks.models import plain_model
    from benchmarks.packing import OURS, difference, mixed_images, packing_ways
    from benchmarks.timing import describe_machine, format_table, summarize, time_in_turns, write_benchmark

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    model = plain_model(arguments.variant, image_size=224)
    images = mixed_images(model.config, arguments.count)
    ways, title = packing_ways(model, images), f"packing, {arguments.variant}, {arguments.count} images of many sizes"
    record = {"machine": describe_machine(), "difference": difference(ways)}
    if record["difference"] > 1e-4:
        raise RuntimeError(f"Logits differ by {record['difference']:.1e}. Nothing was timed. Please report this.")
    seconds = time_in_turns(ways, arguments.rounds)
    summary = summarize(seconds, len(images), OURS)
    record["sets"] = {
        title: {"sizes": [list(image.shape[1:]) for image in images], "seconds": seconds, "summary": summary}
    }
    print(format_table(title, summary, OURS))
    print(f"    Logits differ by up to {record['difference']:.1e}.")
    write_benchmark(record, Path(arguments.output_dir), "packing")


def measure_prediction(arguments: argparse.Namespace) -> None:
    """
    What scripts/predict.py does after the model is loaded, from photo files to a table of labels, beside transformers'
    pipeline with the same model, which decodes in full in one process.
    """
    from transformers.utils import logging

    from benchmarks.data import photo_sets, summarize_files
    from benchmarks.prediction import PredictionBenchmark, fresh_model
    from benchmarks.timing import OURS, describe_machine, format_table, summarize, time_in_turns, write_benchmark

    logging.disable_progress_bar()
    what = arguments.model or arguments.variant
    record = {"machine": describe_machine(), "model": what, "num_workers": arguments.num_workers, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or fresh_model(arguments.variant, Path(folder, "model"))
        for name, files in photo_sets(arguments.train_dir, Path(folder), arguments.count).items():
            benchmark = PredictionBenchmark(model, files, arguments.num_workers, folder)
            seconds = time_in_turns(benchmark.ways(), arguments.rounds)
            summary, scores = summarize(seconds, len(files), OURS), benchmark.difference()
            facts = {**summarize_files(files), "difference_in_scores": scores}
            record["sets"][name] = {**facts, "seconds": seconds, "summary": summary}
            print(format_table(f"{name}: {what}, {len(files)} photos", summary))
            mean, most, other = scores["mean"], scores["maximum"], scores["other_label"]
            print(f"    Scores differ from full decoding by {mean:.5f} on average, {most:.4f} at most.")
            print(f"    {other} of {len(files)} photos get another label.\n")
    write_benchmark(record, Path(arguments.output_dir), "prediction")


def measure_finetune(arguments: argparse.Namespace) -> None:
    """
    Runs of scripts/finetune.py's trainer on a folder of photos, from the first batch to the last, beside the example of
    transformers: its Trainer and its ViT, from the same weights, with the same batches, steps and processes that read.
    On a CPU times are the processor's, of all processes of a run: what other programs take does not count.
    """
    import torch
    from transformers.utils import logging

    from benchmarks.data import photo_sets, summarize_files
    from benchmarks.finetuning import FinetuneBenchmark
    from benchmarks.timing import (
        OURS,
        describe_machine,
        format_table,
        processor_seconds,
        summarize,
        time_in_turns,
        write_benchmark,
    )

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    logging.disable_progress_bar()
    on_device = torch.cuda.is_available()
    clock, told = (time.perf_counter, "wall clock") if on_device else (processor_seconds, "processor")
    settings = {name: getattr(arguments, name) for name in ("variant", "batch_size", "steps", "num_workers")}
    record = {"machine": describe_machine(), **settings, "clock": told, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, files) in enumerate(photo_sets(arguments.train_dir, Path(folder), arguments.count).items()):
            benchmark = FinetuneBenchmark(files, Path(folder, str(number)), **settings)
            seconds = time_in_turns(benchmark.ways(), arguments.rounds, clock)
            summary = summarize(seconds, benchmark.images, OURS)
            record["sets"][name] = {**summarize_files(files), "seconds": seconds, "summary": summary}
            title = (
                f"{name}: {arguments.variant}, {arguments.steps} steps of {arguments.batch_size} photos, {told} time"
            )
            print(format_table(title, summary), "\n", flush=True)
    write_benchmark(record, Path(arguments.output_dir), "finetune")


def measure_soak(arguments: argparse.Namespace) -> None:
    """
    predict.py and finetune.py side by side on the same photos, with processes that read them, evaluations and
    checkpoints, for as long as is asked: the memory of all their processes together, where what they share counts once,
    and their open files, every ten seconds.
    """
    from benchmarks.data import make_photos
    from benchmarks.prediction import fresh_model
    from benchmarks.soak import commands, summarize_samples, watch
    from benchmarks.timing import describe_machine, write_numbers

    record = {"machine": describe_machine(), "minutes": arguments.minutes, "sets": {}}
    output_dir = Path(arguments.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, open(output_dir / "soak.log", "w", encoding="utf-8") as log:
        photos = []
        for label in ("a", "b"):
            (place := Path(folder, "photos", label)).mkdir(parents=True)
            photos += make_photos(place, (500, 375), 32)
        model = fresh_model("Mi/16", Path(folder, "model"))
        scripts = Path(__file__).parents[2] / "scripts"
        lines = commands(scripts, photos, model, Path(folder), arguments.num_workers, arguments.minutes)
        for name, samples in watch(lines, 60 * arguments.minutes, 10, log).items():
            summary = summarize_samples(samples)
            record["sets"][name] = {"summary": summary, "samples": samples}
            print(f"{name}, medians of the four quarters of {arguments.minutes} minutes, and the most:")
            for what, found in summary.items():
                quarters = ", ".join(f"{value:,.0f}" for value in found["quarters"])
                print(f"    {what.replace('_', ' '):12} {quarters}; {found['most']:,.0f}")
    print(f"All numbers: {write_numbers(record, output_dir, 'soak')}")
