# SPDX-License-Identifier: Apache-2.0
"""
The fast way from a file to the pixels of a part of it: what training needs, and no more.

JPEG photos are decoded at the scale that the part needs: libjpeg gives 1/2, 1/4 or 1/8 of the sides by computing fewer
cosines. Every part is resized by torch's 8-bit kernels, as the image processor does with `do_fast_resize`: at most one
level away from Pillow, in a third of the time. (Bicubic, where one side is enlarged and the other reduced, can be
further: the two passes are in another order.)

Images that are evaluated or served are decoded in full and resized by Pillow, unless the processor is set otherwise.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ..image_decoding_vit_scratch import ImageDecodeError, decode_errors, is_scalable_jpeg, open_image, orientation_of
from ..image_processing_vit_scratch import TORCH_FILTERS, ViTScratchImageProcessor, resize_interleaved


# The EXIF orientations of upright images whose x (y) axis runs against one of the axes that are stored, and those whose
# sides are swapped.
_X_IS_REVERSED, _Y_IS_REVERSED, _IS_TURNED = {2, 3, 6, 7}, {3, 4, 7, 8}, {5, 6, 7, 8}

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def reduction(part: tuple[float, float], size: tuple[int, int]) -> int:
    """
    The greatest of 8, 4, 2 and 1 by which the sides of a part can be divided so that it still has the pixels of the
    result in both directions. Both are (width, height).
    """
    factor = min(part[0] / size[0], part[1] / size[1])
    return next((scale for scale in (8, 4, 2) if factor >= scale), 1)


def open_photo(content: str | bytes, decoder: ViTScratchImageProcessor, name: str) -> "Image.Image | ReducedJpeg":
    """
    A JPEG file as its header alone; anything else decoded, upright.

    Args:
        content: path or bytes of a file.
        decoder: for the channels.
        name: what errors call it.

    Raises:
        ImageDecodeError: it is missing, damaged or no image.
    """
    with decode_errors(name):
        image = open_image(content)
    return ReducedJpeg(image, decoder, name) if isinstance(image, JpegImageFile) else decoder.decode(image, name=name)


class ReducedJpeg:
    """
    A JPEG photo that is decoded when it is known which part of it is wanted, and how small: see `reduction`. At scale 1
    it is the whole image, bit for bit.

    Attributes:
        width, height: in pixels, of the whole image, upright.
    """

    def __init__(self, image: JpegImageFile, decoder: ViTScratchImageProcessor, name: str) -> None:
        self._image, self._decoder, self._name = image, decoder, name
        self._orientation = orientation_of(image)
        self.width, self.height = image.size[::-1] if self._orientation in _IS_TURNED else image.size

    def decode(self, size: tuple[int, int], box: Box) -> tuple[Image.Image, Box]:
        """
        Once: the image, upright, at the scale that makes (width, height) of the box, and where the box is in it. Raises
        ImageDecodeError for a broken file.
        """
        left, top, right, bottom = box
        with decode_errors(self._name):
            is_scalable = is_scalable_jpeg(self._image)
        scale = reduction((right - left, bottom - top), size) if is_scalable else 1
        with decode_errors(self._name):
            stored_width, stored_height = self._image.size
            if scale > 1:
                self._image.draft(None, (stored_width // scale, stored_height // scale))
        image = self._decoder.decode(self._image, name=self._name)
        # A side that the scale does not divide is rounded up, at the end of the stored axis.
        x = image.width - self.width / scale if self._orientation in _X_IS_REVERSED else 0.0
        y = image.height - self.height / scale if self._orientation in _Y_IS_REVERSED else 0.0
        return image, (x + left / scale, y + top / scale, x + right / scale, y + bottom / scale)


@dataclass(frozen=True)
class StoredImage:
    """Path or bytes of an image file, None where a table has neither, and what errors call it."""

    content: str | bytes | None
    name: str

    def decode(self, decoder: ViTScratchImageProcessor) -> Image.Image:
        """The image, upright, with the decoder's channels. Raises ImageDecodeError with the name of a broken file."""
        return decoder.decode(self._content(), name=self.name)

    def fit(self, processor: ViTScratchImageProcessor, **settings: Any) -> torch.Tensor:
        """uint8 (C, H, W), as the processor decodes, resizes and crops it: see its `fit`. Raises what that raises."""
        return torch.from_numpy(np.stack(processor.fit(self._content(), name=self.name, **settings)))

    def open_photo(self, decoder: ViTScratchImageProcessor) -> "TrainingPhoto":
        """The same, but JPEG files are not decoded yet."""
        return TrainingPhoto(open_photo(self._content(), decoder, self.name))

    def _content(self) -> str | bytes:
        if self.content is None:
            raise ImageDecodeError(f"{self.name} is missing: the row has neither bytes nor a path")
        return self.content


class TrainingPhoto:
    """
    What `PhotoAugmentation` takes in place of a PIL image, to go the fast way.

    Attributes:
        width, height: in pixels, of the whole image, upright.
        is_decoded: JPEG photos are not, before the pixels of a part of them are asked for.
    """

    def __init__(self, image: Image.Image | ReducedJpeg) -> None:
        self.image, self.width, self.height = image, image.width, image.height
        self.is_decoded = not isinstance(image, ReducedJpeg)


@dataclass(frozen=True)
class PhotoPart:
    """
    A part of a photo, resized, and mirrored or not; not yet decoded. A JPEG's is to be of multiples of the scale at
    which it is decoded; else its edges are moved, by half a decoded pixel at most.

    Attributes:
        size: (width, height).
        resample: the PIL filter. Those that torch lacks are Pillow's.
        box: in pixels of the whole image.
    """

    photo: TrainingPhoto
    size: tuple[int, int]
    resample: int
    box: tuple[int, int, int, int]
    is_mirrored: bool = False

    def pixels(self) -> torch.Tensor:
        """uint8 (C, H, W). Once. Raises ImageDecodeError for a broken file."""
        image, box = self.photo.image, self.box
        if not self.photo.is_decoded:
            image, box = image.decode(self.size, box)
        box = tuple(round(edge) for edge in box)
        if self.resample in TORCH_FILTERS:
            pixels = resize_interleaved(_interleaved(image, box), self.size, self.resample)[0]
            pixels = pixels[: len(image.getbands())].numpy()
        else:
            pixels = to_pixels(image.crop(box).resize(self.size, self.resample)).numpy()
        return torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1] if self.is_mirrored else pixels))

    def to_image(self) -> Image.Image:
        """The same as a PIL image of mode L, RGB or RGBA."""
        return Image.fromarray(self.pixels().permute(1, 2, 0).squeeze(-1).contiguous().numpy())


def _interleaved(image: Image.Image, box: tuple[int, int, int, int]) -> torch.Tensor:
    """
    A part of an image, uint8 (1, H, W, C). For RGB C is 4, with one that means nothing: as in Pillow's own memory, of
    which this is a view.
    """
    left, top, right, bottom = box
    if image.mode == "RGB":
        try:
            memory = pyarrow.array(image).values
        except ValueError:  # more than 16 MB are not in one piece
            pass
        else:
            return torch.from_dlpack(memory).view(1, image.height, image.width, 4)[:, top:bottom, left:right]
    return torch.from_numpy(np.array(image.crop(box)).reshape(1, bottom - top, right - left, -1))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """uint8 (C, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))


class Augmentation(Protocol):
    """Any callable (image, generator) -> image that can be pickled for worker processes; `description` is for cards."""

    description: str

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Image.Image: ...
