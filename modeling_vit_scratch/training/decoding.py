# SPDX-License-Identifier: Apache-2.0
"""
JPEG photos at the scale that training needs: libjpeg gives 1/2, 1/4 or 1/8 of the sides by computing fewer cosines.

Other formats, and every image that is evaluated or served, are decoded in full.
"""

from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile

from ..image_processing_vit_scratch import ViTScratchImageProcessor, binary_source, decode_errors


# The EXIF orientations of upright images whose x (y) axis runs against one of the axes that are stored, and those whose
# sides are swapped.
_X_IS_REVERSED, _Y_IS_REVERSED, _IS_TURNED = {2, 3, 6, 7}, {3, 4, 7, 8}, {5, 6, 7, 8}


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
        image = Image.open(binary_source(content))
    return ReducedJpeg(image, decoder, name) if isinstance(image, JpegImageFile) else decoder.decode(image, name=name)


class ReducedJpeg:
    """
    A JPEG photo that is decoded when it is known which part of it is wanted, and how small.

    Rule: the smallest of the scales 1/8, 1/4, 1/2 and 1 at which the part has at least the pixels of the result in both
    directions. At scale 1 the result is that of the whole image, bit for bit.

    Attributes:
        width, height: in pixels, of the whole image, upright.
    """

    def __init__(self, image: JpegImageFile, decoder: ViTScratchImageProcessor, name: str) -> None:
        self._image, self._decoder, self._name = image, decoder, name
        with decode_errors(name):
            self._orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        self.width, self.height = image.size[::-1] if self._orientation in _IS_TURNED else image.size

    def resize(self, size: tuple[int, int], resample: int, box: tuple[float, float, float, float]) -> Image.Image:
        """As `PIL.Image.Image.resize`; once, since it decodes. Raises ImageDecodeError for a broken file."""
        left, top, right, bottom = box
        factor = min((right - left) / size[0], (bottom - top) / size[1])
        scale = next((scale for scale in (8, 4, 2) if factor >= scale), 1)
        with decode_errors(self._name):
            stored_width, stored_height = self._image.size
            self._image.draft(None, (stored_width // scale, stored_height // scale))
        image = self._decoder.decode(self._image, name=self._name)
        # A side that the scale does not divide is rounded up, at the end of the stored axis.
        x = image.width - self.width / scale if self._orientation in _X_IS_REVERSED else 0.0
        y = image.height - self.height / scale if self._orientation in _Y_IS_REVERSED else 0.0
        box = (x + left / scale, y + top / scale, x + right / scale, y + bottom / scale)
        return image.resize(size, resample, box=box)
