# SPDX-License-Identifier: Apache-2.0
"""The crops of DINO: large and small parts of one image, each with other colours."""

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..data.dataset import Photo, reduction
from .photo import OPERATIONS, PhotoAugmentation


# `DataAugmentationDINO` in main_dino.py: torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1), for four of five crops.
_JITTER = {"Brightness": 0.4, "Contrast": 0.4, "Color": 0.2, "Hue": 0.1}
_JITTERED, _GREY = 0.8, 0.2
# Standard deviations of the blur, in pixels of an image of 224: for other sizes in proportion.
_BLUR, _BLURRED_AT = (0.1, 2.0), 224


class MultiCrop:
    """
    Two global crops of `size` and some local ones of `local_size`, (height, width), as in DINO (Caron et al.,
    arXiv:2104.14294). The scales are the least and the largest fraction of the area. Those of photos are mirrored half
    of the time, their colours change, and some are blurred or solarised. Digits would lose what they are.
    """

    def __init__(
        self, size: tuple[int, int], local_size: tuple[int, int], local_crops: int, resample: int,
        global_scale: tuple[float, float], local_scale: tuple[float, float], is_photo: bool = True,
    ) -> None:  # fmt: skip
        large = PhotoAugmentation(size, resample, *global_scale)
        small = PhotoAugmentation(local_size, resample, *local_scale)
        # The part, and the probabilities that it is blurred and solarised.
        self.crops = [(large, 1.0, 0.0), (large, 0.1, 0.2), *[(small, 0.5, 0.0)] * local_crops]
        self.is_photo, self.blur = is_photo, max(size) / _BLURRED_AT
        shares = [" to ".join(f"{100 * share:g}" for share in scale) for scale in (global_scale, local_scale)]
        sides = " x ".join(map(str, local_size))
        local = f" and {local_crops} of {shares[1]} %, of {sides} pixels" if local_crops else ""
        self.description = f"2 crops of {shares[0]} % of the area{local}"
        self.description += ", with colours and blur as in DINO" if is_photo else ""

    def __call__(self, image: Image.Image | Photo, generator: np.random.Generator) -> dict[str, list[Image.Image]]:
        """The global crops as "pixel_values", the local ones as "local_pixel_values"."""
        drawn = [part.draw(image.width, image.height, generator) for part, _, _ in self.crops]
        left = top = 0.0
        scale = 1.0
        if isinstance(image, Photo):  # a JPEG is decoded once, at the scale of the crop that needs most
            width, height = image.width, image.height
            sizes = [part.size[::-1] for part, _, _ in self.crops]
            parts = [(box[2] - box[0], box[3] - box[1]) for box, _ in drawn]
            wanted = min(map(reduction, parts, sizes))
            image, whole = image.decode((width / wanted, height / wanted), (0, 0, width, height))
            left, top, scale = whole[0], whole[1], width / (whole[2] - whole[0])
        crops = []
        for (part, blur, solarize), (box, is_mirrored) in zip(self.crops, drawn):
            offsets = (left, top, left, top)
            box = tuple(round(offset + edge / scale) for offset, edge in zip(offsets, box))
            crop = image.crop(box).resize(part.size[::-1], part.resample)
            if is_mirrored and self.is_photo:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crops.append(self._change(crop, blur, solarize, generator) if self.is_photo else crop)
        return {"pixel_values": crops[:2]} | ({"local_pixel_values": crops[2:]} if len(crops) > 2 else {})

    def _change(self, crop: Image.Image, blur: float, solarize: float, generator: np.random.Generator) -> Image.Image:
        if generator.random() < _JITTERED:
            for name in generator.permutation(list(_JITTER)):
                change = generator.uniform(-_JITTER[name], _JITTER[name])
                crop = turn_hue(crop, change) if name == "Hue" else OPERATIONS[name](crop, change)
        if generator.random() < _GREY:
            crop = crop.convert("L").convert(crop.mode)
        if generator.random() < blur:
            crop = crop.filter(ImageFilter.GaussianBlur(self.blur * generator.uniform(*_BLUR)))
        return ImageOps.solarize(crop, 128) if generator.random() < solarize else crop


def turn_hue(image: Image.Image, change: float) -> Image.Image:
    """Torchvision's `adjust_hue`, by a fraction of the circle. Grey images stay as they are."""
    if image.mode == "L":
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + int(255 * change)) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert(image.mode)
