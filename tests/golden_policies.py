# SPDX-License-Identifier: Apache-2.0
"""
What timm's and torchvision's augmentation makes of a small picture: writes golden_policies.json beside this file.

    python tests/golden_policies.py        in an environment of its own with torch, timm and torchvision

Geometric operations are told to be bilinear and to fill with the grey 128, as ours are.
"""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


FILE = Path(__file__).with_suffix(".json")


def picture() -> Image.Image:
    """8 x 6 pixels, (6, 8, 3): rectangular, with a dark and a light half, so that equalising and the like do much."""
    pixels = np.random.RandomState(0).randint(20, 130, (6, 8, 3))
    pixels[:, 4:] += 100
    return Image.fromarray(pixels.astype(np.uint8))


def pack(image: Image.Image) -> str:
    return base64.b85encode(zlib.compress(np.asarray(image, dtype=np.uint8).tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype=np.uint8).reshape(6, 8, 3)


def torchvision_cases() -> dict[str, list[str]]:
    """policy:operation:magnitude -> the results for both signs, in any order."""
    from torchvision.transforms import InterpolationMode, autoaugment

    image, cases = picture(), {}
    for policy, indices in (("RandAugment", (9, 30)), ("TrivialAugmentWide", (4, 30))):
        augment = getattr(autoaugment, policy)()
        size = (31, (6, 8)) if policy == "RandAugment" else (31,)
        for name, (magnitudes, signed) in augment._augmentation_space(*size).items():
            for index in indices:
                magnitude = float(magnitudes[index]) if magnitudes.ndim else 0.0
                results = [
                    autoaugment._apply_op(image, name, sign * magnitude, InterpolationMode.BILINEAR, [128] * 3)
                    for sign in ((1, -1) if signed else (1,))
                ]
                cases[f"{policy}:{name}:{index}"] = sorted({pack(result) for result in results})
    return cases


def timm_cases() -> dict[str, list[str]]:
    """The same for timm's increasing RandAugment."""
    from timm.data import auto_augment

    settings = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BILINEAR, "translate_const": 250}
    image, cases = picture(), {}
    for name in auto_augment._RAND_INCREASING_TRANSFORMS:
        for magnitude in (4, 9):  # at 10 its PosterizeIncreasing keeps no bits, which Pillow 13 refuses
            operation, results = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings), set()
            for chance in (0.1, 0.9):
                auto_augment.random.random = lambda chance=chance: chance
                results.add(pack(operation(image)))
            cases[f"timm:{name}:{magnitude}"] = sorted(results)
    return cases


def mixing_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (3, 2, 7, 10) and classes (3,)."""
    return np.random.RandomState(1).standard_normal((3, 2, 7, 10)).astype(np.float32), np.array([2, 0, 1])


def mixing_cases() -> list[dict]:
    """torchvision's MixUp and CutMix, with their random numbers given."""
    import torch
    from torchvision.transforms import v2

    pixels, classes = map(torch.from_numpy, mixing_inputs())
    cases = []
    for name, weight, column, row in (
        ("mixup", 0.3, 0, 0), ("cutmix", 0.6, 4, 3), ("cutmix", 0.2, 0, 6), ("cutmix", 0.97, 9, 0),
        ("cutmix", 0.0, 5, 3),
    ):  # fmt: skip
        transform = v2.MixUp(num_classes=3) if name == "mixup" else v2.CutMix(num_classes=3)
        transform._dist = type("Fixed", (), {"sample": staticmethod(lambda shape, weight=weight: torch.tensor(weight))})
        given = iter((column, row))
        randint, torch.randint = torch.randint, lambda *args, given=given, **kwargs: torch.tensor([next(given)])
        mixed, labels = transform(pixels, classes)
        torch.randint = randint
        cases.append(
            {"name": name, "weight": weight, "column": column, "row": row, "labels": labels.tolist()}
            | {"pixels": [round(value, 6) for value in mixed.flatten().tolist()]}
        )
    return cases


def main() -> None:
    import importlib.metadata

    import torch

    libraries = [torch.library.Library("torchvision", "DEF")]  # for a torchvision that is built for another torch
    for name in ("nms", "qnms"):
        libraries[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    golden = {
        "versions": {name: importlib.metadata.version(name) for name in ("pillow", "timm", "torchvision")},
        "operations": torchvision_cases() | timm_cases(),
        "mixing": mixing_cases(),
    }
    FILE.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
