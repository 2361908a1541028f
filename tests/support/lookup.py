"""Models that look their embeddings up in a table, with the texts and images that go with them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax.configs import default
from clip_jax.data.sources.base import Example
from clip_jax.data.sources.captions import Captions
from clip_jax.embed.encoder import Encoder
from clip_jax.errors import BadExample
from clip_jax.evaluate import tasks
from clip_jax.evaluate.in_memory import InMemoryEmbeddings
from clip_jax.evaluate.results import Result
from clip_jax.evaluate.sets.dataset import Dataset

SIDE, WIDTH = 4, 8  # of the stub's images and embeddings


class Table:
    """A `CLIP` that looks its embeddings up: image and text i have row i of a table."""

    @dataclasses.dataclass
    class size:
        image_size = SIDE
        image_crop = "center"
        image_filter = "bicubic"
        context_length = 3
        objective = "contrastive"

    def encode_text(self):
        raise AssertionError("called by name only")

    def apply(self, variables, values, method):
        if method == "encode_image":
            assert values.dtype == jnp.uint8
            pixels = values[:, 0, 0].astype(jnp.int32)
            return variables["images"][pixels[:, 0] * 256 + pixels[:, 1]]
        assert method == "encode_text"
        return variables["texts"][values[:, 1]]


class Likelihoods:
    """A model without a text tower: image i and text t have the score of that place in a table."""

    size = Table.size

    def score(self):
        raise AssertionError("called by name only")

    def apply(self, variables, pixels, prompts, method):
        assert method == "score"
        assert pixels.dtype == jnp.uint8
        numbers = pixels[:, 0, 0].astype(jnp.int32)
        images = numbers[:, 0] * 256 + numbers[:, 1]
        return variables["scores"][images[:, None], prompts.tokens[:, 1]]


class Words:
    """A tokenizer: each text has the number of its place in a list."""

    context_length = 3
    vocab_size = 1000

    def __init__(self, texts=()):
        self.texts = list(dict.fromkeys(texts))

    def encode(self, text: str) -> tuple[np.ndarray, bool]:
        if not text.strip():
            return np.array([998, 999, 0], np.int32), False
        return np.array([998, self.texts.index(text), 999], np.int32), False

    def encode_batch(self, texts) -> tuple[np.ndarray, np.ndarray]:
        rows = [self.encode(text)[0] for text in texts]
        return np.array(rows, np.int32).reshape(-1, 3), np.full(len(rows), 3)

    def __call__(self, texts, truncate=False) -> np.ndarray:
        self.texts += [text for text in texts if text not in self.texts]
        return np.stack([self.encode(text)[0] for text in texts])

    def is_empty(self, ids) -> bool:
        return ids[1] == 999

    def decode(self, ids) -> str:
        return self.texts[ids[1]]


class Cards:
    """Example i shows the number i; a text of None is an unreadable image, a tuple of texts several
    captions."""

    templates = ("a {}", "the {}")

    def __init__(self, texts, labels=None, class_names=()):
        self.texts, self.class_names = texts, tuple(class_names)
        self.labels = [-1] * len(texts) if labels is None else labels

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Example:
        if self.texts[index] is None:
            raise BadExample("unreadable image", f"card {index}")
        texts = self.texts[index]
        texts = (texts,) if isinstance(texts, str) else texts
        return Example(
            image=np.full((SIDE, SIDE, 3), [index // 256, index % 256, 0], np.uint8),
            captions=Captions(texts, (1.0,) * len(texts)),
            labels=(int(self.labels[index]),) if self.labels[index] >= 0 else (),
            key=f"card {index}",
        )


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def stub(images: np.ndarray, texts: np.ndarray, scale: float = 10.0) -> dict:
    """Variables of a `Table`."""
    params = {"logit_scale": jnp.log(jnp.float32(scale))}
    return {"images": jnp.asarray(images), "texts": jnp.asarray(texts), "params": params}


def evaluate(
    task: str,
    source: Cards,
    words: Words,
    variables: dict,
    encoder: Encoder,
    *,
    templates: tuple[str, ...] = Cards.templates,
    whole: bool = False,
) -> Result:
    """The result of a task on a source; `whole`: with all variants, as the command has it."""
    kind = "classification" if task == "zeroshot" else "retrieval"
    metric = "accuracy" if task == "zeroshot" else ""
    dataset = Dataset("cards", "Cards", kind, metric, source.class_names, {"own": templates})
    dataset = dataclasses.replace(dataset, partial=True)
    config = default.get_config()
    embeddings = InMemoryEmbeddings(
        encoder, words, lambda *_: source, threads=2, views=config.data.views, seed=7
    )
    embeddings.bind(variables)
    settings = tasks.Settings.from_config(config.eval, seed=0)
    context = tasks.Context(embeddings, settings, [dataset], headline_only=not whole)
    assert tasks.get(task).supports(context, dataset)
    return tasks.run(context, task, dataset)


def encoder(mesh: Mesh, batch_size: int = 16) -> Encoder:
    return Encoder(Table(), mesh, batch_size, threads=2)
