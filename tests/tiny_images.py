# SPDX-License-Identifier: Apache-2.0
"""Eight tiny images in every form that the readers know, and short runs on them. Shared by the tests of training."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_vit_scratch.common.errors import Problems
from modeling_vit_scratch.common.flags import DataArguments
from modeling_vit_scratch.data.held_out import read_earlier
from modeling_vit_scratch.data.splits import ImageData, read_data
from modeling_vit_scratch.pretraining.arguments import PRETRAIN
from modeling_vit_scratch.pretraining.build import build_pretraining
from modeling_vit_scratch.training.build import build_model, build_trainer
from modeling_vit_scratch.training.command_line import parse_arguments
from modeling_vit_scratch.training.trainer import ImageTrainer


ROOT = Path(__file__).parents[1]
# Not in the order of the alphabet's other end, and with names that are not Python identifiers.
BATCH = ("--per_device_train_batch_size", "4")  # without it, a run without flags follows the images
CLASSES = ("brown bear", "cat", "zebra")


def image(label: int, number: int, size: tuple[int, int] = (30, 20)) -> Image.Image:
    """A picture that no other (label, number) has; the label shows in its colour."""
    pixels = np.random.default_rng((label, number)).integers(0, 100, size=(size[1], size[0], 3), dtype=np.uint8)
    pixels[..., label % 3] += 150
    return Image.fromarray(pixels)


def class_folders(folder: Path, classes: tuple[str, ...] = CLASSES, each: int = 4) -> Path:
    """A folder for each class; the index of a class in CLASSES decides what its images look like."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            image(CLASSES.index(name), number).save(folder / name / f"{number}.png")
    return folder


def encoded(label: int, number: int) -> bytes:
    buffer = io.BytesIO()
    image(label, number).save(buffer, "PNG")
    return buffer.getvalue()


def rows(names: bool = True) -> list[dict[str, Any]]:
    """Eight rows of two classes, zebra first."""
    labels = [2, 1] * 4
    return [
        {"image": {"bytes": encoded(label, i), "path": f"{i}.png"}, "label": CLASSES[label] if names else label}
        for i, label in enumerate(labels)
    ]


def parquet(file: Path) -> Path:
    datasets.Dataset.from_list(rows()).to_parquet(file)
    return file


def table(file: Path, separator: str | None = ",") -> Path:
    """A .csv, or without separator a .jsonl, of paths that are relative to it."""
    (file.parent / "pictures").mkdir(exist_ok=True)
    lines = [] if separator is None else [f"file_name{separator}category"]
    for i, row in enumerate(rows()):
        (file.parent / "pictures" / f"{i}.png").write_bytes(row["image"]["bytes"])
        entry = {"file_name": f"pictures/{i}.png", "category": row["label"]}
        lines.append(json.dumps(entry) if separator is None else separator.join(entry.values()))
    file.write_text("\n".join(lines) + "\n")
    return file


def webdataset(file: Path) -> Path:
    with tarfile.open(file, "w") as archive:
        for i, row in enumerate(rows(names=False)):
            for name, content in ((f"{i}.png", row["image"]["bytes"]), (f"{i}.cls", str(row["label"]).encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return file


def read(
    cache_dir: Path | None = None,
    seed: int = 0,
    problems: Problems | None = None,
    start: Path | None = None,
    **flags: Any,
) -> ImageData:
    """The data of these flags; `start` is the model that the run starts from."""
    cache, earlier = None if cache_dir is None else str(cache_dir), None if start is None else read_earlier(str(start))
    return read_data(DataArguments(**flags), seed, problems or Problems(), cache_dir=cache, earlier=earlier)


def build(output_dir: Path, *flags: str) -> ImageTrainer:
    """What scripts/finetune.py builds for these flags: by default the tiny model on the images of `class_folders`."""
    argv = ["--output_dir", str(output_dir), "--disable_tqdm", "True", "--report_to", "none"]
    argv += [*BATCH, "--logging_steps", "1", *flags]
    if "--model_name_or_path" not in flags and "--variant" not in flags:
        argv += ["--variant", "test/4"]
    model_arguments, data_arguments, training_arguments, problems = parse_arguments(argv)
    start, checkpoint = model_arguments.model_name_or_path, training_arguments.resume_from_checkpoint
    earlier = read_earlier(start, checkpoint, data_arguments.train_val_split)
    data = read_data(data_arguments, training_arguments.seed, problems, earlier=earlier)
    model, processor, _ = build_model(
        model_arguments,
        data.label_names,
        data.source.num_channels,
        training_arguments.seed,
        is_multi_label=data.is_multi_label,
        is_regression=data.is_regression,
    )
    return build_trainer(model, processor, data, training_arguments)


def flags(pets: str, *more: str) -> list[str]:
    """A run on these images with nothing in it but steps."""
    return ["--train_dir", pets, "--train_val_split", "0.25", "--eval_strategy", "no", "--save_strategy", "no", *more]


def weights(trainer: ImageTrainer) -> dict[str, torch.Tensor]:
    """A copy of the model's weights."""
    return {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


def load_script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def build_pretrainer(output_dir: Path, *flags: str) -> ImageTrainer:
    """What scripts/pretrain.py builds for these flags: by default the tiny model on the images of `class_folders`."""
    argv = ["--output_dir", str(output_dir), "--disable_tqdm", "True", "--report_to", "none"]
    argv += ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--mask_patch_size", "8", *flags]
    if "--model_name_or_path" not in flags:
        argv += ["--variant", "test/4"]
    model_arguments, data_arguments, training_arguments, wishes, problems = parse_arguments(argv, PRETRAIN)
    data = read_data(data_arguments, training_arguments.seed, problems, needs_labels=wishes.is_supervised)
    return build_pretraining(model_arguments, wishes, data, training_arguments)[0]
