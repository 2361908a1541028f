"""The keys of samples, against Python's tarfile; and headers that few writers make."""

import io
import os
import tarfile

import odd_tars
import pytest
from etils import epath
from shards import contents, picture, write_tar

from clip_jax.curation.balancing import readers, tars
from clip_jax.data.sources import tar_index
from clip_jax.data.sources.base import as_key, from_key
from clip_jax.data.sources.tar import TarShards

LONG = "d" * 90 + "/" + "k" * 150
KEYS = ("0", "a/0", "b/0", "./c/0", "v1.0/0.1", "猫é", "x" * 99, "y" * 120, f"{LONG}1", f"{LONG}2")


def members(keys=KEYS) -> odd_tars.Members:
    return [m for key in keys for m in ((f"{key}.JPG", picture(len(key))), (f"{key}.txt", b"t"))]


def read(path) -> list[tuple[str, str]]:
    return contents(TarShards(str(path)))


def expected(data: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [name.rpartition(".")[0] for name in tar.getnames() if name.endswith(".txt")]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_are_tarfiles_names(tmp_path, format_):
    keys = KEYS
    if format_ == tarfile.USTAR_FORMAT:  # which has room for 100 bytes behind a directory of 155
        keys = (*KEYS[:6], *(f"{'p' * 80}/{i}/{'q' * 90}" for i in range(2)))
    data = odd_tars.archive(members(keys), format_)
    (tmp_path / "a.tar").write_bytes(data)
    for _ in range(2):  # scanned, then from the index
        source = TarShards(str(tmp_path))
        assert [key for key, _ in contents(source)] == [f"a.tar/{k}" for k in expected(data)]
        assert [e.image for e in map(source.__getitem__, range(len(source)))] == [
            picture(len(key)) for key in keys
        ]
        assert not source.problems


@pytest.mark.parametrize("make", [odd_tars.v7, odd_tars.base_256, odd_tars.pax_sizes])
def test_other_formats(tmp_path, make):
    data = make(members(KEYS[:6]))
    (tmp_path / "a.tar").write_bytes(data)
    assert [key for key, _ in read(tmp_path)] == [f"a.tar/{key}" for key in KEYS[:6]]


def test_times_in_place_of_the_prefix(tmp_path):
    """tarfile takes the times for directories, so that no caption would meet its image."""
    (tmp_path / "a.tar").write_bytes(odd_tars.old_gnu(members(KEYS[:6])))
    assert [key for key, _ in read(tmp_path)] == [f"a.tar/{key}" for key in KEYS[:6]]


def test_long_links_and_links(tmp_path):
    data = odd_tars.archive(members(["0"])).rstrip(b"\0")
    data += bytes(-len(data) % 512)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        data += odd_tars.archive(
            [("l.jpg", b"")], tarfile.GNU_FORMAT, type=kind, linkname="0/" * 90
        )[: 512 * 3 if kind == tarfile.SYMTYPE else None]
    (tmp_path / "a.tar").write_bytes(data)
    source = TarShards(str(tmp_path))
    assert contents(source) == [("a.tar/0", "t")]
    assert not source.problems


@pytest.mark.parametrize("sparse", [odd_tars.sparse_old, odd_tars.sparse_pax])
def test_sparse_files_are_counted_and_what_follows_is_read(tmp_path, sparse):
    name = "0.jpg" if sparse is odd_tars.sparse_pax else b"0.jpg"
    data = sparse(name, picture(1)) + odd_tars.archive([("0.txt", b"lost"), *members(["1"])])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [m.name for m in tar if m.issparse()] == ["0.jpg"]
    (tmp_path / "a.tar").write_bytes(data)
    source = TarShards(str(tmp_path))
    assert contents(source) == [("a.tar/1", "t")]
    assert source.problems == {"sparse file": 1, "no image": 1}


def test_a_name_for_all_members_is_counted(tmp_path):
    data = odd_tars.pax(b"g", path="all.jpg") + odd_tars.archive(members(["0"]))
    (tmp_path / "a.tar").write_bytes(data)
    write_tar(tmp_path / "b.tar", members(["1"]))
    source = TarShards(str(tmp_path))
    assert contents(source) == [("b.tar/1", "t")]
    assert source.problems == {"name in a global header": 2}


def test_names_that_are_not_utf_8_in_pax(tmp_path):
    fields = odd_tars.record("hdrcharset", "BINARY") + b"14 path=\xe9.jpg\n"
    data = odd_tars.member(b"p", fields, kind=b"x") + odd_tars.member(b"x", picture(1))
    data += odd_tars.member(b"\xe9.txt", b"t") + odd_tars.END
    (tmp_path / "a.tar").write_bytes(data)
    assert read(tmp_path) == [("a.tar/\\udce9", "t")]


def test_comments_of_git_archive_are_nothing(tmp_path):
    data = odd_tars.pax(b"g", comment="0" * 40) + odd_tars.archive(members(["0"]))
    (tmp_path / "a.tar").write_bytes(data)
    assert read(tmp_path) == [("a.tar/0", "t")]


class TestJoined:
    def test_all_archives_are_read_and_keys_differ(self, tmp_path):
        parts = [odd_tars.archive([("0.jpg", picture(i)), ("0.txt", b"%d" % i)]) for i in range(3)]
        (tmp_path / "a.tar").write_bytes(b"".join(parts))
        source = TarShards(str(tmp_path))
        found = contents(source)
        assert [text for _, text in found] == ["0", "1", "2"]
        assert [source[i].image for i in range(3)] == [picture(i) for i in range(3)]
        assert len({key for key, _ in found}) == 3
        assert found[0][0] == "a.tar/0"
        assert source.problems == {"repeated key": 2}

    def test_no_file_goes_to_a_sample_of_another_archive(self, tmp_path):
        first = odd_tars.archive([("0.jpg", picture(1)), ("0.txt", b"one")])
        second = odd_tars.archive([("0.json", b'{"caption": "2"}'), ("0.jpg", picture(2))])
        (tmp_path / "a.tar").write_bytes(first + second)
        source = TarShards(str(tmp_path), "caption,txt")
        assert [source[i].captions.texts for i in range(2)] == [("one",), ("2",)]

    def test_a_lone_block_of_zeros_is_no_end(self, tmp_path):
        first, second = (odd_tars.archive(members([key])) for key in "01")
        first = first.rstrip(b"\0")
        first += bytes(512 - len(first) % 512 + 512)
        (tmp_path / "a.tar").write_bytes(first + second)
        assert read(tmp_path) == [("a.tar/0", "t"), ("a.tar/1", "t")]

    def test_what_is_no_archive_is_damage(self, tmp_path):
        (tmp_path / "a.tar").write_bytes(odd_tars.archive(members(["0"])) + b"<html>" * 200)
        source = TarShards(str(tmp_path))
        assert contents(source) == [("a.tar/0", "t")]
        assert source.problems == {"damaged shard": 1}


def test_hidden_files(tmp_path):
    found = members(["d/0", "d/._0", ""])
    write_tar(tmp_path / "a.tar", found)
    source = TarShards(str(tmp_path))
    assert contents(source) == [("a.tar/d/0", "t")]
    assert source.problems == {"hidden file": 4}


def test_several_images_of_a_key(tmp_path):
    found = [("0.jpg", picture(1)), ("0.txt", b"one"), ("0.png", picture(2)), ("0.txt", b"two")]
    write_tar(tmp_path / "a.tar", found)
    source = TarShards(str(tmp_path))
    keys = [key for key, _ in contents(source)]
    assert len(set(keys)) == 2
    assert source.problems == {"repeated key": 1}


@pytest.mark.parametrize(
    "name", [b"a\nb", b"a\tb", b"caf\xe9", b"caf\xe8", b"a\xe2\x80\xa8b", b"\\n"]
)
def test_keys_are_one_line_of_utf_8(tmp_path, name):
    data = odd_tars.member(name + b".jpg", picture(1)) + odd_tars.member(name + b".txt", b"t")
    (tmp_path / "a.tar").write_bytes(data + odd_tars.END)
    ((key, _),) = read(tmp_path)
    assert key.encode().decode().splitlines() == [key]
    assert from_key(key) == "a.tar/" + name.decode("utf-8", "surrogateescape")


def test_keys_are_one_to_one():
    names = ["a\nb", "a\\nb", "a\\\nb", "\x85", "\udc85", "\\x85", "猫 é", " x "]
    assert len({as_key(name) for name in names}) == len(names)
    assert [from_key(as_key(name)) for name in names] == names
    assert as_key("猫 é/0.1") == "猫 é/0.1"


def test_shards_of_one_name_in_several_directories(tmp_path):
    for folder in ("x/train", "y/train"):
        os.makedirs(tmp_path / folder)
        write_tar(tmp_path / folder / "0.tar", members(["0"]))
    found = read(f"{tmp_path}/x/train/0.tar,{tmp_path}/y/train/0.tar")
    assert [key for key, _ in found] == ["x/train/0.tar/0", "y/train/0.tar/0"]


@pytest.mark.parametrize("name", odd_tars.HOSTILE)
def test_hostile_headers_cost_the_rest_of_their_shard(tmp_path, name):
    first = odd_tars.member(b"0.jpg", picture(1)) + odd_tars.member(b"0.txt", b"t")
    (tmp_path / "a.tar").write_bytes(first + odd_tars.HOSTILE[name]() + odd_tars.END)
    write_tar(tmp_path / "b.tar", members(["1"]))
    source = TarShards(str(tmp_path))
    assert contents(source) == [("a.tar/0", "t"), ("b.tar/1", "t")]
    assert source.problems.keys() <= {"damaged shard", "sparse file", "no caption"}
    (tmp_path / "c.tar").write_bytes(odd_tars.HOSTILE[name]())
    tar_index.scan(epath.Path(tmp_path / "c.tar"))


def test_curation_reads_and_copies_the_same_samples(tmp_path):
    """Selections of pairs: keys, and copies of one of two samples of a key."""
    parts = [
        odd_tars.archive([(f"{LONG}.png", picture(i)), (f"{LONG}.txt", b"%d" % i)]) for i in (1, 2)
    ]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    columns = readers.Columns("", (), ())
    with open(tmp_path / "a.tar", "rb") as file:
        found, *_ = readers.READERS[".tar"](file, epath.Path("a.tar"), columns, 9)
    assert [f"a.tar/{key}" for key in found["key"].to_pylist()] == [
        key for key, _ in read(tmp_path)
    ]
    tars.copy(epath.Path(tmp_path / "a.tar"), epath.Path(tmp_path / "copy" / "b.tar"), [1])
    assert read(tmp_path / "copy") == [(f"b.tar/{LONG}", "2")]
