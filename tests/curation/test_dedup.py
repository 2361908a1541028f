"""`data dedup`: the search against brute force, and copies of images found among others."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shards import write_tar
from tiny_data import encoded, sample

from clip_jax.curation import cli, dedup_search, parallel
from clip_jax.curation.dedup_search import SIGNATURE, close_pairs
from clip_jax.data.sources.tar import TarShards


def near_hashes(rng: np.random.Generator, count: int, flips: int) -> np.ndarray:
    """Random hashes, half of them others with up to `flips` bits flipped, some repeated."""
    hashes = rng.integers(0, 2**64, count, np.uint64)
    for i in range(count // 2, count):
        bits = rng.choice(64, rng.integers(0, flips + 1), replace=False)
        flip = sum(1 << int(bit) for bit in bits)
        hashes[i] = hashes[i - count // 2 + rng.integers(-1, 2)] ^ np.uint64(flip)
    return hashes


def brute_force(hashes: np.ndarray, others: np.ndarray | None, threshold: int) -> set[tuple]:
    bits = np.bitwise_count(hashes[:, None] ^ (hashes if others is None else others)[None])
    close = np.argwhere(bits <= threshold).tolist()
    return {(i, j, int(bits[i, j])) for i, j in close if others is not None or i < j}


@pytest.mark.parametrize("threshold", [0, 1, 4, 7, 12])
def test_close_pairs_are_all_pairs_each_once(threshold, monkeypatch):
    rng = np.random.default_rng(threshold)
    hashes, others = near_hashes(rng, 400, 14), near_hashes(rng, 300, 14)
    others[:50] = hashes[100:150] ^ np.uint64(5)
    for parts in {threshold + 1, threshold + 2, dedup_search._parts(400, 300, threshold)}:
        monkeypatch.setattr(dedup_search, "_parts", lambda *_, parts=parts: parts)
        for against in (None, others):
            found = list(zip(*(x.tolist() for x in close_pairs(hashes, threshold, against))))
            expected = brute_force(hashes, against, threshold)
            assert len(found) == len(set(found))
            assert set(found) == expected
            assert len(expected) > (10 if against is None or threshold > 1 else -1)


def test_parts_grow_with_the_set():
    chosen = [dedup_search._parts(n, n, 6) for n in (10**3, 10**5, 10**7)]
    assert chosen[0] < chosen[1] < chosen[2]


def first_come(close: np.ndarray) -> np.ndarray:
    """Returns whether each item is kept, given which are close: bool [n, n] -> [n]."""
    kept = np.zeros(len(close), bool)
    for i in range(len(close)):
        kept[i] = not (close[i] & kept).any()
    return kept


def made_signatures(hashes: np.ndarray, shades: np.ndarray) -> np.ndarray:
    made = np.zeros(len(hashes), SIGNATURE)
    made["hash"], made["colours"] = hashes, shades[:, None]
    return made


def test_the_first_of_near_duplicates_is_kept():
    rng = np.random.default_rng(0)
    hashes = near_hashes(rng, 300, 8)
    made = made_signatures(hashes, rng.integers(100, 140, 300))
    matches = dedup_search.match_signatures(made, 5, 16)
    bits = np.bitwise_count(hashes[:, None] ^ hashes)
    shades = made["colours"][:, 0].astype(int)
    close = (bits <= 5) & (abs(shades[:, None] - shades) <= 16)
    np.testing.assert_array_equal(matches.kept < 0, first_come(close))
    dropped = np.flatnonzero(matches.kept >= 0)
    assert len(dropped) > 30
    assert (bits <= 5).sum() > close.sum()  # colours told some apart
    for i in dropped:
        kept = matches.kept[i]
        assert kept < i
        assert matches.kept[kept] == -1
        assert close[i, kept]
        assert matches.distance[i] == bits[i, kept]


def test_against_another_set():
    rng = np.random.default_rng(1)
    hashes, others = near_hashes(rng, 200, 8), near_hashes(rng, 150, 8)
    hashes[20:60] = others[30:70] ^ np.uint64(3)
    same = made_signatures(hashes, np.zeros(200)), made_signatures(others, np.zeros(150))
    matches = dedup_search.match_signatures(same[0], 4, 0, same[1])
    bits = np.bitwise_count(hashes[:, None] ^ others)
    np.testing.assert_array_equal(matches.kept >= 0, (bits <= 4).any(axis=1))
    dropped = np.flatnonzero(matches.kept >= 0)
    assert len(dropped) >= 40
    np.testing.assert_array_equal(bits[dropped, matches.kept[dropped]], bits[dropped].min(axis=1))


@pytest.mark.parametrize("block", [16, 1000])
def test_embeddings(block, monkeypatch):
    monkeypatch.setattr(dedup_search, "_BLOCK", block)
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(30, 8))
    rows = centres[rng.integers(30, size=100)] + 0.1 * rng.normal(size=(100, 8))
    rows = (rows * rng.uniform(1, 9, (100, 1))).astype(np.float32)
    rows[7] = 0  # no embedding
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
    cosine = unit @ unit.T
    matches = dedup_search.match_embeddings(rows, 0.97)
    np.testing.assert_array_equal(matches.kept < 0, first_come(cosine >= 0.97))
    dropped = np.flatnonzero(matches.kept >= 0)
    assert 30 < len(dropped) < 80
    np.testing.assert_allclose(
        1 - matches.distance[dropped], cosine[dropped, matches.kept[dropped]], atol=1e-5
    )
    kept = np.flatnonzero(matches.kept < 0)
    for i in dropped:
        earlier = kept[kept < i]
        assert cosine[i, matches.kept[i]] == pytest.approx(cosine[i, earlier].max(), abs=1e-5)
    against = dedup_search.match_embeddings(rows[50:], 0.97, rows[:50])
    found = against.kept >= 0
    np.testing.assert_array_equal(found, (cosine[50:, :50] >= 0.97).any(axis=1))
    np.testing.assert_array_equal(against.kept[found], cosine[50:, :50].argmax(axis=1)[found])


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Noise whose amplitude falls with frequency, as in photographs; width, height."""
    rng = np.random.default_rng(seed)
    across, down = np.fft.fftfreq(size[0]), np.fft.fftfreq(size[1])
    falling = 1 / (np.hypot(down[:, None], across)[..., None] + 1 / max(size)) ** 1.5
    waves = np.fft.fft2(rng.normal(size=(size[1], size[0], 3)), axes=(0, 1)) * falling
    values = np.real(np.fft.ifft2(waves, axes=(0, 1)))
    values = 128 + 50 * (values - values.mean()) / values.std()
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def cropped(image: Image.Image) -> Image.Image:
    return image.crop((2, 1, image.width - 2, image.height - 2))


COPIES = {
    "reencoded": lambda image: encoded(image, "JPEG", quality=40),
    "halved": lambda image: encoded(image.resize((80, 60)), "PNG"),
    "enlarged": lambda image: encoded(image.resize((400, 300)), "JPEG"),
    "cropped": lambda image: encoded(cropped(image), "JPEG"),
    "repeated": lambda image: encoded(image, "PNG"),
}
SCENES = 12


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A set of different scenes, one in other colours, copies of five of them, and no image."""
    folder = tmp_path_factory.mktemp("shards")
    originals = [(f"scene{i:02}", encoded(scene(i), "PNG")) for i in range(SCENES)]
    recoloured = Image.merge("RGB", scene(0).split()[::-1])
    copies = [(f"{name}{i}", COPIES[name](scene(i))) for i, name in enumerate(COPIES)]
    others = [("recoloured", encoded(recoloured, "PNG")), ("broken", b"<html>")]
    members = [m for key, data in [*originals, *others] for m in sample(key, data, f"a {key}")]
    write_tar(folder / "train.tar", members)
    write_tar(folder / "copies.tar", [m for key, data in copies for m in sample(key, data, key)])
    return folder


def run(*argv) -> None:
    cli.main(["dedup", *map(str, argv)])


EXPECTED = {f"copies.tar/{name}{i}": f"train.tar/scene{i:02}" for i, name in enumerate(COPIES)}


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_are_found_and_nothing_else(shards, tmp_path, capsys, monkeypatch, workers):
    monkeypatch.setattr(parallel, "PART", 6)
    output = tmp_path / "found"
    both = f"{shards}/train.tar,{shards}/copies.tar"
    run(both, f"--out={output}", f"--workers={workers}", "--show=3")
    rows = pq.read_table(output / "duplicates.parquet").to_pylist()
    assert {row["key"]: row["kept_key"] for row in rows} == EXPECTED
    assert {row["distance"] for row in rows} <= {0, 2, 4, 6}
    assert len({row["group"] for row in rows}) == len(rows)
    kept = (output / "keep.txt").read_text().splitlines()
    assert kept == [f"train.tar/scene{i:02}" for i in range(SCENES)] + ["train.tar/recoloured"]
    printed = capsys.readouterr().out
    assert "of 18 images 5 (27.78%) are near-duplicates of an earlier one; 13 are kept" in printed
    assert "1 HTML instead of an image" in printed
    page = (output / "pairs.html").read_text()
    assert page.count("data:image/jpeg") == 6
    assert "train.tar/scene0" in page
    cli.main(["pack", both, str(tmp_path / "clean"), f"--keep={output / 'keep.txt'}"])
    clean = TarShards(str(tmp_path / "clean"))
    assert [clean[i].text for i in range(len(clean))] == [f"a {key.split('/')[1]}" for key in kept]


def test_against(shards, tmp_path, capsys):
    output = tmp_path / "found"
    argv = ("--workers=1", f"--out={output}")
    run(shards / "train.tar", f"--against={shards}/copies.tar", *argv)
    rows = pq.read_table(output / "duplicates.parquet").to_pylist()
    assert {row["kept_key"]: row["key"] for row in rows} == EXPECTED
    kept = (output / "keep.txt").read_text().splitlines()
    assert kept == [f"train.tar/scene{i:02}" for i in range(5, SCENES)] + ["train.tar/recoloured"]
    assert "are near-duplicates of one of" in capsys.readouterr().out


def test_given_embeddings(shards, tmp_path, capsys):
    angles = np.array([0, 10, 20, 90, 100.0])
    rows = np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    np.save(tmp_path / "rows.npy", rows)
    argv = (f"{shards}/copies.tar", "--workers=1", f"--out={tmp_path / 'found'}")
    run(*argv, f"--embeddings={tmp_path / 'rows.npy'}", "--cosine=0.98")
    rows = pq.read_table(tmp_path / "found" / "duplicates.parquet").to_pylist()
    names = [f"copies.tar/{name}{i}" for i, name in enumerate(COPIES)]
    # The one at 20 degrees is close to the one at 10, which is dropped, and not to the one at 0.
    assert [(row["key"], row["kept_key"]) for row in rows] == [
        (names[1], names[0]),
        (names[4], names[3]),
    ]
    np.save(tmp_path / "rows.npy", np.zeros((4, 2)))
    with pytest.raises(SystemExit):
        run(*argv, f"--embeddings={tmp_path / 'rows.npy'}")
    assert "a row for each of 5 examples" in capsys.readouterr().err


class _ColourModel:
    """Embeds an image as its mean colour."""

    class net:
        class size:
            image_size, embed_dim = 8, 3

    @staticmethod
    def encode_image(pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape[1:] == (8, 8, 3)
        return pixels.mean(axis=(1, 2)) - 128


def test_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_jax.api.load", lambda path: {"a run": _ColourModel}[path])
    colours = list(itertools.product((20, 230), repeat=3))
    images = [Image.new("RGB", (12, 9), colour) for colour in [*colours, (225, 230, 228)]]
    members = [m for i, x in enumerate(images) for m in sample(f"{i}", encoded(x), "text")]
    write_tar(tmp_path / "a.tar", members)
    output = tmp_path / "found"
    run(tmp_path / "a.tar", "--checkpoint=a run", "--workers=1", f"--out={output}")
    rows = pq.read_table(output / "duplicates.parquet").to_pylist()
    assert [(row["key"], row["kept_key"]) for row in rows] == [("a.tar/8", "a.tar/7")]
    assert 0 < rows[0]["distance"] < 0.01


def test_mistakes(tmp_path):
    for argv in (
        ["x", "--checkpoint=a", "--embeddings=b"],
        ["x", "--against_embeddings=b"],
        ["x", "--threshold=40"],
        ["x", "--cosine=0"],
    ):
        with pytest.raises(SystemExit) as ended:
            run(*argv)
        assert ended.value.code == 2


def test_keys_with_ends_of_lines(tmp_path):
    """The second of each pair is removed, whatever the names of the files."""
    names = ["a b", "a\nb", "a\nb~copy", "é\r", "é\r~copy"]
    for i, name in enumerate(sorted(names)):
        source = i - ("~copy" in name)
        (tmp_path / f"{name}.png").write_bytes(encoded(scene(source), "PNG"))
        (tmp_path / f"{name}.txt").write_text(name, newline="")
    run(tmp_path, f"--out={tmp_path / 'found'}", "--workers=1")
    keep = f"--keep={tmp_path / 'found' / 'keep.txt'}"
    cli.main(["pack", str(tmp_path), str(tmp_path / "clean"), keep, "--workers=1"])
    clean = TarShards(str(tmp_path / "clean"))
    kept = [clean[i].text for i in range(len(clean))]
    assert sorted(text.strip() for text in kept) == ["a\nb", "a b", "é"]
