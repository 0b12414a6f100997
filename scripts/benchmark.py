# SPDX-License-Identifier: Apache-2.0
"""
Measures how fast this library is beside what one would use without it, on this machine.

    python scripts/benchmark.py data                          photos that the script makes: 12 megapixels and 500 x 375
    python scripts/benchmark.py data --train_dir photos       your own

`data`: from photo files to a normalised batch, on one core. Ways that are compared take turns, round by round; the
table has medians over the rounds, and the ratio of each way to ours within a round, with its quartiles. All numbers,
with the hardware, the versions and the command, go into OUTPUT_DIR/data.json.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    arguments = parser.parse_args()
    for name in ("count", "rounds", "image_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1.")
    if not 0 < arguments.smallest_area <= 1:
        parser.error(f"--smallest_area {arguments.smallest_area:g} must be above 0 and at most 1.")
    arguments.measure(arguments)


def measure_data(arguments: argparse.Namespace) -> None:
    """
    From photo files to a normalised float32 batch, on one core. Ours is what training does: a random part, resized and
    mirrored half of the time, with JPEG files decoded at reduced scale, and normalised on the CPU. The others decode in
    full, and crop and resize with Pillow or transformers' ViTImageProcessorPil.
    """
    import torch

    from modeling_vit_scratch.benchmarking.data import (
        OURS,
        PHOTO_SIZES,
        DataBenchmark,
        find_photos,
        make_photos,
        summarize_files,
    )
    from modeling_vit_scratch.benchmarking.timing import describe_machine, format_table, summarize, time_in_turns

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
    file = Path(arguments.output_dir, "data.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"All numbers: {file}")


if __name__ == "__main__":
    from modeling_vit_scratch.training.errors import run_command_line

    sys.exit(run_command_line(main))
