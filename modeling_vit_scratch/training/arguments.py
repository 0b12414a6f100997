# SPDX-License-Identifier: Apache-2.0
"""The flags that scripts share: one field, one default, one help text."""

import ast
import os
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..augmentation.photo import PHOTO_SMALLEST_AREA
from ..configuration_vit_scratch import VARIANTS, ViTScratchConfig
from .recipe_arguments import RecipeArguments


FROM_SCRATCH_VARIANT = "S/16"
PROBES = ("knn", "fewshot")
LAMB = "lamb"  # the value of --optim that is this library's own
FROM_SCRATCH_LEARNING_RATE = 1e-3
FROM_CHECKPOINT_LEARNING_RATE = 1e-4

# Flags of TrainingArguments that would do harm or nothing here: name -> the value that means "not given", and why.
REFUSED_FLAGS: dict[str, tuple[Any, str]] = {
    "hub_token": (None, "whoever sees the command line sees it. Set HF_TOKEN or run `hf auth login`."),
    "do_train": (True, "this script always trains."),
    "do_predict": (False, "this script has no test split. Use scripts/predict.py on the finished model."),
    "enable_jit_checkpoint": (
        False,
        "its signal handler stays behind after training. Ctrl-C and SIGTERM save a checkpoint without it.",
    ),
    "prediction_loss_only": (False, "the best epoch is chosen by accuracy, which needs the predictions."),
}


@dataclass
class ModelArguments:
    """What the network starts from."""

    _argument_group_name = "model: what the network starts from"

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this model: a folder, a file or a Hub id of any ViT. Its classifier is kept if its "
            "labels are those of the data, and replaced by a fresh one if not. Example: outputs/pretrained"
        },
    )
    variant: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch: size/patch. One of "
            + ", ".join(VARIANTS)
            + f". Default: {FROM_SCRATCH_VARIANT}, or what suits a built-in data set. Example: Ti/16"
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch with the architecture of this config.json (a folder or a Hub id) in place of a "
            "--variant. Example: outputs/digits"
        },
    )
    image_processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Take the image processor from this folder or Hub id. Default: that of --model_name_or_path, or "
            "one that fits the architecture."
        },
    )
    image_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width of the images in pixels, or one number for both; the patch must divide it. "
            "Default: that of the variant or model. Example: 160, or: 96 128"
        },
    )
    patch_size: list[int] | None = field(
        default=None,
        metadata={
            "help": "Height and width of a patch in pixels, or one number for both. Default: that of the variant or "
            "model. Example: 14"
        },
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": "Other fields of the architecture. Example: drop_path_rate=0.1,hidden_dropout_prob=0.1,pooling=mean"
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Where to keep what is downloaded. Default: the cache of Hugging Face."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of --model_name_or_path on the Hub."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run code that comes with --image_processor_name. The model itself never needs this."},
    )


@dataclass
class ImageTrainingArguments(TrainingArguments):
    """The arguments of transformers' Trainer, with the defaults of image classification."""

    _argument_group_name = "training: every argument of transformers' TrainingArguments, and at the end our own"

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where the model goes. Default: outputs/ and the name of the data. Example: outputs/pets"},
    )
    num_train_epochs: float = field(default=10.0, metadata={"help": "How often to go through the training images."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Images in a training batch, per device."})
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images in an evaluation batch, per device."}
    )
    learning_rate: float = field(
        default=FROM_SCRATCH_LEARNING_RATE,
        metadata={
            "help": f"The highest learning rate. {FROM_SCRATCH_LEARNING_RATE:g} from scratch, "
            f"{FROM_CHECKPOINT_LEARNING_RATE:g} with --model_name_or_path."
        },
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls. Example: linear"})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps over which the learning rate rises; below 1, this part of all steps. Example: 500"},
    )
    optim: str = field(
        default=TrainingArguments.default_optim,
        metadata={
            "help": "The optimizer. lamb, for large batches as in DeiT III: Adam's step, for each weight with decay as "
            "long as the weight, times the learning rate; it takes --adam_beta1, --adam_beta2 and --adam_epsilon, and "
            "clips gradients to a norm of 1 by itself. All others are transformers'.",
            "choices": [*(name.value for name in OptimizerNames), LAMB],
        },
    )
    weight_decay: float = field(
        default=0.05,
        metadata={"help": "AdamW's decay of the weights of dense layers and patches; nothing else decays."},
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint: no, steps, epoch or best."}
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to report the loss: no, steps or epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep: the best and the latest."})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "Finish with the checkpoint of the best epoch. Default: if checkpoints are saved when they are "
            "evaluated.",
            "nargs": "?",
            "const": True,
        },
    )
    metric_for_best_model: str | None = field(
        default="accuracy",
        metadata={
            "help": "What makes a checkpoint the best: accuracy, macro_f1, top5_accuracy or loss; of several labels an "
            "image mean_average_precision, which is the default there, micro_f1, macro_f1, samples_f1 or exact_match."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16. Default: if the hardware is made for it and --fp16 is off.",
            "nargs": "?",
            "const": True,
        },
    )
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that read images, per device. Default: up to 8; where the CPU trains, 2. The number "
            "changes nothing but the speed."
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={
            "help": "Keep these processes from one epoch to the next. Default: if there are any.",
            "nargs": "?",
            "const": True,
        },
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has nothing to remove here."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Report losses that are no numbers as 0. Here, such a loss stops the run."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for unused parameters with several processes: there are none."}
    )
    do_train: bool = field(default=True, metadata={"help": "Always."})
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Publish the model on the Hub: during training as --hub_strategy says, and in the end with card "
            "and record. Needs a token with the role write: HF_TOKEN or `hf auth login`. A push that fails during "
            "training does not stop it."
        },
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": "The repository to publish in, made if it is not there: NAME or USER/NAME. Default: the name of "
            "--output_dir. Example: me/vit-pets"
        },
    )
    hub_strategy: str = field(
        default="every_save",
        metadata={
            "help": "What to push and when. end: the model, when training has ended. every_save: also at every "
            "checkpoint. checkpoint: also the latest checkpoint, as last-checkpoint/, to resume from on another "
            "machine. all_checkpoints: also all of them."
        },
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata={
            "help": "Make a new repository that only you can read. Default: as you or the organization have set it.",
            "nargs": "?",
            "const": True,
        },
    )
    hub_always_push: bool = field(
        default=False, metadata={"help": "Push every checkpoint, also if the upload of the one before is under way."}
    )
    hub_revision: str | None = field(
        default=None, metadata={"help": "Push to this branch, made from main if there is none of that name."}
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "The licence of the model, for its card, as the Hub names it. Default: that of the data, if they "
            "have one. Example: apache-2.0"
        },
    )
    recipe_arguments: RecipeArguments = field(init=False, default_factory=RecipeArguments)
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Go on where a run stopped: True for the latest checkpoint in --output_dir, or a checkpoint."
        },
    )

    smallest_area: float = field(
        default=PHOTO_SMALLEST_AREA,
        metadata={
            "help": "Photos are trained on in random parts; a part has at least this share of the area, 1 for as "
            "much as has the shape of the input. Example: 0.08, for a million images"
        },
    )
    probe: list[str] | None = field(
        default=None,
        metadata={
            "help": "At every evaluation, tell what the features are worth without training on them: the held-out "
            "accuracy of 20 nearest neighbours (knn), and of least squares on 1, 5, 10 and 25 images of every class "
            "(fewshot). Costs a pass over --probe_images twice. Example: knn fewshot",
            "choices": PROBES,
        },
    )
    probe_images: int = field(
        default=2000,
        metadata={"help": "Training images that --probe learns from, and held-out images it is tested on, at most."},
    )
    probe_steps: int | None = field(
        default=None, metadata={"help": "Also --probe whenever so many steps are done. Example: 1000"}
    )
    fast_decode: bool = field(
        default=True,
        metadata={
            "help": "Decode JPEG photos for training at 1/2, 1/4 or 1/8 of their sides, where the random part still "
            "has as many pixels as the input, and resize all photos with torch's 8-bit kernels. Pixels then differ "
            "from those of full decoding and Pillow: for photos of 500 x 375 at 224, which are not reduced, by 0.03 of "
            "255 levels on average and 1 at most; for 12-megapixel photos at 224 by 0.5 and 5; for photos of 256 x 341 "
            "at 96 by 0.8 and 38. False: decode in full and resize with Pillow. Evaluation always does."
        },
    )
    images_on_device: bool = field(
        default=False,
        metadata={
            "help": "Decode all images once, resized to --image_size, keep their pixels in the memory of the device "
            "that trains (two bytes for each value), and augment them there, all at the beginning of an epoch. For "
            "small images that fit, e.g. 100,000 of 64 x 64 in 2.5 GB: reading and augmenting them one by one would "
            "take longer than learning from them. Photos keep no more detail than --image_size has."
        },
    )
    max_broken_images: int = field(
        default=0,
        metadata={
            "help": "Go on when training images can't be read, up to so many: each is named, and another takes its "
            "place. The first one more ends the run. Goes with --verify_images False. Example: 100"
        },
    )

    def __post_init__(self) -> None:
        # On a machine without accelerator this is what use_cpu means; the Trainer needs to hear it to start a process
        # group on the CPU, and not to pin memory.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.save_strategy == self.eval_strategy != "no"
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _has_native_bf16()
        if self.dataloader_num_workers is None:
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.dataloader_num_workers = 0 if cores < 2 else min(2 if self.use_cpu else 8, cores)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        is_lamb = self.optim == LAMB
        if is_lamb:  # transformers turns the name into one of its own optimizers, and has none of this name
            self.optim = OptimizerNames.ADAMW_TORCH
        super().__post_init__()
        if is_lamb:
            self.optim = LAMB

    @property
    def optimizer_name(self) -> str:
        """The value of --optim."""
        return OptimizerNames(self.optim).value if self.optim != LAMB else LAMB


def _has_native_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def pixels(size: list[int] | None) -> int | list[int] | None:
    """The value of --image_size or --patch_size as the configuration takes it."""
    return size[0] if size is not None and len(size) == 1 else size


def config_fields(text: str | None) -> dict[str, Any]:
    """
    The value of --config_overrides as fields of the configuration.

    Raises:
        ValueError: for anything but NAME=VALUE with fields that no other flag and not the data set.
    """
    fields: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", text or ""):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        if not equals or name not in ViTScratchConfig.__annotations__:
            raise ValueError(f"--config_overrides {part.strip()}: give NAME=VALUE with a field of the configuration.")
        if name in ("image_size", "patch_size", "num_channels"):
            raise ValueError(
                f"--config_overrides {name}: leave it out. --image_size and --patch_size are flags, the "
                "data say how many channels there are."
            )
        try:
            fields[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[name] = value
    return fields
