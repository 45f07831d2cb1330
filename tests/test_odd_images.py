"""Pictures as the web has them: each goes through either patchifier and the loader, or is a fault that is named."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from siglip2.core.data.fields import BadSample, Fields, Sample
from siglip2.core.data.loader import EvalBatches, Maker, TrainBatches
from siglip2.core.data.order import Order
from siglip2.core.layout import Layout
from siglip2.core.native import native_grid
from siglip2.core.views import CAPTION, IMAGE
from siglip2.plugins.fixed import Fixed
from siglip2.plugins.naflex import NaFlex
from siglip2.testing import tiny_tokenizer

BUDGET = 16
PATCHIFIERS = {
    "fixed": Fixed(image_size=64, batch_size=4).patchifier(),
    "naflex": NaFlex(seq_lens=[BUDGET], batch_size=4, eval_seq_len=BUDGET).patchifier(),
}


def picture(height, width):
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows * 5 + 40, columns * 4, rows * columns], axis=-1).astype(np.uint8))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, depth=8, colour=2, rows=b""):
    """A PNG by hand: PIL writes neither 16 bits a colour nor headers that lie."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def deep(channels, colour):
    values = np.arange(30 * 50 * channels, dtype=">u2").reshape(30, -1) * 14
    return png(50, 30, depth=16, colour=colour, rows=b"".join(b"\0" + row.tobytes() for row in values))


def turned(mode):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encode(picture(30, 90).convert(mode), "JPEG", exif=exif)


def oversized_jpeg():
    data = encode(picture(8, 8), "JPEG")
    at = data.index(b"\xff\xc0") + 5  # height and width in the header of the frame
    return data[:at] + struct.pack(">HH", 60_000, 60_000) + data[at + 4 :]


GOOD = {  # file, (height, width)
    "one pixel": (encode(picture(1, 1), "PNG"), (1, 1)),
    "wide panorama": (encode(picture(5, 1000), "JPEG"), (5, 1000)),
    "tall panorama": (encode(picture(1000, 5), "PNG"), (1000, 5)),
    "cmyk jpeg": (encode(picture(30, 50).convert("CMYK"), "JPEG"), (30, 50)),
    "palette png with transparency": (
        encode(picture(30, 50).convert("P"), "PNG", transparency=bytes(range(256))),
        (30, 50),
    ),
    "16 bit grey png": (deep(1, 0), (30, 50)),
    "16 bit colour png": (deep(3, 2), (30, 50)),
    "turned jpeg": (turned("RGB"), (90, 30)),
    "turned cmyk jpeg": (turned("CMYK"), (90, 30)),  # another decoder
    "animated gif": (
        encode(picture(30, 50), "GIF", save_all=True, append_images=[Image.new("RGB", (50, 30))]),
        (30, 50),
    ),
    "grey png with alpha": (encode(picture(30, 50).convert("LA"), "PNG"), (30, 50)),
    "black and white png": (encode(picture(30, 50).convert("1"), "PNG"), (30, 50)),
}
BAD = {  # file, reason
    "truncated jpeg": (encode(picture(200, 300), "JPEG")[:2000], "cannot be decoded"),
    "empty file": (b"", "the image file is empty"),
    "text called jpg": (b"<html>404 not found</html>", "not an image file"),
    "header only": (encode(picture(30, 50), "PNG")[:40], "its header is broken"),
    "png bomb": (png(60_000, 60_000), "over the limit of 89478485 pixels"),
    "jpeg bomb": (oversized_jpeg(), "over the limit of 89478485 pixels"),
    "picture a little too large": (png(10_000, 9_000), "the image is 10000x9000, over the limit of 89478485 pixels"),
}


def sample(data, *, fields=Fields()):  # noqa: B008 - frozen
    return Sample("0001", "web.tar", {"jpg": data, "txt": b"a caption"}, fields)


class WebSource:
    """Samples with the given files, and after them nine good ones, so that bad ones can be replaced."""

    name = "web.tar"

    def __init__(self, files):
        self.files = [*files, *[encode(picture(40, 60), "PNG")] * 9]

    def __len__(self):
        return len(self.files)

    def shard_sizes(self):
        return [len(self)]

    def read(self, i):
        return Sample(f"{i:04d}", self.name, {"jpg": self.files[i], "txt": b"a caption"})


def maker(name, *files):
    return Maker(WebSource(files), PATCHIFIERS[name], tiny_tokenizer(), seed=0)


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("patchifier", PATCHIFIERS)
def test_odd_picture_fills_the_grid_of_its_shape(patchifier, name):
    data, size = GOOD[name]
    row = maker(patchifier, data).row(0, position=0, views=[IMAGE, CAPTION], layout=Layout(BUDGET, 1))
    images = row.views["image"]
    assert images.patches.shape == (1, BUDGET, 768)
    if patchifier == "fixed":
        assert images.grid == (4, 4)
    else:
        assert images.sizes.tolist() == [[list(native_grid(*size, patch_size=16, max_patches=BUDGET))]]
        assert images.patches[0, images.valid[0]].amax(1).min() > 0
    assert images.patches.max() > 0


@pytest.mark.parametrize("name", ["turned jpeg", "turned cmyk jpeg"])
def test_grid_follows_a_picture_that_its_exif_turns(name):
    data, _ = GOOD[name]
    assert Image.open(io.BytesIO(data)).size == (90, 30)  # as stored: wide
    images = PATCHIFIERS["naflex"](sample(data).image(), IMAGE, Layout(BUDGET, 1))
    rows, columns = images.sizes[0, 0].tolist()
    assert rows > columns


def test_first_frame_of_an_animation_is_what_is_seen():
    still, moving = sample(encode(picture(30, 50), "GIF")).image(), sample(GOOD["animated gif"][0]).image()
    assert torch.equal(still, moving)


@pytest.mark.parametrize("name", BAD)
def test_unusable_picture_is_a_bad_sample_that_says_why(name):
    data, reason = BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadSample, match=reason) as caught:
            sample(data).image()
    assert (caught.value.where, caught.value.key) == ("web.tar", "0001")


@pytest.mark.parametrize("name", ["png bomb", "jpeg bomb"])
def test_bomb_takes_no_memory(name):
    """With 256 MB left to take; the decoded picture has 10.8 GB."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("the size of this process is not known")
    sample(GOOD["cmyk jpeg"][0]).image()  # whatever decoders load, they have loaded
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, hard))
        with pytest.raises(MemoryError):
            bytearray(2**30)  # the limit holds
        with pytest.raises(BadSample, match="over the limit"):
            sample(BAD[name][0]).image()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_limit_of_pixels_can_be_set_with_the_fields():
    data = encode(picture(30, 50), "PNG")
    assert sample(data, fields=Fields(max_pixels=1500)).image().shape == (3, 30, 50)
    with pytest.raises(BadSample, match="the image is 50x30, over the limit of 1499 pixels"):
        sample(data, fields=Fields(max_pixels=1499)).image()
    with pytest.raises(ValueError, match="max_pixels is 0, expected a number of pixels, or null"):
        Fields(max_pixels=0)


@pytest.mark.parametrize("patchifier", PATCHIFIERS)
def test_worker_counts_and_names_what_it_cannot_use_and_goes_on(patchifier):
    files = [data for data, _ in (*GOOD.values(), *BAD.values())]
    making = maker(patchifier, *files)
    num_batches = len(making.source) // 4
    order = Order([len(making.source)], 0)
    batches = TrainBatches(making, order, [(0.0, (IMAGE, CAPTION))], max_batches=num_batches)
    assert 4 * num_batches == len(making.source)  # an epoch: every sample is asked for
    faults, keys = {}, []
    for batch in DataLoader(batches, batch_size=None, num_workers=1):
        assert batch.views["image"].patches.shape == (4, BUDGET, 768)
        faults |= {fault.key: fault.reason for fault in batch.faults}
        keys += batch.keys
    bad = {f"{number:04d}": reason for number, (_, reason) in enumerate(BAD.values(), start=len(GOOD))}
    assert faults.keys() == bad.keys()
    assert all(bad[key] in reason for key, reason in faults.items())
    assert len(keys) == 4 * num_batches
    assert not bad.keys() & set(keys)
    assert {f"{number:04d}" for number in range(len(GOOD))} <= set(keys)


@pytest.mark.parametrize("patchifier", PATCHIFIERS)
def test_evaluation_marks_rows_whose_picture_cannot_be_used(patchifier):
    names = ["cmyk jpeg", "text called jpg", "turned jpeg", "png bomb"]
    files = [{**GOOD, **BAD}[name][0] for name in names]
    batch = EvalBatches(maker(patchifier, *files), [IMAGE], batch_size=4)[0]
    assert batch.real.tolist() == [True, False, True, False]
    assert [fault.key for fault in batch.faults] == ["0001", "0003"]
    assert all(fault.where == "web.tar" for fault in batch.faults)
