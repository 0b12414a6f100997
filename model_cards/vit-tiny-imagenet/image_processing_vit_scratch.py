# SPDX-License-Identifier: Apache-2.0
"""From what people have (files, URLs, PIL images, arrays, tensors) to the `pixel_values` of a Vision Transformer.

Four steps per image: fetch, decode to upright 8-bit pixels, resize and crop in Pillow, then rescale and normalize in
one float32 multiply-add per channel. Needs no torchvision, and gives the same values with and without it. On RGB input
the result equals transformers' `ViTImageProcessorPil`, unless `do_fast_resize` is set.
"""

import base64
import math
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    ChannelDimension,
    PILImageResampling,
    SizeDict,
    get_image_size_for_max_height_width,
    httpx,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What a URL may cost: seconds in all, redirects, and bytes after they are unpacked.
URL_TIMEOUT_SECONDS, MAX_REDIRECTS, MAX_URL_BYTES = 60, 5, 256_000_000
FLOAT_TOLERANCE = 1e-3
# More than any camera has; a damaged or hostile preprocessor_config.json must not fill the memory.
MAX_CHANNELS = 10_000
# What `decode`, and after it `resize_and_crop`, go by.
DECODE_SETTINGS = ("num_channels", "do_convert_rgb", "background_color", "input_data_format")
FIT_SETTINGS = ("do_resize", "size", "crop_pct", "resample", "do_center_crop", "crop_size", "do_fast_resize")
# torch's names of the filters that it has for 8 bits.
TORCH_FILTERS = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}
# The fast way: pixels of an image that Pillow resizes as fast as torch does, the copy included; and how many times the
# sides of the result JPEG files have at least after they are decoded. Less than 1.5 shows, more is slower.
LARGE, JPEG_GAP = 4_000_000, 1.5
# Second bytes of JPEG markers: the frames that libjpeg can scale (baseline, extended, progressive, and the latter two
# with arithmetic coding), the markers after which no frame header comes, and those that have no length.
SCALABLE_FRAMES = {b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca"}
LAST_MARKERS = {b"\xc3", b"\xc5", b"\xc6", b"\xc7", b"\xcb", b"\xcd", b"\xce", b"\xcf", b"\xd9", b"\xda", b""}
MARKERS_ALONE = {b"\x00", b"\x01", *(bytes([0xD0 + n]) for n in range(9))}
# What to do to an image by its EXIF orientation.
TRANSPOSITIONS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Tags of TIFF.
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR = 258, 262, 284
# What transformers writes into preprocessor_config.json beside the settings.
FILE_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}


class ImageDecodeError(ValueError):
    """A picture cannot be fetched or decoded. The message holds its name (or place in the batch) and the reason."""


class ViTScratchImageProcessorKwargs(ImagesKwargs, total=False):
    """
    num_channels (`int`, *optional*, defaults to 3):
        1 is gray, 3 is RGB; with any other number every image must have exactly that many channels.
    crop_pct (`float`, *optional*):
        In (0, 1]: resize with the aspect ratio kept, the shorter side to `size / crop_pct`, then cut `size` from the
        centre. `None` resizes straight to `size`.
    background_color (`tuple[int, int, int]`, *optional*, defaults to white):
        RGB colour, 0 to 255, that shows through transparent pixels.
    do_fast_resize (`bool`, *optional*, defaults to `False`):
        Resize the fast way, with slightly other values: see the class.
    """

    num_channels: int | None
    crop_pct: float | int | None
    background_color: tuple[int, ...] | list[int] | None
    do_fast_resize: bool | None
    # wider than in ImagesKwargs, which refuses a mean of 0 or a std of 1 written as integers
    rescale_factor: float | int | None
    image_mean: float | int | list[float | int] | tuple[float | int, ...] | None
    image_std: float | int | list[float | int] | tuple[float | int, ...] | None


class ViTScratchImageProcessor(PilBackend):
    """
    Image processor of the from-scratch Vision Transformer: `processor(images, return_tensors="pt")` gives a
    `BatchFeature` whose `pixel_values` are float32 of shape (B, C, H, W). `return_tensors=None` gives a list of
    (C, H, W) arrays, as the processors of transformers do.

    Accepted, alone, in (nested, mixed) lists and tuples, or as 4-D batches (B, H, W, C) and (B, C, H, W):

    - paths, http(s) URLs, `data:` URIs, bytes, binary files: anything Pillow reads but PostScript, which is a program;
      of an animation the first frame;
    - PIL images of any mode, at their current frame. Transparency (an alpha band or a transparent colour) is laid
      over `background_color`. Modes I, I;16* and F follow the rule for arrays below;
    - NumPy arrays and torch tensors of any device, (H, W), (H, W, C) or (C, H, W), with 1 (gray), 2 (gray and
      alpha), 3 (RGB) or 4 (RGB and alpha) channels, or exactly `num_channels` if that is neither 1 nor 3.

    Rules, the same for every input:

    - *Orientation.* The EXIF orientation of files and PIL images is applied; a damaged EXIF block counts as none.
    - *Values* become 8 bits per channel, rounded to nearest. bool: 0 and 255. uint8: as it is. uint16: 65535 is 255.
      Other integers: as they are if all lie in 0..255, else like uint16 if all lie in 0..65535. Floats: times 255 if
      all lie in 0..1, else as they are if all lie in 0..255 (0.001 beyond either end is taken as rounding). Anything
      else, NaN included, is an error.
    - *Layout* of a 3-D array: `input_data_format`; else the channel axis is the one as long as `num_channels`; else
      the one with 1, 3 or 4 entries; else the one with 2. If both the first and the last axis fit: channels first,
      as in transformers, with a warning.
    - *Channels.* With `num_channels` 1 or 3 everything is converted to gray (ITU-R 601-2) or RGB. With any other
      number, images with exactly that many channels are kept: PIL images by their bands (RGBA and CMYK for 4),
      arrays with channels that are resized independently. `do_convert_rgb=False` keeps the channels that an image
      has, whatever `num_channels` says.
    - *Size.* As in transformers: an int or `{"height", "width"}`, `{"shortest_edge"}`, `{"shortest_edge",
      "longest_edge"}`, `{"max_height", "max_width"}`; also `{"longest_edge"}` alone. `do_center_crop` with `crop_size`
      pads smaller images with black. `crop_pct` is timm's: the shorter side to `floor(size / crop_pct)`, then the
      centre. The result of a resize may not have more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    - *Resizing* is Pillow's, bit for bit. With `do_fast_resize` torch's 8-bit kernels do it, for gray and RGB images of
      up to 4 megapixels and both filters they have, bilinear and bicubic: values are within 1 of 255 levels, 2 where
      bicubic enlarges. Larger images are reduced by whole numbers first, and JPEG files decoded at 1/2, 1/4 or 1/8 of
      their sides where that leaves 1.5 times the sides of the result, which changes values of photographs by 0.1 to
      1.3 levels on average, and by up to 17 at edges. All else is as without it. transformers' `backend="torchvision"`,
      which was `use_fast=True`, chooses between classes, and has no meaning for this one.
    - *Rescaling.* Values are 0..255 before `rescale_factor`. Without `do_rescale` they stay so, except that arrays
      and tensors that came as 0..1 leave as 0..1: `do_rescale=False` is what transformers asks for with those.

    The defaults are those of the paper's code (google-research/vision_transformer, `input_pipeline.py`): straight to
    the square, 224 x 224, bilinear, and -1..1.

    Raises:
        ImageDecodeError: a picture is missing, damaged, no image, or a decompression bomb.
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
    do_fast_resize = False
    do_rescale = True
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)

    def __init__(self, **kwargs: Unpack[ViTScratchImageProcessorKwargs]) -> None:
        settings = {key: value for key, value in kwargs.items() if key not in FILE_KEYS and not key.startswith("_")}
        validate_typed_dict(
            self.valid_kwargs, {key: dict(v) if isinstance(v, SizeDict) else v for key, v in settings.items()}
        )
        for statistic in ("image_mean", "image_std"):
            channels = min(kwargs.get("num_channels") or self.num_channels, MAX_CHANNELS)  # more is refused below
            kwargs.setdefault(statistic, (0.5,) * channels)
        super().__init__(**kwargs)
        self._checked = {key: getattr(self, key) for key in self._valid_kwargs_names}
        self._validate_preprocess_kwargs(**self._checked)

    def decode(
        self,
        image: Any,
        *,
        name: str | None = None,
        num_channels: int | None = None,
        do_convert_rgb: bool | None = None,
        background_color: tuple[int, ...] | list[int] | None = None,
        input_data_format: str | ChannelDimension | None = None,
    ) -> Image.Image | np.ndarray:
        """
        One image, in any form that the class accepts, upright and with 8 bits per channel; not yet resized.

        `name` is what errors call it if it has no file name; settings that are `None` are the processor's own. Returns
        a PIL image of mode L (`num_channels=1`) or RGB (3); with other `num_channels` a PIL image with all its bands,
        or, from an array, a uint8 array (H, W, C). Raises what the class raises.
        """
        name = source_name(image, name or "the image")
        num_channels = self.num_channels if num_channels is None else num_channels
        convert = self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb
        mode = {1: "L", 3: "RGB"}.get(num_channels) if convert else None
        background = self.background_color if background_color is None else background_color

        pixels = fetch(image, name)
        if isinstance(pixels, np.ndarray):
            layout = self.input_data_format if input_data_format is None else input_data_format
            pixels = to_eight_bits(channels_last(pixels, num_channels, layout, name), name)
            if pixels.shape[-1] in ((1, 2, 3, 4) if mode else (1, 3)):
                pixels = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
        else:
            pixels = to_ordinary_mode(pixels, name)
        is_array = isinstance(pixels, np.ndarray)
        if mode and not is_array:
            return to_opaque(pixels, mode, tuple(background))
        channels = pixels.shape[-1] if is_array else len(pixels.getbands())
        if convert and channels != num_channels:
            raise ValueError(
                f"{name} has {channels} channels, but the processor is for {num_channels} (num_channels): convert the "
                "image, or set num_channels."
            )
        return pixels

    def fit(self, image: Any, *, name: str | None = None, **settings: Any) -> list[np.ndarray]:
        """
        One image, decoded, resized and cropped: its channels, C uint8 arrays (H, W). All but rescaling is done.

        `name` is as in `decode`; `settings` (`DECODE_SETTINGS`, `FIT_SETTINGS`) are the processor's own if left out.
        """
        name = source_name(image, name or "the image")
        to_decode = {key: settings.get(key) for key in DECODE_SETTINGS}
        settings = {key: settings.get(key, getattr(self, key)) for key in FIT_SETTINGS}
        if settings["do_resize"] and settings["do_fast_resize"] and is_file(image):
            with decode_errors(name):
                image = open_image(image)
            # The modes that are resized before they are converted, with the same result: CMYK is not among them.
            if isinstance(image, JpegImageFile) and image.mode in ("L", "RGB"):
                image, settings["do_resize"] = resize_jpeg(image, name, settings), False
        return resize_and_crop(self.decode(image, name=name, **to_decode), name, settings)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As the parent's, which checks all settings in each call: here only if one is not what `__init__` checked."""
        is_as_checked = all(getattr(self, key) is value for key, value in self._checked.items())
        if args or kwargs.keys() - {"return_tensors"} or not is_as_checked:
            return super().preprocess(images, *args, **kwargs)
        return self._preprocess_image_like_inputs(images, **self._checked | kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "_checked"}

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
        problems = list(setting_problems(kwargs))
        if problems:
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
            if kwargs["do_rescale"]:
                factors.append(kwargs["rescale_factor"])
            else:
                factors.append(1 / 255 if is_unit_float(image) else 1.0)
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
    for key in ("size", "crop_size"):
        if settings[key] is not None and any(edge < 1 for _, edge in settings[key]):
            yield f"{key} must be 1 or more everywhere, got {dict(settings[key])}"
        limit, size = Image.MAX_IMAGE_PIXELS, settings[key]
        if size is not None and limit and (size.height or 1) * (size.width or 1) > limit:
            yield f"{key} may not have more than {limit:,} pixels (PIL.Image.MAX_IMAGE_PIXELS), got {dict(size)}"
    if settings["do_center_crop"] and not (settings["crop_size"].height and settings["crop_size"].width):
        yield f"crop_size must have height and width, got {dict(settings['crop_size'])}"
    if settings["do_pad"]:
        yield "do_pad is not supported: use a size with height and width, or do_center_crop"
    if settings["do_resize"] and settings["size"].max_pixels is not None:
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


# --- 1. fetch -------------------------------------------------------------------------------------------------------


def flatten(images: Any) -> list[Any]:
    """Single images, in order, from one image, nested lists and tuples, and 4-D batches."""
    if isinstance(images, list | tuple):
        return [image for entry in images for image in flatten(entry)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def source_name(source: Any, fallback: str) -> str:
    """The file name or URL of an image, if it has one."""
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return fallback if path.startswith("data:") else path
    name = getattr(source, "filename", None) or getattr(source, "name", None)
    return name if name and isinstance(name, str) else fallback


def fetch(source: Any, name: str) -> Image.Image | np.ndarray:
    """A loaded, upright PIL image, or an array as it came."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, torch.Tensor):
        # NumPy has no bfloat16 and no float8
        source = source.detach().float() if source.is_floating_point() else source.detach()
        return source.cpu().numpy()
    if isinstance(source, Image.Image):
        with decode_errors(name):
            if 0 not in source.size:
                prepare_decoding(source)
                source.load()
            return upright(source)
    if is_file(source):
        with decode_errors(name), open_image(source) as image:
            image.load()
            return upright(image)
    raise TypeError(
        f"{name} is of type {type(source).__name__}: expected a path, URL, bytes, binary file, PIL image, NumPy array "
        "or torch tensor."
    )


def is_file(source: Any) -> bool:
    """Whether `fetch` opens it: a path, URL, bytes or binary file."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")


def open_image(source: Any) -> Image.Image:
    """A path, URL, bytes or binary file as a PIL image that is not decoded yet. Raises what Pillow raises."""
    image = Image.open(binary_source(source))
    prepare_decoding(image)
    return image


def prepare_decoding(image: Image.Image) -> None:
    """
    Sets right, before an image is decoded, what Pillow gets wrong in some files. Raises ValueError for what it would
    run, or can't read.
    """
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program that draws, and is not run: export it as PNG")
    if isinstance(image, TiffImageFile):
        if image.mode == "RGB" and 16 in image.tag_v2.get(BITS_PER_SAMPLE, ()) and image.tag_v2.get(PLANAR) == 2:
            raise ValueError("it is a TIFF with 16-bit colours in separate planes, which Pillow mixes up: save as PNG")
        # Pillow maps uncompressed files into memory, and then takes the sides of a turned image for those that are
        # stored: garbage for the EXIF orientations 5 to 8. It maps nothing that has no name.
        image.filename = ""
    elif image.format == "PNG" and "transparency" in image.info and image.tile:
        rawmode = image.tile[0][3]
        image.load()  # and has no tile afterwards: a second time nothing is scaled
        image.info["transparency"] = scaled_transparency(image.info["transparency"], rawmode)


def scaled_transparency(key: Any, rawmode: Any) -> Any:
    """The transparent colour of a PNG for the 8 bits that it is decoded to. Pillow leaves it in the file's depth."""
    factor = {"L;2": 85, "L;4": 17}.get(rawmode)
    if factor is not None and isinstance(key, int):
        return key * factor
    if rawmode == "RGB;16B" and isinstance(key, tuple):
        return tuple(value >> 8 for value in key)
    return key


def binary_source(source: Any) -> Any:
    """What `PIL.Image.open` takes, for a path, URL, `data:` URI, bytes or binary file."""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            source = download(source)
        elif source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2])
        else:
            facts = os.stat(source)
            if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
                raise ValueError("it is no regular file")  # a pipe or a device, which can be waited for without end
            source = b"" if facts.st_size == 0 else source
    if not isinstance(source, bytes | bytearray | memoryview):
        return source
    if len(source) == 0:
        raise ValueError("it is empty (0 bytes)")
    return BytesIO(source)


def download(url: str) -> bytes:
    """
    The content of a URL, by transformers' own client; not by its `load_image`, which drops transparency and clips 16
    bits. Raises ValueError where it takes too long or is too large, also after it was unpacked.
    """
    content, deadline = bytearray(), time.monotonic() + URL_TIMEOUT_SECONDS
    with (
        httpx.Client(timeout=URL_TIMEOUT_SECONDS, follow_redirects=True, max_redirects=MAX_REDIRECTS) as client,
        client.stream("GET", url) as response,
    ):
        response.raise_for_status()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > MAX_URL_BYTES:
                raise ValueError(f"it has more than {MAX_URL_BYTES / 1e6:,.0f} MB, the limit for an image from a URL")
            if time.monotonic() > deadline:
                raise ValueError(f"it did not arrive within {URL_TIMEOUT_SECONDS} seconds")
    return bytes(content)


@contextmanager
def decode_errors(name: str) -> Iterator[None]:
    """Whatever Pillow, its plugins, the file system or the network raise, as one `ImageDecodeError`."""
    try:
        yield
    except Exception as error:
        reasons = {
            FileNotFoundError: "the file does not exist",
            IsADirectoryError: "it is a folder",
            PermissionError: "no permission to read it",
            UnidentifiedImageError: "its content is in no image format that Pillow knows",
            Image.DecompressionBombError: f"{error} For a source that you trust, raise PIL.Image.MAX_IMAGE_PIXELS.",
        }
        reason = reasons.get(type(error)) or (str(error).splitlines() or [type(error).__name__])[0]
        raise ImageDecodeError(f"{name} cannot be read as an image: {reason}") from None


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none, or where it is damaged: the pixels may still be fine."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # parsers of damaged blocks raise anything
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image as it is to be looked at, with an orientation of 1."""
    orientation = orientation_of(image)
    if orientation == 1:
        return image  # exif_transpose would copy it
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # some other entry of the block is damaged
        turned = image.transpose(TRANSPOSITIONS[orientation])
        for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            turned.info.pop(key, None)
        return turned


# --- 2. decode ------------------------------------------------------------------------------------------------------


def channels_last(array: np.ndarray, num_channels: int, layout: str | None, name: str) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C), by the layout rule of the class."""
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {array.shape}: expected (H, W), (H, W, C) or (C, H, W).")
    if 0 in array.shape:
        raise ValueError(f"{name} has no pixels: its shape is {array.shape}.")
    if array.ndim == 2:
        return array[..., None]
    if layout is None:
        layout = infer_layout(array.shape, num_channels, name)
    return array if layout == ChannelDimension.LAST else np.moveaxis(array, 0, -1)


def infer_layout(shape: tuple[int, ...], num_channels: int, name: str) -> ChannelDimension:
    for counts in ((num_channels,), (1, 3, 4), (2,)):
        first, last = shape[0] in counts, shape[-1] in counts
        if first and last:
            logger.warning(f"{name} of shape {shape} is taken as channels first; input_data_format says otherwise.")
        if first or last:
            return ChannelDimension.FIRST if first else ChannelDimension.LAST
    raise ValueError(
        f"{name} has shape {shape}: neither the first nor the last axis is a channel axis for num_channels="
        f"{num_channels}. Pass input_data_format; a batch of gray images needs a channel axis, (B, 1, H, W)."
    )


def is_unit_float(source: Any) -> bool:
    """Whether an accepted array or tensor is taken as floats in 0..1."""
    if not isinstance(source, np.ndarray | torch.Tensor):
        return False
    array = fetch(source, "")
    return array.dtype.kind == "f" and float(array.max()) <= 1 + FLOAT_TOLERANCE


def to_eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 pixels, by the value rule of the class."""
    kind, dtype = array.dtype.kind, array.dtype
    if dtype == np.uint8:
        return array
    if kind == "b":
        return array.astype(np.uint8) * 255
    if kind not in "uif":
        raise ValueError(f"{name} has dtype {dtype}: expected bool, integers or floats.")
    low, high = float(array.min()), float(array.max())
    if kind == "f":
        # written so that NaN fails too
        if not (low >= -FLOAT_TOLERANCE and high <= 255 + FLOAT_TOLERANCE):
            raise ValueError(f"{name} has {dtype} values from {low:g} to {high:g}: expected 0..1 or 0..255, no NaN.")
        scale = 255 if high <= 1 + FLOAT_TOLERANCE else 1
        return np.rint(array.astype(np.float32) * scale).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"{name} has {dtype} values from {low:g} to {high:g}: expected 0..255 or 0..65535.")
    if high > 255 or (kind == "u" and dtype.itemsize == 2):
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return array.astype(np.uint8)


def to_ordinary_mode(image: Image.Image, name: str) -> Image.Image:
    """An image whose bands hold 8-bit colours: no palette, no premultiplied alpha, no 1, 16 or 32 bits."""
    if 0 in image.size:
        raise ValueError(f"{name} has no pixels: its width and height are {image.size}.")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return deep_to_gray(image, name)
    if image.mode == "P":
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "1" and "transparency" in image.info:
        key = image.info["transparency"]
        image = image.convert("L")
        image.info["transparency"] = key  # Pillow drops it on the way
    mode = {"1": "L", "La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(image.mode)
    return image.convert(mode) if mode else image


def deep_to_gray(image: Image.Image, name: str) -> Image.Image:
    """A gray image of 16 or 32 bits, or of floats, as mode L; as mode LA if it has a transparent colour."""
    values = np.asarray(image)
    if image.format == "PPM" and image.mode == "I":
        values = values.astype(np.uint16)  # Pillow has scaled them to 16 bits, however dark they are
    if isinstance(image, TiffImageFile) and image.mode.startswith("I;16") and image.tag_v2.get(PHOTOMETRIC) == 0:
        values = 65535 - values  # white is zero, which Pillow inverts for 8 bits alone
    try:
        gray = Image.fromarray(to_eight_bits(values, name))
    except ValueError as error:
        raise ImageDecodeError(str(error)) from error
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))


def to_opaque(image: Image.Image, mode: str, background: tuple[int, ...]) -> Image.Image:
    """Mode L or RGB, with transparency laid over the background colour."""
    if image.has_transparency_data:
        backdrop = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(backdrop, image.convert("RGBA"))
    # Pillow goes from LAB to gray by way of RGB only
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


# --- 3. resize and crop ---------------------------------------------------------------------------------------------


def resize_and_crop(image: Image.Image | np.ndarray, name: str, settings: dict[str, Any]) -> list[np.ndarray]:
    """The channels, C arrays (H, W), of a PIL image or uint8 array (H, W, C), resized and centre-cropped."""
    if isinstance(image, np.ndarray):
        bands = (Image.fromarray(np.ascontiguousarray(band)) for band in np.moveaxis(image, -1, 0))
        return [channel for band in bands for channel in resize_and_crop(band, name, settings)]
    width, height = image.size
    if settings["do_resize"]:
        width, height = target_size((width, height), name, settings)
        if settings["do_fast_resize"]:
            image = fast_resize(image, (width, height), settings["resample"])
        else:
            image = image.resize((width, height), settings["resample"])
    window = settings["crop_size"] if settings["do_center_crop"] else None
    if settings["crop_pct"] is not None:
        window = settings["size"]
    if window is not None:
        left, top = (width - window.width) // 2, (height - window.height) // 2
        image = image.crop((left, top, left + window.width, top + window.height))
    if image.mode == "RGB":  # in half the time of split
        bands = (np.frombuffer(image.tobytes("raw", band), np.uint8) for band in "RGB")
        return [band.reshape(image.height, image.width) for band in bands]
    return [np.asarray(band) for band in image.split()]


def target_size(size: tuple[int, int], name: str, settings: dict[str, Any]) -> tuple[int, int]:
    """(width, height) after the resize of an upright image of this (width, height)."""
    height, width = resized_size(size[::-1], settings["size"], settings["crop_pct"])
    limit = Image.MAX_IMAGE_PIXELS
    if not 1 <= height * width <= (limit or math.inf):
        raise ValueError(
            f"{name}: resizing {size[1]}x{size[0]} (height x width) would give {height}x{width}, and the result must "
            f"have from 1 to {limit} pixels (PIL.Image.MAX_IMAGE_PIXELS). Use a size with height and width, or with a "
            "longest_edge."
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
        longest = max(image_size)
        return height * size.longest_edge // longest, width * size.longest_edge // longest
    if size.max_height:
        return get_image_size_for_max_height_width(image_size, size.max_height, size.max_width)
    return size.height, size.width


def fast_resize(
    image: Image.Image, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    """
    As `PIL.Image.Image.resize`, by torch's 8-bit kernels, with weights of 16 bits in place of 22. What these can't do,
    and what takes longer to copy, Pillow does, which takes the mean of small blocks first where it is reduced by much.
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
    planes = pixels.permute(0, 3, 1, 2)
    return F.interpolate(planes, size[::-1], mode=TORCH_FILTERS[resample], antialias=True)


def resize_jpeg(image: JpegImageFile, name: str, settings: dict[str, Any]) -> Image.Image:
    """
    A JPEG file that is not decoded yet, resized, not yet upright. libjpeg decodes it at 1, 1/2, 1/4 or 1/8 of its
    sides, whichever is the least that leaves `JPEG_GAP` times the sides of the result.
    """
    is_turned = orientation_of(image) in (5, 6, 7, 8)
    size = target_size(image.size[::-1] if is_turned else image.size, name, settings)
    size = size[::-1] if is_turned else size
    with decode_errors(name):
        box = None
        if is_scalable_jpeg(image):
            _, box = image.draft(None, (math.ceil(JPEG_GAP * size[0]), math.ceil(JPEG_GAP * size[1])))
        return fast_resize(image, size, settings["resample"], box)


def is_scalable_jpeg(image: JpegImageFile) -> bool:
    """
    Whether libjpeg can decode a JPEG file, which is not decoded yet, at a part of its sides: `Image.draft` asks it to.

    It can't scale a lossless frame (SOF3, 7, 11, 15: medical scanners write such) and decodes it at full size. Pillow
    does not compare the sizes, and writes past the end of an image that `draft` has made smaller. So only the frames
    that are known to scale are drafted.
    """
    file, start = image.fp, image.fp.tell()
    try:
        file.seek(2)  # after the marker that starts the image
        while byte := file.read(1):
            if byte != b"\xff":
                continue  # as libjpeg, past what is between segments
            while (marker := file.read(1)) == b"\xff":
                pass
            if marker in SCALABLE_FRAMES:
                return True
            if marker in LAST_MARKERS:
                return False
            if marker not in MARKERS_ALONE:
                file.seek(int.from_bytes(file.read(2), "big") - 2, os.SEEK_CUR)
        return False
    except (OSError, ValueError):  # a length that leads out of the file
        return False
    finally:
        file.seek(start)


# --- 4. rescale and normalize ---------------------------------------------------------------------------------------


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
