# SPDX-License-Identifier: Apache-2.0
"""
Named runs of pretraining without labels, and MAE's fine-tuning: see `recipes`.

"MAE" is github.com/facebookresearch/mae at efb2a80, "SimMIM" github.com/microsoft/SimMIM at d3e29bc.
"""

from .recipe import COSINE, IMAGENET, Recipe, slug


# Of MAE and SimMIM: pixels normalised by the mean and variance of ImageNet, resized with bicubic interpolation.
_PIXELS = "the processor's bilinear resizing and -1 to 1 for bicubic and ImageNet's mean and variance"


def paper_mpp() -> Recipe:
    """The paper's masked patch prediction: Adam, rate 2e-4, 10,000 steps of warm-up, cosine, batch 4096."""
    return Recipe(
        name="paper_mpp_b16",
        source="Dosovitskiy et al., arXiv:2010.11929v2, B.1.2",
        batch_size=4096,
        fields={
            "variant": "B/16",
            "image_size": [224],
            "config_overrides": "hidden_act=gelu_pytorch_tanh",
            "objective": "mpp",
            "mask_ratio": 0.5,
            "mpp_target": "mean_color",
            "max_steps": 1_000_000,
            "learning_rate": 2e-4,
            "weight_decay": 0.1,
            "warmup_steps": 10_000.0,
            "max_grad_norm": 0.0,
            "smallest_area": 0.05,
            **COSINE,
        },
        data="--train_dir 'shards/*.tar' --streaming",
        expected="from JFT-300M, fine-tuned on ImageNet: 79.9 %; 100,000 steps give most of it (B.1.2)",
        differs="the paper gives no weight decay and no clipping for it: here those of Table 3 for JFT-300M",
        script="pretrain",
    )


# MAE, PRETRAIN.md and FINETUNE.md: fine-tuning rate, layer decay, drop path, epochs, accuracy, price.
_MAE: dict[str, tuple[float, float, float, int, str, str]] = {
    "B/16": (2e-3, 0.65, 0.1, 100, "83.57 ± 0.08 % on ImageNet (n = 4), from 1600 epochs", "7 h 11 min on 32 V100"),
    "L/16": (4e-3, 0.75, 0.2, 50, "85.87 ± 0.07 % on ImageNet (n = 4), from 1600 epochs", "8 h 52 min on 32 V100"),
    "H/14": (4e-3, 0.75, 0.3, 50, "86.93 % on ImageNet, from 1600 epochs", "13 h 9 min on 64 V100"),
}


def mae(variant: str) -> Recipe:
    """MAE, PRETRAIN.md and main_pretrain.py: 800 epochs, 1.5e-4 for 256 images, warm-up of 40 epochs, decay 0.05."""
    return Recipe(
        name=f"mae_{slug(variant)}",
        source="He et al., arXiv:2111.06377; MAE, PRETRAIN.md",
        batch_size=4096,
        fields={
            "variant": variant,
            "image_size": [224],
            "config_overrides": "position_embedding=sincos_2d",
            "objective": "mae",
            "mask_ratio": 0.75,
            "norm_pix_loss": True,
            "decoder_hidden_size": 512,
            "decoder_num_hidden_layers": 8,
            "decoder_num_attention_heads": 16,
            "num_train_epochs": 800.0,
            "learning_rate": 1.5e-4 * 4096 / 256,
            "adam_beta2": 0.95,
            "weight_decay": 0.05,
            "warmup_steps": 40 / 800,
            "max_grad_norm": 0.0,
            "smallest_area": 0.2,
            **COSINE,
        },
        data=IMAGENET,
        expected="fine-tuned on ImageNet, L/16: 85.5 %" if variant == "L/16" else "published for 1600 epochs only",
        price="42 h on 64 V100" if variant == "L/16" else "not published",
        differs=f"{_PIXELS}; the fixed positions have MoCo v3's frequencies",
        script="pretrain",
    )


def mae_finetuning(variant: str) -> Recipe:
    """MAE, FINETUNE.md and main_finetune.py: AdamW, batch 1024, layer decay, RandAugment, Mixup, CutMix, erasing."""
    rate, layer_decay, drop_path, epochs, expected, price = _MAE[variant]
    return Recipe(
        name=f"mae_finetune_{slug(variant)}",
        source="He et al., arXiv:2111.06377; MAE, FINETUNE.md",
        batch_size=1024,
        fields={
            "image_size": [224],
            "config_overrides": f"pooling=mean,drop_path_rate={drop_path:g}",
            "num_train_epochs": float(epochs),
            "learning_rate": rate,
            "layer_decay": layer_decay,
            "weight_decay": 0.05,
            "warmup_steps": 5 / epochs,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 1e-6},
            "label_smoothing_factor": 0.1,
            "smallest_area": 0.08,
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "random_erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        data=f"--model_name_or_path MAE {IMAGENET}",
        expected=expected,
        price=price,
        differs=f"{_PIXELS}; the norm is before the mean of the patches, MAE's after it; erased pixels are grey, MAE's "
        "noise; the least rate is that of the last layer for all",
    )


def simmim() -> Recipe:
    """SimMIM, configs/vit_base__800ep: AdamW, 1e-4 for 512 images, batch 2048, clip 5, LayerScale 0.1, drop path."""
    return Recipe(
        name="simmim_b16",
        source="Xie et al., arXiv:2111.09886; SimMIM, configs/vit_base__800ep",
        batch_size=2048,
        fields={
            "variant": "B/16",
            "image_size": [224],
            "config_overrides": "layer_scale_init_value=0.1,drop_path_rate=0.1",
            "objective": "simmim",
            "mask_ratio": 0.6,
            "mask_patch_size": 32,
            "num_train_epochs": 800.0,
            "learning_rate": 1e-4 * 2048 / 512,
            "adam_beta2": 0.999,
            "weight_decay": 0.05,
            "warmup_steps": 10 / 800,
            "max_grad_norm": 5.0,
            "smallest_area": 0.67,
            **COSINE,
        },
        data=IMAGENET,
        expected="fine-tuned on ImageNet: 83.8 %",
        differs=f"a cosine for one step to a tenth after 700 epochs; learned positions for shared relative biases; "
        f"{_PIXELS}; the warm-up starts at 0, not 5e-7",
        script="pretrain",
    )


def pretraining_recipes() -> list[Recipe]:
    """All of them."""
    return [paper_mpp(), *(mae(variant) for variant in _MAE), *(mae_finetuning(variant) for variant in _MAE), simmim()]
