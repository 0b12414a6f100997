# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
The named variants of the Vision Transformer: size, patches and, of the hybrids, the stem.

"The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021 (arXiv:2010.11929v2).
"""

from typing import Any


# width, layers, MLP width, heads. B, L and H: the paper, Table 1. Ti and S: Steiner et al., How to train your ViT?
# (AugReg, arXiv:2106.10270), Table 2. "Mi" is ours, for the CPU and small pictures; "test" is for tests.
_SIZES: dict[str, tuple[int, int, int, int]] = {
    "test": (32, 2, 64, 4),
    "Mi": (96, 6, 192, 6),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
}
# The patch sizes for which the paper or AugReg trained each size. "test" is rectangular on purpose: code that takes
# rows for columns fails on it.
_PATCHES: dict[str, tuple[int, ...]] = {
    "test": (4,),
    "Mi": (2, 4, 8, 16),
    "Ti": (16,),
    "S": (16, 32),
    "B": (8, 16, 32),
    "L": (16, 32),
    "H": (14,),
}
_IMAGE_SIZES: dict[str, int | list[int]] = {"test": [16, 24], "Mi/2": 8, "Mi/4": 32, "Mi/8": 64, "Mi/16": 128}


def _variant(size: str, patch: int) -> dict[str, Any]:
    width, layers, mlp_width, heads = _SIZES[size]
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": mlp_width,
        "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": _IMAGE_SIZES.get(size, _IMAGE_SIZES.get(f"{size}/{patch}", 224)),
    }


# Hybrids: units in each stage of the ResNet, size, and the pixels that become one token (the paper's code,
# configs/models.py). The names are the published ones: "R+Ti/16" has 32, since its root halves the image twice.
_HYBRIDS: dict[str, tuple[list[int], str, int]] = {
    "R+Ti/16": ([], "Ti", 32),
    "R26+S/32": ([2, 2, 2, 2], "S", 32),
    "R26+B/32": ([2, 2, 2, 2], "B", 32),
    "R50+B/16": ([3, 4, 9], "B", 16),
    "R50+L/32": ([3, 4, 6, 3], "L", 32),
}

VARIANTS: dict[str, dict[str, Any]] = {
    f"{size}/{patch}": _variant(size, patch) for size, patches in _PATCHES.items() for patch in patches
} | {name: {**_variant(size, patch), "stem_layers": stem} for name, (stem, size, patch) in _HYBRIDS.items()}

__all__ = ["VARIANTS"]
