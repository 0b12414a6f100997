# SPDX-License-Identifier: Apache-2.0
"""The flags of pretraining, and what each objective changes in the defaults of the others."""

import argparse
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import Problems
from ..training.arguments import FROM_SCRATCH_LEARNING_RATE, ImageTrainingArguments
from ..training.command_line import Script


MPP_TARGETS = {"mean_color": "mean colours", "downsized": "colours at 4 x 4 pixels", "full_patch": "pixels"}


# What it is, and the share of patches that it hides.
OBJECTIVES: dict[str, tuple[str, float | None]] = {
    "supervised": ("the labels, with the paper's tanh layer before the classifier (3.1)", None),
    "mpp": ("masked patch prediction, the paper's self-supervision (B.1.2)", 0.5),
    "simmim": ("the pixels of masked squares (arXiv:2111.09886)", 0.6),
    "mae": ("the pixels of masked patches, from an encoder that sees the others only (arXiv:2111.06377)", 0.75),
}
# The random parts of images that their authors train on, and Adam's second decay.
_OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "simmim": {"smallest_area": 0.67},
    "mae": {"smallest_area": 0.2, "adam_beta2": 0.95},
}


@dataclass
class PretrainingArguments:
    """What the network learns before it is fine-tuned."""

    _argument_group_name = "pretraining: what to learn"

    objective: str = field(
        default="supervised",
        metadata={"help": "; ".join(f"{name}: {what}" for name, (what, _) in OBJECTIVES.items()) + "."},
    )
    mask_ratio: float | None = field(
        default=None,
        metadata={
            "help": "The share of patches to hide. Default: "
            + ", ".join(f"{ratio:g} for {name}" for name, (_, ratio) in OBJECTIVES.items() if ratio)
            + "."
        },
    )
    mask_patch_size: int = field(
        default=32, metadata={"help": "SimMIM hides squares of so many pixels; a multiple of the patch."}
    )
    mpp_target: str = field(
        default="mean_color",
        metadata={
            "help": "What masked patch prediction predicts: mean_color (3-bit colours, 512 classes), downsized (4 x 4 "
            "of them for a patch) or full_patch (its pixels)."
        },
    )
    norm_pix_loss: bool = field(
        default=True, metadata={"help": "MAE: the target is each patch with its own mean and variance taken out."}
    )
    decoder_hidden_size: int | None = field(
        default=None,
        metadata={"help": "MAE: width of the decoder. Default: two thirds of the encoder's, 512 at most (B/16: 512)."},
    )
    decoder_num_hidden_layers: int | None = field(
        default=None,
        metadata={"help": "MAE: layers of the decoder. Default: two thirds of the encoder's, 8 at most (B/16: 8)."},
    )
    decoder_num_attention_heads: int | None = field(
        default=None, metadata={"help": "MAE: heads of the decoder. Default: one for 32 channels (B/16: 16)."}
    )

    @property
    def is_supervised(self) -> bool:
        return self.objective == "supervised"

    def facts(self) -> dict[str, Any]:
        """The flags that the objective reads, for the record."""
        names = {
            "supervised": (),
            "mpp": ("mask_ratio", "mpp_target"),
            "simmim": ("mask_ratio", "mask_patch_size"),
            "mae": ("mask_ratio", "norm_pix_loss"),
        }
        return {"objective": self.objective} | {name: getattr(self, name) for name in names[self.objective]}

    def check(self, training: ImageTrainingArguments, problems: Problems) -> None:
        """Adds what is wrong to the problems."""
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
        if not 0.0 < self.mask_ratio < 1.0:
            problems.add(f"--mask_ratio {self.mask_ratio:g} must lie between 0 and 1, e.g. 0.75.")
        wishes = training.recipe_arguments
        for name, value in (
            ("mixup", wishes.mixup),
            ("cutmix", wishes.cutmix),
            ("label_smoothing_factor", training.label_smoothing_factor),
        ):
            if value:
                problems.add(
                    f"--{name} {value:g} needs labels, and --objective {self.objective} has none. Leave it out."
                )
        if wishes.head_learning_rate_multiplier != 1.0:
            problems.add(
                f"--head_learning_rate_multiplier: --objective {self.objective} has no classifier. Leave it out."
            )


def _defaults(source: str, seen: argparse.Namespace) -> dict[str, Any]:
    objective = seen.objective or "supervised"
    defaults: dict[str, Any] = {
        "learning_rate": FROM_SCRATCH_LEARNING_RATE,
        "train_val_split": 0.05,
        "load_best_model_at_end": False,
        **_OBJECTIVE_DEFAULTS.get(objective, {}),
    }
    if objective != "supervised":
        defaults |= {"metric_for_best_model": "loss"}
        if source == "digits":  # 16 patches: of 4, nothing could be told from the rest
            defaults |= {"variant": "Mi/2"}
    return defaults


PRETRAIN = Script(
    usage="%(prog)s [--objective NAME] [--variant S/16] [--dataset_name NAME | --train_dir DIR] [...]",
    description="Pretrains a Vision Transformer, on labels or on the images alone. What it writes is the "
    "--model_name_or_path of scripts/finetune.py.",
    epilog="Without labels (--objective mpp, simmim or mae), --train_dir may be any folder of images. Several GPUs: "
    "accelerate launch scripts/pretrain.py [...]. Stop with Ctrl-C; go on with the same command and "
    "--resume_from_checkpoint True.",
    output_suffix="-pretrained",
    flags=(PretrainingArguments,),
    seen=("objective",),
    defaults=_defaults,
)
