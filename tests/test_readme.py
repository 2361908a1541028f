"""What the README shows of using a model, run as it stands."""

import pathlib

import jax
import numpy as np
import readme

import clip_jax
from clip_jax import sharding, weights


def test_use_the_result(tmp_path: pathlib.Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme.prepare(tmp_path)
    rng = np.random.default_rng(0)
    names = {
        "pixels": rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
        "images": rng.integers(0, 256, (2, 224, 224, 3), np.uint8),
        "tokens": clip_jax.tokenize(["a cat", "two dogs"]),
        "key": jax.random.key(0, impl="unsafe_rbg"),  # the fastest
        "mesh": sharding.make_mesh(devices=jax.devices()[:1]),
    }
    for language, text in readme.blocks("Use the result"):
        if "import transformers" not in text:  # see test_parity_readme.py
            readme.run(language, text, names)

    model = names["model"]
    assert "quick_gelu" in repr(model)
    np.testing.assert_array_equal(names["image_embeds"], model.encode_image(["a.png", "b.jpg"]))
    np.testing.assert_array_equal(names["text_embeds"], model.encode_text(["a cat", "two dogs"]))
    assert names["image_embed"].shape == names["text_embed"].shape == (2, 512)
    shown = capsys.readouterr().out
    assert "20 examples in 1 part(s) in embeddings" in shown
    by_text, by_picture = shown.split("\nthe digit seven\n")[1].split("\na.png\n")
    assert by_text.count(".png") == 2 * 10  # key and path of each
    assert by_picture.split()[3:5] == ["1.000", "0.png"]  # the same picture
    for name in ("for_transformers/config.json", "exported/README.md"):
        assert (tmp_path / name).is_file()
    run = weights.open("runs/quickstart")
    assert weights.open("for_transformers").size == run.size
