"""The headers of a tar file, read one by one: which regular files it holds, where, and where it is damaged."""

from collections.abc import Iterator

from siglip2.core.data.storage import ByteFile

BLOCK = 512  # bytes; tar headers and contents are padded to it
TRAILING_BYTES = 2**20  # tar pads its end with zeros; more than this behind the end mark is data that nobody reads
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"BZ": "bzip2", b"\xfd7": "xz"}
REGULAR, LONG_NAME, PAX, EMPTY = (b"0", b"\0", b"7"), b"L", b"x", (b"1", b"2", b"3", b"4", b"5", b"6")


class TarDamage(Exception):
    """A tar file stops making sense at some byte; what came before is whole."""


def read_members(file: ByteFile) -> Iterator[tuple[str, int, int]]:
    """Name, content offset and content size of each regular file in a tar (ustar, pax and GNU long names).

    A few lines instead of `tarfile`, which is five times slower and ends in silence at a header it cannot
    read.

    Raises:
        TarDamage: where the file is cut or a header is broken.
        ValueError: if it is compressed.
    """
    at = 0
    override: dict[str, str] = {}  # from an extended header, for the file behind it
    while True:
        header = file.stream(at, BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(f"cut at byte {file.size}, without the end mark of a tar")
        if not any(header):
            if (rest := file.size - at) > TRAILING_BYTES:
                raise TarDamage(f"{rest} bytes behind the end mark at byte {at} are not read (joined tars?)")
            return
        if at == 0 and header[:2] in COMPRESSED:
            how = COMPRESSED[header[:2]]
            raise ValueError(f"{file.path} is compressed ({how}); unpack it, so that single samples can be read")
        kind, name, size = _parse_header(header, at)
        size = 0 if kind in EMPTY else int(override.get("size", size)) if kind in REGULAR else size
        begin, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if begin + size > file.size:
            raise TarDamage(f"cut at byte {file.size}, inside {name!r}")
        if kind == LONG_NAME:
            override["path"] = _text(file.stream(begin, size))
        elif kind == PAX:
            override |= _parse_pax(file.stream(begin, size), begin)
        else:
            name = override.get("path", name)
            if kind in REGULAR and not name.endswith("/"):
                yield name, begin, size
            override = {} if kind in REGULAR + EMPTY else override


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="surrogateescape")


def _parse_header(header: bytes, at: int) -> tuple[bytes, str, int]:
    """Kind, name and size of one tar header."""
    try:
        checksum = int(_text(header[148:156]).strip() or "0", 8)
        size = int(_text(header[124:136]).strip() or "0", 8) if header[124] < 0x80 else -1
        if size < 0:  # GNU's base-256 for files of 8 GiB and more
            size = int.from_bytes(header[125:136], "big")
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise TarDamage(f"no tar header at byte {at}")
    name, prefix = _text(header[:100]), _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return header[156:157], f"{prefix}/{name}" if prefix else name, size


def _parse_pax(records: bytes, at: int) -> dict[str, str]:
    """The `length key=value` records of an extended header."""
    found = {}
    try:
        while records and records[0]:
            length = int(records[: records.index(b" ")])
            key, _, value = records[records.index(b" ") + 1 : length - 1].partition(b"=")
            found[key.decode()] = value.decode(errors="surrogateescape")
            records = records[length:] if length > 0 else b""
    except ValueError:
        raise TarDamage(f"broken extended header at byte {at}") from None
    return found
