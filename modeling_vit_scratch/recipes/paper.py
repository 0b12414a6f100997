# SPDX-License-Identifier: Apache-2.0
"""
Named runs as data: `--recipe NAME` puts them between the defaults of the command line and its flags.

Every number is from the source that the recipe names, or is said to be ours. "GV" is github.com/google-research/
vision_transformer at c6de1e5, "BV" github.com/google-research/big_vision at 0127fb6. Where a run here would not be the
published one, `differs` says how: a published result is then what to compare with, not what to expect.

Notes for all: what TensorFlow code calls "linear" ends at 1e-5 (GV, vit_jax/utils.py), here `polynomial` with `lr_end`.
BV's weight decay is relative to the schedule: its 1e-4 at a rate of 1e-3 is torch's 0.1. Models from the JAX code have
the tanh form of GELU.
"""

import difflib
from typing import Any

from .ours import own_recipes
from .pretraining import pretraining_recipes
from .recipe import COSINE, IMAGENET, LINEAR, Recipe, slug


# ---------------------------------------------------------------------------------------------------------------------
# The paper: Dosovitskiy et al., arXiv:2010.11929v2


# Table 3. Data: variant -> epochs (the longest that is listed), rate.
PAPER_PRETRAINING: dict[str, dict[str, tuple[int, float]]] = {
    "jft300m": {
        "B/16": (7, 8e-4),
        "B/32": (7, 8e-4),
        "L/32": (7, 6e-4),
        "L/16": (14, 4e-4),
        "H/14": (14, 3e-4),
        "R50+B/16": (7, 8e-4),
        "R50+L/32": (7, 2e-4),
    },
    "imagenet21k": {"B/16": (90, 1e-3), "B/32": (90, 1e-3), "L/16": (90, 1e-3), "L/32": (90, 1e-3)},
    "imagenet1k": {"B/16": (300, 3e-3), "B/32": (300, 3e-3), "L/16": (300, 3e-3), "L/32": (300, 3e-3)},
}
# Table 3: schedule, decay, dropout. Clipping at norm 1 is for ImageNet: appendix B.1.
_PAPER_DATA: dict[str, tuple[dict[str, Any], float, float, float]] = {
    "jft300m": (LINEAR, 0.1, 0.0, 0.0),
    "imagenet21k": (LINEAR, 0.03, 0.1, 0.0),
    "imagenet1k": (COSINE, 0.3, 0.1, 1.0),
}
# Accuracy at 224 pixels before fine-tuning, on the data themselves: GV, issue 62.
_PAPER_ACCURACY = {
    ("imagenet1k", "B/32"): 69.19, ("imagenet1k", "B/16"): 74.79, ("imagenet1k", "L/32"): 66.90,
    ("imagenet1k", "L/16"): 72.59, ("imagenet21k", "B/16"): 47.88, ("imagenet21k", "B/32"): 44.04,
    ("imagenet21k", "L/16"): 49.90, ("imagenet21k", "L/32"): 45.42,
}  # fmt: skip
# Table 2, TPUv3-core-days.
_PAPER_PRICE = {("jft300m", "H/14"): 2500, ("jft300m", "L/16"): 680, ("imagenet21k", "L/16"): 230}


def paper_pretraining(data: str, variant: str) -> Recipe:
    """
    Table 3: Adam, batch 4096, 10,000 steps of warm-up, 224 pixels. The representation layer: section 3.1. Sigmoid
    cross-entropy: GV, issue 34; the bias of its head for ImageNet-21k: GV, issue 2.
    """
    epochs, rate = PAPER_PRETRAINING[data][variant]
    schedule, decay, dropout, clip = _PAPER_DATA[data]
    width = {"B": 768, "L": 1024, "H": 1280}[variant.split("+")[-1][0]]
    bias = ",head_bias_init=-10" if data == "imagenet21k" else ""
    accuracy, days = _PAPER_ACCURACY.get((data, variant)), _PAPER_PRICE.get((data, variant))
    return Recipe(
        name=f"paper_{data}_{slug(variant)}",
        source="Dosovitskiy et al., arXiv:2010.11929v2, Table 3",
        batch_size=4096,
        fields={
            "variant": variant,
            "image_size": [224],
            "config_overrides": f"hidden_act=gelu_pytorch_tanh,representation_size={width},"
            f"hidden_dropout_prob={dropout:g}{bias}",
            "loss": "sigmoid",
            "num_train_epochs": float(epochs),
            "learning_rate": rate,
            "adam_beta2": 0.999,
            "weight_decay": decay,
            "warmup_steps": 10_000.0,
            "max_grad_norm": clip,
            "smallest_area": 0.05,
            **schedule,
        },
        data=IMAGENET if data == "imagenet1k" else "--train_dir 'shards/*.tar'",
        expected="not published" if accuracy is None else f"{accuracy} % at 224 pixels (GV, issue 62)",
        price="not published" if days is None else f"{days:,} TPUv3-core-days (Table 2)",
        differs="" if data == "imagenet21k" else "the bias of the head starts at 0: where it did is not published",
    )


# Table 4: steps, dev split. Rate: GV's default 0.03 (configs/common.py); 0.01 for VTAB (the table's only one); for Pets
# and Flowers BV's choice on validation data (configs/transfer.py), which is in the table's grid. Warm-up: 500 steps
# (GV), 100 for runs of 500 (BV). All grids are in the tests.
_PAPER_FINETUNING: dict[str, tuple[int, float, float, float, str]] = {
    "imagenet": (20_000, 0.01, 0.03, 500.0, IMAGENET),
    "cifar100": (10_000, 0.02, 0.03, 500.0, "--dataset_name uoft-cs/cifar100 --label_column_name fine_label"),
    "cifar10": (10_000, 0.02, 0.03, 500.0, "--dataset_name uoft-cs/cifar10"),
    "pets": (500, 0.1, 0.003, 100.0, "--train_dir pets/train --validation_dir pets/test"),
    "flowers": (500, 0.1, 0.003, 100.0, "--train_dir flowers/train --validation_dir flowers/test"),
    "vtab": (2500, 0.2, 0.01, 500.0, "--train_dir task/train --validation_dir task/test"),
}
# From ImageNet-21k at 384 pixels: Table 5.
_PAPER_TABLE_5 = {
    "imagenet": "B/16 83.97, B/32 81.28, L/16 85.15, L/32 80.99, H/14 85.13 %",
    "cifar10": "B/16 98.95, B/32 98.79, L/16 99.16, L/32 99.13, H/14 99.27 %",
    "cifar100": "B/16 91.67, B/32 91.97, L/16 93.44, L/32 93.04, H/14 93.82 %",
}


def paper_finetuning(data: str) -> Recipe:
    """
    Table 4: SGD with momentum 0.9, batch 512, cosine, no decay, clipped at norm 1, 384 pixels, a head of zeros. For
    L/16, H/14 and R50+B/16 GV adds dropout (configs/models.py): `--config_overrides hidden_dropout_prob=0.1`.
    """
    steps, held_out, rate, warmup, flags = _PAPER_FINETUNING[data]
    expected = _PAPER_TABLE_5.get(data)
    notes = ["the momentum is float32, GV's bfloat16"]
    if data == "vtab":
        notes.append("the warm-up is GV's, and a fifth held out VTAB's own habit: the table has neither")
    return Recipe(
        name=f"paper_finetune_{data}",
        source="Dosovitskiy et al., arXiv:2010.11929v2, Table 4; GV, vit_jax/configs/common.py",
        batch_size=512,
        fields={
            "image_size": [384],
            "max_steps": steps,
            "train_val_split": held_out,
            "learning_rate": rate,
            "warmup_steps": warmup,
            "optim": "sgd",
            "optim_args": "momentum=0.9",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "smallest_area": 0.05,
            **COSINE,
        },
        data=f"--model_name_or_path MODEL {flags}",
        expected=f"from ImageNet-21k: {expected} (Table 5)" if expected else "not published for this data",
        differs="; ".join(notes),
    )


def paper_finetuning_large(variant: str, image_size: int, expected: str) -> Recipe:
    """Table 2: ImageNet at a higher resolution, with Polyak averaging of 0.9999 (section 4.1)."""
    base = paper_finetuning("imagenet")
    return Recipe(
        name=f"paper_finetune_imagenet_{slug(variant)}_{image_size}",
        source="Dosovitskiy et al., arXiv:2010.11929v2, Tables 2 and 4, section 4.1",
        batch_size=base.batch_size,
        fields={**base.fields, "image_size": [image_size], "ema_decay": 0.9999, "ema_warmup": False},
        data=base.data,
        expected=expected,
        differs=base.differs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# AugReg: Steiner et al., How to train your ViT?, arXiv:2106.10270; and the plain baseline, arXiv:2205.01580


# BV, configs/vit_i1k.py: mixup, randaug.
AUGREG_LEVELS: dict[str, tuple[float, str | None]] = {
    "none": (0.0, None),
    "light1": (0.0, "randaug(2,0)"),
    "light2": (0.2, "randaug(2,10)"),
    "medium1": (0.2, "randaug(2,15)"),
    "medium2": (0.5, "randaug(2,15)"),
    "strong1": (0.5, "randaug(2,20)"),
    "strong2": (0.8, "randaug(2,20)"),
}
_BV_MIXUP = "Mixup keeps both weights, BV the larger one first, which is the same in distribution of the mixed images"


def augreg(level: str) -> Recipe:
    """BV, configs/vit_i1k.py for B/16: 300 epochs of ImageNet, batch 4096, Adam, decay 0.1 of torch, cosine, clip 1."""
    mixup, policy = AUGREG_LEVELS[level]
    return Recipe(
        name=f"augreg_{level}",
        source="Steiner et al., arXiv:2106.10270; BV, configs/vit_i1k.py",
        batch_size=4096,
        fields={
            "variant": "B/16",
            "image_size": [224],
            "config_overrides": "hidden_act=gelu_pytorch_tanh,representation_size=768,head_bias_init=-6.9",
            "loss": "sigmoid",
            "num_train_epochs": 300.0,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "warmup_steps": 10_000.0,
            "max_grad_norm": 1.0,
            "smallest_area": 0.05,
            "mixup": mixup,
            "auto_augment": policy,
            **COSINE,
        },
        data=IMAGENET,
        differs=f"the first moment is float32, BV's bfloat16; {_BV_MIXUP}",
    )


def bv_s16_90ep() -> Recipe:
    """BV, configs/vit_s16_i1k.py: Beyer, Zhai, Kolesnikov, Better plain ViT baselines for ImageNet-1k."""
    return Recipe(
        name="bv_s16_90ep",
        source="Beyer et al., arXiv:2205.01580; BV, configs/vit_s16_i1k.py",
        batch_size=1024,
        fields={
            "variant": "S/16",
            "image_size": [224],
            "config_overrides": "hidden_act=gelu_pytorch_tanh,representation_size=384,pooling=mean,"
            "position_embedding=sincos_2d",
            "num_train_epochs": 90.0,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
            "warmup_steps": 10_000.0,
            "max_grad_norm": 1.0,
            "smallest_area": 0.05,
            "mixup": 0.2,
            "auto_augment": "randaug(2,10)",
            **COSINE,
        },
        data=IMAGENET,
        expected="76.5 % on ImageNet",
        price="6 to 7 hours on a TPUv3-8",
        differs=f"the first moment is float32, BV's bfloat16; {_BV_MIXUP}",
    )


# BV, configs/transfer.py: steps, warm-up, held out, best rate on validation data, result (mean of 5) for B/32.
_BV_TRANSFER: dict[str, tuple[int, float, float, float, str, str]] = {
    "imagenet": (20_000, 500.0, 0.01, 0.03, "83.27 (83.22 to 83.33)", _PAPER_FINETUNING["imagenet"][-1]),
    "cifar10": (10_000, 500.0, 0.02, 0.003, "98.55 (98.46 to 98.6)", _PAPER_FINETUNING["cifar10"][-1]),
    "cifar100": (10_000, 500.0, 0.02, 0.01, "91.35 (91.09 to 91.62)", _PAPER_FINETUNING["cifar100"][-1]),
    "pets": (500, 100.0, 0.1, 0.003, "93.78 (93.62 to 94.00)", _PAPER_FINETUNING["pets"][-1]),
    "flowers": (500, 100.0, 0.1, 0.003, "99.43 (99.42 to 99.45)", _PAPER_FINETUNING["flowers"][-1]),
}


def bv_transfer(data: str) -> Recipe:
    """BV, configs/transfer.py: SGD with momentum, batch 512, cosine, clip 1, no decay, 384 pixels."""
    steps, warmup, held_out, rate, expected, flags = _BV_TRANSFER[data]
    crop = "the crop is a random part of the image, BV's one of 384 out of 448 pixels; "
    return Recipe(
        name=f"bv_transfer_{data}",
        source="BV, configs/transfer.py",
        batch_size=512,
        fields={
            **paper_finetuning(data).fields,
            "max_steps": steps,
            "warmup_steps": warmup,
            "train_val_split": held_out,
            "learning_rate": rate,
        },
        data=f"--model_name_or_path AUGREG_B32 {flags}",
        expected=f"B/32 of AugReg: {expected} %, mean and range of 5",
        differs=f"{crop if data.startswith('cifar') else ''}the momentum is float32, BV's bfloat16",
    )


# ---------------------------------------------------------------------------------------------------------------------
# DeiT III: Touvron et al., arXiv:2204.07118; facebookresearch/deit, README_revenge.md


# Rate of LAMB, drop path, image size, accuracy at 224 pixels (S) or after fine-tuning at 224 (B, L).
_DEIT3: dict[str, tuple[float, float, int, float]] = {
    "S/16": (4e-3, 0.05, 224, 81.4),
    "B/16": (3e-3, 0.2, 192, 83.8),
    "L/16": (3e-3, 0.45, 192, 84.9),
}
_DEIT3_ARCHITECTURE = "layer_scale_init_value=1e-4,cls_token_position=False"


def deit3(variant: str) -> Recipe:
    """800 epochs of ImageNet: 3-Augment, colour jitter 0.3, Mixup 0.8, CutMix 1, LayerScale, drop path, batch 2048."""
    rate, drop_path, image_size, accuracy = _DEIT3[variant]
    return Recipe(
        name=f"deit3_{slug(variant)}",
        source="Touvron et al., arXiv:2204.07118; facebookresearch/deit, README_revenge.md",
        batch_size=2048,
        fields={
            "variant": variant,
            "image_size": [image_size],
            "config_overrides": f"{_DEIT3_ARCHITECTURE},drop_path_rate={drop_path:g}",
            "num_train_epochs": 800.0,
            "optim": "lamb",
            "loss": "bce",
            "learning_rate": rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-5},
            "warmup_steps": 5 / 800,
            "weight_decay": 0.05,
            "max_grad_norm": 0.0,
            "smallest_area": 0.08,
            "auto_augment": "3a",
            "color_jitter": 0.3,
            "aug_repeats": 3,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        data=IMAGENET,
        expected=f"{accuracy} % at 224 pixels" + ("" if image_size == 224 else ", after 20 epochs more at 224"),
        price="8 GPUs" if variant != "L/16" else "32 GPUs",
        differs="the warm-up starts at 0, not 1e-6; epochs are longer by up to 255 images",
    )


# Drop path, batch over all GPUs, accuracy.
_DEIT3_384: dict[str, tuple[float, float]] = {"S/16": (0.0, 83.4), "B/16": (0.15, 85.0), "L/16": (0.4, 85.8)}


def deit3_finetuning(variant: str) -> Recipe:
    """20 epochs at 384 pixels with AdamW at 1e-5. Its least rate is 1e-5 as well: the cosine is a constant."""
    drop_path, accuracy = _DEIT3_384[variant]
    return Recipe(
        name=f"deit3_finetune_384_{slug(variant)}",
        source="Touvron et al., arXiv:2204.07118; facebookresearch/deit, README_revenge.md",
        batch_size=512,
        fields={
            "image_size": [384],
            "config_overrides": f"drop_path_rate={drop_path:g}",
            "num_train_epochs": 20.0,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 5 / 20,
            "weight_decay": 0.1,
            "max_grad_norm": 0.0,
            "label_smoothing_factor": 0.1,
            "smallest_area": 0.08,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        data=f"--model_name_or_path DEIT3 {IMAGENET}",
        expected=f"{accuracy} % on ImageNet",
        price={"S/16": "8 GPUs", "B/16": "16 GPUs", "L/16": "32 GPUs"}[variant],
        differs="the warm-up starts at 0, not 1e-6",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Ours: small pictures, few of them, and no GPU


# What both share. The Trainer's AdamW.
_OURS = {"learning_rate": 1e-3, "warmup_steps": 0.1, "weight_decay": 0.05, "max_grad_norm": 1.0, **COSINE}


def digits() -> Recipe:
    """The defaults of the digits, by name."""
    return Recipe(
        name="digits",
        source="ours",
        batch_size=64,
        fields={"variant": "Mi/4", "image_size": [8], "num_train_epochs": 40.0, **_OURS},
        data="--dataset_name digits",
        expected="99.0 ± 0.7 % of 270 held-out digits (10 seeds, the last step)",
        price="1 minute on 2 CPU cores",
    )


def small_photos() -> Recipe:
    """A few thousand photographs at 64 pixels, on a CPU. Stronger augmentation needs longer runs."""
    return Recipe(
        name="small_photos",
        source="ours",
        batch_size=64,
        fields={"variant": "Mi/8", "image_size": [64], "num_train_epochs": 24.0, "smallest_area": 0.35, **_OURS},
        data="--train_dir photos",
        expected="not measured over several seeds yet",
        price="not measured",
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table


def _all() -> dict[str, Recipe]:
    recipes = [
        *(paper_pretraining(data, variant) for data, rows in PAPER_PRETRAINING.items() for variant in rows),
        *(paper_finetuning(data) for data in _PAPER_FINETUNING),
        paper_finetuning_large("L/16", 512, "from JFT 87.76 %, from ImageNet-21k 85.30 % (Table 2)"),
        paper_finetuning_large("H/14", 518, "from JFT 88.55 % (Table 2)"),
        *(augreg(level) for level in AUGREG_LEVELS),
        bv_s16_90ep(),
        *(bv_transfer(data) for data in _BV_TRANSFER),
        *(deit3(variant) for variant in _DEIT3),
        *(deit3_finetuning(variant) for variant in _DEIT3_384),
        *pretraining_recipes(),
        *own_recipes(),
        digits(),
        small_photos(),
    ]
    return {recipe.name: recipe for recipe in recipes}


RECIPES: dict[str, Recipe] = _all()


def find_recipe(name: str) -> Recipe:
    """
    The recipe of that name.

    Raises:
        ValueError: if there is none; the message lists them.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no recipe {name!r}.{hint} Recipes: {', '.join(RECIPES)}.")
    return RECIPES[name]
