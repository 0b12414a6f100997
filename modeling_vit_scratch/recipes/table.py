# SPDX-License-Identifier: Apache-2.0
"""
Settings of runs as tables, for flags that a command leaves open: defaults by what it starts from, published runs, and
what follows from the number of images. A later one replaces an earlier one: from scratch, the data set, the script, a
saved model, a recipe, the command line. Imports no torch.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


# --- From the number of images ----------------------------------------------------------------------------------------


# A run is a budget of steps, and a batch grows with the square root of the number of images: so a hundred images are
# seen 60 times each, and ten thousand 5 times. Rates fall with the width of the network. What this was measured on,
# beside a grid of other settings and a linear probe: docs/measurements.md, by scripts/experiments/defaults.py.

# A command that gives one of these keeps the fixed defaults.
LENGTH_AND_BATCH = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
FEW_HELD_OUT = 500  # fewer choose a checkpoint by their loss
SMALLEST_BATCH, LARGEST_BATCH = 16, 64
FRESH_HEAD_MULTIPLIER = 10.0  # it starts at zero, the rest is trained already


@dataclass(frozen=True)
class Start:
    """What a run starts from, or trains: its budget, and its learning rate at a width."""

    name: str
    steps: int
    epochs: tuple[int, int]  # at least and at most: each ends with an evaluation and a checkpoint
    learning_rate: float
    width: int  # above which the rate falls as 1 / width
    head_multiplier: float = 1.0  # of a fresh classifier


STARTS = {
    "checkpoint": Start("from a checkpoint", 600, (5, 60), 3e-4, 256, FRESH_HEAD_MULTIPLIER),
    "adapters": Start("adapters", 600, (5, 60), 1e-3, 256, 3.0),
    "head": Start("the classifier alone", 1500, (20, 100), 1e-2, 10**9),
    "scratch": Start("from scratch", 2400, (30, 200), 1e-3, 384),
}


def settings_from_data(
    start: str, images: int, width: int, has_fresh_head: bool, processes: int = 1
) -> dict[str, tuple[Any, str]]:
    """By flag the value and the reason, for so many training images and a network of this width."""
    rule = STARTS[start]
    batch = min(max(2 ** round(math.log2(images) / 2), SMALLEST_BATCH), LARGEST_BATCH)
    per_device = max(1, batch // processes)
    steps_per_epoch = -(-images // (per_device * processes))
    epochs = min(max(round(rule.steps / steps_per_epoch), rule.epochs[0]), rule.epochs[1])
    rate = float(f"{rule.learning_rate * min(1.0, rule.width / width):.2g}")
    among = "" if processes == 1 else f", shared by {processes} processes"
    found: dict[str, tuple[Any, str]] = {
        "per_device_train_batch_size": (
            per_device, f"about the square root of {images:,} images, {SMALLEST_BATCH} to {LARGEST_BATCH}{among}"
        ),
        "num_train_epochs": (
            float(epochs), f"about {rule.steps:,} steps {rule.name}, in {rule.epochs[0]} to {rule.epochs[1]} epochs"
        ),
        "learning_rate": (rate, f"{rule.name}, for a width of {width}"),
    }  # fmt: skip
    if rule.head_multiplier != 1.0 and has_fresh_head:
        found["head_learning_rate_multiplier"] = (rule.head_multiplier, "the classifier is new, the encoder is not")
    return found


# --- From what the command starts from --------------------------------------------------------------------------------


FROM_SCRATCH: dict[str, Any] = {"variant": "S/16", "learning_rate": STARTS["scratch"].learning_rate}
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
# A saved model or a config.json has an architecture.
SAVED_ARCHITECTURE: dict[str, Any] = {"variant": None, "image_size": None, "patch_size": None}
FINE_TUNING: dict[str, Any] = {"learning_rate": 1e-4}
# --freeze encoder: without augmentation an epoch costs next to nothing. --lora_rank: new weights, which start at zero.
HEAD_ALONE = {"smallest_area": 1.0, "learning_rate": STARTS["head"].learning_rate, "num_train_epochs": 50.0}
ADAPTERS: dict[str, Any] = {"learning_rate": STARTS["adapters"].learning_rate}


# --- Published runs: `--recipe NAME` ----------------------------------------------------------------------------------


# `--recipe NAME` puts a row between the defaults of the command line and its flags.
#
# Every number is from the source that the row names, or is ours. "GV" is github.com/google-research/vision_transformer
# at c6de1e5, "BV" github.com/google-research/big_vision at 0127fb6, "MAE" github.com/facebookresearch/mae at efb2a80,
# "SimMIM" github.com/microsoft/SimMIM at d3e29bc. A run that `differs` from the published one may have another result.
#
# For all: the "linear" schedule of the TensorFlow code ends at 1e-5 (GV, vit_jax/utils.py), here `polynomial` with
# `lr_end`. BV's weight decay is relative to the schedule: 1e-4 at a rate of 1e-3 is torch's 0.1. Models of the JAX code
# have the tanh form of GELU.


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, for `--recipe`."""

    name: str
    what: str  # the kind of training
    trained_on: str  # the name of the data, for people
    source: str  # of the numbers
    batch_size: int  # images in an optimizer step, over all processes and accumulated batches
    fields: dict[str, Any]  # values of flags
    data: str  # flags of the published run's data
    model: str = "any"  # the starting point, if that is no --variant
    expected: str = "not published"  # the published result, or one measured here
    price: str = "not published"
    differs: str = ""  # from the published run
    script: str = "finetune"  # in scripts/

    def describe(self) -> str:
        """What a user wants to know before the run."""
        lines = [
            f"{self.name}: {self.source}",
            f"    accelerate launch scripts/{self.script}.py --recipe {self.name} {self.data}",
            f"    expected: {self.expected}",
            f"    price: {self.price}",
        ]
        return "\n".join(lines + ([f"    differs from the published run: {self.differs}"] if self.differs else []))


_ATTRIBUTES = {field.name for field in dataclasses.fields(Recipe)} - {"fields"}
RECIPES: dict[str, Recipe] = {}


def add_rows(shared: dict[str, Any], columns: str = "", *values: tuple[Any, ...]) -> None:
    """
    Adds recipes that share attributes of `Recipe` and values of flags, and differ in columns: a tuple of values each.
    Texts may have columns in braces (those in capitals are for texts only), and {slug}, the variant as in names.
    """
    for row in values or [()]:
        cells = dict(zip(columns.split(), row, strict=True))
        slug = cells.get("variant", cells.get("model", "")).lower().replace("/", "").replace("+", "_")
        fields = {
            name: value.format(slug=slug, **cells) if isinstance(value, str) else value
            for name, value in {**shared, **cells}.items()
            if name.islower()
        }
        attributes = {name: fields.pop(name) for name in _ATTRIBUTES & fields.keys()}
        RECIPES[attributes["name"]] = Recipe(**attributes, fields=fields)


IMAGENET = {"trained_on": "ImageNet", "data": "--dataset_name ILSVRC/imagenet-1k"}
LINEAR = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5, "power": 1.0}}
COSINE = {"lr_scheduler_type": "cosine"}

# --- The paper: Dosovitskiy et al., arXiv:2010.11929v2 ----------------------------------------------------------------

# Table 3: Adam, batch 4096, 10,000 steps of warm-up, 224 pixels, of several numbers of epochs the longest. Clipping at
# norm 1 is for ImageNet: appendix B.1. The representation layer: section 3.1. Sigmoid cross-entropy: GV, issue 34; the
# bias of its head for ImageNet-21k: GV, issue 2. Days: Table 2. Accuracy at 224 pixels before fine-tuning, on the data
# themselves: GV, issue 62.
_TABLE_3 = {
    "what": "pre-training", "source": "Dosovitskiy et al., arXiv:2010.11929v2, Table 3", "batch_size": 4096,
    "image_size": [224], "loss": "sigmoid", "adam_beta2": 0.999, "warmup_steps": 10_000.0, "smallest_area": 0.05,
}  # fmt: skip
_JAX = "hidden_act=gelu_pytorch_tanh,representation_size={WIDTH}"
_BIAS_NOT_PUBLISHED = "the bias of the head starts at 0: where it did is not published"
add_rows({
    **_TABLE_3, **LINEAR, "name": "paper_jft300m_{slug}", "trained_on": "JFT-300M",
    "data": "--train_dir 'shards/*.tar'", "weight_decay": 0.1, "max_grad_norm": 0.0,
    "config_overrides": f"{_JAX},hidden_dropout_prob=0", "differs": _BIAS_NOT_PUBLISHED,
}, "variant   num_train_epochs learning_rate WIDTH price",
    ("B/16", 7.0, 8e-4, 768, "not published"),
    ("B/32", 7.0, 8e-4, 768, "not published"),
    ("L/32", 7.0, 6e-4, 1024, "not published"),
    ("L/16", 14.0, 4e-4, 1024, "680 TPUv3-core-days (Table 2)"),
    ("H/14", 14.0, 3e-4, 1280, "2,500 TPUv3-core-days (Table 2)"),
    ("R50+B/16", 7.0, 8e-4, 768, "not published"),
    ("R50+L/32", 7.0, 2e-4, 1024, "not published"),
)  # fmt: skip
add_rows({
    **_TABLE_3, **LINEAR, "name": "paper_imagenet21k_{slug}", "trained_on": "ImageNet-21k",
    "data": "--train_dir 'shards/*.tar'", "num_train_epochs": 90.0, "learning_rate": 1e-3, "weight_decay": 0.03,
    "max_grad_norm": 0.0, "config_overrides": f"{_JAX},hidden_dropout_prob=0.1,head_bias_init=-10",
    "expected": "{ACCURACY} % at 224 pixels (GV, issue 62)",
}, "variant WIDTH ACCURACY price",
    ("B/16", 768, 47.88, "not published"),
    ("B/32", 768, 44.04, "not published"),
    ("L/16", 1024, 49.9, "230 TPUv3-core-days (Table 2)"),
    ("L/32", 1024, 45.42, "not published"),
)  # fmt: skip
add_rows({
    **_TABLE_3, **COSINE, **IMAGENET, "name": "paper_imagenet1k_{slug}", "num_train_epochs": 300.0,
    "learning_rate": 3e-3, "weight_decay": 0.3, "max_grad_norm": 1.0,
    "config_overrides": f"{_JAX},hidden_dropout_prob=0.1",
    "expected": "{ACCURACY} % at 224 pixels (GV, issue 62)", "differs": _BIAS_NOT_PUBLISHED,
}, "variant WIDTH ACCURACY",
    ("B/16", 768, 74.79), ("B/32", 768, 69.19), ("L/16", 1024, 72.59), ("L/32", 1024, 66.9),
)  # fmt: skip

# Table 4: SGD with momentum 0.9, batch 512, cosine, no decay, clipped at norm 1, 384 pixels, a head of zeros; steps and
# the part that is held out. Rate: GV's default 0.03 (configs/common.py); 0.01 for VTAB (the table's only one); for Pets
# and Flowers BV's choice on validation data (configs/transfer.py), which is in the table's grid. Warm-up: 500 steps
# (GV), 100 for runs of 500 (BV). All grids are in the tests. Results from ImageNet-21k at 384 pixels: Table 5. For
# L/16, H/14 and R50+B/16 GV adds dropout (configs/models.py): `--config_overrides hidden_dropout_prob=0.1`.
_SGD = {
    **COSINE, "what": "fine-tuning", "batch_size": 512, "image_size": [384], "optim": "sgd",
    "optim_args": "momentum=0.9", "weight_decay": 0.0, "max_grad_norm": 1.0, "smallest_area": 0.05,
}  # fmt: skip
_CIFAR100 = "--dataset_name uoft-cs/cifar100 --label_column_name fine_label"
_folders = "--train_dir {0}/train --validation_dir {0}/test".format
_MOMENTUM = "the momentum is float32, GV's bfloat16"
_NOT_PUBLISHED = "not published for this data"
add_rows({
    **_SGD, "name": "paper_finetune_{DATA}", "data": "--model_name_or_path MODEL {FLAGS}",
    "source": "Dosovitskiy et al., arXiv:2010.11929v2, Table 4; GV, vit_jax/configs/common.py",
}, "DATA trained_on FLAGS max_steps train_val_split learning_rate warmup_steps expected differs",
    ("imagenet", "ImageNet", IMAGENET["data"], 20_000, 0.01, 0.03, 500.0, "from ImageNet-21k: B/16 83.97, B/32 "
     "81.28, L/16 85.15, L/32 80.99, H/14 85.13 % (Table 5)", _MOMENTUM),
    ("cifar100", "CIFAR-100", _CIFAR100, 10_000, 0.02, 0.03, 500.0, "from ImageNet-21k: B/16 91.67, B/32 "
     "91.97, L/16 93.44, L/32 93.04, H/14 93.82 % (Table 5)", _MOMENTUM),
    ("cifar10", "CIFAR-10", "--dataset_name uoft-cs/cifar10", 10_000, 0.02, 0.03, 500.0, "from ImageNet-21k: B/16 "
     "98.95, B/32 98.79, L/16 99.16, L/32 99.13, H/14 99.27 % (Table 5)", _MOMENTUM),
    ("pets", "Oxford Pets", _folders("pets"), 500, 0.1, 0.003, 100.0, _NOT_PUBLISHED, _MOMENTUM),
    ("flowers", "Flowers", _folders("flowers"), 500, 0.1, 0.003, 100.0, _NOT_PUBLISHED, _MOMENTUM),
    ("vtab", "a VTAB task", _folders("task"), 2500, 0.2, 0.01, 500.0, _NOT_PUBLISHED, f"{_MOMENTUM}; the warm-up is "
     "GV's, and a fifth held out VTAB's own habit: the table has neither"),
)  # fmt: skip
# Table 2: a higher resolution, with Polyak averaging of 0.9999 (section 4.1).
add_rows({
    **_SGD, **IMAGENET, "name": "paper_finetune_imagenet_{slug}_{SIZE}", "max_steps": 20_000,
    "source": "Dosovitskiy et al., arXiv:2010.11929v2, Tables 2 and 4, section 4.1", "train_val_split": 0.01,
    "data": f"--model_name_or_path MODEL {IMAGENET['data']}", "learning_rate": 0.03, "warmup_steps": 500.0,
    "ema_decay": 0.9999, "ema_warmup": False, "differs": _MOMENTUM,
}, "model SIZE image_size expected",
    ("L/16", 512, [512], "from JFT 87.76 %, from ImageNet-21k 85.30 % (Table 2)"),
    ("H/14", 518, [518], "from JFT 88.55 % (Table 2)"),
)  # fmt: skip

# --- AugReg: Steiner et al., How to train your ViT?, arXiv:2106.10270; and the plain baseline, arXiv:2205.01580 -------

_BV = {
    **COSINE, **IMAGENET, "what": "pre-training", "image_size": [224], "learning_rate": 1e-3, "weight_decay": 0.1,
    "warmup_steps": 10_000.0, "max_grad_norm": 1.0, "smallest_area": 0.05,
    "differs": "the first moment is float32, BV's bfloat16; Mixup keeps both weights, BV the larger one first, which "
    "is the same in distribution of the mixed images",
}  # fmt: skip
# BV, configs/vit_i1k.py for B/16: 300 epochs of ImageNet; mixup, randaug.
add_rows({
    **_BV, "name": "augreg_{LEVEL}", "source": "Steiner et al., arXiv:2106.10270; BV, configs/vit_i1k.py",
    "batch_size": 4096, "variant": "B/16", "loss": "sigmoid", "num_train_epochs": 300.0,
    "config_overrides": "hidden_act=gelu_pytorch_tanh,representation_size=768,head_bias_init=-6.9",
}, "LEVEL mixup auto_augment",
    ("none", 0.0, None), ("light1", 0.0, "randaug(2,0)"), ("light2", 0.2, "randaug(2,10)"),
    ("medium1", 0.2, "randaug(2,15)"), ("medium2", 0.5, "randaug(2,15)"),
    ("strong1", 0.5, "randaug(2,20)"), ("strong2", 0.8, "randaug(2,20)"),
)  # fmt: skip
# BV, configs/vit_s16_i1k.py: Better plain ViT baselines for ImageNet-1k.
add_rows({
    **_BV, "name": "bv_s16_90ep", "source": "Beyer et al., arXiv:2205.01580; BV, configs/vit_s16_i1k.py",
    "batch_size": 1024, "variant": "S/16", "num_train_epochs": 90.0, "mixup": 0.2,
    "auto_augment": "randaug(2,10)", "config_overrides": "hidden_act=gelu_pytorch_tanh,representation_size=384,"
    "pooling=mean,position_embedding=sincos_2d", "expected": "76.5 % on ImageNet",
    "price": "6 to 7 hours on a TPUv3-8",
})  # fmt: skip
# BV, configs/transfer.py: SGD as in the paper; the best rate on validation data, result (mean of 5) for B/32.
add_rows({
    **_SGD, "name": "bv_transfer_{DATA}", "source": "BV, configs/transfer.py", "model": "B/32",
    "data": "--model_name_or_path AUGREG_B32 {FLAGS}",
    "expected": "B/32 of AugReg: {RESULT} %, mean and range of 5",
    "differs": "{CROP}the momentum is float32, BV's bfloat16",
}, "DATA trained_on FLAGS max_steps warmup_steps train_val_split learning_rate RESULT CROP",
    ("imagenet", "ImageNet", IMAGENET["data"], 20_000, 500.0, 0.01, 0.03, "83.27 (83.22 to 83.33)", ""),
    ("cifar10", "CIFAR-10", "--dataset_name uoft-cs/cifar10", 10_000, 500.0, 0.02, 0.003, "98.55 (98.46 to 98.6)",
     "the crop is a random part of the image, BV's one of 384 out of 448 pixels; "),
    ("cifar100", "CIFAR-100", _CIFAR100, 10_000, 500.0, 0.02, 0.01, "91.35 (91.09 to 91.62)",
     "the crop is a random part of the image, BV's one of 384 out of 448 pixels; "),
    ("pets", "Oxford Pets", _folders("pets"), 500, 100.0, 0.1, 0.003, "93.78 (93.62 to 94.00)", ""),
    ("flowers", "Flowers", _folders("flowers"), 500, 100.0, 0.1, 0.003, "99.43 (99.42 to 99.45)", ""),
)  # fmt: skip

# --- DeiT III: Touvron et al., arXiv:2204.07118; facebookresearch/deit, README_revenge.md -----------------------------

_DEIT3 = {
    **IMAGENET, "source": "Touvron et al., arXiv:2204.07118; facebookresearch/deit, README_revenge.md",
    "max_grad_norm": 0.0, "smallest_area": 0.08, "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip
# 800 epochs of ImageNet: 3-Augment, colour jitter, LayerScale, drop path, LAMB. Accuracy at 224 pixels, for B and L
# after 20 epochs more.
add_rows({
    **_DEIT3, "name": "deit3_{slug}", "what": "pre-training", "batch_size": 2048, "num_train_epochs": 800.0,
    "config_overrides": "layer_scale_init_value=1e-4,cls_token_position=False,drop_path_rate={DROP_PATH:g}",
    "optim": "lamb", "loss": "bce", "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-5}, "warmup_steps": 5 / 800, "weight_decay": 0.05,
    "auto_augment": "3a", "color_jitter": 0.3, "aug_repeats": 3,
    "differs": "the warm-up starts at 0, not 1e-6; epochs are longer by up to 255 images",
}, "variant learning_rate DROP_PATH image_size expected price",
    ("S/16", 4e-3, 0.05, [224], "81.4 % at 224 pixels", "8 GPUs"),
    ("B/16", 3e-3, 0.2, [192], "83.8 % at 224 pixels, after 20 epochs more at 224", "8 GPUs"),
    ("L/16", 3e-3, 0.45, [192], "84.9 % at 224 pixels, after 20 epochs more at 224", "32 GPUs"),
)  # fmt: skip
# 20 epochs at 384 pixels with AdamW at 1e-5. Its least rate is 1e-5 as well: the cosine is a constant.
add_rows({
    **_DEIT3, "name": "deit3_finetune_384_{slug}", "what": "fine-tuning", "batch_size": 512,
    "image_size": [384], "config_overrides": "drop_path_rate={DROP_PATH:g}", "num_train_epochs": 20.0,
    "learning_rate": 1e-5, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5 / 20,
    "weight_decay": 0.1, "label_smoothing_factor": 0.1, "auto_augment": "rand-m9-mstd0.5-inc1",
    "data": f"--model_name_or_path DEIT3 {IMAGENET['data']}", "differs": "the warm-up starts at 0, not 1e-6",
}, "model DROP_PATH expected price",
    ("S/16", 0.0, "83.4 % on ImageNet", "8 GPUs"),
    ("B/16", 0.15, "85.0 % on ImageNet", "16 GPUs"),
    ("L/16", 0.4, "85.8 % on ImageNet", "32 GPUs"),
)  # fmt: skip

# --- Without labels: MAE, He et al., arXiv:2111.06377, and SimMIM, Xie et al., arXiv:2111.09886 -----------------------

# Masked patch prediction, B.1.2: Adam, rate 2e-4, 10,000 steps of warm-up, cosine, batch 4096.
add_rows({
    **COSINE, "name": "paper_mpp_b16", "what": "masked pre-training", "trained_on": "JFT-300M",
    "script": "pretrain", "source": "Dosovitskiy et al., arXiv:2010.11929v2, B.1.2", "batch_size": 4096,
    "variant": "B/16", "image_size": [224], "config_overrides": "hidden_act=gelu_pytorch_tanh", "objective": "mpp",
    "mask_ratio": 0.5, "mpp_target": "mean_color", "max_steps": 1_000_000, "learning_rate": 2e-4,
    "weight_decay": 0.1, "warmup_steps": 10_000.0, "max_grad_norm": 0.0, "smallest_area": 0.05,
    "data": "--train_dir 'shards/*.tar' --streaming",
    "expected": "from JFT-300M, fine-tuned on ImageNet: 79.9 %; 100,000 steps give most of it (B.1.2)",
    "differs": "the paper gives no weight decay and no clipping for it: here those of Table 3 for JFT-300M",
})  # fmt: skip
_PIXELS = "the processor's bilinear resizing and -1 to 1 for bicubic and ImageNet's mean and variance"
# PRETRAIN.md and main_pretrain.py: 800 epochs, 1.5e-4 for 256 images, warm-up of 40 epochs, decay 0.05.
add_rows({
    **COSINE, **IMAGENET, "name": "mae_{slug}", "what": "masked pre-training", "script": "pretrain",
    "source": "He et al., arXiv:2111.06377; MAE, PRETRAIN.md", "batch_size": 4096, "image_size": [224],
    "config_overrides": "position_embedding=sincos_2d", "objective": "mae", "mask_ratio": 0.75,
    "norm_pix_loss": True, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16, "num_train_epochs": 800.0, "learning_rate": 1.5e-4 * 4096 / 256,
    "adam_beta2": 0.95, "weight_decay": 0.05, "warmup_steps": 40 / 800, "max_grad_norm": 0.0,
    "smallest_area": 0.2, "differs": f"{_PIXELS}; the fixed positions have MoCo v3's frequencies",
}, "variant expected price",
    ("B/16", "published for 1600 epochs only", "not published"),
    ("L/16", "fine-tuned on ImageNet, L/16: 85.5 %", "42 h on 64 V100"),
    ("H/14", "published for 1600 epochs only", "not published"),
)  # fmt: skip
# FINETUNE.md and main_finetune.py: AdamW, batch 1024, warm-up of 5 epochs, after 1600 epochs of pre-training.
add_rows({
    **IMAGENET, "name": "mae_finetune_{slug}", "what": "fine-tuning", "batch_size": 1024, "image_size": [224],
    "source": "He et al., arXiv:2111.06377; MAE, FINETUNE.md",
    "data": f"--model_name_or_path MAE {IMAGENET['data']}",
    "config_overrides": "pooling=mean,drop_path_rate={DROP_PATH:g}", "weight_decay": 0.05, "max_grad_norm": 0.0,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "label_smoothing_factor": 0.1, "smallest_area": 0.08, "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
    "differs": f"{_PIXELS}; the norm is before the mean of the patches, MAE's after it; erased pixels are "
    "grey, MAE's noise; the least rate is that of the last layer for all",
}, "model learning_rate layer_decay DROP_PATH num_train_epochs warmup_steps expected price",
    ("B/16", 2e-3, 0.65, 0.1, 100.0, 5 / 100, "83.57 ± 0.08 % on ImageNet (n = 4), from 1600 epochs",
     "7 h 11 min on 32 V100"),
    ("L/16", 4e-3, 0.75, 0.2, 50.0, 5 / 50, "85.87 ± 0.07 % on ImageNet (n = 4), from 1600 epochs",
     "8 h 52 min on 32 V100"),
    ("H/14", 4e-3, 0.75, 0.3, 50.0, 5 / 50, "86.93 % on ImageNet, from 1600 epochs", "13 h 9 min on 64 V100"),
)  # fmt: skip
# SimMIM, configs/vit_base__800ep: AdamW, 1e-4 for 512 images, batch 2048, clip 5, LayerScale 0.1, drop path.
add_rows({
    **COSINE, **IMAGENET, "name": "simmim_b16", "what": "masked pre-training", "script": "pretrain",
    "source": "Xie et al., arXiv:2111.09886; SimMIM, configs/vit_base__800ep", "batch_size": 2048,
    "variant": "B/16", "image_size": [224], "config_overrides": "layer_scale_init_value=0.1,drop_path_rate=0.1",
    "objective": "simmim", "mask_ratio": 0.6, "mask_patch_size": 32, "num_train_epochs": 800.0,
    "learning_rate": 1e-4 * 2048 / 512, "adam_beta2": 0.999, "weight_decay": 0.05, "warmup_steps": 10 / 800,
    "max_grad_norm": 5.0, "smallest_area": 0.67, "expected": "fine-tuned on ImageNet: 83.8 %",
    "differs": "a cosine for one step to a tenth after 700 epochs; learned positions for shared relative biases; "
    f"{_PIXELS}; the warm-up starts at 0, not 5e-7",
})  # fmt: skip

# --- Ours. The models of the first two are in model_cards/. -----------------------------------------------------------

# DeiT's augmentation (Touvron et al., arXiv:2012.12877, Table 9), with larger parts: the images are small.
_TINY_IMAGENET = {
    **COSINE, "what": "pre-training", "trained_on": "Tiny ImageNet", "source": "this repository", "script": "pretrain",
    "auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25, "cutmix": 1.0, "label_smoothing_factor": 0.1,
    "images_on_device": True, "adam_beta2": 0.95, "weight_decay": 0.05, "max_grad_norm": 1.0,
}  # fmt: skip
_SMALL = {
    **COSINE, "what": "from scratch", "source": "ours", "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 0.1,
    "weight_decay": 0.05, "max_grad_norm": 1.0,
}  # fmt: skip
# A plain ViT of 7.2 million weights, from scratch on 100,000 images of 64 x 64 pixels and 200 classes.
add_rows({
    **_TINY_IMAGENET, "name": "tiny_imagenet", "batch_size": 2048, "variant": "Ti/16", "image_size": [64],
    "patch_size": [8], "config_overrides": "hidden_size=256,num_hidden_layers=9,num_attention_heads=4,"
    "intermediate_size=1024,drop_path_rate=0.1,representation_size=None", "num_train_epochs": 155.0,
    "learning_rate": 2.5e-3, "warmup_steps": 0.05, "ema_decay": 0.9995, "smallest_area": 0.25, "mixup": 0.8,
    "data": "--dataset_name tiny-imagenet --torch_compile True --per_device_train_batch_size 2048",
    "expected": "42.24 % of Tiny ImageNet's validation images (n = 1); much more with more steps",
    "price": "364 s on one NVIDIA H200",
})  # fmt: skip
# Continues it at a higher resolution (the paper, section 3.2): the same images, enlarged, with less mixup.
add_rows({
    **_TINY_IMAGENET, "name": "tiny_imagenet_96", "batch_size": 512, "model": "tiny_imagenet",
    "image_size": [96], "num_train_epochs": 91.0, "learning_rate": 3e-3, "warmup_steps": 0.03,
    "ema_decay": 0.999, "smallest_area": 0.35, "mixup": 0.2,
    "data": "--model_name_or_path MODEL --dataset_name tiny-imagenet --torch_compile True --torch_compile_mode "
    "reduce-overhead --per_device_train_batch_size 512",
    "expected": "from tiny_imagenet: 53.77 % of Tiny ImageNet's validation images (n = 1)",
    "price": "354 s on one NVIDIA H200",
})  # fmt: skip
# The defaults of the digits, by name.
add_rows({
    **_SMALL, "name": "digits", "trained_on": "digits", "variant": "Mi/4", "image_size": [8],
    "num_train_epochs": 40.0, "data": "--dataset_name digits", "price": "1 minute on 2 CPU cores",
    "expected": "99.0 ± 0.7 % of 270 held-out digits (10 seeds, the last step)",
})  # fmt: skip
# A few thousand photographs at 64 pixels, on a CPU. Stronger augmentation needs longer runs.
add_rows({
    **_SMALL, "name": "small_photos", "trained_on": "your photos", "variant": "Mi/8", "image_size": [64],
    "num_train_epochs": 24.0, "smallest_area": 0.35, "data": "--train_dir photos",
    "expected": "not measured over several seeds yet", "price": "not measured",
})  # fmt: skip


def find_recipe(name: str) -> Recipe:
    """The recipe of a name. Raises ValueError, which lists all of them, if there is none."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}.{hint} `--recipe list` shows them: {', '.join(RECIPES)}.")
    return RECIPES[name]


def recipe_table(recipes: Iterable[Recipe]) -> str:
    """The output of `--recipe list`: a line for each recipe."""
    lines = [("name", "what", "model", "data", "length", "batch", "rate", "source")]
    for one in recipes:
        fields, steps = one.fields, one.fields.get("max_steps")
        length = f"{steps:,} steps" if steps else f"{fields['num_train_epochs']:g} epochs"
        rate, model = f"{fields['learning_rate']:g}", fields.get("variant", one.model)
        cells = (one.name, one.what, model, one.trained_on, length, str(one.batch_size), rate)
        lines.append((*cells, one.source.split(";")[0]))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def scale_learning_rate(rate: float, from_batch_size: int, to_batch_size: int, optimizer: str) -> float:
    """
    A learning rate for another batch size: proportional to it for SGD (Goyal et al., arXiv:1706.02677), to its square
    root for Adam and similar optimizers (Malladi et al., arXiv:2205.10287).
    """
    ratio = to_batch_size / from_batch_size
    return rate * (ratio if optimizer == "sgd" else math.sqrt(ratio))


def fit_batch_size(
    recipe: Recipe, per_device: int, processes: int, accumulation: int | None = None
) -> tuple[int, dict[str, Any]]:
    """
    The batches to accumulate, by default those that come closest to the recipe's batch size; and if they miss it the
    fields that change: the learning rate, and steps for the same number of images.
    """
    together = per_device * processes
    if accumulation is None:
        accumulation = max(1, round(recipe.batch_size / together))
    total, fields, changed = together * accumulation, recipe.fields, {}
    if total == recipe.batch_size:
        return accumulation, changed
    optimizer = fields.get("optim", "adamw_torch_fused")
    changed["learning_rate"] = scale_learning_rate(fields["learning_rate"], recipe.batch_size, total, optimizer)
    for name, kind in (("max_steps", int), ("warmup_steps", float)):
        if fields.get(name, 0) >= 1:
            changed[name] = kind(max(1, round(fields[name] * recipe.batch_size / total)))
    return accumulation, changed
