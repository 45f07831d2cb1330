"""Toy pictures and shards, for the tests of sources."""

import io

from PIL import Image
from webdataset import TarWriter


def picture(number, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, start, count, **more):
    """A shard as img2dataset lays it out."""
    with open(path, "wb") as file, TarWriter(file) as tar:
        for number in range(start, start + count):
            meta = {"caption": f"json {number}", "key": f"{number:09d}", "width": 6}
            parts = {"jpg": picture(number), "txt": f"text {number} 猫", "json": meta, **more}
            tar.write({"__key__": f"{number:09d}", **parts})


def keys(source):
    return [source.read(i).key for i in range(len(source))]
