"""Files that visitors really send, and some that they should not; each as its bytes."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image

from dimefm_edge.data.scenes import scene_test_set


def scene(name: str = "red ladder") -> Image.Image:
    """A picture of one of the `scenes` classes, 64 x 64."""
    drawn = scene_test_set()
    return drawn.image(drawn.classnames.index(name))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def huge_png(side: int = 20_000) -> bytes:
    """A black PNG of side x side pixels in some 50 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    data = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rotated_jpeg(image: Image.Image) -> bytes:
    """Lying on its side, with the EXIF tag that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def deep_png(image: Image.Image) -> bytes:
    """Grey, 16 bits a pixel."""
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return encoded(Image.fromarray(grey), "PNG")


def animated_gif(first: Image.Image, second: Image.Image) -> bytes:
    return encoded(first, "GIF", save_all=True, append_images=[second], duration=50)


def see_through_png(image: Image.Image) -> bytes:
    """The left half is transparent, and black below that."""
    pixels = np.dstack([np.asarray(image), np.full(image.size, 255, np.uint8)])
    pixels[:, : image.width // 2] = 0
    return encoded(Image.fromarray(pixels, "RGBA"), "PNG")


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def zip_bomb() -> bytes:
    """200 MiB of nothing as a picture, in some 200 kB."""
    return zipped({"bomb.png": bytes(200 * 2**20)})
