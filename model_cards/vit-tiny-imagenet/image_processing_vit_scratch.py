# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
The image processor of the Vision Transformer: from decoded images to `pixel_values`.

Three steps per image: decode (`image_decoding_vit_scratch.py`), resize and crop in Pillow, then rescale and normalize
in one float32 multiply-add per channel. Needs no torchvision, and gives the same values with and without it. On RGB
input the result equals transformers' `ViTImageProcessorPil`, unless `do_fast_resize` is set.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import PILImageResampling, get_image_size_for_max_height_width
from transformers.processing_utils import Unpack

from .compatibility_vit_scratch import ImagesKwargs, PilBackend, SizeDict, make_importable, validate_typed_dict
from .image_decoding_vit_scratch import (
    decode_errors,
    decode_image,
    flatten,
    is_file,
    is_scalable_jpeg,
    is_unit_float,
    open_image,
    orientation_of,
    read_array,
    source_name,
)


make_importable(__name__)

# More than any camera has; a damaged or hostile preprocessor_config.json must not fill the memory.
MAX_CHANNELS = 10_000
# What `decode` uses, and after it `resize_and_crop`.
DECODE_SETTINGS = ("num_channels", "do_convert_rgb", "background_color", "input_data_format", "do_eight_bits")
FIT_SETTINGS = ("do_resize", "size", "crop_pct", "resample", "do_center_crop", "crop_size", "do_fast_resize")
# torch's names of the filters that it has for 8 bits.
TORCH_FILTERS = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
# `do_fast_resize`: from so many pixels on, Pillow is as fast as torch, the copy included; and JPEG files are decoded to
# at least so many times the sides of the result. Less than 1.5 is visible, more is slower.
LARGE, JPEG_GAP = 4_000_000, 1.5
# From 13 on, Pillow resizes first along the axis that leaves less to do, and rounds in between.
PILLOW_CHOOSES_AXIS = int(PIL.__version__.partition(".")[0]) >= 13
# What transformers writes into preprocessor_config.json beside the settings.
FILE_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


class ViTScratchImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, *optional*, defaults to 3):
        1 is gray, 3 is RGB; with any other number every image must have exactly that many channels.
    crop_pct (`float`, *optional*):
        In (0, 1]: the shorter side to `size / crop_pct`, then the central `size`. `None` resizes straight to `size`.
    background_color (`tuple[int, int, int]`, *optional*, defaults to white):
        RGB colour, 0 to 255, that shows through transparent pixels.
    do_eight_bits (`bool`, *optional*, defaults to `True`):
        Round arrays to 8 bits. `False`: they keep their values, as float32.
    do_fast_resize (`bool`, *optional*, defaults to `False`):
        Resize the fast way, with slightly other values: see the class.
    """

    num_channels: int | None
    crop_pct: float | int | None
    background_color: tuple[int, ...] | list[int] | None
    do_eight_bits: bool | None
    do_fast_resize: bool | None
    # wider than in ImagesKwargs, which refuses a mean of 0 or a std of 1 written as integers
    rescale_factor: float | int | None
    image_mean: float | int | list[float | int] | tuple[float | int, ...] | None
    image_std: float | int | list[float | int] | tuple[float | int, ...] | None


class ViTScratchImageProcessor(PilBackend):
    """
    Image processor of the Vision Transformer: `processor(images, return_tensors="pt")` gives a `BatchFeature` with
    `pixel_values`, float32 (B, C, H, W). `return_tensors=None` gives a list of (C, H, W) arrays, as in transformers.

    Accepts single images, (nested, mixed) lists and tuples, and 4-D batches (B, H, W, C) or (B, C, H, W) of:

    - paths, http(s) URLs, `data:` URIs, bytes, binary files: anything Pillow reads but PostScript, which is a program;
      of an animation the first frame; .npy files (H, W, C), and with tifffile TIFF files of any number of channels;
    - PIL images of any mode, at their current frame. Transparency (an alpha band or a transparent colour) is laid
      over `background_color`. Modes I, I;16* and F follow the rule for arrays below;
    - NumPy arrays and torch tensors of any device, (H, W), (H, W, C) or (C, H, W), with 1 (gray), 2 (gray and
      alpha), 3 (RGB) or 4 (RGB and alpha) channels, or exactly `num_channels` if that is neither 1 nor 3.

    The rules are the same for every input:

    - *Orientation.* The EXIF orientation of files and PIL images is applied; damaged EXIF is ignored.
    - *Values* become 8 bits per channel, rounded to nearest. bool: 0 and 255. uint8: unchanged. uint16: 65535 is 255.
      Other integers: unchanged if all lie in 0..255, else like uint16 if all lie in 0..65535. Floats: times 255 if all
      lie in 0..1, else unchanged if all lie in 0..255, within 0.001. All else is an error, NaN included.
      With `do_eight_bits=False` arrays keep their values.
    - *Layout* of a 3-D array: `input_data_format`; else the channel axis is the one as long as `num_channels`; else
      the one with 1, 3 or 4 entries; else the one with 2. If both the first and the last axis fit: channels first,
      as in transformers, with a warning.
    - *Channels.* With `num_channels` 1 or 3 images are converted to gray (ITU-R 601-2) or RGB. With any other number
      they must have exactly that many: PIL images as bands (RGBA and CMYK for 4), arrays as channels, which are
      resized independently. `do_convert_rgb=False` keeps the channels that an image has, whatever `num_channels` is.
    - *Size.* As in transformers: an int or `{"height", "width"}`, `{"shortest_edge"}`, `{"shortest_edge",
      "longest_edge"}`, `{"max_height", "max_width"}`; also `{"longest_edge"}` alone. `do_center_crop` with `crop_size`
      pads smaller images with black. `crop_pct` is timm's: the shorter side to `floor(size / crop_pct)`, then the
      centre. The result of a resize may not have more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    - *Resizing* is Pillow's, bit for bit. `do_fast_resize` uses torch's 8-bit kernels for bilinear and bicubic resizes
      of gray and RGB images of up to 4 megapixels: values are within 1 of 255 levels, 2 where bicubic enlarges. Larger
      images are first reduced by whole factors, and JPEG files are decoded at 1/2, 1/4 or 1/8 of their sides if that
      leaves 1.5 times the sides of the result: values of photographs change by 0.1 to 1.3 levels on average, by up to
      17 at edges. transformers' `backend="torchvision"` chooses between classes and does nothing here.
    - *Rescaling.* Values are 0..255 before `rescale_factor`. Without `do_rescale` they stay so, except that arrays
      and tensors that came as 0..1 leave as 0..1: `do_rescale=False` is what transformers asks for with those.

    The defaults are those of the paper's code (google-research/vision_transformer, `input_pipeline.py`): straight to
    the square, 224 x 224, bilinear, and -1..1.

    Raises:
        ImageDecodeError: an image is missing, damaged, in no known format, or a decompression bomb.
        ValueError: an empty batch or image, values or channels outside the rules, contradictory settings.
        TypeError: something that is no image at all, or an unknown setting.
    """

    valid_kwargs = ViTScratchImageProcessorKwargs

    do_convert_rgb = True
    num_channels = 3
    background_color = (255, 255, 255)
    do_resize = True
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BILINEAR
    crop_pct = None
    do_eight_bits = True
    do_fast_resize = False
    do_rescale = True
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, **kwargs: Unpack[ViTScratchImageProcessorKwargs]) -> None:
        settings = {key: value for key, value in kwargs.items() if key not in FILE_KEYS and not key.startswith("_")}
        settings = {key: dict(v) if isinstance(v, SizeDict) else v for key, v in settings.items()}
        validate_typed_dict(self.valid_kwargs, settings)
        channels = min(kwargs.get("num_channels") or self.num_channels, MAX_CHANNELS)  # more is refused below
        kwargs = {"image_mean": (0.5,) * channels, "image_std": (0.5,) * channels} | kwargs
        super().__init__(**kwargs)
        self._checked = {key: getattr(self, key) for key in self._valid_kwargs_names}
        self._validate_preprocess_kwargs(**self._checked)

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """See the class. Here for type checkers: the parent's annotations know neither paths nor bytes."""
        return super().__call__(images, *args, **kwargs)

    def decode(self, image: Any, *, name: str | None = None, **settings: Any) -> Image.Image | np.ndarray:
        """
        One image, in any form that the class accepts, upright and with 8 bits per channel; not yet resized.

        `name` is what errors call it if it has no file name; `settings` (`DECODE_SETTINGS`) that are `None` or left out
        are the processor's own. Returns a PIL image of mode L (`num_channels=1`) or RGB (3); with other `num_channels`
        a PIL image with all its bands, or, from an array, a uint8 array (H, W, C). Raises what the class raises.
        """
        settings = {key: value for key, value in settings.items() if value is not None}
        settings = {key: getattr(self, key) for key in DECODE_SETTINGS} | settings
        return decode_image(image, source_name(image, name or "the image"), **settings)

    def fit(self, image: Any, *, name: str | None = None, **settings: Any) -> list[np.ndarray]:
        """
        One image, decoded, resized and cropped: its channels, C uint8 arrays (H, W). All but rescaling is done.

        `name` is as in `decode`; `settings` (`DECODE_SETTINGS`, `FIT_SETTINGS`) are the processor's own if left out.
        """
        name = source_name(image, name or "the image")
        settings = {key: getattr(self, key) for key in (*DECODE_SETTINGS, *FIT_SETTINGS)} | settings
        if settings["do_resize"] and settings["do_fast_resize"] and is_file(image):
            with decode_errors(name):
                array = read_array(image)
                image = open_image(image) if array is None else array
            # The modes that are resized before they are converted, with the same result: CMYK is not among them.
            if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB"):
                image, settings["do_resize"] = resize_jpeg(image, name, settings), False
        pixels = self.decode(image, name=name, **{key: settings[key] for key in DECODE_SETTINGS})
        return resize_and_crop(pixels, name, settings)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As the parent's, which checks all settings in each call: here only if one is not what `__init__` checked."""
        is_as_checked = all(getattr(self, key) is value for key, value in self._checked.items())
        if args or kwargs.keys() - {"return_tensors"} or not is_as_checked:
            return super().preprocess(images, *args, **kwargs)
        return self._preprocess_image_like_inputs(images, **self._checked | kwargs)

    def to_dict(self) -> dict[str, Any]:
        hidden = {"_checked"} | ({"do_eight_bits"} if self.do_eight_bits else set())  # older code does not know it
        return {key: value for key, value in super().to_dict().items() if key not in hidden}

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        kwargs = super()._standardize_kwargs(**kwargs)
        # transformers 4 wrote `"do_convert_rgb": null` for ViT, and meant nothing by it
        for key in ("do_convert_rgb", "background_color"):
            if kwargs.get(key) is None:
                kwargs[key] = getattr(type(self), key)
        kwargs["background_color"] = tuple(kwargs["background_color"])
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        super()._validate_preprocess_kwargs(**kwargs)
        if problems := list(setting_problems(kwargs)):
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}.")

    def _preprocess_image_like_inputs(self, images: Any, **kwargs: Any) -> BatchFeature:
        batch = flatten(images)
        if not batch:
            raise ValueError("no images: the list or batch is empty.")
        resized, factors = [], []
        # one after the other, so that a batch never holds more than one image in full size
        for index, image in enumerate(batch):
            name = source_name(image, f"image {index + 1} of the batch (index {index})")
            resized.append(self.fit(image, name=name, **kwargs))
            unscaled = 1 / 255 if not kwargs["do_rescale"] and is_unit_float(image) else 1.0
            factors.append(kwargs["rescale_factor"] if kwargs["do_rescale"] else unscaled)
        pixel_values = rescale_and_normalize(resized, factors, kwargs)
        features = BatchFeature({"pixel_values": pixel_values}, tensor_type=kwargs["return_tensors"])
        to_device = kwargs["device"] is not None and kwargs["return_tensors"] == "pt"
        return features.to(kwargs["device"]) if to_device else features


def setting_problems(settings: dict[str, Any]) -> Iterator[str]:
    """What is wrong with standardized settings, in plain words; nothing if they fit together."""
    num_channels, crop_pct, background = (settings[key] for key in ("num_channels", "crop_pct", "background_color"))
    if num_channels is None or num_channels < 1:
        yield f"num_channels must be 1 or more, got {num_channels}"
    elif num_channels > MAX_CHANNELS:
        yield f"num_channels must be {MAX_CHANNELS:,} or less, got {num_channels}"
    elif settings["do_normalize"] and settings["do_convert_rgb"]:
        for key in ("image_mean", "image_std"):
            if np.ndim(settings[key]) and len(settings[key]) != num_channels:
                yield (
                    f"{key} has {len(settings[key])} values but num_channels is {num_channels}: "
                    "give one number, or one per channel"
                )
    if settings["do_normalize"] and not np.all(np.asarray(settings["image_std"]) > 0):
        yield f"image_std must be above 0, got {settings['image_std']}"
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        yield f"background_color must be three numbers from 0 to 255, got {background}"
    limit = Image.MAX_IMAGE_PIXELS
    for key, size in ((key, settings[key]) for key in ("size", "crop_size") if settings[key] is not None):
        if any(edge < 1 for _, edge in size):
            yield f"{key} must be 1 or more everywhere, got {dict(size)}"
        if limit and (size.height or 1) * (size.width or 1) > limit:
            yield f"{key} may not have more than {limit:,} pixels (PIL.Image.MAX_IMAGE_PIXELS), got {dict(size)}"
    if settings["do_center_crop"] and not (settings["crop_size"].height and settings["crop_size"].width):
        yield f"crop_size must have height and width, got {dict(settings['crop_size'])}"
    if settings["do_pad"]:
        yield "do_pad is not supported: use a size with height and width, or do_center_crop"
    if settings["do_resize"] and getattr(settings["size"], "max_pixels", None) is not None:  # no such up to 5.16
        yield "size with min_pixels and max_pixels is not supported: use height and width, or shortest_edge"
    if settings["do_resize"] and settings["resample"] not in set(PILImageResampling):
        yield f"resample must be one of PIL.Image.Resampling, got {settings['resample']!r}"
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            yield f"crop_pct must be above 0 and at most 1, got {crop_pct}"
        if settings["do_center_crop"]:
            yield "crop_pct already crops the centre: leave out do_center_crop, or set crop_pct=None"
        if not (settings["do_resize"] and settings["size"].height and settings["size"].width):
            yield "crop_pct needs do_resize and a size with height and width, or set crop_pct=None"
    if settings["data_format"] not in (None, "channels_first"):
        yield f"pixel_values are always (B, C, H, W): data_format {settings['data_format']!r} is not supported"
    if settings["input_data_format"] not in (None, "channels_first", "channels_last"):
        yield f"input_data_format must be channels_first or channels_last, got {settings['input_data_format']!r}"


def resize_and_crop(image: Image.Image | np.ndarray, name: str, settings: dict[str, Any]) -> list[np.ndarray]:
    """The channels, C arrays (H, W), of a PIL image or array (H, W, C), resized and centre-cropped."""
    if isinstance(image, np.ndarray):
        bands = (Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(image, -1, 0))
        return [channel for band in bands for channel in resize_and_crop(band, name, settings)]
    width, height = image.size
    if settings["do_resize"]:
        width, height = target_size((width, height), name, settings)
        resize = fast_resize if settings["do_fast_resize"] else Image.Image.resize
        image = resize(image, (width, height), settings["resample"])
    window = settings["crop_size"] if settings["crop_pct"] is None else settings["size"]
    if settings["do_center_crop"] or settings["crop_pct"] is not None:
        left, top = (width - window.width) // 2, (height - window.height) // 2
        image = image.crop((left, top, left + window.width, top + window.height))
    if image.mode == "RGB":  # in half the time of split
        bands = (np.frombuffer(image.tobytes("raw", band), np.uint8) for band in "RGB")
        return [band.reshape(image.height, image.width) for band in bands]
    return [np.asarray(band) for band in image.split()]


def target_size(size: tuple[int, int], name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """(width, height) after the resize of an upright image of this (width, height)."""
    height, width = resized_size(size[::-1], settings["size"], settings["crop_pct"])
    if not 1 <= height * width <= (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"{name}: resizing {size[1]}x{size[0]} (height x width) would give {height}x{width}, and the result must "
            f"have from 1 to {Image.MAX_IMAGE_PIXELS} pixels (PIL.Image.MAX_IMAGE_PIXELS). Use a size with height and "
            "width, or with a longest_edge."
        )
    return width, height


def resized_size(image_size: tuple[int, int], size: SizeDict, crop_pct: float | None) -> tuple[int, int]:
    """(height, width) after the resize, by the rules of transformers and, with `crop_pct`, of timm."""
    height, width = image_size
    if crop_pct is not None:
        target_height, target_width = math.floor(size.height / crop_pct), math.floor(size.width / crop_pct)
        if target_height == target_width:
            return get_size_with_aspect_ratio(image_size, target_height)
        ratio = min(height / target_height, width / target_width)
        return round(height / ratio), round(width / ratio)
    if size.shortest_edge:
        return get_size_with_aspect_ratio(image_size, size.shortest_edge, size.longest_edge)
    if size.longest_edge:
        return tuple(edge * size.longest_edge // max(image_size) for edge in image_size)
    if size.max_height:
        return get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
    return size.height, size.width


def fast_resize(
    image: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """
    As `PIL.Image.Image.resize`, by torch's 8-bit kernels, with weights of 16 bits in place of 22. Pillow resizes what
    these can't, and what takes longer to copy: with `reducing_gap`, so it averages small blocks first.
    """
    raw = {"L": "L", "RGB": "RGBX"}.get(image.mode)  # kernels for four channels are faster than those for three
    is_whole, is_large = box in (None, (0, 0, *image.size)), image.width * image.height > LARGE
    if raw is None or resample not in TORCH_FILTERS or not is_whole or is_large:
        return image.resize(size, resample, box=box, reducing_gap=3.0)
    content = image.tobytes("raw", raw)
    try:  # the same memory, since a copy drives all else from the caches
        pixels = torch.from_dlpack(np.frombuffer(content, np.uint8))
    except BufferError:  # numpy before 2.1 does not share what may not be written to
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    resized = resize_interleaved(pixels.view(1, image.height, image.width, -1), size, resample)
    result = Image.frombytes(image.mode, size, resized.permute(0, 2, 3, 1).contiguous().numpy(), "raw", raw)
    result.info = image.info.copy()  # the EXIF orientation among it
    return result


def resize_interleaved(pixels: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """uint8 (1, H, W, C) to (1, C, height, width), which is interleaved in memory too: kernels for such are fast."""
    planes, (width, height) = pixels.permute(0, 3, 1, 2), size
    fewer_rows, fewer_columns = planes.shape[2] - height, planes.shape[3] - width
    if PILLOW_CHOOSES_AXIS and fewer_rows > max(0, 2 * fewer_columns):
        planes = F.interpolate(planes, (height, planes.shape[3]), mode=TORCH_FILTERS[resample], antialias=True)
    return F.interpolate(planes, (height, width), mode=TORCH_FILTERS[resample], antialias=True)


def resize_jpeg(image: JpegImageFile, name: str, settings: dict[str, Any]) -> Image.Image:
    """
    A JPEG file that is not decoded yet, resized, not yet upright. libjpeg decodes it at 1, 1/2, 1/4 or 1/8 of its
    sides, whichever is the least that leaves `JPEG_GAP` times the sides of the result.
    """
    axes = -1 if orientation_of(image) in (5, 6, 7, 8) else 1  # these swap width and height
    size, box = target_size(image.size[::axes], name, settings)[::axes], None
    with decode_errors(name):
        if is_scalable_jpeg(image):
            _, box = image.draft(None, (math.ceil(JPEG_GAP * size[0]), math.ceil(JPEG_GAP * size[1])))
        return fast_resize(image, size, settings["resample"], box)


def rescale_and_normalize(
    images: list[list[np.ndarray]], factors: list[float], settings: dict[str, Any]
) -> np.ndarray | list[np.ndarray]:
    """(value * factor - mean) / std for each image, as one array (B, C, H, W), or a list if no tensors are wanted."""
    shapes = [(len(channels), *channels[0].shape) for channels in images]
    if len(set(shapes)) == 1:
        batch = np.empty((len(images), *shapes[0]), dtype=np.float32)
    elif settings["return_tensors"] is None:
        batch = [np.empty(shape, dtype=np.float32) for shape in shapes]
    else:
        raise ValueError(
            f"images of shapes (C, H, W) {min(shapes)} and {max(shapes)} do not fit into one tensor: use a size with "
            "height and width, do_center_crop, or return_tensors=None for a list."
        )
    for channels, factor, target in zip(images, factors, batch):
        mean = per_channel(settings, "image_mean", 0.0, len(channels))
        std = per_channel(settings, "image_std", 1.0, len(channels))
        for channel, scale, offset, plane in zip(channels, factor / std, -mean / std, target):
            np.multiply(channel, np.float32(scale), out=plane)
            plane += np.float32(offset)
    return batch if settings["return_tensors"] is not None else list(batch)


def per_channel(settings: dict[str, Any], key: str, neutral: float, channels: int) -> np.ndarray:
    values = settings[key] if settings["do_normalize"] else neutral
    if np.ndim(values) and len(values) != channels:
        raise ValueError(f"{key} has {len(values)} values, but an image has {channels} channels.")
    return np.array(values if np.ndim(values) else [values] * channels, dtype=np.float64)
