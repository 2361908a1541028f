"""Tar shards, sound and damaged, against what was written."""

import os
import shutil
import subprocess
import tarfile

import pytest
from shards import contents, open_source, picture, sample, write_tar

from clip_jax.data.sources.tar import TarShards
from clip_jax.errors import BadExample, UserError
from clip_jax.storage import faults


def write_shards(path, count: int = 3) -> None:
    for shard in range(count):
        members = [m for i in range(4) for m in sample(f"{i}", f"{shard} {i}", 9 * i)]
        write_tar(path / f"{shard:02}.tar", members)


class TestTar:
    def test_samples_as_written(self, tmp_path):
        for shard in range(3):
            members = [m for i in range(4) for m in sample(f"{i:03}", f"{shard} {i}", 9 * i)]
            write_tar(tmp_path / f"{shard:02}.tar", members)
        source = open_source(type="tar", path=str(tmp_path / "*.tar"))
        assert contents(source) == [
            (f"{shard:02}.tar/{i:03}", f"{shard} {i}") for shard in range(3) for i in range(4)
        ]
        assert [source[i].image for i in range(12)] == [picture(9 * (i % 4)) for i in range(12)]
        assert {source[i].label for i in range(12)} == {-1}
        assert source.class_names == ()
        assert not source.problems

    @pytest.mark.parametrize(
        ("paths", "count"),
        [
            ("{0}/*.tar", 3),
            ("{0}", 3),
            ("{0}/{{00..01}}.tar", 2),
            ("{0}/00.tar,{0}/02.tar", 2),
            ("{0}/0[12].tar, {0}/00.tar", 3),
        ],
    )
    def test_ways_to_name_shards(self, tmp_path, paths, count):
        for shard in range(3):
            write_tar(tmp_path / f"{shard:02}.tar", sample("a", f"caption {shard}"))
        assert len(TarShards(paths.format(tmp_path))) == count

    def test_captions_and_classes_of_the_json(self, tmp_path):
        write_tar(tmp_path / "a.tar", [*sample("0", "dog"), *sample("1", "cat")])
        source = open_source(type="tar", path=str(tmp_path), text_key="alt", label_key="kind")
        assert contents(source) == [("a.tar/0", "dog!"), ("a.tar/1", "cat!")]
        assert source.class_names == ("c", "d")
        assert [source[0].label, source[1].label] == [1, 0]

    def test_json_stands_in_for_txt(self, tmp_path):
        members = [*sample("0", "one"), *sample("1", "two")]
        write_tar(tmp_path / "a.tar", [m for m in members if m[0] != "1.txt"])
        assert [text for _, text in contents(TarShards(str(tmp_path)))] == ["one", "two"]

    def test_integer_classes_stay(self, tmp_path):
        members = [("0.png", b"x"), ("0.json", b'{"caption": "a", "y": 7}')]
        members += [("1.png", b"x"), ("1.json", b'{"caption": "b"}')]
        write_tar(tmp_path / "a.tar", members)
        source = TarShards(str(tmp_path), "", "y")
        assert [source[0].label, source[1].label] == [7, -1]
        assert source.class_names == ()
        with pytest.raises(UserError, match="label_key"):
            TarShards(str(tmp_path), "", "z")

    @pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_odd_members(self, tmp_path, format_):
        """Long and non-ASCII names, folders, scattered files, other files, the same key twice."""
        members = [
            ("d/0.jpg", b"first"),
            (f"{'long' * 60}.png", b"second"),
            ("é.webp", b"third"),
            ("../../etc/evil.png", b"fourth"),
            ("notes.md", b"nothing"),
            ("d/0.txt", b"1"),
            ("../../etc/evil.txt", b"4"),
            (f"{'long' * 60}.txt", b"2"),
            ("é.txt", b"3"),
            ("é.WEBP", b"fifth"),
            ("é.txt", b"5"),
        ]
        write_tar(tmp_path / "a.tar", members, format=format_)
        source = TarShards(str(tmp_path))
        found = {source[i].image: source[i].text for i in range(len(source))}
        assert found == {
            b"first": "1",
            b"second": "2",
            b"third": "3",
            b"fifth": "5",
        }
        assert source[0].key == "a.tar/d/0"
        assert source.problems == {"repeated key": 1, "unsafe file name": 2}

    @pytest.mark.parametrize(
        ("format_", "name"),
        [
            (tarfile.USTAR_FORMAT, "d" * 120 + "/{}/key"),  # split into a prefix and a name
            (tarfile.USTAR_FORMAT, "猫{}"),
            (tarfile.GNU_FORMAT, "d" * 90 + "/" + "k" * 600 + "{}"),
            (tarfile.PAX_FORMAT, "é" * 200 + "{}"),
            (tarfile.PAX_FORMAT, "plain{}"),
            (tarfile.GNU_FORMAT, "./a.b/{}.c"),
        ],
    )
    def test_keys_are_whole_names(self, tmp_path, format_, name):
        names = [name.format(i) for i in range(3)]
        members = [m for i, each in enumerate(names) for m in sample(each, f"caption {i}")]
        write_tar(tmp_path / "a.tar", members, format=format_)
        expected = [(f"a.tar/{each}", f"caption {i}") for i, each in enumerate(names)]
        assert contents(TarShards(str(tmp_path))) == expected
        # Read in chunks, and together with neighbours, they are the same.
        assert contents(TarShards(str(tmp_path), chunk=2, cached_chunks=2)) == expected

    def test_archives_that_were_appended(self, tmp_path):
        """Archives joined by `cat a.tar b.tar`; the same key in both is two samples."""
        for name, keys in (("a", "012"), ("b", "23")):
            write_tar(tmp_path / name, [m for key in keys for m in sample(key, f"{name} {key}")])
        path = tmp_path / "ab.tar"
        path.write_bytes((tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes())
        source = TarShards(str(path))
        found = contents(source)
        assert [text for _, text in found] == ["a 0", "a 1", "a 2", "b 2", "b 3"]
        assert len({key for key, _ in found}) == 5
        assert source.problems == {"repeated key": 1}
        path.write_bytes((tmp_path / "a").read_bytes() + b"no archive" * 100)
        source = TarShards(str(path))
        assert len(source) == 3
        assert source.problems == {"damaged shard": 1}

    def test_sparse_files_are_counted(self, tmp_path):
        if not shutil.which("tar"):
            pytest.skip("needs GNU tar")
        for key in ("0", "1"):
            for name, data in sample(key, key):
                (tmp_path / name).write_bytes(data)
        with (tmp_path / "1.png").open("r+b") as file:
            file.truncate(2**22)
        command = ["tar", "--sparse", "-cf", "a.tar", "0.png", "0.txt", "1.png", "1.txt"]
        subprocess.run(command, cwd=tmp_path, check=True)
        source = TarShards(str(tmp_path / "a.tar"))
        assert contents(source) == [("a.tar/0", "0")]
        assert source.problems == {"sparse file": 1, "no image": 1}

    def test_negative_size(self, tmp_path):
        path = tmp_path / "a.tar"
        write_tar(path, [m for key in "01" for m in sample(key, key)])
        with tarfile.open(path) as tar:
            place = tar.getmember("1.png").offset
        data = bytearray(path.read_bytes())
        header = tarfile.TarInfo("1.png")
        header.size = -(2**40)
        data[place : place + 512] = header.tobuf(tarfile.GNU_FORMAT)
        path.write_bytes(data)
        source = TarShards(str(path))
        assert contents(source) == [("a.tar/0", "0")]
        assert source.problems == {"damaged shard": 1}

    def test_shards_of_one_name_have_keys_of_their_own(self, tmp_path):
        for folder in ("x", "y"):
            (tmp_path / folder).mkdir()
            write_tar(tmp_path / folder / "0.tar", sample("a", folder))
        source = TarShards(f"{tmp_path}/x,{tmp_path}/y")
        assert contents(source) == [("x/0.tar/a", "x"), ("y/0.tar/a", "y")]

    def test_keys_without_caption_or_image_are_counted(self, tmp_path):
        members = [("0.png", b"x"), *sample("1", "whole"), ("2.txt", b"t"), ("3.png", b"x")]
        write_tar(tmp_path / "a.tar", members)
        source = TarShards(str(tmp_path))
        assert contents(source) == [("a.tar/1", "whole")]
        assert source.problems == {"no caption": 2, "no image": 1}

    def test_every_cut_keeps_the_whole_samples(self, tmp_path):
        path = tmp_path / "a.tar"
        write_tar(path, [m for i in range(3) for m in sample(f"{i}", f"caption {i}")])
        whole = path.read_bytes()
        with tarfile.open(path) as tar:
            # A sample is whole once its image and its .txt are.
            ends = [m.offset_data + 512 for m in tar.getmembers() if m.name.endswith(".txt")]
        for cut in range(ends[0], ends[-1] + 1024, 256):
            path.write_bytes(whole[:cut])
            source = TarShards(str(path))
            assert len(source) == sum(end <= cut for end in ends), cut
            assert contents(source) == [(f"a.tar/{i}", f"caption {i}") for i in range(len(source))]
            assert source.problems == {"damaged shard": 1}

    def test_damaged_header_is_reported(self, tmp_path):
        path = tmp_path / "a.tar"
        write_tar(path, [m for i in range(3) for m in sample(f"{i}", f"caption {i}")])
        with tarfile.open(path) as tar:
            place = tar.getmember("1.png").offset
        data = bytearray(path.read_bytes())
        data[place : place + 512] = b"\xff" * 512
        path.write_bytes(data)
        source = TarShards(str(path))
        assert contents(source) == [("a.tar/0", "caption 0")]
        assert source.problems == {"damaged shard": 1}

    def test_missing_and_foreign_files_do_not_end_the_run(self, tmp_path):
        write_tar(tmp_path / "00.tar", sample("0", "here"))
        (tmp_path / "02.tar").write_bytes(b"<html>not a tar</html>" * 100)
        (tmp_path / "03.tar").write_bytes(b"")
        source = TarShards(str(tmp_path / "{00..03}.tar"))
        assert contents(source) == [("00.tar/0", "here")]
        assert source.problems == {"damaged shard": 3}

    def test_shard_that_vanishes_is_retried_then_named(self, tmp_path, monkeypatch):
        write_tar(tmp_path / "0.tar", [*sample("a", "one"), *sample("b", "two")])
        source = TarShards(str(tmp_path))
        waits = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                os.rename(tmp_path / "away.tar", tmp_path / "0.tar")

        monkeypatch.setattr(faults.time, "sleep", sleep)
        os.rename(tmp_path / "0.tar", tmp_path / "away.tar")
        assert source[0].text == "one"  # is back at the third try
        assert len(waits) == 2
        (tmp_path / "0.tar").unlink()
        with pytest.raises(BadExample, match=r"0\.tar") as caught:
            source[1]
        assert caught.value.reason == "missing shard"
        waited = len(waits)
        with pytest.raises(BadExample):
            source[0]
        assert len(waits) == waited  # known to be missing: not waited for again

    def test_shard_cut_after_indexing(self, tmp_path):
        path = tmp_path / "0.tar"
        write_tar(path, [*sample("a", "one"), *sample("b", "two")])
        source = TarShards(str(path))
        stat = path.stat()
        path.write_bytes(path.read_bytes()[:3000])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a damaged disk would
        assert source[0].text == "one"
        with pytest.raises(BadExample) as caught:
            source[1]
        assert caught.value.reason == "truncated shard"

    def test_unusable_captions(self, tmp_path):
        members = [("0.png", b"x"), ("0.txt", b"caf\xe9")]
        members += [("1.png", b"x"), ("1.json", b"{")]
        members += [("2.png", b"x"), ("2.json", b'{"caption": null}')]
        members += [("3.png", b"x"), ("3.json", b"[1]")]
        write_tar(tmp_path / "0.tar", members)
        source = TarShards(str(tmp_path))
        reasons = []
        for index in range(4):
            with pytest.raises(BadExample) as caught:
                source[index]
            assert caught.value.key == f"0.tar/{index}"
            reasons.append(caught.value.reason)
        assert reasons == [
            "invalid UTF-8 caption",
            "unreadable json",
            "no caption",
            "unreadable json",
        ]

    def test_nothing_found(self, tmp_path):
        with pytest.raises(UserError, match=r"No tar shards match.*absent"):
            TarShards(str(tmp_path / "absent*.tar"))
        with pytest.raises(UserError, match="No tar shards match"):
            TarShards("")
        write_tar(tmp_path / "0.tar", [("a.png", b"x")])
        with pytest.raises(UserError, match=r"No usable sample.*no caption"):
            TarShards(str(tmp_path))


class TestChunks:
    def test_same_examples_with_fewer_reads(self, tmp_path, monkeypatch):
        write_shards(tmp_path)
        expected = contents(TarShards(str(tmp_path)))
        opened = []
        start = TarShards._start_neighbours
        monkeypatch.setattr(
            TarShards,
            "_start_neighbours",
            lambda self, *span: opened.append(span) or start(self, *span),
        )
        source = TarShards(str(tmp_path), chunk=3, cached_chunks=2)
        assert contents(source) == expected
        # Chunks of 3 over shards of 4: the second and the third cross from one to the next.
        assert opened == [(0, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 12)]
        assert source[1].image == picture(9)

    def test_one_bad_sample_does_not_lose_its_neighbours(self, tmp_path):
        write_shards(tmp_path, 1)
        source = TarShards(str(tmp_path), chunk=4, cached_chunks=1)
        path = tmp_path / "00.tar"
        stat = path.stat()
        path.write_bytes(path.read_bytes()[:7000])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a damaged disk would
        texts = []
        for index in range(4):
            try:
                texts.append(source[index].text)
            except BadExample as bad:
                texts.append(bad.reason)
        assert texts == ["0 0", "0 1", "truncated shard", "truncated shard"]

    def test_replaced_shard(self, tmp_path):
        """Its bytes are no longer those that the index describes."""
        write_shards(tmp_path, 2)
        source = TarShards(str(tmp_path))
        path = tmp_path / "00.tar"
        path.write_bytes((tmp_path / "01.tar").read_bytes())
        with pytest.raises(BadExample, match=r"00\.tar.*replaced shard.*since its index was made"):
            source[0]
        assert source[4].text == "1 0"
        assert TarShards(str(tmp_path))[0].text == "1 0"
