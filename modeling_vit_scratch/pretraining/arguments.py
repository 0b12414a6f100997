# SPDX-License-Identifier: Apache-2.0
"""The flags of pretraining beside those of training. Imports no torch."""

import argparse
from dataclasses import dataclass
from typing import Any

from ..common.errors import Problems
from ..common.flags import flag
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
}
_RATIOS = ", ".join(f"{ratio:g} for {name}" for name, (_, ratio) in OBJECTIVES.items() if ratio)
# Random crops and Adam's second decay as published. Without labels there is no accuracy.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "mpp": {"metric_for_best_model": "loss"},
    "distillation": {"metric_for_best_model": "loss"},
    "simmim": {"metric_for_best_model": "loss", "smallest_area": 0.67},
    "mae": {"metric_for_best_model": "loss", "smallest_area": 0.2, "adam_beta2": 0.95},
}


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

    @property
    def is_supervised(self) -> bool:
        return self.objective == "supervised"

    def metadata(self) -> dict[str, Any]:
        """The flags that the objective reads, for the record."""
        own_flag = {"mpp": "mpp_target", "simmim": "mask_patch_size", "mae": "norm_pix_loss"}
        names = ("mask_ratio", own_flag[self.objective]) if self.objective in own_flag else ()
        return {"objective": self.objective} | {name: getattr(self, name) for name in names}

    def check(self, training: TrainingFlags, recipe: RecipeArguments, problems: Problems) -> None:
        """Adds what is wrong with the values, and sets the default of `mask_ratio`."""
        if self.objective not in OBJECTIVES:
            problems.add(f"--objective {self.objective} is none of {', '.join(OBJECTIVES)}.")
            return
        if self.mpp_target not in MPP_TARGETS:
            problems.add(f"--mpp_target {self.mpp_target} is none of {', '.join(MPP_TARGETS)}.")
        if OBJECTIVES[self.objective][1] is None and self.mask_ratio is not None:
            problems.add("--mask_ratio goes with an --objective that masks: mpp, simmim or mae. Leave it out.")
        if self.is_supervised:
            return
        if self.mask_ratio is None:
            self.mask_ratio = OBJECTIVES[self.objective][1]
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
    note="Without labels (--objective mpp, simmim or mae), --train_dir may be any folder of images.\n",
    output_suffix="-pretrained",
    flags=(PretrainingArguments,),
    groups={"pretraining": ("objective", "mask_ratio", "mask_patch_size", "norm_pix_loss")},
)
