# SPDX-License-Identifier: Apache-2.0
"""
How many wrong labels `evaluate.py --label_issues` finds: 5 % of the labels become other ones, at random, and are looked
for among the 5 % most doubtful, with three seeds. The third argument is the record to write.

    python -m scripts.experiments.label_flips model_cards/vit-tiny-imagenet train.parquet model_cards/label_issues.json
"""

import json
import sys
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluating.label_issues import label_quality, out_of_fold
from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.common.errors import Problems
from modeling_vit_scratch.common.flags import DataArguments
from modeling_vit_scratch.common.pretrained import load_pretrained
from modeling_vit_scratch.common.records import digests, provenance
from modeling_vit_scratch.data.dataset import ImageClassificationDataset
from modeling_vit_scratch.data.sources import read_source
from modeling_vit_scratch.data.splits import read_split
from modeling_vit_scratch.evaluation.during_training import Features, extract_features


SHARE, SEEDS = 0.05, (0, 1, 2)


def main(model_name: str, data_name: str, record_file: str) -> None:
    model, processor, _ = load_pretrained(ViTScratchForImageClassification, f"MODEL {model_name}", model_name, {})
    options, problems = DataArguments(train_dir=data_name), Problems()
    examples = read_split("training", read_source(options, None, problems).train, options, problems, True).examples()
    images = ImageClassificationDataset(examples, processor, model.config.num_channels)
    features = extract_features(model, images, 64, 0, processor, desc="features")
    count, classes, runs = len(features.labels), int(features.labels.max()) + 1, []
    for seed in SEEDS:
        random, labels, flips = np.random.default_rng(seed), features.labels.copy(), round(SHARE * count)
        flipped = random.choice(count, flips, replace=False)
        labels[flipped] = (labels[flipped] + random.integers(1, classes, flips)) % classes
        probabilities = out_of_fold(Features(features.values, labels), seed)
        scores, is_issue = label_quality(probabilities, labels)
        order = np.argsort(scores, kind="stable")
        runs.append({
            "seed": seed, "flips": flips, "doubtful": int(is_issue.sum()),
            "accuracy_out_of_fold": float((probabilities.argmax(axis=1) == features.labels).mean()),
            "found_among_most_doubtful": float(np.isin(order[:flips], flipped).mean()),
            "found_among_twice_as_many": float(np.isin(flipped, order[: 2 * flips]).mean()),
        })  # fmt: skip
    found = [run["found_among_most_doubtful"] for run in runs]
    record = {
        "model": {"name": Path(model_name).name, "weights": digests(Path(model_name))},
        "dataset": {"name": Path(data_name).name, "images": count, "classes": classes},
        "share_of_flips": SHARE, "mean": float(np.mean(found)), "standard_deviation": float(np.std(found, ddof=1)),
        "runs": runs, **provenance("scikit-learn", "cleanlab"),
        "command": f"python -m scripts.experiments.label_flips {model_name} {Path(data_name).name} {record_file}",
    }  # fmt: skip
    Path(record_file).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(*found, record["mean"], sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
