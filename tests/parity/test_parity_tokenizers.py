"""Tokenizers of folders against transformers: rows of ids, and the embeddings of captions."""

import io
import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import sentencepiece
import tokenizers
from etils import epath
from parity import torch  # or skips
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

import clip_jax
from clip_jax import weights
from clip_jax.data import published

transformers = pytest.importorskip("transformers")

LENGTH = 16  # tokens
TRAINING = [
    "a photo of two cats, on a sofa.",
    "it's a dog! (really)",
    "the number 42",
    "café naïve",
]
CAPTIONS = [
    "a photo of two cats, on a sofa.",
    "It's a DOG! (Really)",
    "snow_snow  SNOW",
    "",
    "   ",
    "café NAÏVE",
    "一只猫 \N{CAT FACE}",
    "cat " * 60,
    "tab\tnew\nline",
    "don't “quote”",
    "Tom & Jerry",
    "ＦＵＬＬ ﬁ",
]
Folder = pathlib.Path


def fast(tokenizer: tokenizers.Tokenizer, **tokens: str):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def gemma(folder: Folder):
    """The form of SigLIP 2: blanks are a letter, lower case by the config, padding 0."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    alphabet = list("abcdefghijklmnopqrstuvwxyz,.;!'()0123456789ABCDEFG")
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TRAINING, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return fast(made, **tokens, unk_token="<unk>", padding_side="right"), "siglip"


def siglip(folder: Folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in TRAINING * 4]),
        model_writer=model,
        vocab_size=60,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=0,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    return transformers.SiglipTokenizer(str(folder / "spiece.model")), "siglip"


def clip_with_added_tokens(folder: Folder):
    """Other ids for start and end than the largest, and a token for padding."""
    made = tokenizers.Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TRAINING, trainer)
    merges = [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]
    tokenizer = transformers.CLIPTokenizer(vocab=made.get_vocab(), merges=merges)
    tokenizer.add_tokens(["<extra>", "café"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer, "clip"


def xlm_roberta(folder: Folder):
    """Its own start, end and padding, in the towers of MetaCLIP 2."""
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [
        (f"▁{word}", -2.0 - i / 10)
        for i, word in enumerate(["a", "cat", "dog", "photo", "of", "two"])
    ]
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,!'"]
    made = tokenizers.Tokenizer(models.Unigram([*special, *words, *letters], unk_id=3))
    made.pre_tokenizer, made.normalizer = pre_tokenizers.Metaspace(), normalizers.NFKC()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return fast(made, **tokens), "metaclip_2"


def bert(folder: Folder):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "dog", "##s", "photo", "of", "two"]
    vocabulary = {
        name: index for index, name in enumerate([*names, "on", "sofa", ",", ".", "snow"])
    }
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return fast(made, **tokens, sep_token="[SEP]"), "clip"


def save_model(folder: Folder, tokenizer, kind: str) -> None:
    """Random towers of transformers for a tokenizer, and the processor of pictures."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 2
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 2
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    text |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": end, "bos_token_id": start}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "siglip":
        config = transformers.SiglipConfig(text_config={**tower, **text}, vision_config=vision)
        transformers.SiglipModel(config).save_pretrained(folder)
        pictures = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        towers = {"text_config": {**tower, **text}, "vision_config": vision}
        names = {"clip": "CLIP", "metaclip_2": "MetaClip2"}[kind]
        config = getattr(transformers, f"{names}Config")(**towers, projection_dim=32)
        getattr(transformers, f"{names}Model")(config).save_pretrained(folder)
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        pictures = transformers.CLIPImageProcessor(**size)
    pictures.save_pretrained(folder)


def assert_equal(folder: Folder, rows: np.ndarray, embeddings: np.ndarray) -> None:
    ours = clip_jax.load(str(folder))
    for caption, ids, wanted in zip(CAPTIONS, ours.tokenizer(CAPTIONS, truncate=True), rows):
        assert ids.tolist() == wanted.tolist(), caption
    np.testing.assert_allclose(ours.encode_text(CAPTIONS, truncate=True), embeddings, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [gemma, siglip, clip_with_added_tokens, xlm_roberta, bert])
def test_rows_and_embeddings_are_those_of_transformers(make: Callable, tmp_path: Folder):
    folder = tmp_path / "theirs"
    folder.mkdir()
    tokenizer, kind = make(folder)
    tokenizer.save_pretrained(folder)
    save_model(folder, tokenizer, kind)
    made = tokenizer(CAPTIONS, padding="max_length", max_length=LENGTH, truncation=True)
    rows = np.array(made.input_ids)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = model.get_text_features(torch.tensor(rows))
    found = getattr(found, "pooler_output", found)
    embeddings = (found / found.norm(dim=-1, keepdim=True)).numpy()
    assert_equal(folder, rows, embeddings)

    for form in ("clip_jax", "huggingface"):  # and it travels along
        weights.save(weights.open(str(folder)), tmp_path / form, form)
        assert_equal(tmp_path / form, rows, embeddings)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "huggingface")
    back = processor(
        text=CAPTIONS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np"
    )
    assert np.array_equal(back.input_ids, rows)


def test_a_separator_that_open_clip_strips(tmp_path: Folder):
    """CLIPA's rows: BERT's, with 0 where the separator was, cut ones too."""
    open_clip = pytest.importorskip("open_clip")
    tokenizer, _ = bert(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    settings = json.dumps({"model_cfg": {"text_cfg": text}})
    (tmp_path / "open_clip_config.json").write_text(settings)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), LENGTH, strip_sep_token=True)
    ours = published.create(epath.Path(tmp_path), LENGTH)
    assert np.array_equal(ours(CAPTIONS, truncate=True), theirs(CAPTIONS).numpy())
    assert 3 not in theirs(CAPTIONS)
