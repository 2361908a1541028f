"""The README's example of handing a model to transformers, run as it stands."""

import pathlib

import numpy as np
import pytest
import readme

import clip_jax

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_handing_it_to_transformers(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme.prepare(tmp_path)
    blocks = readme.blocks("Use the result")
    names: dict = {}
    for language, text in blocks:
        if "--to=huggingface" in text or "import transformers" in text:
            readme.run(language, text, names)

    ours = clip_jax.load("runs/quickstart")
    tokens = clip_jax.tokenize(["a seven", "a three above a nine"], context_length=24)
    with torch.no_grad():
        theirs = names["theirs"].get_text_features(torch.from_numpy(tokens).long())
    embeds = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    wanted = ours.encode_text(["a seven", "a three above a nine"])
    np.testing.assert_allclose(embeds.numpy(), wanted, atol=1e-5)
