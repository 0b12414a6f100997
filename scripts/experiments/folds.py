# SPDX-License-Identifier: Apache-2.0
"""Cross-validation, `finetune.py --folds N`: a run for each fold, and what each says of the images it has not seen."""

import copy
import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_vit_scratch.common.files import latest_whole
from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
from modeling_vit_scratch.evaluation.metrics import probabilities
from modeling_vit_scratch.evaluation.predictions import load_model, predict


def train_folds(
    train: Callable[..., tuple[Any, Any]],
    model_arguments: Any,
    data_arguments: Any,
    training_arguments: Any,
    problems: Any,
) -> None:
    """
    A run of `train` for each fold, in FOLDER/fold1 and so on; then the table of all, FOLDER/folds.json and
    out_of_fold.csv. `train` gets the arguments, and returns the data and the accelerator.
    """
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
