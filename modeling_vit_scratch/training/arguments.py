# SPDX-License-Identifier: Apache-2.0
"""The flags of training. Imports no torch."""

import ast
import re
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import Problems
from ..common.flags import PHOTO_SMALLEST_AREA, FastDecodeFlag, HubFlags, ReadingFlags, SeedFlag, flag
from ..common.records import license_problem
from ..recipes.table import FINE_TUNING, FROM_SCRATCH


# The variants of `ViTScratchConfig` but for the tests' own; importing them from there would import torch.
VARIANT_NAMES = (
    "Ti/16", "S/16", "S/32", "B/8", "B/16", "B/32", "L/16", "L/32", "H/14", "Mi/2", "Mi/4", "Mi/8", "Mi/16",
    "R+Ti/16", "R26+S/32", "R26+B/32", "R50+B/16", "R50+L/32",
)  # fmt: skip
LAMB = "lamb"  # the value of --optim that is this library's own
LOSSES = ("softmax", "sigmoid", "bce")
_WHEN = ("no", "steps", "epoch")


@dataclass
class ModelArguments(HubFlags):
    """What the network starts from."""

    model_name_or_path: str | None = flag(
        None,
        "Start from this model: a folder, a file of weights or a Hub id of any ViT. Its classifier keeps the rows of "
        "labels that the data have, too.",
        metavar="MODEL",
    )
    variant: str | None = flag(
        None,
        f"Train from scratch, by size and patch: {', '.join(VARIANT_NAMES)}. Default: {FROM_SCRATCH['variant']}, or "
        "one that suits a built-in data set.",
        metavar="NAME",
    )
    config_name: str | None = flag(
        None, "Train from scratch with the architecture of this config.json: a folder or a Hub id.", metavar="CONFIG"
    )
    image_processor_name: str | None = flag(
        None, "Folder or Hub id of another image processor. Default: the model's.", metavar="NAME"
    )
    image_size: list[int] | None = flag(
        None, "Input size in pixels: one number, or height and width. Default: that of the variant or model."
    )
    patch_size: list[int] | None = flag(None, "Patch size in pixels, in the same way.")
    config_overrides: str | None = flag(
        None, "Other fields of the configuration. Example: drop_path_rate=0.1,pooling=mean", metavar="FIELDS"
    )
    trust_remote_code: bool = flag(False, "Run code that comes with --image_processor_name. The model needs none.")

    def config_fields(self) -> dict[str, Any]:
        """The fields of the configuration that the flags set. Raises ValueError for wrong --config_overrides."""
        from ..configuration_vit_scratch import ViTScratchConfig  # here: it imports torch

        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        fields = {name: size[0] if len(size) == 1 else size for name, size in sizes.items() if size is not None}
        for part in filter(None, map(str.strip, re.split(r",(?![^\[]*\])", self.config_overrides or ""))):
            name, equals, value = (word.strip() for word in part.partition("="))
            if not equals or name not in ViTScratchConfig.__annotations__:
                raise ValueError(f"--config_overrides {part}: give NAME=VALUE with a field of the configuration.")
            if name in ("image_size", "patch_size", "num_channels"):
                reason = "--image_size and --patch_size are flags, the data say how many channels there are."
                raise ValueError(f"--config_overrides {name}: leave it out. {reason}")
            try:
                fields[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                fields[name] = value
        return fields


@dataclass
class RecipeArguments:
    """Augmentation, loss, teacher, learning rates of layers and average of weights: the Trainer has no flags for it."""

    recipe: str | None = flag(
        None,
        "Settings of a published run, which other flags override. `--recipe list` shows all of them, `--recipe NAME "
        "--help` the settings of one.",
        metavar="NAME",
    )
    auto_augment: str | None = flag(
        None,
        "ra (RandAugment), ta_wide (TrivialAugment), 3a (3-Augment), rand-m9-mstd0.5-inc1 (timm) or randaug(2,10) "
        "(big_vision).",
        metavar="POLICY",
    )
    color_jitter: float = flag(
        0.0, "Strength of random brightness, contrast and saturation. Example: 0.3", at_least=0, at_most=1
    )
    random_erasing: float = flag(0.0, "Probability of erasing a random rectangle. Example: 0.25", at_least=0, at_most=1)
    aug_repeats: int = flag(
        1,
        "Repeated augmentation: each image appears N times in a row. The epoch keeps its length, so it covers 1/N of "
        "the images.",
        at_least=1,
    )
    mixup: float = flag(0.0, "Mixup alpha. With --cutmix, one of both per batch.", metavar="ALPHA", at_least=0)
    cutmix: float = flag(0.0, "CutMix alpha.", metavar="ALPHA", at_least=0)
    loss: str = flag(
        "softmax",
        "softmax: cross-entropy. sigmoid: binary cross-entropy, summed over classes (the paper). bce: its mean (DeiT "
        "III). With several labels per image always binary.",
        choices=LOSSES,
    )
    class_weights: list[str] | None = flag(
        None, "Weights of classes in the loss: `balanced` (inverse frequency), or a number for each label.", metavar="W"
    )
    balanced_sampling: bool = flag(False, "Every class equally often in an epoch of the same length.")
    layer_decay: float = flag(
        1.0, "Learning rate of each layer relative to the next one. Example: 0.75", above=0, at_most=1
    )
    head_learning_rate_multiplier: float = flag(
        1.0, "Learning rate of the classifier relative to --learning_rate. Example: 10", above=0
    )
    ema_decay: float | None = flag(
        None, "Decay of a moving average of the weights, then evaluated and saved. Example: 0.9999", above=0, below=1
    )
    ema_warmup: bool = flag(True, "Begin with a lower decay, (1 + n) / (10 + n).")
    progressive_image_size: int | None = flag(
        None,
        "Train on images of N pixels a side at first, which grow to their full size in two thirds of the training. "
        "Example: 96",
        metavar="N",
        at_least=1,
    )
    patch_drop_rate: float = flag(
        0.0, "Leave out this share of each training image's patches. Example: 0.5", at_least=0, below=1
    )
    freeze: str | None = flag(
        None,
        "Keep the weights of the encoder, the embeddings, or these and the first N layers. With `encoder`, features "
        "are computed once and the head trains on them in seconds, unless a flag augments images.",
        metavar="encoder|embeddings|N",
    )
    lora_rank: int | None = flag(
        None,
        "Train low-rank adapters of this rank (LoRA) and the head; merged into plain weights at the end. Example: 8",
        at_least=1,
    )
    teacher_model: str | None = flag(
        None,
        "Learn from this classifier, too: a folder or a Hub id. See `--help all`: --distillation_type.",
        metavar="MODEL",
    )
    distillation_type: str = flag(
        "soft",
        "What --teacher_model teaches: soft, its probabilities; hard, its classes; token, its classes to a "
        "distillation token (DeiT); features, what a linear layer makes of the student's.",
        choices=("soft", "hard", "token", "features"),
    )
    distillation_alpha: float = flag(
        0.5, "Weight of the teacher in the loss; the labels have the rest.", at_least=0, at_most=1
    )
    distillation_tau: float = flag(1.0, "Temperature of soft distillation.", above=0)

    message: str | None = field(init=False, default=None)  # for the user, on the recipe
    # What `recipes.table` plans, "" for nothing; and the flags that it may set.
    plan: str = field(init=False, default="")
    open_flags: frozenset[str] = field(init=False, default=frozenset())

    @property
    def distills(self) -> bool:
        return self.teacher_model is not None and self.distillation_alpha > 0

    @property
    def distillation_flags(self) -> str:
        """Those that have another value than their default, beside --teacher_model."""
        names = ("distillation_type", "distillation_alpha", "distillation_tau")
        return ", ".join(f"--{name}" for name in names if getattr(self, name) != getattr(RecipeArguments, name))

    def check_distillation(self, problems: Problems) -> None:
        """Adds what does not go together."""
        kind, how = self.distillation_type, f"--distillation_type {self.distillation_type}"
        if self.teacher_model is None:
            if self.distillation_flags:
                problems.add(f"{self.distillation_flags}: there is no teacher. Add --teacher_model, or leave this out.")
            return
        if self.distillation_tau != 1.0 and kind != "soft":
            problems.add(f"--distillation_tau is for --distillation_type soft, not for {kind}.")
        if self.loss != "softmax" and kind != "features":
            problems.add(f"{how} compares probabilities that sum to 1: it needs --loss softmax, not {self.loss}.")
        if (self.freeze and kind == "token") or (self.freeze == "encoder" and kind == "features"):
            problems.add(f"{how} trains what --freeze {self.freeze} keeps as it is. Leave one of them out.")
        if self.lora_rank and kind == "token":
            problems.add(f"{how} trains a new token, and --lora_rank adapters alone. Leave one of them out.")


@dataclass
class TrainingFlags(ReadingFlags, FastDecodeFlag, SeedFlag):
    """Flags of transformers' Trainer that people set, with defaults for image classification; and the trainer's own."""

    output_dir: str | None = flag(
        None, "Folder for the model. Default: outputs/ and the name of the data.", metavar="DIR"
    )
    num_train_epochs: float = flag(10.0, "Passes over the training images.")
    max_steps: int = flag(-1, "Train for N steps, not --num_train_epochs. Default: -1, off.")
    per_device_train_batch_size: int = flag(64, "Batch size per device.", at_least=1)
    gradient_accumulation_steps: int = flag(1, "Batches per optimizer step.", at_least=1)
    learning_rate: float = flag(
        FROM_SCRATCH["learning_rate"],
        f"Peak learning rate: {FROM_SCRATCH['learning_rate']:g} from scratch, {FINE_TUNING['learning_rate']:g} with "
        "--model_name_or_path.",
        above=0,
    )
    optim: str = flag(
        "adamw_torch_fused", "Any of transformers', e.g. sgd; or lamb, which clips gradients to norm 1.", metavar="NAME"
    )
    lr_scheduler_type: str = flag("cosine", "Learning rate schedule.", metavar="NAME")
    warmup_steps: float = flag(0.1, "Warmup steps; below 1, a fraction of all steps.")
    weight_decay: float = flag(
        0.05, "Weight decay of dense layers and the patch projection; nothing else decays.", at_least=0
    )
    max_grad_norm: float = flag(1.0, "Clip gradients to norm X; 0: off.")
    label_smoothing_factor: float = flag(0.0, "Label smoothing.", at_least=0, below=1)
    eval_strategy: str = flag("epoch", "Evaluate: no, steps or epoch.", metavar="WHEN", choices=_WHEN)
    save_strategy: str = flag(
        "epoch", "Save a checkpoint: no, steps, epoch or best.", metavar="WHEN", choices=(*_WHEN, "best")
    )
    logging_strategy: str = flag("epoch", "When to report the loss: no, steps or epoch.", metavar="WHEN", choices=_WHEN)
    save_total_limit: int | None = flag(2, "Checkpoints to keep.")
    load_best_model_at_end: bool | None = flag(
        None, "End with the best epoch. Default: if checkpoints are saved whenever they are evaluated."
    )
    metric_for_best_model: str | None = flag(
        "accuracy",
        "What makes a checkpoint the best: accuracy, macro_f1, loss or any that the run reports.",
        metavar="NAME",
    )
    early_stopping_patience: int | None = flag(
        None, "End after N evaluations without a better --metric_for_best_model, with the best checkpoint.", at_least=1
    )
    max_hours: float | None = flag(None, "End after X hours of training: evaluated, saved, and to be resumed.", above=0)
    resume_from_checkpoint: str | None = flag(
        None,
        "True: continue from the latest checkpoint in --output_dir. auto: if there is one. Or the path of one.",
        metavar="PATH",
    )
    bf16: bool | None = flag(None, "Compute in bfloat16. Default: if the hardware supports it and --fp16 is off.")
    dataloader_persistent_workers: bool | None = flag(
        None, "Keep worker processes between epochs. Default: if there are any."
    )
    push_to_hub: bool = flag(False, "Publish the model on the Hub. Needs a token: HF_TOKEN or `hf auth login`.")
    hub_model_id: str | None = flag(
        None, "Repository on the Hub: NAME or USER/NAME. Default: the name of --output_dir.", metavar="NAME"
    )
    hub_strategy: str = flag(
        "every_save",
        "end: push the finished model. every_save: also each checkpoint's weights. checkpoint: also last-checkpoint/, "
        "to resume elsewhere. all_checkpoints: also all of them.",
        metavar="WHAT",
    )
    hub_private_repo: bool | None = flag(None, "Make a new repository private. Default: your account's setting.")
    hub_always_push: bool = flag(False, "Push a checkpoint even if the previous upload has not finished.")
    hub_revision: str | None = flag(None, "Branch to push to; created from main if missing.", metavar="BRANCH")

    license: str | None = flag(None, "Default: the weights' or the data's.")
    license_name: str | None = flag(None, "Name of a --license other. Example: imagenet-terms")
    license_link: str | None = flag(None, "Where a --license other can be read.", metavar="URL")
    smallest_area: float = flag(
        PHOTO_SMALLEST_AREA, "Minimum area of the random crop (torchvision's scale). 1 disables it.", above=0, at_most=1
    )
    probe: list[str] | None = flag(
        None,
        "Test the features at every evaluation: 20 nearest neighbours (knn), and least squares on 1, 5, 10 and 25 "
        "images per class (fewshot).",
        choices=("knn", "fewshot"),
        metavar="NAME",
    )
    probe_images: int = flag(2000, "Training and held-out images that --probe uses, at most.", at_least=1)
    probe_steps: int | None = flag(None, "Also run --probe every N steps.", at_least=1)
    images_on_device: bool = flag(
        False, "Keep all images in device memory at --image_size and augment them there. For many small images."
    )

    @property
    def terms(self) -> tuple[str | None, ...]:
        """The licence, its name and its link."""
        return self.license, self.license_name, self.license_link

    def check(self, recipe: RecipeArguments, problems: Problems) -> None:
        """Adds what is wrong with the values, but for limits of single flags."""
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            problems.add(f"--num_train_epochs {self.num_train_epochs:g} must be above 0.")
        if self.early_stopping_patience and "no" in (self.eval_strategy, self.save_strategy):
            problems.add("--early_stopping_patience needs evaluations and checkpoints: no strategy may be `no`.")
        if self.probe_steps is not None and not self.probe:
            problems.add(f"--probe_steps {self.probe_steps} says when, not what. Add --probe knn fewshot.")
        if self.probe and self.probe_steps is None and self.eval_strategy == "no":
            problems.add("--probe never runs: add --probe_steps, or an --eval_strategy other than no.")
        hub_flags = ("hub_model_id", "hub_private_repo", "hub_revision")
        given = " ".join(f"--{name}" for name in hub_flags if getattr(self, name) is not None)
        if given and not self.push_to_hub:
            problems.add(f"{given}: nothing is pushed without --push_to_hub. Add it, or leave this out.")
        if self.license is not None and (reason := license_problem(*self.terms)):
            problems.add(f"--license {self.license}: {reason}")
        if recipe.loss == "bce" and self.label_smoothing_factor:
            problems.add(
                "--loss bce makes a whole class of every probability above 0, and --label_smoothing_factor would put "
                "all classes there. Keep one of them."
            )
        recipe.check_distillation(problems)
        if recipe.freeze is not None:
            is_layers = recipe.freeze.isdecimal() and int(recipe.freeze) > 0
            if recipe.freeze not in ("encoder", "embeddings") and not is_layers:
                problems.add(f"--freeze {recipe.freeze}: give encoder, embeddings, or a number of layers from 1 on.")
            if recipe.lora_rank is not None:
                problems.add("--freeze and --lora_rank each say what is trained. Keep one of them.")
        if recipe.balanced_sampling and recipe.aug_repeats > 1:
            problems.add("--balanced_sampling and --aug_repeats each say how often an image comes. Keep one of them.")
        given = {"aug_repeats": recipe.aug_repeats > 1, "balanced_sampling": recipe.balanced_sampling}
        for name, is_given in {**given, "max_broken_images": self.max_broken_images}.items():
            if self.images_on_device and is_given:
                problems.add(f"--{name} does not go with --images_on_device. Keep one of them.")
