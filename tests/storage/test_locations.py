"""clip_jax.storage.locations: the same for local paths and a bucket."""

import time

import pytest
from etils import epath

from clip_jax.errors import UserError
from clip_jax.storage import locations, writing


def test_lists_patterns_and_directories(place):
    for name in ("a.tar", "b.tar", "c.txt", "sub/d.tar"):
        writing.write(place / name, name)
    assert locations.expand(f"{place}/*.tar", ".tar") == [place / "a.tar", place / "b.tar"]
    assert locations.expand(str(place), ".tar") == [place / "a.tar", place / "b.tar"]
    assert locations.expand(f"{place}/*/d.tar", ".tar") == [place / "sub/d.tar"]
    named = f"{place}/{{0..1}}.tar,{place}/c.txt"
    assert locations.expand(named, ".tar") == [place / "0.tar", place / "1.tar", place / "c.txt"]
    assert locations.expand(f"{place}/*.zip", ".tar") == []
    assert locations.tree(place) == ["a.tar", "b.tar", "c.txt", "sub/d.tar"]


@pytest.mark.parametrize("count", [2, 20])
def test_sizes_and_versions(place, count):
    paths = [place / f"{i}" for i in range(count)]
    for i, path in enumerate(paths):
        writing.write(path, b"x" * i)
    found = locations.stats([*paths, place / "none"])
    assert [stat and stat.size for stat in found] == [*range(count), None]
    assert locations.stat(paths[1]) == found[1]
    time.sleep(0.02)  # more than the resolution of a file system's clock
    writing.write(paths[1], b"y")
    assert locations.stat(paths[1]).size == 1
    assert locations.stat(paths[1]).version != found[1].version


def test_many_sizes_in_one_request(bucket, remote):
    for i in range(30):
        bucket.put("bucket", f"{remote.name}/{i}", b"x")
    bucket.stats(reset=True)
    assert all(locations.stats([remote / f"{i}" for i in range(30)]))
    assert bucket.stats()["requests"] == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://host/a.tar", r"https:// is not read; download"),
        ("hf://org/set", r"hf:// is not read"),
        ("pipe:cat a.tar", r"pipe:.*is not read"),
        ("gs:/bucket/a.tar", r"two slashes"),
        ("gs:///a.tar", r"no bucket"),
        ("a.tar::b.tar", r"with commas, not with ::"),
    ],
)
def test_what_is_not_read_is_said(path, message):
    with pytest.raises(UserError, match=f"{message}(.|\n)*gs://BUCKET"):
        locations.expand(path, ".tar")


def test_choices_in_braces():
    found = locations.expand("/d/{train,val}/{0..1}.tar, /e/{a,b}{0..1}.tar,/f.tar", ".tar")
    assert list(map(str, found)) == [
        *(f"/d/{split}/{i}.tar" for split in ("train", "val") for i in range(2)),
        *(f"/e/{name}{i}.tar" for name in "ab" for i in range(2)),
        "/f.tar",
    ]


def test_names_are_as_short_as_they_can_be():
    def short(*paths: str) -> list[str]:
        return locations.short_names(list(map(epath.Path, paths)))

    assert short("/a/0.tar", "/b/1.tar") == ["0.tar", "1.tar"]
    assert short("/a/0.tar", "/a/0.tar") == ["0.tar", "0.tar"]
    assert short("/r/a/0.tar", "/r/b/0.tar", "/r/b/1.tar") == ["a/0.tar", "b/0.tar", "b/1.tar"]
    assert short("/r/0.tar", "/r/b/0.tar") == ["0.tar", "b/0.tar"]
    assert short("gs://x/0.tar", "gs://y/0.tar") == ["x/0.tar", "y/0.tar"]
