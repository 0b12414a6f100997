# SPDX-License-Identifier: Apache-2.0
"""
Draws what is inside a model, the figures of the paper among them, and what a training run would see.

    python scripts/visualize.py filters outputs/digits
    python scripts/visualize.py rollout outputs/digits photo.jpg --output rollout.png --save_arrays rollout.npz
    python scripts/visualize.py distance google/vit-base-patch16-224 photos/
    python scripts/visualize.py augmentation --train_dir photos --auto_augment ta_wide --mixup 0.2

Each figure explains itself: python scripts/visualize.py rollout --help
"""

import argparse
from pathlib import Path
from typing import Any

from startup.quick import before_torch, run_command_line


def main() -> None:
    with before_torch():
        arguments, rest = build_parser().parse_known_args()
        if arguments.figure == "augmentation":
            settings = parse_training(rest)
        else:
            check(arguments, rest)
    if arguments.figure == "augmentation":
        draw_augmentation(*settings)
    else:
        draw_figure(arguments)


def check(arguments: argparse.Namespace, unknown: list[str]) -> None:
    """Raises InputError with what is wrong with the flags of a figure."""
    from modeling_vit_scratch.common.errors import Problems

    problems, size, arrays = Problems(), arguments.image_size, arguments.save_arrays
    if unknown:
        build_parser().error(f"unrecognized arguments: {' '.join(unknown)}")
    if arrays is not None and arrays.suffix != ".npz":
        problems.add(f"--save_arrays {arrays}: arrays are written as .npz.")
    if size is not None and (len(size) > 2 or min(size) < 1):
        problems.add(f"--image_size {' '.join(map(str, size))}: give one number, or height and width, in pixels.")
    if getattr(arguments, "batch_size", 1) < 1:
        problems.add(f"--batch_size {arguments.batch_size} must be at least 1.")
    if problems.messages:
        raise problems.as_error()


def draw_figure(arguments: argparse.Namespace) -> None:
    """A figure of a model."""
    import numpy as np

    from modeling_vit_scratch.visualization.arrays import find_photos, open_model
    from modeling_vit_scratch.visualization.figures import check_drawing
    from startup.figures import LIMITS
    from visualizing.commands import FIGURES, Subject

    size, arrays = arguments.image_size, arguments.save_arrays
    file = arguments.output or Path("outputs", "figures", f"{arguments.figure}.png")
    check_drawing(file, arrays)
    options = {name: getattr(arguments, name) for name in ("label", "batch_size") if hasattr(arguments, name)}
    photos = find_photos(getattr(arguments, "photos", []))
    if len(photos) > LIMITS.get(arguments.figure, 0) > 0:
        print(f"Of {len(photos)} photos, the first {LIMITS[arguments.figure]} are taken.")
    image_size = None if size is None else (size[0], size[-1])
    model, processor = open_model(arguments.model, arguments.revision, image_size)
    name = Path(arguments.model).name or arguments.model
    picture = FIGURES[arguments.figure](Subject(model, processor, name, photos, **options))

    if arrays is not None:
        arrays.parent.mkdir(parents=True, exist_ok=True)
        np.savez(arrays, **picture.arrays)
        print(f"Arrays in {arrays}: {', '.join(f'{k} {v.shape}' for k, v in picture.arrays.items())}")
    replaced = ", in place of an older one" if file.exists() else ""
    picture.save(file)
    print(f"Drawn in {file}{replaced}")


def build_parser() -> argparse.ArgumentParser:
    """A subcommand for each figure."""
    from startup.figures import AUGMENTATION, DESCRIPTIONS, LIMITS

    form = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **form)
    commands = parser.add_subparsers(dest="figure", metavar="figure", required=True)
    for name, description in DESCRIPTIONS.items():
        text = description.strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text, **form)
        command.add_argument("model", help="what from_pretrained reads: a folder, a Hub id, a .npz or other checkpoint")
        if name in LIMITS:
            command.add_argument(
                "photos", nargs="+", metavar="photo",
                help=f"images, URLs, or folders with images in any depth; the first {LIMITS[name]} of them taken",
            )  # fmt: skip
        if name in ("gradcam", "sheet"):
            command.add_argument("--label", help="class to explain, by name or index (default: the predicted one)")
        if name in ("distance", "sheet"):
            command.add_argument("--batch_size", type=int, default=8, help="photos measured at a time (default: 8)")
        command.add_argument(
            "--image_size", type=int, nargs="+", metavar="PIXELS",
            help="height and width, or one number for both, if not the model's own; positions are resampled",
        )  # fmt: skip
        command.add_argument("--revision", default="main", help="branch, tag or commit on the Hub (default: main)")
        command.add_argument(
            "--output", type=Path, help=f".png, .pdf or .svg to write (default: outputs/figures/{name}.png)"
        )
        command.add_argument("--save_arrays", type=Path, metavar="FILE.npz", help="also write the numbers drawn")
    text = AUGMENTATION.strip()
    commands.add_parser("augmentation", help=text.splitlines()[0], description=text, **form)
    return parser


def parse_training(flags: list[str]) -> tuple[Any, ...]:
    """The flags of a training run."""
    from modeling_vit_scratch.training.command_line import parse_arguments

    return parse_arguments(
        flags, defaults={"output_dir": "outputs/preview", "verify_images": False, "report_to": "none"}
    )


def draw_augmentation(model_arguments: Any, data_arguments: Any, training_arguments: Any, problems: Any) -> None:
    """The images of a training run, by the run's own code."""
    from modeling_vit_scratch.data.splits import read_data
    from modeling_vit_scratch.training.build import build_model, build_trainer
    from modeling_vit_scratch.visualization.figures import draw_grid
    from visualizing.commands import augmentation_grid

    seed = training_arguments.seed
    data = read_data(data_arguments, seed, problems, model_arguments.cache_dir)
    model, processor, _ = build_model(
        model_arguments, data.label_names, data.source.num_channels, seed, is_multi_label=data.is_multi_label
    )
    trainer = build_trainer(model, processor, data, training_arguments)
    file = Path(training_arguments.output_dir, "augmentation.png")
    draw_grid(augmentation_grid(trainer), trainer.describe_augmentation(), file)
    print(f"{trainer.describe_augmentation()}\nDrawn in {file}")


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
