"""Pictures come out as PIL gives them, whichever library read them; broken files are a ValueError that says why."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from siglip2.core.data.image_io import decode_image

# smooth, so that lossy codecs have something to do; odd sides, so that chroma subsampling has an edge
ROWS, COLUMNS = np.mgrid[0:45, 0:61]
PIXELS = np.stack([ROWS * 5, COLUMNS * 4, (ROWS * COLUMNS) % 256], axis=-1).astype(np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(PICTURE, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def clear_palette():
    image = PICTURE.convert("P")
    return encode(image, "PNG", transparency=bytes(range(256)))


def png(depth, colour, row):
    """A 2x1 PNG by hand: PIL does not write 16 bits a colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    )


FILES = {
    "jpeg": encode(PICTURE, "JPEG"),
    "jpeg, no chroma subsampling": encode(PICTURE, "JPEG", subsampling=0),
    "jpeg, progressive": encode(PICTURE, "JPEG", progressive=True),
    "jpeg, grey": encode(PICTURE.convert("L"), "JPEG"),
    "jpeg, cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "png": encode(PICTURE, "PNG"),
    "png, grey": encode(PICTURE.convert("L"), "PNG"),
    "png, black and white": encode(PICTURE.convert("1"), "PNG"),
    "png, alpha": encode(PICTURE.convert("RGBA"), "PNG"),
    "png, grey and alpha": encode(PICTURE.convert("LA"), "PNG"),
    "png, palette": encode(PICTURE.convert("P"), "PNG"),
    "webp, lossless": encode(PICTURE, "WEBP", lossless=True),
    "webp": encode(PICTURE, "WEBP"),
    "webp, alpha": encode(PICTURE.convert("RGBA"), "WEBP"),
    "gif": encode(PICTURE, "GIF"),
    "bmp": encode(PICTURE, "BMP"),
    "tiff": encode(PICTURE, "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_equal_pil(name):
    decoded = decode_image(FILES[name])
    assert decoded.dtype == torch.uint8
    assert decoded.permute(1, 2, 0).is_contiguous()
    expected = np.asarray(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    np.testing.assert_array_equal(decoded.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_is_applied(kind, orientation):
    turned = decode_image(with_orientation(kind, orientation))
    upright = decode_image(with_orientation(kind, 1))
    quarter_turns = {1: 0, 3: 2, 6: -1, 8: 1}[orientation]  # anticlockwise, EXIF 2.3 table 6
    assert torch.equal(turned, torch.rot90(upright, quarter_turns, dims=(1, 2)))


def test_palette_with_transparency_keeps_its_colours():
    expected = np.asarray(PICTURE.convert("P").convert("RGB"))
    np.testing.assert_array_equal(decode_image(clear_palette()).permute(1, 2, 0).numpy(), expected)


def test_sixteen_bits_keep_the_high_byte():
    grey = decode_image(png(16, 0, struct.pack(">2H", 0x1234, 0xFEDC)))
    assert grey[:, 0].tolist() == [[0x12, 0xFE]] * 3
    colour = decode_image(png(16, 2, struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0xFFFF, 0x80FF)))
    assert colour[:, 0, :].tolist() == [[0x12, 0], [0x56, 0xFF], [0x9A, 0x80]]


@pytest.mark.parametrize("name", ["jpeg", "jpeg, cmyk", "png", "webp", "gif", "bmp", "tiff"])
def test_truncated_file_is_refused(name):
    with pytest.raises(ValueError, match=r"cannot be decoded: .+ \(\d+ bytes\)|its header is broken"):
        decode_image(FILES[name][: len(FILES[name]) * 2 // 3])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not an image file"),
        (FILES["png"][:10], "not an image file"),
    ],
)
def test_what_is_no_image_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        decode_image(data)


def test_bomb_is_refused_before_it_is_decoded_and_without_a_warning():
    large = FILES["png"][:16] + struct.pack(">II", 10_000, 10_000) + FILES["png"][24:29]
    large += struct.pack(">I", zlib.crc32(large[12:29])) + FILES["png"][33:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="10000x10000, over the limit"):
            decode_image(large)
    with pytest.raises(ValueError, match="61x45, over the limit of 100 pixels"):
        decode_image(FILES["jpeg"], max_pixels=100)
