# SPDX-License-Identifier: Apache-2.0
"""
Trains a Vision Transformer to classify images, from scratch or from a saved model.

    python scripts/finetune.py                                        digits of scikit-learn, on a CPU
    python scripts/finetune.py --train_dir photos --variant S/16      your own images, a folder for each class
    accelerate launch scripts/finetune.py --model_name_or_path outputs/photos --train_dir more_photos

Ends with the held-out accuracy, the model's folder and three lines that use it.
"""

from typing import Any

from startup.quick import before_torch, run_command_line


def main() -> None:
    with before_torch():
        from modeling_vit_scratch.training.command_line import parse_arguments

        arguments = parse_arguments(description=__doc__)
    if arguments[1].folds:
        from experiments.folds import train_folds

        train_folds(train, *arguments)
    else:
        train(*arguments)


def train(model_arguments: Any, data_arguments: Any, training_arguments: Any, problems: Any) -> tuple[Any, Any]:
    """A run from the data to the saved model. Returns the data and the accelerator."""
    from modeling_vit_scratch.cards.records import build_record, result_message, write_record
    from modeling_vit_scratch.cards.writing import write_training_card
    from modeling_vit_scratch.data.copies import draw_near_copies
    from modeling_vit_scratch.data.held_out import read_earlier
    from modeling_vit_scratch.data.splits import export_examples, read_data
    from modeling_vit_scratch.training.build import build_model, build_trainer
    from modeling_vit_scratch.training.progress import undecided_line

    seed, is_first = training_arguments.seed, training_arguments.process_index == 0
    start, checkpoint = model_arguments.model_name_or_path, training_arguments.resume_from_checkpoint
    hub = {"revision": model_arguments.model_revision, "cache_dir": model_arguments.cache_dir}
    earlier = read_earlier(start, checkpoint, data_arguments.train_val_split, **hub)
    data = read_data(data_arguments, seed, problems, model_arguments.cache_dir, earlier=earlier)
    model, processor, origin = build_model(
        model_arguments, data.label_names, data.source.num_channels, seed,
        is_multi_label=data.is_multi_label, is_regression=data.is_regression,
    )  # fmt: skip
    trainer = build_trainer(model, processor, data, training_arguments)
    if is_first:
        sheet = draw_near_copies(data.near_copies, training_arguments.output_dir)
        print(data.describe(), *sheet, *origin, *trainer.describe(), sep="\n")

    outcome = trainer.train(resume_from_checkpoint=training_arguments.resume_from_checkpoint)
    scores = trainer.evaluate()
    trainer.save_state()

    if is_first:
        record = build_record(trainer, data, model_arguments, scores, outcome.metrics["train_runtime"])
        write_record(record, training_arguments.output_dir)
        write_training_card(trainer, record)
    trainer.save_model()
    if is_first:
        example = export_examples(data, data_arguments.export_examples)
        warning = undecided_line(trainer, scores["eval_loss"])
        print(result_message(record, training_arguments.output_dir, example, warning))
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return data, trainer.accelerator


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
