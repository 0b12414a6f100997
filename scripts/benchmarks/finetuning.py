# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a folder of photos from the first batch to the last, beside what transformers' example does."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import PrinterCallback, Trainer, TrainingArguments

from benchmarks.data import RESAMPLE
from benchmarks.models import plain_model
from benchmarks.peers import build_peers
from benchmarks.timing import OURS
from modeling_vit_scratch.augmentation.photo import PhotoAugmentation
from modeling_vit_scratch.checkpoint.formats import TRANSFORMERS
from modeling_vit_scratch.common.pretrained import default_processor
from modeling_vit_scratch.data.splits import ImageData, read_data
from modeling_vit_scratch.training.build import build_trainer
from modeling_vit_scratch.training.command_line import parse_arguments


STOCK = "Pillow; transformers: ViT, Trainer"
_LABELS = ("one", "other")  # the time does not depend on what is in the photos


@dataclass(frozen=True)
class FinetuneBenchmark:
    """
    What is compared: a training run of `steps` steps, from the start of the processes that read photos to their end.

    Attributes:
        files: photos.
        folder: for links to the photos and what runs write.
        variant: e.g. "Mi/16".
        batch_size: images in a step.
        steps: of a run.
        num_workers: processes that read photos.
        image_size: side of the network's input in pixels.
    """

    files: list[Path]
    folder: Path
    variant: str
    batch_size: int = 8
    steps: int = 16
    num_workers: int = 2
    image_size: int = 224

    @property
    def images(self) -> int:
        """That a run trains on."""
        return self.steps * self.batch_size

    def ways(self) -> dict[str, Callable[[], Any]]:
        """By name, all from the same weights. Each returns its trainer."""
        return {
            OURS: lambda: self._run(self.our_trainer()),
            "ours with --fast_decode False": lambda: self._run(self.our_trainer("--fast_decode", "False")),
            STOCK: lambda: self._run(self.stock_trainer()),
        }

    @staticmethod
    def _run(trainer: Trainer) -> Trainer:
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer

    def our_trainer(self, *flags: str) -> Trainer:
        """As scripts/finetune.py builds it."""
        _, _, arguments, problems = parse_arguments([*self._argv, *flags])
        if problems.messages:
            raise problems.as_error()
        model, _ = self._models
        return build_trainer(copy.deepcopy(model), default_processor(model.config), self.data, arguments)

    def stock_trainer(self) -> Trainer:
        """
        As in examples/pytorch/image-classification/run_image_classification.py of transformers: its data set, its
        transforms, its collate function, its Trainer; the random parts are of the same sizes as ours, and Pillow and
        torch do what torchvision does there. Everything that is not about photos has our settings.
        """
        _, _, ours, _ = parse_arguments(self._argv)
        _, model = self._models
        part = PhotoAugmentation((self.image_size, self.image_size), RESAMPLE, ours.smallest_area)
        generator = np.random.default_rng()

        def transform(batch: dict[str, list]) -> dict[str, list]:
            batch["pixel_values"] = [normalized(part(image.convert("RGB"), generator)) for image in batch.pop("image")]
            return batch

        def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            labels = torch.tensor([example["labels"] for example in examples])
            return {"pixel_values": torch.stack([example["pixel_values"] for example in examples]), "labels": labels}

        names = (
            "output_dir", "max_steps", "per_device_train_batch_size", "dataloader_num_workers", "learning_rate", "bf16",
            "weight_decay", "lr_scheduler_type", "warmup_steps", "use_cpu", "remove_unused_columns", "disable_tqdm",
            "eval_strategy", "save_strategy", "logging_strategy", "report_to",
        )  # fmt: skip
        arguments = TrainingArguments(**{name: getattr(ours, name) for name in names})
        photos = self._stock_photos.with_transform(transform)
        return Trainer(copy.deepcopy(model), arguments, data_collator=collate, train_dataset=photos)

    @cached_property
    def data(self) -> ImageData:
        """The photos in a folder of two classes, read as by scripts/finetune.py."""
        for number, file in enumerate(self.files):
            name = Path(self.folder, "photos", _LABELS[number % 2], f"{number:05}{file.suffix}")
            name.parent.mkdir(parents=True, exist_ok=True)
            name.symlink_to(file.resolve())
        _, data_arguments, arguments, problems = parse_arguments(self._argv)
        return read_data(data_arguments, arguments.seed, problems)

    @cached_property
    def _stock_photos(self) -> datasets.Dataset:
        """The training photos as `load_dataset("imagefolder")` has them."""
        photos = self.data.train.images.add_column("labels", list(self.data.train.labels))
        return photos.cast_column("image", datasets.Image())

    @cached_property
    def _models(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        ours = plain_model(self.variant, self.image_size, num_labels=len(_LABELS))
        with tempfile.TemporaryDirectory() as folder:
            theirs, missing = build_peers(ours, folder, [TRANSFORMERS.name])
        if missing:
            raise RuntimeError(missing[TRANSFORMERS.name])
        return ours, theirs[TRANSFORMERS.name]

    @property
    def _argv(self) -> list[str]:
        flags = {
            "train_dir": Path(self.folder, "photos"), "output_dir": Path(self.folder, "run"), "variant": self.variant,
            "max_steps": self.steps, "per_device_train_batch_size": self.batch_size,
            "dataloader_num_workers": self.num_workers, "eval_strategy": "no", "save_strategy": "no",
            "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "verify_images": False,
            "allow_overlap": True,
        }  # fmt: skip
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def normalized(image: Image.Image) -> torch.Tensor:
    """torchvision's ToTensor and Normalize(0.5, 0.5): (3, H, W), float32."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5)
