# SPDX-License-Identifier: Apache-2.0
"""
Measures what a model's features are worth on labelled images, without training the model: three probes, one table.

    python scripts/probe.py outputs/pretrained                                  digits of scikit-learn
    python scripts/probe.py B_16.npz --train_dir photos --image_size 224        your own images
    accelerate launch scripts/probe.py google/vit-base-patch16-224 --dataset_name food101

knn: 20 nearest neighbours. fewshot: least squares in closed form on 1, 5, 10 and 25 images of every class, as in the
paper. linear: logistic regression, its regulariser chosen on a part of the training images. All learn from training
images and are tested on held-out ones. The record goes to results.json in --output_dir (default: outputs/probe).
"""

import argparse
from pathlib import Path

from startup.quick import before_torch, run_command_line


# Of scripts/finetune.py.
DATA_FLAGS = (
    "train_dir", "dataset_name", "validation_dir", "train_val_split", "image_size", "max_train_samples",
    "split_seed", "max_eval_samples", "dataset_config_name", "image_column_name", "label_column_name",
    "per_device_eval_batch_size", "dataloader_num_workers", "seed", "output_dir",
)  # fmt: skip


def main() -> None:
    with before_torch():
        from modeling_vit_scratch.common.errors import InputError
        from modeling_vit_scratch.training.command_line import build_parser, parse_arguments

        own, flags = own_parser(build_parser()).parse_known_args()
        defaults = {"output_dir": "outputs/probe", "report_to": "none"}
        words = ["--model_name_or_path", own.model, *flags]
        model_arguments, data_arguments, training_arguments, problems = parse_arguments(words, defaults=defaults)
    folder = Path(training_arguments.output_dir)
    if (folder / "results.json").exists():
        problems.add(f"{folder} has the results of another run. Give another --output_dir, or remove it.")
    if data_arguments.streaming:
        problems.add("--streaming: probes go through the images once and need their number. Leave it out.")

    from modeling_vit_scratch.acceleration.speed_up import speed_up
    from modeling_vit_scratch.cards.records import dataset_metadata, model_metadata, write_record
    from modeling_vit_scratch.common.records import provenance
    from modeling_vit_scratch.data.dataset import ImageClassificationDataset
    from modeling_vit_scratch.data.held_out import read_earlier
    from modeling_vit_scratch.data.splits import check_for_probes, read_data
    from modeling_vit_scratch.evaluation.during_training import KINDS, extract_features, run_probes, table
    from modeling_vit_scratch.training.build import load_encoder

    seed, is_first = training_arguments.seed, training_arguments.process_index == 0
    earlier = read_earlier(own.model, cache_dir=model_arguments.cache_dir)
    data = read_data(data_arguments, seed, problems, model_arguments.cache_dir, earlier=earlier)
    check_for_probes(data)
    encoder, processor = load_encoder(model_arguments, seed if own.random_weights else None)
    speed_up(encoder.to(training_arguments.device))
    if is_first:
        weights = ", random weights" if own.random_weights else ""
        print(data.describe(), f"{own.model}: {encoder.num_parameters():,} parameters{weights}.", sep="\n")
    try:
        train, test = (
            extract_features(
                encoder,
                ImageClassificationDataset(examples, processor, encoder.config.num_channels),
                training_arguments.per_device_eval_batch_size,
                training_arguments.dataloader_num_workers,
                processor,
                desc=name,
            )
            for name, examples in (("Training images", data.train), ("Held-out images", data.validation))
        )
        if is_first:
            kinds = [kind for kind in KINDS if kind != "linear" or not own.skip_linear]
            found = run_probes(
                train, test, len(data.label_names), kinds, seed, report=lambda line: print(line, flush=True)
            )
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {"dataset": dataset_metadata(data), "model": model_metadata(encoder, model_arguments)}
            record = {"probes": found, "n": len(data.validation), "seed": seed, "random_weights": own.random_weights}
            write_record({**record, **metadata, **provenance()}, folder)
            print(table(found), f"Record: {folder / 'results.json'}", sep="\n")
    except ValueError as error:
        raise InputError(str(error)) from error


def own_parser(training: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The own flags; --help shows those of finetune.py for data, too."""
    formatter = training.formatter_class("")
    formatter.start_section("data")
    formatter.add_arguments([action for name in DATA_FLAGS for action in training._actions if action.dest == name])
    formatter.end_section()
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=formatter.format_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="any checkpoint that the library knows: a file, a folder or a Hub id")
    parser.add_argument("--skip_linear", action="store_true", help="leave out the linear probe, which takes longest")
    parser.add_argument(
        "--random_weights", action="store_true", help="the same network with fresh weights of --seed, to compare with"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
