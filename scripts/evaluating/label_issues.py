# SPDX-License-Identifier: Apache-2.0
"""
Labels that may be wrong, to look at: confident learning (Northcutt et al., arXiv:1911.00068) by cleanlab, from the
probabilities that a linear classifier of the model's features gives to images that it was not fitted to.
"""

import csv
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.configuration_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.evaluation.arguments import EvaluationArguments
from modeling_vit_scratch.evaluation.data import EvaluationData
from modeling_vit_scratch.evaluation.during_training import Features
from modeling_vit_scratch.evaluation.predictions import Predictions
from modeling_vit_scratch.image_processing_vit_scratch import ViTScratchImageProcessor
from modeling_vit_scratch.visualization.figures import draw_grid


FOLDS, L2 = 5, 100.0
COLUMNS, ROWS, SHEET = 4, 6, "label_issues.png"


def out_of_fold(features: Features, seed: int = 0) -> np.ndarray:
    """The probabilities (N, K) of the classes that are there. Raises InputError for a class with one image."""
    folds = min(FOLDS, int(np.unique(features.labels, return_counts=True)[1].min()))
    if folds < 2:
        raise InputError("--label_issues compares the images of a class, and there is a class with one image.")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1.0 / L2, max_iter=1000))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return cross_val_predict(classifier, *features, cv=splits, method="predict_proba")


def label_quality(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cleanlab's score of each label, low where it is doubtful, and which ones it takes for wrong; both (N,)."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    scores = get_label_quality_scores(labels, probabilities, method="self_confidence")
    return scores, find_label_issues(labels, probabilities, n_jobs=1)


def write_label_issues(
    config: ViTScratchConfig, data: EvaluationData, predictions: Predictions, arguments: EvaluationArguments
) -> str:
    """Writes label_issues.csv, the most doubtful label first, and .png, its first images. Returns a line to print."""
    used, labels = np.unique(predictions.labels, return_inverse=True)
    probabilities = out_of_fold(Features(predictions.features, labels), arguments.seed)
    scores, is_issue = label_quality(probabilities, labels)
    folder, names = Path(arguments.output_dir), [config.id2label[index] for index in used.tolist()]
    order, likely = np.argsort(scores, kind="stable").tolist(), probabilities.argmax(axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "label_issues.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "likely", "probability", "quality", "is_issue"])
        for i in order:
            of_image = data.examples.name(i), names[labels[i]], names[likely[i]]
            table.writerow([*of_image, f"{probabilities[i, likely[i]]:.6f}", f"{scores[i]:.6f}", bool(is_issue[i])])
    decoder, columns = ViTScratchImageProcessor(num_channels=config.num_channels), min(COLUMNS, len(order))
    shown = np.array(order[: min(ROWS, len(order) // columns) * columns]).reshape(-1, columns).tolist()
    grid = [[np.asarray(data.examples.decode(i, decoder).convert("RGB")) for i in row] for row in shown]
    titles = [[f"{names[labels[i]]}: {names[likely[i]]}?" for i in row] for row in shown]
    draw_grid(grid, "The most doubtful labels: LABEL: WHAT IT LOOKS LIKE?", folder / SHEET, titles)
    return (
        f"{int(is_issue.sum()):,} of {len(order):,} labels are doubtful. Look at them: {folder / SHEET}. All, the most "
        f"doubtful first: {folder / 'label_issues.csv'}"
    )
