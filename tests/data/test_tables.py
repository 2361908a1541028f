"""Tables as pandas, pyarrow and img2dataset understand them, the same for all who read them."""

import csv
import gzip
import io
import json
import logging
import random
from collections import Counter

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from etils import epath

from clip_jax.curation.balancing import pairs, readers
from clip_jax.data.sources import delimited, table_scan, tables
from clip_jax.data.sources.folder import ImageFolder
from clip_jax.embed.inputs import CaptionFile
from clip_jax.errors import BadExample, UserError

SEPARATORS = ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def load(path, *columns: str) -> list[tuple]:
    """The rows of a table, of all columns or of some."""
    wanted: list[str] = []

    def choose(names, path):
        wanted[:] = columns or names
        return wanted

    table = tables.load([epath.Path(path)], choose)
    return list(zip(*(table.columns[name] for name in wanted)))


def texts(source) -> list[str]:
    """The captions of a source, or why there is none."""
    found = []
    for index in range(len(source)):
        try:
            found.append(source[index].text)
        except BadExample as error:
            found.append(error.reason)
    return found


def folder_texts(path, image_key: str = "", text_key: str = "") -> list[str]:
    """The captions that training has of a table; its images need not be there."""
    source = ImageFolder(str(path), text_key, "", image_key=image_key)
    found = []
    for index in range(len(source)):
        try:
            if index in source._bad_rows:
                found.append(source._bad_rows[index])
            else:
                found.append(source._captions(index).texts[0])
        except BadExample as error:
            found.append(error.reason)
    return found


def curated(path, text_key: str = "", names: tuple[str, ...] = ()) -> tuple[dict, Counter]:
    """The captions that curation has of a table, by row, and what it counts."""
    stats: Counter[str] = Counter()
    columns = readers.Columns(text_key, (), names)
    found = {}
    for table in pairs.read(epath.Path(path), columns, 1000, stats):
        found |= zip(table["row"].to_pylist(), table["caption"].to_pylist())
    return found, stats


def small_blocks(monkeypatch, block: int, row: int) -> None:
    monkeypatch.setattr(table_scan, "_BLOCK", block)
    monkeypatch.setattr(table_scan, "MAX_ROW", row)
    monkeypatch.setattr(delimited, "MAX_ROW", row)


# ---- Delimited text ----------------------------------------------------------------------------


def some_rows(count: int, width: int, pieces: list[str]) -> list[tuple[str, ...]]:
    rng = random.Random(count * width)

    def cell() -> str:
        return "x" + "".join(rng.choices(pieces, k=rng.randrange(6)))

    return [tuple(cell() for _ in range(width)) for _ in range(count)]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("quote_all", [False, True])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_what_is_written_well_is_read_as_it_was(tmp_path, monkeypatch, suffix, quote_all, line_end):
    pieces = ["a", " ", '"', '""', ",", "é", "\u2028", "\x85", "'", "\0", *"\n\r"]
    rows = some_rows(300, 3, [*pieces, *("\t" if suffix == "csv" else ())])
    rows.insert(0, ("one", "two", "three"))
    path, delimiter = tmp_path / f"x.{suffix}", "," if suffix == "csv" else "\t"

    def written(cell: str) -> str:
        needed = quote_all or set(cell) & {delimiter, '"', "\n", "\r"}
        return '"' + cell.replace('"', '""') + '"' if needed else cell

    lines = [delimiter.join(map(written, row)) + line_end for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert load(path) == rows[1:]
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    by_arrow = pyarrow.csv.read_csv(path, parse_options=parse).to_pydict()
    assert load(path, "three", "one") == list(zip(by_arrow["three"], by_arrow["one"]))
    for block in (200, 201, 511, 4096):  # rows across blocks
        small_blocks(monkeypatch, block, 150)
        assert load(path) == rows[1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('0,a 5\'10" man\n1,b "quoted" c\n', [("0", "a 5'10\" man"), ("1", 'b "quoted" c')]),
        ('0,"a ""b"" c"\n1,""\n', [("0", 'a "b" c'), ("1", "")]),
        ('0,"Hello" she said\n', [("0", "Hello she said")]),
        ('0,"two\nlines in a cell"\n1,b\n', [("0", "two\nlines in a cell"), ("1", "b")]),
        ('0,"never closed\n1,b\n2,c\n', [("0", '"never closed'), ("1", "b"), ("2", "c")]),
        ('0,"opened\n1,b\n2,"c"\n', [("0", '"opened'), ("1", "b"), ("2", "c")]),
        ("0,a\n\n\r\n1,b", [("0", "a"), ("1", "b")]),
        ("0,a\r1,b\r\n2,c\n", [("0", "a"), ("1", "b"), ("2", "c")]),
        ("0\n1,b,c\n,\n", [("0", None), ("1", "b"), ("", "")]),
        ('0,"' + "x" * 200_000 + '"\n', [("0", "x" * 200_000)]),
    ],
)
def test_quotes_and_line_ends(tmp_path, text, expected):
    (tmp_path / "x.csv").write_text("n,caption\n" + text, newline="")
    assert load(tmp_path / "x.csv") == expected
    swapped = text.translate({ord(","): "\t", ord("\t"): ","})
    (tmp_path / "x.tsv").write_text("n\tcaption\n" + swapped, newline="")
    swapped = [tuple(c and c.translate({ord(","): "\t"}) for c in row) for row in expected]
    assert load(tmp_path / "x.tsv") == swapped


def test_a_stray_quote_in_a_tsv_swallows_no_rows(tmp_path):
    """Even where a later row happens to end with a quote; lines that are no rows stay one cell."""
    path = tmp_path / "x.tsv"
    path.write_text('n\tcaption\n0\t"wow, said the cat\n1\ta screen of 24"\n2\tb\n')
    assert [row[1] for row in load(path)] == ['"wow, said the cat', 'a screen of 24"', "b"]
    path.write_text('n\tcaption\n0\t"first line\nsecond"\n1\tb\n')
    assert [row[1] for row in load(path)] == ["first line\nsecond", "b"]


def test_rows_that_are_too_long(tmp_path, monkeypatch):
    for block in (1000, 64, 40):
        small_blocks(monkeypatch, block, 30)
        (tmp_path / "x.csv").write_text("n,caption\n0,a\n1," + "long " * 50 + "\n2,b\n3,c\n")
        found, stats = curated(tmp_path / "x.csv")
        assert found == {0: "a", 2: "b", 3: "c"}
        assert stats == {"read": 4, "malformed row": 1}
        assert load(tmp_path / "x.csv")[1] == (None, None)
    monkeypatch.setattr(table_scan, "_MAX_LINE", 60)
    lines = [json.dumps({"caption": text}) for text in ("a", "long " * 50, "b")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert curated(tmp_path / "x.jsonl") == ({0: "a", 2: "b"}, {"read": 3, "malformed row": 1})


def test_other_separators_are_part_of_a_caption(tmp_path):
    captions = [f"a{mark}b" for mark in SEPARATORS]
    rows = [{"image": f"{i}.png", "caption": text} for i, text in enumerate(captions)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "x.txt").write_text("\n".join(captions), encoding="utf-8", newline="")
    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        lines = [f"{row['image']}{mark}{row['caption']}" for row in rows]
        text = "\n".join([f"image{mark}caption", *lines])
        (tmp_path / f"x.{suffix}").write_text(text, encoding="utf-8", newline="")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for suffix in ("csv", "tsv", "jsonl", "parquet", "txt"):
        path = tmp_path / f"x.{suffix}"
        assert list(curated(path)[0].values()) == captions
        assert texts(CaptionFile(epath.Path(path), "")) == captions
        if suffix != "txt":
            assert folder_texts(path) == captions


# ---- All kinds, all readers --------------------------------------------------------------------

ROWS = [
    ("0.png", "a cat"),
    ("1.png", 'say "hi",\n“zwei”'),
    ("2.png", None),
    ("3.png", "nul\0"),
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("columns", [("image", "caption"), ("picture", "words")])
def test_one_table_in_every_format(tmp_path, suffix, mark, columns):
    rows = [dict(zip(columns, row)) for row in ROWS]
    path = tmp_path / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_bytes(mark + "\n".join(map(json.dumps, rows)).encode())
    else:
        file, delimiter = io.StringIO(), "," if suffix == "csv" else "\t"
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows([cell for cell in row.values() if cell is not None] for row in rows)
        path.write_bytes(mark + file.getvalue().encode())
    image_key, text_key = ("", "") if columns[0] == "image" else columns
    source = ImageFolder(str(path), text_key, "", image_key=image_key)
    assert source._images == [row[0] for row in ROWS]
    # Of delimited text, a row without the cell is too short; training has at least its image.
    missing = "malformed row" if suffix in ("csv", "tsv") else "no caption"
    expected = [text or "no caption" for _, text in ROWS]
    assert folder_texts(path, image_key, text_key) == expected
    expected[2] = missing
    assert texts(CaptionFile(epath.Path(path), text_key)) == expected
    found, stats = curated(path, text_key)
    assert found == {i: text for i, text in enumerate(expected) if i != 2}
    assert stats == {"read": 4, missing: 1}


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.string(), 1),
    ],
)
def test_types_of_text(tmp_path, kind):
    values = ["a cat", "b", "a cat"]
    cells = [[text] for text in values] if "list" in str(kind) else values
    columns = {"image": ["0.png", "1.png", "2.png"], "caption": pa.array(cells, kind)}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=2)
    assert folder_texts(tmp_path / "x.parquet") == values
    assert texts(CaptionFile(epath.Path(tmp_path / "x.parquet"), "")) == values
    assert list(curated(tmp_path / "x.parquet")[0].values()) == values


def test_captions_that_are_no_text(tmp_path):
    rows = {"image": ["0.png"], "caption": [{"en": "a"}]}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"struct.*--text_key"):
        curated(tmp_path / "x.parquet")
    pq.write_table(pa.table({"image": ["0"], "caption": pa.nulls(1)}), tmp_path / "x.parquet")
    assert folder_texts(tmp_path / "x.parquet") == ["no caption"]
    assert curated(tmp_path / "x.parquet") == ({}, {"read": 1, "no caption": 1})


def test_jsonl_rows_of_many_kinds(tmp_path):
    lines = [
        '{"caption": "no image"}',
        '{"image": "1.png", "caption": ["a", "b"]}',
        '{"image": "2.png", "caption": 7}',
        '{"image": "3.png", "text": "other key"}',
        '{"image": {"path": "4.png", "bytes": null}, "caption": "in a struct"}',
        '{"image": "5.png", "caption": "half \\ud83d a pair"}',
        '{"image": "6.png", "caption": "whole \\ud83d\\ude00 pair"}',
        '{"image": "7.png", "caption": "cut',
        "[1]",
        "[" * 100_000,
        "",
        '{"image": null, "caption": "null"}',
    ]
    path = tmp_path / "x.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"image": "9.png", "caption": "\xff"}')
    assert folder_texts(path) == [
        "no image",
        "a",
        "empty caption",
        "no caption",
        "in a struct",
        "invalid UTF-8 caption",
        "whole 😀 pair",
        "malformed row",
        "malformed row",
        "malformed row",
        "no image",
        "invalid UTF-8 caption",
    ]
    assert ImageFolder(str(path), "", "")._images[4] == "4.png"
    found, stats = curated(path)
    assert list(found) == [0, 1, 2, 4, 6, 10]
    assert stats == {
        "read": 12,
        "no caption": 1,
        "invalid UTF-8 caption": 2,
        "malformed row": 3,
    }
    assert len(CaptionFile(epath.Path(path), "")) == 12


def test_no_row_is_forgotten(tmp_path, caplog):
    """A row without a key is an example that is skipped and counted under a name to find it by."""
    (tmp_path / "captions.jsonl").write_text('{"image": "a.png", "caption": "a"}\n{"caption": "b"}')
    (tmp_path / "a.png").write_bytes(b"image")
    source = ImageFolder(str(tmp_path), "", "")
    assert texts(source) == ["a", "no image"]
    with pytest.raises(BadExample) as caught:
        source[1]
    assert (caught.value.reason, caught.value.key) == ("no image", "captions.jsonl:1")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,x,extra\na.png\n,y\n")
    with caplog.at_level(logging.WARNING):
        assert texts(ImageFolder(str(tmp_path), "", "")) == ["x", "no caption", "no image"]
    assert "2 of the rows" in caplog.text
    assert "row 1;" in caplog.text


# ---- What cannot be read -----------------------------------------------------------------------


def test_tables_without_rows(tmp_path):
    empty = pa.table({"image": pa.array([], pa.string()), "caption": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "x.parquet")
    for name, content, message in (
        ("x.parquet", None, "has no rows"),
        ("x.csv", b"image,caption\n", "has no rows"),
        ("x.jsonl", b"\n\n", "has no rows"),
        ("x.csv", b"", "the file is empty"),
        ("x.tsv", b"\n\r\n", "the file is empty"),
        ("x.jsonl", b"", "has no rows"),
        ("y.parquet", b"", "y.parquet cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            ImageFolder(str(tmp_path / name), "", "")
        if name != "y.parquet":
            assert curated(tmp_path / name)[0] == {}
            with pytest.raises(UserError):
                CaptionFile(epath.Path(tmp_path / name), "")
    assert curated(tmp_path / "y.parquet")[1] == {"damaged shard": 1, "read": 0}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.csv",
            gzip.compress(b"image,caption\n0,a\n", mtime=0),
            "gzip: decompress it with gunzip",
        ),
        ("x.jsonl", "{}".encode("utf-16"), "UTF-16: save it in UTF-8"),
        ("x.tsv", b"PK\x03\x04 and so on", "spreadsheet: save it as .csv"),
        ("x.csv", b"image,caption\n0,ok\n1,caf\xe9\n", "row 2, column 'caption'.*iconv"),
        ("x.csv", b"image;caption\n0;a\n", "commas between columns"),
        ("x.csv", b"Image,Caption\n0,a\n", "its columns are Image, Caption"),
        ("x.csv", b"image,caption,caption\n0,a,b\n", "2 columns named 'caption'.*Rename"),
        ("x.jsonl", b'[\n{"image": "0"}\n]', "column"),
        ("x.jsonl", b'[{"image": "0", "caption": "a"}]', "a JSON object in each line"),
        ("x.parquet", b"PAR1 and nothing of the kind", "cannot be read"),
    ],
)
def test_what_is_no_table_is_said_so(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ImageFolder(str(tmp_path / name), "", "")


def test_compressed_by_name(tmp_path):
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(b"image,caption\n", mtime=0))
    with pytest.raises(UserError, match="decompress"):
        ImageFolder(str(tmp_path / "x.csv.gz"), "", "")
    with pytest.raises(UserError, match="Decompress"):
        pairs.find(str(tmp_path / "x.csv.gz"))


def test_a_damaged_row_of_a_table_in_utf8_costs_that_row(tmp_path):
    (tmp_path / "x.csv").write_bytes("image,caption\n0,é\n1,".encode() + b"\xff\n2,b\n")
    assert folder_texts(tmp_path / "x.csv") == ["é", "invalid UTF-8 caption", "b"]
    assert curated(tmp_path / "x.csv")[1] == {"read": 3, "invalid UTF-8 caption": 1}


def test_repeated_names_that_nobody_wants(tmp_path):
    (tmp_path / "x.csv").write_text("image,size,caption,size\n0,1,a,2\n")
    assert folder_texts(tmp_path / "x.csv") == ["a"]


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Blocks hold what was asked for at most, and come before the file is read to its end."""
    path = tmp_path / "x.csv"
    path.write_text("caption\n" + "word " * 20 + "\n")
    with path.open("a") as file:
        for _ in range(300):
            file.write(("word " * 20 + "\n") * 1000)
    with path.open("rb") as file:
        blocks = table_scan.scan(file, epath.Path(path), lambda names, path: names, rows=5000)
        first = next(blocks)
        assert first.length == 5000
        assert file.tell() <= 2 * table_scan._BLOCK < path.stat().st_size
        lengths = [first.length, *(block.length for block in blocks)]
    assert sum(lengths) == 300_001
    assert max(lengths) == 5000
