# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
From what people have (paths, URLs, bytes, PIL images, arrays, tensors) to an upright image with 8 bits per channel.

The rules are those that `ViTScratchImageProcessor` documents; `decode_image` applies them.
"""

import base64
import importlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from transformers.image_utils import ChannelDimension
from transformers.utils import logging

from .compatibility_vit_scratch import httpx


logger = logging.get_logger(__name__)

# Limits of a download: seconds in all, redirects, and bytes after decompression.
URL_TIMEOUT_SECONDS, MAX_REDIRECTS, MAX_URL_BYTES = 60, 5, 256_000_000
FLOAT_TOLERANCE = 1e-3
# Of a progressive JPEG. Cameras and programs write 10 or so; each takes as long as an image, and may have no content.
MAX_JPEG_SCANS = 100
# Second bytes of JPEG markers: the frames that libjpeg can scale (baseline, extended, progressive, and the latter two
# with arithmetic coding), the markers after which no frame header comes, and those that have no length.
SCALABLE_FRAMES = {b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca"}
LAST_MARKERS = {b"\xc3", b"\xc5", b"\xc6", b"\xc7", b"\xcb", b"\xcd", b"\xce", b"\xcf", b"\xd9", b"\xda", b""}
MARKERS_ALONE = {b"\x00", b"\x01", *(bytes([0xD0 + n]) for n in range(9))}
# What turns an image upright, by its EXIF orientation.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLES_PER_PIXEL, PLANAR = 258, 262, 277, 284


class ImageDecodeError(ValueError):
    """An image cannot be fetched or decoded. The message holds its name (or index in the batch) and the reason."""


def decode_image(
    source: Any,
    name: str,
    num_channels: int,
    do_convert_rgb: bool,
    background_color: tuple[int, ...] | list[int],
    input_data_format: str | ChannelDimension | None,
    do_eight_bits: bool = True,
) -> Image.Image | np.ndarray:
    """See `ViTScratchImageProcessor.decode`; `name` is what errors call the image."""
    mode = {1: "L", 3: "RGB"}.get(num_channels) if do_convert_rgb else None
    pixels = fetch(source, name)
    if isinstance(pixels, np.ndarray):
        pixels = channels_last(pixels, num_channels, input_data_format, name)
        pixels = to_eight_bits(pixels, name) if do_eight_bits else to_floats(pixels, name)
        if do_eight_bits and pixels.shape[-1] in ((1, 2, 3, 4) if mode else (1, 3)):
            pixels = Image.fromarray(np.ascontiguousarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))
    else:
        pixels = to_ordinary_mode(pixels, name)
    is_array = isinstance(pixels, np.ndarray)
    if mode and not is_array:
        return to_opaque(pixels, mode, tuple(background_color))
    channels = pixels.shape[-1] if is_array else len(pixels.getbands())
    if do_convert_rgb and channels != num_channels:
        raise ValueError(
            f"{name} has {channels} channels, but the processor is for {num_channels} (num_channels): convert the "
            "image, or set num_channels."
        )
    return pixels


# --- Opening --------------------------------------------------------------------------------------------------------


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
        with decode_errors(name):
            if (array := read_array(source)) is not None:
                return array
            with open_image(source) as image:
                image.load()
                return upright(image)
    raise TypeError(
        f"{name} is of type {type(source).__name__}: expected a path, URL, bytes, binary file, PIL image, NumPy array "
        "or torch tensor."
    )


def is_file(source: Any) -> bool:
    """Whether `open_image` opens it: a path, URL, bytes or binary file."""
    return isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(source, "read")


def open_image(source: Any) -> Image.Image:
    """A path, URL, `data:` URI, bytes or binary file as a PIL image, not decoded yet. Raises what Pillow raises."""
    source = os.fspath(source) if isinstance(source, os.PathLike) else source
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            source = download(source)
        elif source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2])
        else:
            status = os.stat(source)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise ValueError("it is no regular file")  # reading a pipe or a device could block forever
            source = b"" if status.st_size == 0 else source
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) == 0:
            raise ValueError("it is empty (0 bytes)")
        source = BytesIO(source)
    image = Image.open(source)
    prepare_decoding(image)
    return image


def read_array(source: Any) -> np.ndarray | None:
    """The values (H, W, C) of a .npy file, or of a TIFF of more channels than Pillow knows; None for other files."""
    is_path = isinstance(source, str | os.PathLike)
    if is_path and not (str(source).lower().endswith((".npy", ".tif", ".tiff")) and os.path.isfile(source)):
        return None
    if not is_path and not isinstance(source, bytes | bytearray | memoryview):
        return None
    with open(source, "rb") if is_path else BytesIO(source) as file:
        start = file.read(8)
        file.seek(0)
        if start.startswith(b"\x93NUMPY"):
            return np.load(file, allow_pickle=False)  # a pickle runs code
        if start[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or number_of_channels(file) <= 4:
            return None
        try:
            tifffile = importlib.import_module("tifffile")
        except ImportError:
            raise ValueError("it is a TIFF of more than four channels: pip install tifffile") from None
        file.seek(0)
        with tifffile.TiffFile(file) as opened:
            series = opened.series[0]
            return series.asarray() if series.axes.startswith("Y") else np.moveaxis(series.asarray(), 0, -1)


def number_of_channels(file: Any) -> int:
    """Of a TIFF file; 0 where it is damaged. Pillow would log an error for more than it knows."""
    try:
        header = file.read(8)
        tags = ImageFileDirectory_v2(header + (file.read(8) if b"+" in header[:4] else b""))
        file.seek(tags.next)
        tags.load(file)
        return int(tags.get(SAMPLES_PER_PIXEL, 1))
    except Exception:  # parsers of damaged files raise anything
        return 0


def prepare_decoding(image: Image.Image) -> None:
    """Corrects, before decoding, what Pillow gets wrong in some files. Raises ValueError for files it would misread."""
    if image.format == "EPS":
        raise ValueError("it is PostScript, a program that draws, and is not run: export it as PNG")
    if isinstance(image, JpegImageFile) and "progressive" in image.info and image.fp is not None:
        start = image.fp.tell()
        image.fp.seek(0)
        scans = image.fp.read().count(b"\xff\xda")
        image.fp.seek(start)
        if scans > MAX_JPEG_SCANS:
            raise ValueError(f"it is a JPEG of {scans} scans, and {MAX_JPEG_SCANS} are the limit: save it anew")
    elif isinstance(image, TiffImageFile):
        if image.mode == "RGB" and 16 in image.tag_v2.get(BITS_PER_SAMPLE, ()) and image.tag_v2.get(PLANAR) == 2:
            raise ValueError("it is a TIFF with 16-bit colours in separate planes, which Pillow mixes up: save as PNG")
        # Pillow maps uncompressed files into memory, and then takes the sides of a turned image for those that are
        # stored: garbage for the EXIF orientations 5 to 8. It maps nothing that has no name.
        image.filename = ""
    elif image.format == "PNG" and "transparency" in image.info and image.tile:
        rawmode, key = image.tile[0][3], image.info["transparency"]
        image.load()  # and has no tile afterwards: a second time nothing is scaled
        # Pillow leaves the transparent colour in the file's bit depth; the pixels are decoded to 8 bits.
        if rawmode in ("L;2", "L;4") and isinstance(key, int):
            image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[rawmode]
        elif rawmode == "RGB;16B" and isinstance(key, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)


def download(url: str) -> bytes:
    """
    The content of a URL, by transformers' own client; not by its `load_image`, which drops transparency and clips 16
    bits. Raises ValueError if it takes too long or is too large, also after decompression.
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


# --- Orientation and JPEG headers -----------------------------------------------------------------------------------


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none or it is damaged: the pixels may still be fine."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # parsers of damaged blocks raise anything
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied. Not `ImageOps.exif_transpose`, which fails on damaged EXIF."""
    orientation = orientation_of(image)
    if orientation == 1:
        return image
    image = image.transpose(TRANSPOSITIONS[orientation])
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)
    return image


def is_scalable_jpeg(image: JpegImageFile) -> bool:
    """
    Whether libjpeg can decode a JPEG file, which is not decoded yet, at a fraction of its sides: `Image.draft`.

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
            if marker in SCALABLE_FRAMES | LAST_MARKERS:
                return marker in SCALABLE_FRAMES
            if marker not in MARKERS_ALONE:
                file.seek(int.from_bytes(file.read(2), "big") - 2, os.SEEK_CUR)
        return False
    except (OSError, ValueError):  # a length that leads out of the file
        return False
    finally:
        file.seek(start)


# --- Arrays and modes -----------------------------------------------------------------------------------------------


def channels_last(array: np.ndarray, num_channels: int, layout: str | None, name: str) -> np.ndarray:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C), by the layout rule of the processor."""
    shape = array.shape
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {shape}: expected (H, W), (H, W, C) or (C, H, W).")
    if 0 in shape:
        raise ValueError(f"{name} has no pixels: its shape is {shape}.")
    if array.ndim == 2:
        return array[..., None]
    for counts in ((num_channels,), (1, 3, 4), (2,)):
        first, last = shape[0] in counts, shape[-1] in counts
        if layout is None and (first or last):
            layout = ChannelDimension.FIRST if first else ChannelDimension.LAST
            if first and last:
                logger.warning(f"{name} of shape {shape} is taken as channels first; input_data_format says otherwise.")
    if layout is None:
        raise ValueError(
            f"{name} has shape {shape}: neither the first nor the last axis is a channel axis for num_channels="
            f"{num_channels}. Pass input_data_format; a batch of gray images needs a channel axis, (B, 1, H, W)."
        )
    return array if layout == ChannelDimension.LAST else np.moveaxis(array, 0, -1)


def to_eight_bits(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 pixels, by the value rule of the processor."""
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
            raise ValueError(
                f"{name} has {dtype} values from {low:g} to {high:g}: expected 0..1 or 0..255, no NaN. What is "
                "normalised already needs no processor: give it to the model as pixel_values."
            )
        scale = 255 if high <= 1 + FLOAT_TOLERANCE else 1
        return np.rint(array.astype(np.float32) * scale).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"{name} has {dtype} values from {low:g} to {high:g}: expected 0..255 or 0..65535.")
    if high > 255 or (kind == "u" and dtype.itemsize == 2):
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return array.astype(np.uint8)


def to_floats(array: np.ndarray, name: str) -> np.ndarray:
    """The values as float32. Raises ValueError where they are no finite numbers."""
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise ValueError(f"{name} has dtype {array.dtype} and must have finite numbers, no NaN.")
    return array.astype(np.float32)


def is_unit_float(source: Any) -> bool:
    """Whether an accepted array or tensor is taken as floats in 0..1."""
    if not isinstance(source, np.ndarray | torch.Tensor):
        return False
    array = fetch(source, "")
    return array.dtype.kind == "f" and float(array.max()) <= 1 + FLOAT_TOLERANCE


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
