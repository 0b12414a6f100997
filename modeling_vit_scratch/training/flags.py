# SPDX-License-Identifier: Apache-2.0
"""
The flags of training, and their defaults.

A default that depends on the command is decided here, by tables. A later one of these replaces an earlier one: from
scratch, the data set, pretraining and its objective, a saved model, a recipe. The command line overrides them all.
"""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import Problems
from ..common.flags import (
    PHOTO_SMALLEST_AREA,
    BrokenImageFlags,
    FastDecodeFlag,
    HubFlags,
    ReadingFlags,
    SeedFlag,
    first_look,
    flag,
)
from ..recipes.table import Recipe, find_recipe, fit_batch_size


FROM_SCRATCH: dict[str, Any] = {"variant": "S/16", "learning_rate": 1e-3}
# Built-in data sets. The accuracy is that of the last epoch, so that nothing is chosen on the held-out images.
DATA_SETS: dict[str, dict[str, Any]] = {
    # So small that worker processes would cost time.
    "digits": {
        "variant": "Mi/4", "image_size": [8], "num_train_epochs": 40.0, "dataloader_num_workers": 0,
        "load_best_model_at_end": False,
    },
    # A defect is a small part of a cell: most of the cell must stay in view.
    "elpv": {"variant": "Mi/8", "smallest_area": 0.7, "num_train_epochs": 40.0, "load_best_model_at_end": False},
}  # fmt: skip
PRETRAINING: dict[str, Any] = {"train_val_split": 0.05, "load_best_model_at_end": False}
# Random crops and Adam's second decay as published. Without labels there is no accuracy.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "mpp": {"metric_for_best_model": "loss"},
    "simmim": {"metric_for_best_model": "loss", "smallest_area": 0.67},
    "mae": {"metric_for_best_model": "loss", "smallest_area": 0.2, "adam_beta2": 0.95},
}
# Four patches of a digit say nothing about each other; sixteen do.
DIGITS_WITHOUT_LABELS: dict[str, Any] = {"variant": "Mi/2"}
# A saved model or a config.json has an architecture.
SAVED_ARCHITECTURE: dict[str, Any] = {"variant": None, "image_size": None, "patch_size": None}
FINE_TUNING: dict[str, Any] = {"learning_rate": 1e-4}


def defaults_for(source: str, given: argparse.Namespace, objective: str | None = None) -> dict[str, Any]:
    """
    The defaults that a command changes, without its recipe: for a built-in data set (else ""), the flags `given`, and
    an objective of pretraining (None for fine-tuning).
    """
    chosen = {**FROM_SCRATCH, **DATA_SETS.get(source, {})}
    if objective is not None:
        chosen |= {**PRETRAINING, **OBJECTIVE_DEFAULTS.get(objective, {})}
        if source == "digits" and objective != "supervised":
            chosen |= DIGITS_WITHOUT_LABELS
    if given.model_name_or_path or given.config_name:
        chosen |= SAVED_ARCHITECTURE
        if given.model_name_or_path and objective is None:
            chosen |= FINE_TUNING
    elif given.variant and given.variant != chosen["variant"]:
        chosen |= {"image_size": None, "patch_size": None}  # these go with the default variant
    return chosen


def recipe_defaults(
    argv: list[str], per_device: int, is_saved_architecture: bool
) -> tuple[Recipe | None, dict[str, Any], str | None]:
    """
    The recipe that the command line names; its fields, adapted to the batch size that this machine can make; and a
    message for the user. Without a recipe None, {} and None. Raises ValueError if there is no such recipe.

    Args:
        argv: the command line.
        per_device: the default batch size of a device.
        is_saved_architecture: whether a saved model or configuration replaces the recipe's variant.
    """
    given = first_look(argv, "recipe", "per_device_train_batch_size", "gradient_accumulation_steps")
    if given.recipe is None:
        return None, {}, None
    recipe = find_recipe(given.recipe)
    fields = {"image_size": None, "patch_size": None, **recipe.fields}
    if "variant" in fields and is_saved_architecture:
        for name in ("variant", "config_overrides"):
            fields.pop(name, None)
    elif "variant" not in fields:
        fields.pop("patch_size")
    per_device = _count(given.per_device_train_batch_size) or per_device
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, changed = fit_batch_size(recipe, per_device, processes, _count(given.gradient_accumulation_steps))
    batch = f"{per_device * processes * accumulation} = {per_device} images x {processes} processes x {accumulation}"
    scaled = ", ".join(f"{name} {value:g}" for name, value in changed.items())
    comparison = f"; the recipe's is {recipe.batch_size}, so: {scaled}" if changed else ", as in the recipe"
    message = f"Recipe {recipe.describe()}\n    batch: {batch} accumulated{comparison}"
    return recipe, {**fields, "gradient_accumulation_steps": accumulation, **changed}, message


def _count(text: str | None) -> int | None:
    """A positive number, or None: the parser reports other values."""
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else None


# The variants of `ViTScratchConfig` but for the tests' own; importing them from there would import torch.
VARIANT_NAMES = (
    "Ti/16", "S/16", "S/32", "B/8", "B/16", "B/32", "L/16", "L/32", "H/14", "Mi/2", "Mi/4", "Mi/8", "Mi/16",
    "R+Ti/16", "R26+S/32", "R26+B/32", "R50+B/16", "R50+L/32",
)  # fmt: skip
LOSSES = ("softmax", "sigmoid", "bce")
PROBES = ("knn", "fewshot")
# The targets of masked patch prediction, in words.
MPP_TARGETS = {"mean_color": "mean colours", "downsized": "colours at 4 x 4 pixels", "full_patch": "pixels"}
_WHEN = ("no", "steps", "epoch")
# A description, and the fraction of patches to hide.
OBJECTIVES: dict[str, tuple[str, float | None]] = {
    "supervised": ("labels, with the paper's tanh layer (3.1)", None),
    "mpp": ("masked patch prediction (the paper's B.1.2)", 0.5),
    "simmim": ("the pixels of masked squares", 0.6),
    "mae": ("the pixels of masked patches, from the visible ones", 0.75),
}


@dataclass
class ModelArguments(HubFlags):
    """What the network starts from."""

    model_name_or_path: str | None = flag(
        None,
        "Start from this model: a folder, a file of weights or a Hub id of any ViT. Its classifier is kept if its "
        "labels are those of the data.",
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


@dataclass
class RecipeArguments:
    """Augmentation, loss, learning rates of layers and average of weights: what the Trainer has no flags for."""

    recipe: str | None = flag(
        None,
        "Settings of a published run, which other flags override. `--recipe list` shows all of them, `--recipe NAME "
        "--help` the settings of one.",
        metavar="NAME",
    )
    auto_augment: str | None = flag(
        None,
        "Augmentation policy: ra (RandAugment), ta_wide (TrivialAugment), 3a (3-Augment), rand-m9-mstd0.5-inc1 (as in "
        "timm) or randaug(2,10) (as in big_vision).",
        metavar="POLICY",
    )
    color_jitter: float = flag(0.0, "Strength of random brightness, contrast and saturation. Example: 0.3")
    random_erasing: float = flag(0.0, "Probability of erasing a random rectangle. Example: 0.25")
    aug_repeats: int = flag(
        1,
        "Repeated augmentation: each image appears N times in a row. The epoch keeps its length, so it covers 1/N of "
        "the images.",
    )
    mixup: float = flag(0.0, "Mixup alpha. With --cutmix, one of both per batch.", metavar="ALPHA")
    cutmix: float = flag(0.0, "CutMix alpha.", metavar="ALPHA")
    loss: str = flag(
        "softmax",
        "softmax: cross-entropy. sigmoid: binary cross-entropy, summed over classes, as in the paper. bce: its mean, "
        "as in DeiT III. With several labels per image always binary.",
        choices=LOSSES,
    )
    class_weights: list[str] | None = flag(
        None,
        "Weights of the classes in the loss: `balanced` (inverse frequency), or a number for each label.",
        metavar="W",
    )
    layer_decay: float = flag(1.0, "Learning rate of each layer relative to the next one. Example: 0.75")
    head_learning_rate_multiplier: float = flag(
        1.0, "Learning rate of the classifier relative to --learning_rate. Example: 10"
    )
    ema_decay: float | None = flag(
        None, "Decay of a moving average of the weights, which is then evaluated and saved. Example: 0.9999"
    )
    ema_warmup: bool = flag(True, "Begin with a lower decay, (1 + n) / (10 + n).")

    message: str | None = field(init=False, default=None)  # for the user, on the recipe

    def check(self, problems: Problems) -> None:
        """Adds what is wrong with the values, but for `auto_augment`, whose check needs numpy."""
        for name, what in (
            ("color_jitter", "strength of colour jitter"),
            ("random_erasing", "probability of random erasing"),
        ):
            value, limits = getattr(self, name), "must be above 0 and at most 1, or 0 for none"
            problems.require(0 <= value <= 1, f"--{name} {value:g}: the {what} {limits}.")
        problems.require(
            self.aug_repeats >= 1, f"--aug_repeats {self.aug_repeats} must be at least 1, for every image once."
        )
        for name in ("mixup", "cutmix"):
            problems.require(getattr(self, name) >= 0, f"--{name} {getattr(self, name):g} must not be negative.")
        decay, multiplier, average = self.layer_decay, self.head_learning_rate_multiplier, self.ema_decay
        problems.require(0 < decay <= 1, f"--layer_decay {decay:g} must be above 0 and at most 1.")
        problems.require(multiplier > 0, f"--head_learning_rate_multiplier {multiplier:g} must be above 0.")
        if average is not None:
            problems.require(0 < average < 1, f"--ema_decay {average:g} must lie between 0 and 1, e.g. 0.9999.")


@dataclass
class TrainingFlags(ReadingFlags, FastDecodeFlag, BrokenImageFlags, SeedFlag):
    """Flags of transformers' Trainer that people set, with defaults for image classification; and the trainer's own."""

    output_dir: str | None = flag(
        None, "Folder for the model. Default: outputs/ and the name of the data.", metavar="DIR"
    )
    num_train_epochs: float = flag(10.0, "Passes over the training images.")
    max_steps: int = flag(-1, "Train for N steps, not --num_train_epochs. Default: -1, off.")
    per_device_train_batch_size: int = flag(64, "Batch size per device.")
    gradient_accumulation_steps: int = flag(1, "Batches per optimizer step.")
    learning_rate: float = flag(
        FROM_SCRATCH["learning_rate"],
        f"Peak learning rate: {FROM_SCRATCH['learning_rate']:g} from scratch, {FINE_TUNING['learning_rate']:g} with "
        "--model_name_or_path.",
    )
    optim: str = flag(
        "adamw_torch_fused",
        "Optimizer: any of transformers', e.g. sgd; or lamb, for large batches as in DeiT III, which clips gradients "
        "to a norm of 1.",
        metavar="NAME",
    )
    lr_scheduler_type: str = flag("cosine", "Learning rate schedule.", metavar="NAME")
    warmup_steps: float = flag(0.1, "Warmup steps; below 1, a fraction of all steps.")
    weight_decay: float = flag(0.05, "Weight decay of dense layers and the patch projection; nothing else decays.")
    max_grad_norm: float = flag(1.0, "Clip gradients to this norm; 0: off.")
    label_smoothing_factor: float = flag(0.0, "Label smoothing.")
    eval_strategy: str = flag("epoch", "Evaluate: no, steps or epoch.", metavar="WHEN", choices=_WHEN)
    save_strategy: str = flag(
        "epoch", "Save a checkpoint: no, steps, epoch or best.", metavar="WHEN", choices=(*_WHEN, "best")
    )
    logging_strategy: str = flag("epoch", "When to report the loss: no, steps or epoch.", metavar="WHEN", choices=_WHEN)
    save_total_limit: int | None = flag(2, "Checkpoints to keep.")
    load_best_model_at_end: bool | None = flag(
        None, "End with the weights of the best epoch. Default: if checkpoints are saved whenever they are evaluated."
    )
    metric_for_best_model: str | None = flag(
        "accuracy",
        "What makes a checkpoint the best: accuracy, macro_f1, top5_accuracy or loss; with several labels per image "
        "mean_average_precision, micro_f1, macro_f1, samples_f1 or exact_match.",
        metavar="NAME",
    )
    resume_from_checkpoint: str | None = flag(
        None, "True: continue from the latest checkpoint in --output_dir. Or the path of a checkpoint.", metavar="PATH"
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

    license: str | None = flag(None, "License of the model. Default: that of the data. Example: apache-2.0")
    smallest_area: float = flag(
        PHOTO_SMALLEST_AREA,
        "Minimum area of the random crop, as a fraction of the image (torchvision's scale). 1 disables it.",
    )
    probe: list[str] | None = flag(
        None,
        "Test the features at every evaluation, without training on them: 20 nearest neighbours (knn), and least "
        "squares on 1, 5, 10 and 25 images per class (fewshot).",
        choices=PROBES,
        metavar="NAME",
    )
    probe_images: int = flag(2000, "Training and held-out images that --probe uses, at most.")
    probe_steps: int | None = flag(None, "Also run --probe every N steps.")
    images_on_device: bool = flag(
        False, "Keep all images in device memory at --image_size and augment them there. For many small images."
    )

    def check(self, problems: Problems) -> None:
        """Adds what is wrong with the values."""
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            problems.require(getattr(self, name) >= 1, f"--{name} {getattr(self, name)} must be at least 1.")
        epochs, rate, smoothing = self.num_train_epochs, self.learning_rate, self.label_smoothing_factor
        problems.require(epochs > 0 or self.max_steps > 0, f"--num_train_epochs {epochs:g} must be above 0.")
        problems.require(rate > 0, f"--learning_rate {rate:g} must be above 0, e.g. 1e-3.")
        problems.require(0 <= smoothing < 1, f"--label_smoothing_factor {smoothing:g} must be at least 0 and below 1.")
        area = self.smallest_area
        problems.require(0 < area <= 1, f"--smallest_area {area:g} must be above 0 and at most 1.")
        for name in ("max_broken_images", "weight_decay"):
            problems.require(getattr(self, name) >= 0, f"--{name} {getattr(self, name):g} must not be negative.")
        for name in ("probe_images", "probe_steps"):
            value = getattr(self, name)
            problems.require(value is None or value >= 1, f"--{name} {value} must be at least 1.")
        if self.probe_steps is not None and not self.probe:
            problems.add(f"--probe_steps {self.probe_steps} says when, not what. Add --probe knn fewshot.")
        if self.probe and self.probe_steps is None and self.eval_strategy == "no":
            problems.add("--probe never runs: add --probe_steps, or an --eval_strategy other than no.")
        hub_flags = ("hub_model_id", "hub_private_repo", "hub_revision")
        given = " ".join(f"--{name}" for name in hub_flags if getattr(self, name) is not None)
        if given and not self.push_to_hub:
            problems.add(f"{given}: nothing is pushed without --push_to_hub. Add it, or leave this out.")


@dataclass
class PretrainingArguments:
    """What the network learns before it is fine-tuned."""

    objective: str = flag(
        "supervised", "; ".join(f"{name}: {what}" for name, (what, _) in OBJECTIVES.items()) + ".", metavar="NAME"
    )
    mask_ratio: float | None = flag(
        None,
        "Fraction of patches to hide. Default: "
        + ", ".join(f"{ratio:g} for {name}" for name, (_, ratio) in OBJECTIVES.items() if ratio)
        + ".",
    )
    mask_patch_size: int = flag(32, "SimMIM: side of the masked squares in pixels, a multiple of the patch.")
    mpp_target: str = flag(
        "mean_color",
        "MPP: predict mean_color (3-bit, 512 classes), downsized (4 x 4 of them per patch) or full_patch (pixels).",
        metavar="NAME",
    )
    norm_pix_loss: bool = flag(True, "MAE: normalize the target pixels of each patch.")
    decoder_hidden_size: int | None = flag(None, "MAE: decoder width. Default: two thirds, at most 512.")
    decoder_num_hidden_layers: int | None = flag(None, "MAE: its layers. Default: two thirds, at most 8.")
    decoder_num_attention_heads: int | None = flag(None, "MAE: its heads. Default: one per 32 channels.")

    @property
    def is_supervised(self) -> bool:
        return self.objective == "supervised"

    def metadata(self) -> dict[str, Any]:
        """The flags that the objective reads, for the record."""
        own_flag = {"mpp": "mpp_target", "simmim": "mask_patch_size", "mae": "norm_pix_loss"}
        names = () if self.is_supervised else ("mask_ratio", own_flag[self.objective])
        return {"objective": self.objective} | {name: getattr(self, name) for name in names}

    def check(self, training: TrainingFlags, recipe: RecipeArguments, problems: Problems) -> None:
        """Adds what is wrong with the values, and sets the default of `mask_ratio`."""
        if self.objective not in OBJECTIVES:
            problems.add(f"--objective {self.objective} is none of {', '.join(OBJECTIVES)}.")
            return
        if self.mpp_target not in MPP_TARGETS:
            problems.add(f"--mpp_target {self.mpp_target} is none of {', '.join(MPP_TARGETS)}.")
        if self.is_supervised:
            if self.mask_ratio is not None:
                problems.add("--mask_ratio goes with an --objective that masks: mpp, simmim or mae. Leave it out.")
            return
        if self.mask_ratio is None:
            self.mask_ratio = OBJECTIVES[self.objective][1]
        ratio = self.mask_ratio
        problems.require(0 < ratio < 1, f"--mask_ratio {ratio:g} must lie between 0 and 1, e.g. 0.75.")
        objective = f"--objective {self.objective}"
        label_flags = {"mixup": recipe.mixup, "cutmix": recipe.cutmix}
        label_flags["label_smoothing_factor"] = training.label_smoothing_factor
        for name, value in label_flags.items():
            problems.require(not value, f"--{name} {value:g} needs labels, and {objective} has none. Leave it out.")
        if recipe.head_learning_rate_multiplier != 1.0:
            problems.add(f"--head_learning_rate_multiplier: {objective} has no classifier. Leave it out.")
