# SPDX-License-Identifier: Apache-2.0
"""Images as they come: odd ones, with what they should be read as, and broken ones, with words of the reason."""

import base64
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo


SIDES = (12, 10)
# The mode that a file is written from, by ending. What PIL can't write in any format is tested in memory, in
# test_image_processing.py.
MODES = {
    "1": "png", "L": "jpg", "LA": "png", "P": "gif", "RGB": "png", "RGBA": "webp", "CMYK": "jpg", "YCbCr": "jpg",
    "LAB": "tif", "I": "tif", "F": "tif", "I;16": "png", "I;16B": "tif", "PA": "png",
}  # fmt: skip

# What turns an image upright that has the EXIF orientation 2, 3 and so on to 8.
TURNS = [
    Image.Transpose[name]
    for name in (
        "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90",
    )
]  # fmt: skip
# Grey JPEG files of arithmetic coding, which Pillow does not write: of libjpeg-turbo's cjpeg -arithmetic.
ARITHMETIC_JPEG = {
    "C9": "|JeWA07C!>1_lQP1qcTR2MGxX3Jeqt3=0bk84?o@6df8L9vvDS93UhvCm<p$BODwkHz_PIF*GzZA166II5IpgGc+>)$p8xo015yM0Ra&J"
          "|I7de01yxb|Jncu0RaF2KLF9l*(RC*3-3Z=HygvoQ{W9tcsc5{3V@XMjP{8_(UnEX^)T4s*w^h|XDI*K",
    "CA": "|JeWA07C!>1_lQP1qcTR2MGxX3Jeqt3=0bk84?o@6df8L9vvDS93UhvCm<p$BODwkHz_PIF*GzZA166II5IpgGc+>)$^Z)p015yM0Ra&J"
          "|I7dc01*G$00;pA00001(1QhN;57ft00a;P|Jncu0RaF31p+!<f`>75)D_F#sQ=6W1P}%P+5iXv0RRR+0)3$W%m4%s1^?Or2mt{A0Y4!u%UztK"
          "X*qSE|Jncu0RaF201(*!%m4%s1^?Or2mt{A0Y4CE@O&65a4}xOq=lnd;qd?2",
}  # fmt: skip


def picture(seed: int = 0, size: tuple[int, int] = SIDES) -> Image.Image:
    """Smooth, so that lossy formats keep it; RGB."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    waves = [np.sin(rows / 4 + band + seed) * np.cos(columns / (3 + band)) for band in range(3)]
    return Image.fromarray((127 + 110 * np.stack(waves, -1)).astype(np.uint8))


def in_mode(mode: str) -> Image.Image:
    """The picture in a mode of PIL."""
    gray = picture().convert("L")
    if mode in ("I", "I;16", "I;16B"):  # values to 65535
        kind = {"I": np.int32, "I;16": np.uint16, "I;16B": ">u2"}[mode]
        return Image.fromarray((np.asarray(gray).astype(np.int64) * 257).astype(kind))
    if mode == "F":
        return Image.fromarray(np.asarray(gray).astype(np.float32) / 255)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
        return ImageCms.applyTransform(picture(), to_lab)
    if mode in ("LA", "RGBA"):  # from transparent to opaque
        image = picture().convert("RGBA")
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image.convert(mode)
    return picture().convert(mode) if mode != "PA" else picture().convert("P").convert("PA")


def encoded(image: Image.Image, kind: str, **wishes) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **wishes)
    return buffer.getvalue()


def odd_images(folder: Path) -> dict[str, Image.Image]:
    """Writes them. Returns, by the name of the file, what PIL alone makes of it: upright, and of 8 bits."""
    plain, other = picture(), picture(1)
    gray = plain.convert("L")
    found: dict[str, Image.Image] = {}

    def add(name: str, content: bytes, expected: Image.Image | None = None) -> None:
        (folder / name).write_bytes(content)
        found[name] = Image.open(io.BytesIO(content)) if expected is None else expected
        found[name].load()

    for mode, ending in MODES.items():
        image = in_mode(mode)
        if mode == "PA":
            image = image.convert("RGBA").quantize(8)  # no format keeps this mode: a palette with transparency
        is_deep = mode in ("I", "F", "I;16", "I;16B")
        buffer = folder / f"mode {mode.replace(';', ' ')}.{ending}"
        image.save(buffer, **({"lossless": True} if ending == "webp" else {}))
        add(buffer.name, buffer.read_bytes(), gray if is_deep else None)
    add("one colour is transparent.png", encoded(plain.quantize(8), "PNG", transparency=2))

    add("1x1.png", encoded(plain.crop((0, 0, 1, 1)), "PNG"))
    add("tall.png", encoded(picture(size=(1, 20_000)), "PNG"))
    add("wide.jpg", encoded(picture(size=(20_000, 1)), "JPEG"))
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        more = {"save_all": True, "append_images": [other]} | ({"lossless": True} if kind == "WEBP" else {})
        add(f"animated {kind}.{kind.lower()}", encoded(plain, kind, **more), None if kind == "GIF" else plain)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of RGB, in a file of CMYK
    add("cmyk profile.jpg", encoded(plain.convert("CMYK"), "JPEG", icc_profile=profile))
    add("bad profile.png", encoded(plain, "PNG", icc_profile=b"no profile"), plain)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    add("turned.jpg", encoded(plain, "JPEG", exif=exif), _jpeg(plain).transpose(Image.Transpose.ROTATE_270))
    exif[0x0112] = 99
    add("turned nowhere.jpg", encoded(plain, "JPEG", exif=exif), _jpeg(plain))
    # The kinds of frames: Huffman or arithmetic coding, sequential or progressive, and lossless.
    baseline = encoded(picture().resize((96, 80)), "JPEG")
    add("frame C1.jpg", baseline.replace(b"\xff\xc0\0\x11", b"\xff\xc1\0\x11"), Image.open(io.BytesIO(baseline)))
    add("progressive.jpg", encoded(plain, "JPEG", progressive=True))
    for frame, text in ARITHMETIC_JPEG.items():
        # Decoders round alike: sequential and progressive are the same coefficients.
        add(f"frame {frame}.jpg", base64.b85decode(text), Image.open(io.BytesIO(base64.b85decode(text))))
    add("lossless.jpg", lossless_jpeg(), Image.new("L", (400, 300), 128))
    # Every orientation, in every format that has one.
    turns = dict(enumerate((None, *TURNS), start=1))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])):
        large, options = picture().resize((96, 80)), {"compression": "tiff_lzw"} if kind == "TIFF" else {}
        upright = Image.open(io.BytesIO(encoded(large, kind, **options)))
        for orientation, turn in turns.items():
            exif[0x0112] = orientation
            content = encoded(large, kind, exif=exif, **options)
            add(f"way {orientation}.{kind.lower()}", content, upright if turn is None else upright.transpose(turn))
    # Uncompressed, Pillow maps these by their names, and mixes up the sides of those that are turned.
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        source = plain.quantize(16) if mode == "P" else in_mode(mode)
        shown = in_mode("L") if mode == "I;16" else source.convert("RGBA" if mode == "RGBA" else "RGB")
        for orientation, turn in enumerate(TURNS, start=2):
            exif[0x0112] = orientation
            content = encoded(source, "TIFF", exif=exif)
            add(f"turned {mode.replace(';', ' ')} {orientation}.tif", content, shown.transpose(turn))
    # The pixels are fine, and so is the density before a damaged EXIF block, at which Pillow looks for it again.
    jpeg = encoded(plain, "JPEG", dpi=(72, 72))
    for words in (b"Exif\0\0", b"Exif\0\0II", b"Exif\0\0not a TIFF header"):
        segment = b"\xff\xe1" + struct.pack(">H", len(words) + 2) + words
        add(f"damaged EXIF of {len(words)}.jpg", jpeg[:20] + segment + jpeg[20:], _jpeg(plain))
    for kind in ("PNG", "WEBP"):
        for words in (b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0not a TIFF header"):
            add(f"damaged EXIF of {len(words)}.{kind.lower()}", encoded(plain, kind, exif=words, lossless=True), plain)
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n      10\nno hexadecimal digits\n")
    add("EXIF without digits.png", encoded(plain, "PNG", pnginfo=text), plain)
    for color, name, bands, depths in (
        (0, "L", 1, (1, 2, 4, 8, 16)), (2, "RGB", 3, (8, 16)), (3, "P", 1, (1, 2, 4, 8)), (4, "LA", 2, (8, 16)),
        (6, "RGBA", 4, (8, 16)),
    ):  # fmt: skip
        for depth in depths:
            values = np.random.default_rng(depth).integers(0, 1 << depth, (6, 16, bands))
            bits = (values.reshape(6, -1, 1) >> np.arange(depth)[::-1]) & 1
            palette = np.random.default_rng(0).integers(0, 256, (1 << depth, 3)) if color == 3 else None
            # 16 bits are rounded where they are alone, and cut by Pillow where there are several bands.
            eight = (values + 128) // 257 if (color, depth) == (0, 16) else values >> 8 if depth == 16 else None
            eight = values * 255 // ((1 << depth) - 1) if eight is None else eight
            eight = np.uint8(eight.squeeze(-1) if bands == 1 else eight) if palette is None else palette[values[..., 0]]
            chunks = [] if palette is None else [(b"PLTE", np.uint8(palette).tobytes())]
            rows = [np.packbits(row).tobytes() for row in bits.reshape(6, -1)]
            content = png_of(16, 6, *chunks, depth=depth, color=color, rows=rows)
            add(f"{name} of {depth} bits.png", content, Image.fromarray(np.uint8(eight)))
    levels = np.arange(8)
    for depth, row, values in (
        (1, bytes([0b01010101]), levels % 2 * 255),
        (2, bytes([0b00011011] * 2), levels % 4 * 85),
        (4, bytes([0x01, 0x23, 0x45, 0x67]), levels * 17),
        (16, (levels * 9000).astype(">u2").tobytes(), (levels * 9000 + 128) // 257),
    ):
        key = 3 * 9000 if depth == 16 else 1
        alpha = np.where(values == values[3 if depth == 16 else 1], 0, 255)
        pixels = np.stack([np.stack([values, alpha], -1)] * 2).astype(np.uint8)
        content = png_of(8, 2, (b"tRNS", struct.pack(">H", key)), depth=depth, color=0, rows=[row] * 2)
        add(f"one gray of {depth} bits is transparent.png", content, Image.fromarray(pixels))
    deep = np.stack([levels * 9000] * 3, -1)
    pixels = np.concatenate([deep >> 8, np.where(levels == 3, 0, 255)[:, None]], -1)
    content = png_of(
        8, 2, (b"tRNS", struct.pack(">HHH", *[27000] * 3)), depth=16, rows=[deep.astype(">u2").tobytes()] * 2
    )
    add("one colour of 16 bits is transparent.png", content, Image.fromarray(np.stack([pixels] * 2).astype(np.uint8)))
    dark = np.arange(120, dtype=np.uint16).reshape(10, 12)
    add("dark 16 bits.pgm", b"P5 12 10 65535\n" + dark.astype(">u2").tobytes(), Image.new("L", SIDES, 0))
    negative = Image.fromarray((65535 - np.asarray(in_mode("I;16"))).astype(np.uint16))
    add("white is zero.tif", encoded(negative, "TIFF", tiffinfo={262: 0}), gray)
    add("rubbish after the end.jpg", encoded(plain, "JPEG") + b"\0rubbish" * 50, _jpeg(plain))
    add("really a png.jpg", encoded(plain, "PNG"), plain)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [row.tobytes() for x, y, across, down in passes for row in np.asarray(plain)[y::down, x::across]]
    add("interlaced.png", png_of(*SIDES, rows=rows, interlace=1), plain)
    add("really a jpeg.png", encoded(plain, "JPEG"))
    add("UPPER.JPEG", encoded(plain, "JPEG"))
    for kind in ("BMP", "PPM", "TGA", "PCX", "ICO"):
        more = {"sizes": [SIDES]} if kind == "ICO" else {}  # by itself none that is smaller than 16 x 16
        add(f"kind.{kind.lower()}", encoded(plain, kind, **more), None if kind == "ICO" else plain)
    for kind in ("JPEG2000", "AVIF"):
        if features.check("jpg_2000" if kind == "JPEG2000" else "avif"):
            add(f"kind.{'jp2' if kind == 'JPEG2000' else 'avif'}", encoded(plain, kind))
    if features.check("avif"):
        upright = Image.open(io.BytesIO(encoded(plain, "AVIF")))
        add("damaged EXIF.avif", encoded(plain, "AVIF", exif=b"Exif\0\0II*\0rubbish"), upright)
    add("two\nlines.png", encoded(plain, "PNG"))
    add("Ωμέγα 猫 🐈.png", encoded(plain, "PNG"))
    add("n" * 251 + ".png", encoded(plain, "PNG"))
    add("--output.png", encoded(plain, "PNG"))
    add("%s {} [0-9] $HOME.png", encoded(plain, "PNG"))
    return found


def _jpeg(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, "JPEG")))


def lossless_jpeg(size: tuple[int, int] = (400, 300), frame: int = 0xC3) -> bytes:
    """A grey JPEG of 128s whose frame is of another kind than what cameras write: 0xC3 is lossless, without a DCT."""

    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    width, height = size
    header = segment(frame, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00")
    one_code = segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00")  # one bit for a difference of 0
    scan = segment(0xDA, b"\x01\x01\x00\x01\x00\x00") + bytes((width * height + 7) // 8)
    return b"\xff\xd8" + header + one_code + scan + b"\xff\xd9"


def png_of(
    width: int,
    height: int,
    *chunks: tuple[bytes, bytes],
    depth: int = 8,
    color: int = 2,
    rows: list[bytes] | None = None,
    interlace: int = 0,
) -> bytes:
    """A PNG of so many pixels, of gray (`color` 0) or RGB (2). By itself one row of them is there, too short."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    data = bytes(width + 1) if rows is None else b"".join(b"\0" + row for row in rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    written = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
               for kind, data in parts)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def broken_images(folder: Path) -> dict[str, str]:
    """Writes them. Returns words of the reason, by the name of the file."""
    plain = picture(size=(64, 64))
    found: dict[str, str] = {}

    def add(name: str, content: bytes, words: str = "") -> None:
        (folder / name).write_bytes(content)
        found[name] = words

    for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("TIFF", "tif")):
        content = encoded(plain, kind)
        add(f"half.{ending}", content[: len(content) // 2])
        add(f"beginning.{ending}", content[:20])
    png = encoded(plain, "PNG")
    add("damaged.png", png[:60] + bytes(500) + png[560:])
    add("empty.jpg", b"", "empty (0 bytes)")
    add("text.jpg", b"not a photo\n", "no image format that Pillow knows")
    add("page.jpg", b"<!doctype html><title>404</title>", "no image format that Pillow knows")
    add("zeros.png", bytes(5000), "no image format that Pillow knows")
    add("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no image format that Pillow knows")
    add("bomb.png", png_of(60_000, 60_000), "3600000000 pixels")
    bitmap = bytearray(encoded(plain, "BMP"))
    bitmap[18:26] = struct.pack("<ii", 50_000, 50_000)
    add("bomb.bmp", bytes(bitmap), "2500000000 pixels")
    text = b"Comment\0\0" + zlib.compress(bytes(1 << 22))  # above Pillow's limit of 1 MB
    add("text bomb.png", png_of(4, 1, (b"zTXt", text)), "ecompressed data too large")
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"
    add("program.jpg", program, "a program")
    (folder / "folder.jpg").mkdir()
    found["folder.jpg"] = "folder"
    (folder / "to nothing.jpg").symlink_to(folder / "nothing.jpg")
    found["to nothing.jpg"] = "does not exist"
    (folder / "to itself.jpg").symlink_to(folder / "to itself.jpg")
    found["to itself.jpg"] = ""
    os.mkfifo(folder / "pipe.jpg")
    found["pipe.jpg"] = "no regular file"
    if os.geteuid():  # root reads it all the same
        add("secret.jpg", encoded(plain, "JPEG"), "no permission")
        (folder / "secret.jpg").chmod(0)
    return found
