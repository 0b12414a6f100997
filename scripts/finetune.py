# SPDX-License-Identifier: Apache-2.0
"""
Trains a Vision Transformer to classify images, from scratch or from a saved model.

    python scripts/finetune.py                                        digits of scikit-learn, on a CPU
    python scripts/finetune.py --train_dir photos --variant S/16      your own images, a folder for each class
    accelerate launch scripts/finetune.py --model_name_or_path outputs/photos --train_dir more_photos

Ends with the held-out accuracy, the model's folder and three lines that use it.
"""

import copy
import csv
import json
import statistics
from pathlib import Path
from typing import Any

from startup.quick import before_torch, run_command_line


def main() -> None:
    with before_torch():
        from modeling_vit_scratch.training.command_line import parse_arguments

        arguments = parse_arguments(description=__doc__)
    if arguments[1].folds:
        train_folds(*arguments)
    else:
        train(*arguments)


def train_folds(model_arguments: Any, data_arguments: Any, training_arguments: Any, problems: Any) -> None:
    """A run for each fold, in FOLDER/fold1 and so on; then the table of all, FOLDER/folds.json and out_of_fold.csv."""
    from modeling_vit_scratch.common.files import latest_whole

    folder = Path(training_arguments.output_dir)
    places = [folder / f"fold{number + 1}" for number in range(data_arguments.folds)]
    resumes = str(training_arguments.resume_from_checkpoint).lower() in ("true", "auto")
    if not resumes and any(place.exists() for place in places):
        problems.add(f"{folder} has folds of another run. Go on with --resume_from_checkpoint True, or remove them.")
        raise problems.as_error()
    if training_arguments.push_to_hub:
        problems.add("--folds trains several models, and --push_to_hub is for one. Keep one of them.")
    for fold, place in enumerate(places):
        if (place / "out_of_fold.csv").is_file():
            continue
        own, data_arguments.fold = copy.copy(training_arguments), fold
        checkpoint = latest_whole(place, read=True)[0] if resumes and place.is_dir() else None
        own.output_dir, own.resume_from_checkpoint = str(place), checkpoint and str(checkpoint)
        write_predictions(*train(model_arguments, data_arguments, own, problems), place)
    if training_arguments.process_index == 0:
        print(fold_table(places, folder))


def write_predictions(data: Any, accelerator: Any, place: Path) -> None:
    """Writes PLACE/out_of_fold.csv: the probabilities of each held-out image, by the model that is saved there."""
    from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
    from modeling_vit_scratch.evaluation.metrics import probabilities
    from modeling_vit_scratch.evaluation.predictions import load_model, predict

    accelerator.wait_for_everyone()
    options = EvaluationArguments()
    options.model = str(place)
    model, processor = load_model(options)
    logits = predict(model, processor, data.validation, accelerator, options).logits
    if accelerator.is_main_process:
        values, labels = probabilities(logits, 1.0, data.is_multi_label), data.validation.labels
        with open(place / "out_of_fold.part", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["image", "label", *data.label_names])
            for index, row in enumerate(values):
                has = [labels[index]] if isinstance(labels, list) else labels[index].nonzero()[0]
                names = "|".join(data.label_names[one] for one in has)
                table.writerow([data.validation.name(index), names, *(f"{value:.8f}" for value in row)])
        (place / "out_of_fold.part").rename(place / "out_of_fold.csv")
    accelerator.wait_for_everyone()


def fold_table(places: list[Path], folder: Path) -> str:
    """Joins the results of all folds: the mean, the standard deviation, and the predictions of every image."""
    records = [json.loads((place / "results.json").read_text(encoding="utf-8")) for place in places]
    values, metric = [record["value"] for record in records], records[0]["metric"]
    result = {"metric": metric, "values": values, "n": [record["n"] for record in records]}
    result |= {"mean": statistics.mean(values), "standard_deviation": statistics.stdev(values)}
    (folder / "folds.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    tables = [(place / "out_of_fold.csv").read_text(encoding="utf-8").split("\n", 1) for place in places]
    text = "\n".join([tables[0][0], "".join(rows for _, rows in tables)])
    (folder / "out_of_fold.csv").write_text(text, encoding="utf-8")
    lines = [f"{place.name:<8}{one['value']:>10.4f}{one['n']:>8,} images" for place, one in zip(places, records)]
    lines.append(f"{metric} {result['mean']:.4f}, standard deviation {result['standard_deviation']:.4f} of the folds")
    return "\n".join([*lines, f"Each image by the model that has not seen it: {folder / 'out_of_fold.csv'}"])


def train(model_arguments: Any, data_arguments: Any, training_arguments: Any, problems: Any) -> tuple[Any, Any]:
    """A run from the data to the saved model. Returns the data and the accelerator."""
    from modeling_vit_scratch.cards.run_record import build_record, result_message, write_record
    from modeling_vit_scratch.cards.writing import write_training_card
    from modeling_vit_scratch.data.held_out import read_earlier
    from modeling_vit_scratch.data.splits import export_examples, read_data
    from modeling_vit_scratch.training.build import build_model, build_trainer
    from modeling_vit_scratch.visualization.commands import draw_near_copies

    seed, is_first = training_arguments.seed, training_arguments.process_index == 0
    start, checkpoint = model_arguments.model_name_or_path, training_arguments.resume_from_checkpoint
    earlier = read_earlier(start, checkpoint, data_arguments.train_val_split)
    data = read_data(data_arguments, seed, problems, model_arguments.cache_dir, earlier=earlier)
    model, processor, origin = build_model(
        model_arguments, data.label_names, data.source.num_channels, seed, is_multi_label=data.is_multi_label
    )
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
        print(result_message(record, training_arguments.output_dir, example))
    if training_arguments.push_to_hub:
        trainer.push_to_hub()
    return data, trainer.accelerator


if __name__ == "__main__":
    raise SystemExit(run_command_line(main))
