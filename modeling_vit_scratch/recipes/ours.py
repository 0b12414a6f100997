# SPDX-License-Identifier: Apache-2.0
"""Named runs that were measured with this repository, whose models are in model_cards/: see `recipes`."""

from .recipe import COSINE, Recipe


# Of both. DeiT's augmentation (Touvron et al., arXiv:2012.12877, Table 9), with larger parts: the images are small.
_COMMON = {
    "smallest_area": 0.25,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing_factor": 0.1,
    "images_on_device": True,
    "adam_beta2": 0.95,
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    **COSINE,
}


def tiny_imagenet() -> Recipe:
    """A plain ViT of 7.2 million weights on 100,000 images of 64 x 64 pixels and 200 classes, from scratch."""
    return Recipe(
        name="tiny_imagenet",
        source="this repository",
        batch_size=2048,
        fields={
            "variant": "Ti/16",
            "image_size": [64],
            "patch_size": [8],
            "config_overrides": "hidden_size=256,num_hidden_layers=9,num_attention_heads=4,intermediate_size=1024,"
            "drop_path_rate=0.1,representation_size=None",
            "num_train_epochs": 155.0,
            "learning_rate": 2.5e-3,
            "warmup_steps": 0.05,
            "ema_decay": 0.9995,
            **_COMMON,
        },
        data="--dataset_name tiny-imagenet --torch_compile True --per_device_train_batch_size 2048",
        expected="42.24 % of Tiny ImageNet's validation images (n = 1); much more with more steps",
        price="364 s on one NVIDIA H200",
        script="pretrain",
    )


def tiny_imagenet_96() -> Recipe:
    """Goes on from there at a higher resolution (the paper, section 3.2): the same images, enlarged, mixed less."""
    return Recipe(
        name="tiny_imagenet_96",
        source="this repository",
        batch_size=512,
        fields={
            "image_size": [96],
            "num_train_epochs": 91.0,
            "learning_rate": 3e-3,
            "warmup_steps": 0.03,
            "ema_decay": 0.999,
            **_COMMON,
            "smallest_area": 0.35,
            "mixup": 0.2,
        },
        data="--model_name_or_path MODEL --dataset_name tiny-imagenet --torch_compile True "
        "--torch_compile_mode reduce-overhead --per_device_train_batch_size 512",
        expected="from tiny_imagenet: 53.77 % of Tiny ImageNet's validation images (n = 1)",
        price="354 s on one NVIDIA H200",
        script="pretrain",
    )


def own_recipes() -> list[Recipe]:
    """All of them."""
    return [tiny_imagenet(), tiny_imagenet_96()]
