# SPDX-License-Identifier: Apache-2.0
"""
What timm and torchvision compute, for tests that have neither: writes golden_checkpoints.json beside this file.

    python tests/golden_checkpoints.py        in an environment of its own with torch, timm and torchvision

Weights are random and are not stored: they follow from names and shapes by `weights`, which the tests call too.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch


FILE = Path(__file__).with_suffix(".json")


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """A value for every name, the same everywhere: numpy's RandomState is frozen."""
    state = {}
    for name, shape in shapes.items():
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        is_scale = name.endswith(("weight", "gamma")) and len(shape) == 1
        state[name] = torch.from_numpy(
            np.float32(1) + np.float32(0.3) * values if is_scale else np.float32(0.4) * values
        )
    return state


def images(size: list[int]) -> torch.Tensor:
    """Two images, (2, C, H, W)."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((2, *size)).astype(np.float32))


def timm_cases() -> dict:
    """timm's models by what is special about them, tiny."""
    import timm

    tiny = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    square = {**tiny, "img_size": 16}
    arguments = {
        "vit_base_patch16_224": tiny,
        "vit_base_patch16_224.gap": {**tiny, "global_pool": "avg", "class_token": False, "fc_norm": False},
        "vit_base_patch16_224.avg": {**square, "global_pool": "avg", "reg_tokens": 2, "no_embed_class": True},
        "vit_base_patch16_224.dino": {**square, "num_classes": 0},
        "vit_base_patch16_224.qk_norm": {**square, "qk_norm": True, "qkv_bias": False},
        "deit_base_patch16_224": square,
        "deit_base_distilled_patch16_224": tiny,
        "deit3_base_patch16_224": square,
        "vit_small_patch14_dinov2": {**square, "num_classes": 0},
        "vit_small_patch14_reg4_dinov2": {**square, "num_classes": 0},
        "vit_base_patch16_224.tanh": {**square, "act_layer": "gelu_tanh"},
    }
    cases = {}
    for name, kwargs in arguments.items():
        model = timm.create_model(name.split(".")[0], **kwargs).eval()
        arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in kwargs.items()}
        config = {
            "architecture": name.split(".")[0],
            "num_classes": kwargs["num_classes"],
            "num_features": kwargs["embed_dim"],
            "global_pool": model.global_pool,
            "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
            "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bicubic"}
            | {"crop_pct": 0.95, "crop_mode": "center", "input_size": [3, *_pair(kwargs["img_size"])]},
        }
        cases[f"timm:{name}"] = record(model, [3, *_pair(kwargs["img_size"])], config)
    return cases


def torchvision_cases() -> dict:
    """torchvision's VisionTransformer with and without its representation layer."""
    from torchvision.models.vision_transformer import VisionTransformer

    cases = {}
    for name, size in (("vit", None), ("vit_representation", 12)):
        model = VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=3, representation_size=size).eval()
        cases[f"torchvision:{name}"] = record(model, [3, 16, 16], {})
    return cases


def _pair(size: int | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)


def record(model: torch.nn.Module, size: list[int], config: dict) -> dict:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights(shapes))
    with torch.no_grad():
        output = model(images(size))
    return {
        "shapes": shapes,
        "image": size,
        "config": config,
        "output": [[float(f"{v:.9g}") for v in row] for row in output.tolist()],
    }


if __name__ == "__main__":
    # Beside a torch for the CPU, torchvision from PyPI lacks an operator that nothing here calls.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm
    import torchvision

    versions = {"torch": torch.__version__, "timm": timm.__version__, "torchvision": torchvision.__version__}
    cases = {**timm_cases(), **torchvision_cases()}
    FILE.write_text(json.dumps({"versions": versions, "cases": cases}, separators=(",", ":")) + "\n")
    print(f"{len(cases)} cases, {FILE.stat().st_size} bytes")
