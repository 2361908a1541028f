"""The README's example of handing a model to transformers, run as it stands."""

import pathlib

import numpy as np
import pytest
import readme
import tiny_weights

import clip_jax
from clip_jax import weights

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


def test_handing_it_to_transformers(tmp_path: pathlib.Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights.save(tiny_weights.make("vit"), tmp_path / "runs" / "quickstart")  # no need to train
    names: dict = {}
    for block in readme.blocks("Use the result"):
        if "--to=huggingface" in block.text or "import transformers" in block.text:
            readme.run(block, names)

    ours, texts = clip_jax.load("runs/quickstart"), ["a seven", "a three above a nine"]
    tokens = ours.tokenizer(texts)
    with torch.no_grad():
        theirs = names["theirs"].get_text_features(torch.from_numpy(tokens).long())
    embeds = theirs if isinstance(theirs, torch.Tensor) else theirs.pooler_output
    embeds = embeds / embeds.norm(dim=-1, keepdim=True)
    wanted = ours.encode_text(texts)
    np.testing.assert_allclose(embeds.numpy(), wanted, atol=1e-5)
