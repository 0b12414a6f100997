# SPDX-License-Identifier: Apache-2.0
"""The settings that decide the numbers of a run: a checkpoint has them, and a resumed run compares its own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ..common.errors import InputError
from ..configuration_vit_scratch import ViTScratchConfig
from ..data.dataset import ImageClassificationDataset
from .arguments import ImageTrainingArguments


# The arguments of the Trainer that decide the weights a run ends with, on the same hardware.
DECIDING_ARGUMENTS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
    "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "bf16",
    "fp16", "torch_compile", "dataloader_drop_last", "smallest_area", "images_on_device", "max_broken_images",
)  # fmt: skip
# Fields of a configuration that a checkpoint and the model that resumes from it need not share.
_NOT_COMPARED = {"transformers_version", "dtype", "auto_map", "architectures", "_name_or_path", "use_cache"}


def run_settings(
    arguments: ImageTrainingArguments, train_set: ImageClassificationDataset, objective: str | None
) -> dict[str, Any]:
    """
    The settings of a run, by flag or in words.

    Args:
        arguments: of the run.
        train_set: that it learns from.
        objective: what it learns, if that is not to classify.
    """
    values, recipe = arguments.to_dict(), dataclasses.asdict(arguments.recipe_arguments)
    try:
        num_images = len(train_set)
    except TypeError:  # a stream
        num_images = None
    return {
        **{f"--{name}": values[name] for name in DECIDING_ARGUMENTS},
        **{f"--{name}": value for name, value in recipe.items() if name not in ("recipe", "told")},
        "processes": arguments.world_size,
        "training images": num_images,
        "augmentation": train_set.augmentation.description,
        "device": arguments.device.type,
        "torch": torch.__version__,
        **({} if objective is None else {"objective": objective}),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each setting in which a resumed run differs from the run of its checkpoint."""
    before, now = (json.loads(json.dumps(settings)) for settings in (before, now))  # a tuple comes back as a list
    if before.pop("--lamb", False):  # as --optim lamb was once given
        before["--optim"] = "lamb"
    return [
        f"{name}: {_shown(now.get(name))} now, {_shown(before.get(name))} in the checkpoint's run"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def check_same_model(config: ViTScratchConfig, checkpoint: str) -> None:
    """
    Raises InputError unless a checkpoint is of a model with this configuration: the Trainer loads whatever has the
    right shape, also weights that were trained for other labels.
    """
    ours = json.loads(config.to_json_string())
    theirs = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    theirs = {"temperature": 1.0, "calibrated": True, **theirs}  # checkpoints of before there was one
    different = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    different = [name for name in different if name not in _NOT_COMPARED]
    if different:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is of another model: {', '.join(different)} differ. Give the flags "
            "and the data of the first run, or start a new one in another --output_dir."
        )
