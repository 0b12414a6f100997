# SPDX-License-Identifier: Apache-2.0
"""
Draws what a training run would see: images as they are, and as augmentation and mixing make them, epoch by epoch.

    python scripts/visualize.py augmentation --train_dir photos --auto_augment ta_wide --mixup 0.2
    python scripts/visualize.py augmentation --recipe deit3_s16 --train_dir photos --image_size 224

Takes the flags of scripts/finetune.py, and writes augmentation.png into --output_dir (default: outputs/preview).
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=["augmentation"], help="what to draw; then flags of scripts/finetune.py")
    _, flags = parser.parse_known_args()

    from modeling_vit_scratch.training.command_line import parse_arguments

    defaults = ["--output_dir", "outputs/preview", "--verify_images", "False", "--report_to", "none"]
    model_arguments, data_arguments, training_arguments, problems = parse_arguments([*defaults, *flags])

    from modeling_vit_scratch.training.data import read_data
    from modeling_vit_scratch.training.finetuning import build_trainer
    from modeling_vit_scratch.training.preview import augmentation_grid, draw_grid
    from modeling_vit_scratch.training.starting_point import build_model

    seed = training_arguments.seed
    data = read_data(data_arguments, seed, problems, model_arguments.cache_dir, verify=False)
    model, processor, _ = build_model(model_arguments, data.label_names, data.source.num_channels, seed)
    trainer = build_trainer(model, processor, data, training_arguments)
    file = Path(training_arguments.output_dir, "augmentation.png")
    draw_grid(augmentation_grid(trainer), trainer.describe_augmentation(), file)
    print(f"{trainer.describe_augmentation()}\nDrawn in {file}")


if __name__ == "__main__":
    from modeling_vit_scratch.training.errors import run_command_line

    sys.exit(run_command_line(main))
