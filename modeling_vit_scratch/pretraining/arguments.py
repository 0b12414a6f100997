# SPDX-License-Identifier: Apache-2.0
"""The flags of pretraining beside those of training. Imports no torch."""

import argparse
import math
from dataclasses import dataclass
from typing import Any

from ..common.errors import Problems
from ..common.flags import PHOTO_SMALLEST_AREA, flag
from ..training.arguments import RecipeArguments, TrainingFlags
from ..training.command_line import Script


# The targets of masked patch prediction, in words.
MPP_TARGETS = {"mean_color": "mean colours", "downsized": "colours at 4 x 4 pixels", "full_patch": "pixels"}
# A description, and the fraction of patches to hide.
OBJECTIVES: dict[str, tuple[str, float | None]] = {
    "supervised": ("labels, with the paper's tanh layer (3.1)", None),
    "mpp": ("masked patch prediction (B.1.2)", 0.5),
    "simmim": ("the pixels of masked squares", 0.6),
    "mae": ("those of masked patches", 0.75),
    "distillation": ("features of --teacher_model", None),
    "dino": ("what its own average says of other crops", None),
}
_RATIOS = ", ".join(f"{ratio:g} for {name}" for name, (_, ratio) in OBJECTIVES.items() if ratio)
# Random crops, Adam's second decay, DINO's rate, decay and clipping as published. Without labels there is no accuracy.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "mpp": {"metric_for_best_model": "loss"},
    "distillation": {"metric_for_best_model": "loss"},
    "simmim": {"metric_for_best_model": "loss", "smallest_area": 0.67},
    "mae": {"metric_for_best_model": "loss", "smallest_area": 0.2, "adam_beta2": 0.95},
    "dino": {
        "metric_for_best_model": "loss", "smallest_area": PHOTO_SMALLEST_AREA, "learning_rate": 5e-4,
        "weight_decay": 0.04, "max_grad_norm": 3.0,
    },
}  # fmt: skip
# The flags that the objectives read, for the record.
_OWN_FLAGS = {
    "supervised": (), "distillation": (), "mae": ("mask_ratio", "norm_pix_loss"),
    "mpp": ("mask_ratio", "mpp_target"), "simmim": ("mask_ratio", "mask_patch_size"),
    "dino": (
        "out_dim", "momentum_teacher", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs",
        "weight_decay_end", "freeze_last_layer", "local_crops_number", "local_crops_scale", "global_crops_scale",
    ),
}  # fmt: skip
# DINO: the areas of local and of global crops, by the side of images up to which they are the default: main_dino.py,
# and for small images Gani et al., arXiv:2210.07240 (README.md: CIFAR and Tiny-ImageNet).
CROP_SCALES = {32: ([0.2, 0.5], [0.7, 1.0]), 64: ([0.2, 0.4], [0.5, 1.0]), math.inf: ([0.05, 0.4], [0.4, 1.0])}


@dataclass
class PretrainingArguments:
    """What the network learns before it is fine-tuned."""

    objective: str = flag(
        "supervised", "; ".join(f"{name}: {what}" for name, (what, _) in OBJECTIVES.items()) + ".", metavar="NAME"
    )
    mask_ratio: float | None = flag(None, f"Fraction of patches to hide. Default: {_RATIOS}.", above=0, below=1)
    mask_patch_size: int = flag(32, "SimMIM: side of the masked squares in pixels, a multiple of the patch.")
    mpp_target: str = flag(
        "mean_color",
        "MPP: predict mean_color (3-bit, 512 classes), downsized (4 x 4 of them per patch) or full_patch (pixels).",
        metavar="NAME",
    )
    norm_pix_loss: bool = flag(True, "MAE: normalize target patches.")
    decoder_hidden_size: int | None = flag(None, "MAE: decoder width. Default: 2/3, at most 512.")
    decoder_num_hidden_layers: int | None = flag(None, "MAE: its layers. Default: 2/3, at most 8.")
    decoder_num_attention_heads: int | None = flag(None, "MAE: its heads. Default: one per 32 channels.")

    out_dim: int = flag(1024, "DINO: outputs of the head; 65,536 in the paper, for a million images.", at_least=2)
    momentum_teacher: float = flag(0.996, "DINO: of the teacher, a moving average; at last 1.", above=0, below=1)
    warmup_teacher_temp: float = flag(0.04, "DINO: the teacher's temperature at first.", above=0)
    teacher_temp: float = flag(0.04, "DINO: its temperature after --warmup_teacher_temp_epochs.", above=0)
    warmup_teacher_temp_epochs: float = flag(0.0, "DINO: epochs from one to the other.", at_least=0)
    weight_decay_end: float = flag(0.4, "DINO: --weight_decay of the last step, by a cosine.", at_least=0)
    freeze_last_layer: float = flag(1.0, "DINO: epochs without a step of the head's last layer.", at_least=0)
    local_crops_number: int = flag(8, "DINO: small crops of each image, of 3/7 of --image_size.", at_least=0)
    local_crops_scale: list[float] | None = flag(
        None, "DINO: least and largest area of these. Default: 0.05 0.4; 0.2 0.4 up to 64 pixels, 0.2 0.5 up to 32."
    )
    global_crops_scale: list[float] | None = flag(
        None, "DINO: of the two large crops. Default: 0.4 1; 0.5 1 up to 64 pixels, 0.7 1 up to 32."
    )

    @property
    def is_supervised(self) -> bool:
        return self.objective == "supervised"

    def metadata(self) -> dict[str, Any]:
        """The flags that the objective reads, for the record."""
        return {"objective": self.objective} | {name: getattr(self, name) for name in _OWN_FLAGS[self.objective]}

    def check(self, training: TrainingFlags, recipe: RecipeArguments, problems: Problems) -> None:
        """Adds what is wrong with the values, and sets the default of `mask_ratio`."""
        if self.objective not in OBJECTIVES:
            problems.add(f"--objective {self.objective} is none of {', '.join(OBJECTIVES)}.")
            return
        if self.mpp_target not in MPP_TARGETS:
            problems.add(f"--mpp_target {self.mpp_target} is none of {', '.join(MPP_TARGETS)}.")
        ratio = OBJECTIVES[self.objective][1]
        if ratio is None and self.mask_ratio is not None:
            problems.add("--mask_ratio goes with an --objective that masks: mpp, simmim or mae. Leave it out.")
        if self.is_supervised:
            return
        self.mask_ratio = ratio if self.mask_ratio is None else self.mask_ratio
        if self.objective == "dino":
            self._check_dino(training, recipe, problems)
        objective = f"--objective {self.objective}"
        if (self.objective == "distillation") != (recipe.teacher_model is not None):
            needs = "needs a" if self.objective == "distillation" else "has no"
            problems.add(f"{objective} {needs} --teacher_model.")
        if recipe.distillation_flags:
            problems.add(f"{recipe.distillation_flags}: not with {objective}, which is about images alone.")
        label_flags = {name: getattr(recipe, name) for name in ("mixup", "cutmix", "balanced_sampling")}
        label_flags["label_smoothing_factor"] = training.label_smoothing_factor
        for name, value in label_flags.items():
            if value:
                problems.add(f"--{name} {value:g} needs labels, and {objective} has none. Leave it out.")
        for name in ("freeze", "lora_rank"):
            if (value := getattr(recipe, name)) is not None:
                problems.add(f"--{name} {value} is for a classifier, and {objective} has none. Leave it out.")
        if recipe.head_learning_rate_multiplier != 1.0:
            problems.add(f"--head_learning_rate_multiplier: {objective} has no classifier. Leave it out.")

    def _check_dino(self, training: TrainingFlags, recipe: RecipeArguments, problems: Problems) -> None:
        for name in ("local_crops_scale", "global_crops_scale"):
            scale = getattr(self, name)
            if scale is not None and (len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1):
                given = " ".join(f"{share:g}" for share in scale)
                problems.add(f"--{name} {given}: give the least and the largest fraction, above 0 and at most 1.")
        own = {
            "ema_decay": recipe, "auto_augment": recipe, "color_jitter": recipe, "random_erasing": recipe,
            "smallest_area": training, "images_on_device": training,
        }  # fmt: skip
        for name, flags in own.items():
            if getattr(flags, name) != getattr(type(flags), name):
                reason = "is an average itself: --momentum_teacher" if name == "ema_decay" else "sees crops of its own"
                problems.add(f"--{name} does not go with --objective dino, whose teacher {reason}. Leave it out.")


def _defaults(source: str, given: argparse.Namespace) -> dict[str, Any]:
    objective = given.objective or "supervised"
    chosen = {"train_val_split": 0.05, "load_best_model_at_end": False, **OBJECTIVE_DEFAULTS.get(objective, {})}
    if source == "digits" and objective != "supervised":
        chosen["variant"] = "Mi/2"  # four patches of a digit say nothing about each other; sixteen do
    return chosen


PRETRAIN = Script(
    name="pretrain",
    usage="%(prog)s [--objective NAME] [--train_dir DIR | --dataset_name NAME] [--variant NAME] [...]",
    defaults=_defaults,
    note="Without labels (--objective mpp, simmim, mae or dino), --train_dir may be any folder of images.\n",
    output_suffix="-pretrained",
    flags=(PretrainingArguments,),
    groups={"pretraining": ("objective", "mask_ratio", "local_crops_number")},
)
