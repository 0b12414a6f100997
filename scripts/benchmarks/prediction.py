# SPDX-License-Identifier: Apache-2.0
"""From photo files to a table of labels, beside a loop over transformers' pipeline with the same model."""

import csv
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import pipeline

from benchmarks.timing import OURS
from modeling_vit_scratch.common.pretrained import default_processor
from modeling_vit_scratch.configuration_vit_scratch import ViTScratchConfig
from modeling_vit_scratch.modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.prediction.arguments import parse_arguments
from modeling_vit_scratch.prediction.model import load_predictor
from modeling_vit_scratch.prediction.reading import Inputs, ItemDataset, build_loader
from modeling_vit_scratch.prediction.running import finish, open_job, run_job


def fresh_model(variant: str, folder: Path) -> str:
    """A classifier of a thousand labels with random weights, in a folder: it costs what a trained one costs."""
    torch.manual_seed(0)
    config = ViTScratchConfig.from_variant(variant, num_labels=1000)
    ViTScratchForImageClassification(config).save_pretrained(folder)
    default_processor(config).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class PredictionBenchmark:
    """
    Attributes:
        model: the folder of a classifier.
        files: photos.
        num_workers: processes that read photos.
        folder: for the tables.
        batch_size: images in a batch, of ours and of the pipeline that takes batches.
    """

    model: str
    files: list[Path]
    num_workers: int
    folder: str
    batch_size: int = 8

    def ways(self) -> dict[str, Callable[[], Any]]:
        """By name. The models are loaded; everything else is done anew each time, the file included."""
        names = list(map(str, self.files))
        classify = pipeline("image-classification", model=self.model)
        return {
            OURS: self._our_way(),
            "ours with --no_fast_decode": self._our_way("--no_fast_decode"),
            **self._parts(),
            "pipeline, photo after photo": lambda: [classify(name, top_k=1) for name in names],
            "pipeline, all photos in batches": lambda: classify(names, top_k=1, batch_size=self.batch_size),
        }

    def difference(self) -> dict[str, float]:
        """Between fast and full decoding: of the scores of all labels, and how many photos get another label."""
        (fast, fast_labels), (full, full_labels) = (self._scores(*flags) for flags in ((), ("--no_fast_decode",)))
        difference = np.abs(fast - full)
        changed = sum(one != other for one, other in zip(fast_labels, full_labels))
        return {"mean": difference.mean().item(), "maximum": difference.max().item(), "other_label": changed}

    def _parts(self) -> dict[str, Callable[[], Any]]:
        """What our way can't be faster than: where one of its two parts is all that is done."""
        flags = ["--dataloader_num_workers", str(self.num_workers)]
        arguments = parse_arguments([self.model, *map(str, self.files), *flags])
        predictor, inputs = load_predictor(arguments), Inputs(arguments)
        items, size = list(inputs.items()), self.batch_size
        batches = [(place, items[place : place + size]) for place in range(0, len(items), size)]
        shape = ItemDataset(predictor.processor, fast_decode=True).shape
        pixels = torch.zeros((len(items), *shape), dtype=torch.uint8).split(size)

        def read() -> None:
            deque(build_loader(batches, inputs, predictor.processor, arguments), maxlen=0)

        return {"ours, reading alone": read, "ours, the network alone": lambda: [predictor(batch) for batch in pixels]}

    def _our_way(self, *flags: str) -> Callable[[], Path]:
        """What scripts/predict.py does, once the model is loaded."""
        folder = tempfile.mkdtemp(dir=self.folder)
        argv = [self.model, *map(str, self.files), "--dataloader_num_workers", str(self.num_workers)]
        argv += ["--per_device_eval_batch_size", str(self.batch_size), *flags]
        accelerator = Accelerator()
        predictor = load_predictor(parse_arguments([*argv, "--output", f"{folder}/any.csv"]), accelerator.device)

        def run() -> Path:
            output = Path(folder, "labels.csv")
            arguments = parse_arguments([*argv, "--output", str(output), "--overwrite"])
            inputs = Inputs(arguments)
            job, missing, _ = open_job(predictor, inputs, arguments, accelerator)
            run_job(job, missing, predictor, inputs, arguments, accelerator)
            finish(job)
            return output

        return run

    def _scores(self, *flags: str) -> tuple[np.ndarray, list[str]]:
        """(N, K) in the order of the names of the labels, and the best label of each photo."""
        predictor = load_predictor(parse_arguments([self.model, "x"]))
        top_k = str(predictor.config.num_labels)
        with open(self._our_way(*flags, "--top_k", top_k)(), newline="") as file:
            rows = list(csv.reader(file))[1:]
        named = [dict(zip(row[1::2], map(float, row[2::2]))) for row in rows]
        return np.array([[one[name] for name in sorted(one)] for one in named]), [row[1] for row in rows]
