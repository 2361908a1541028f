"""Tar shards that few writers make: other formats, joined ones, and hostile headers."""

import io
import tarfile
from collections.abc import Callable

Members = list[tuple[str, bytes]]


def archive(members: Members, format: int = tarfile.PAX_FORMAT, **fields) -> bytes:
    """Returns an archive as tarfile writes it; `fields` are set at every member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def block(
    name: bytes,
    size: int | bytes = 0,
    kind: bytes = b"0",
    magic: bytes = b"ustar\0" + b"00",
    tail: bytes = b"",
) -> bytes:
    """Returns a header with a right checksum; `size` as bytes is stored as it is."""
    stored = size if isinstance(size, bytes) else b"%011o\0" % size
    made = bytearray(512)
    made[: len(name)] = name
    made[100:124] = b"0000644\0" * 3
    made[124:136], made[136:148] = stored, b"00000000000\0"
    made[148:156], made[156:157] = b" " * 8, kind
    made[257:265] = magic
    made[345 : 345 + len(tail)] = tail
    made[148:156] = b"%06o\0 " % sum(made)
    return bytes(made)


def body(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes, data: bytes, **fields) -> bytes:
    return block(name, len(data), **fields) + body(data)


def record(keyword: str, value: str) -> bytes:
    """Returns a field of a PAX header."""
    length = len(f" {keyword}={value}\n".encode())
    total = length + len(str(length + len(str(length))))
    return f"{total} {keyword}={value}\n".encode()


def pax(kind: bytes = b"x", **fields: str) -> bytes:
    return member(b"pax", b"".join(record(*each) for each in fields.items()), kind=kind)


END = bytes(1024)


def v7(members: Members) -> bytes:
    """The format before any magic, with bytes of no meaning where POSIX has the prefix."""
    made = (member(n.encode(), d, kind=b"\0", magic=bytes(8), tail=b"junk") for n, d in members)
    return b"".join(made) + END


def old_gnu(members: Members) -> bytes:
    """GNU's own format as `tar --incremental` writes it, with times instead of the prefix."""
    made = (
        member(n.encode(), d, magic=b"ustar  \0", tail=b"%011o\0" % (10**9 + i))
        for i, (n, d) in enumerate(members)
    )
    return b"".join(made) + END


def base_256(members: Members) -> bytes:
    """Sizes as numbers of 95 bits."""
    made = (
        block(n.encode(), b"\x80" + len(d).to_bytes(11, "big"), magic=b"ustar  \0") + body(d)
        for n, d in members
    )
    return b"".join(made) + END


def pax_sizes(members: Members) -> bytes:
    """Sizes and names in PAX headers alone."""
    made = (pax(path=n, size=str(len(d))) + block(b"x") + body(d) for n, d in members)
    return b"".join(made) + END


def sparse_old(name: bytes, data: bytes) -> bytes:
    """A file with a hole of a megabyte behind its data, in GNU's old format."""
    tail = bytes(41) + b"%011o\0%011o\0" % (0, len(data)) + bytes(24 * 3 + 1)
    tail += b"%011o\0" % (len(data) + 2**20)
    return member(name, data, kind=b"S", magic=b"ustar  \0", tail=tail)


def sparse_pax(name: str, data: bytes) -> bytes:
    """The same as GNU tar writes it into PAX headers."""
    table = body(f"1\n0\n{len(data)}\n".encode())
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
    fields["GNU.sparse.realsize"] = str(len(data) + 2**20)
    return pax(**fields) + member(b"GNUSparseFile.0/x", table + data)


# Headers that must cost no more than the rest of a shard: neither an endless loop, nor the memory.
HOSTILE: dict[str, Callable[[], bytes]] = {
    "negative size in base 256": lambda: block(b"a.jpg", b"\xff" * 12, magic=b"ustar  \0"),
    "negative size in PAX": lambda: pax(size="-1024") + block(b"a.jpg", 5),
    "size that is no number": lambda: block(b"a.jpg", b"twelve bytes"),
    "size beyond the file": lambda: block(b"a.jpg", 2**32) + bytes(512),
    "size of 2**90": lambda: block(b"a.jpg", b"\x80" + (2**80).to_bytes(11, "big")),
    "PAX header of 8 GiB": lambda: block(b"p", 2**33 - 1, kind=b"x"),
    "long name of 2**80 bytes": lambda: block(b"l", b"\x80" + (2**80).to_bytes(11, "big"), b"L"),
    "3,000 long names in a row": lambda: member(b"l", b"x" * 200, kind=b"L") * 3000,
    "PAX record of length 0": lambda: member(b"p", b"0 path=x\n", kind=b"x") + block(b"a.jpg"),
    "PAX size of 5,000 digits": lambda: pax(size="9" * 5000) + block(b"a.jpg"),
    "sparse map without an end": lambda: block(
        b"a.jpg", 512, b"S", b"ustar  \0", bytes(137) + b"\1"
    ),
    "sparse map that is no number": lambda: pax(**{"GNU.sparse.map": "a,b"}) + block(b"a.jpg"),
    "sparse map of a billion": lambda: (
        pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"})
        + member(b"a.jpg", b"1000000000\n1\n")
    ),
    "random bytes": lambda: bytes(range(1, 255)) * 40,
}
