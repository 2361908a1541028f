"""What a model can do: zero-shot classification and retrieval, and the page that shows it."""

from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from clip_jax.data.sources import opening
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.embed.encoder import Encoder, Variables
from clip_jax.evaluate.near_duplicates import NearDuplicates
from clip_jax.evaluate.retrieval import Retrieval
from clip_jax.evaluate.run_results import RetrievalResult, ZeroshotResult
from clip_jax.evaluate.zeroshot import Zeroshot

__all__ = ["Encoder", "Evaluators", "Retrieval", "RetrievalResult", "Zeroshot", "ZeroshotResult"]


class Evaluators:
    """The evaluations that a config names.

    Attributes:
      zeroshot, retrieval: the latest results; None before the first, or where switched off.
      notes: what the config names and this model cannot do, a sentence each.
    """

    def __init__(
        self,
        config: ConfigDict,
        net: nn.Module,
        mesh: Mesh,
        tokenizer: Tokenizer,
        fallback_dir: epath.Path | None = None,
    ):
        """Opens the evaluation data, so that a wrong path fails before training, not after.

        Args:
          config: the whole config.
          net: one of `clip_jax.models.MODULES`.
          mesh: devices to evaluate on.
          tokenizer: of captions and prompts.
          fallback_dir: directory for indices of shards whose own cannot be written to.
        """
        self.zeroshot: ZeroshotResult | None = None
        self.retrieval: RetrievalResult | None = None
        self._zeroshot: Zeroshot | None = None
        self._retrieval: Retrieval | None = None
        self._near_duplicates: NearDuplicates | None = None
        self.notes: list[str] = []
        spec, size = config.eval, net.size.image_size
        encoder = Encoder(net, mesh, spec.batch_size, config.data.threads)
        if spec.zeroshot.source.type and not encoder.can_score_text:
            self.notes.append(
                f"No zero-shot evaluation: a model trained for {config.objective} knows no texts."
            )
        elif spec.zeroshot.source.type:
            self._zeroshot = Zeroshot(
                encoder,
                opening.create(spec.zeroshot.source, size, config.seed, fallback_dir=fallback_dir),
                tokenizer,
                spec.zeroshot.class_names,
                spec.zeroshot.templates,
            )
        if not spec.retrieval.source.type:
            return
        if not encoder.embeds_texts and config.objective != "near_duplicates":
            self.notes.append(
                f"No retrieval evaluation: a model trained for {config.objective} embeds no texts."
            )
            return
        source = opening.create(spec.retrieval.source, size, config.seed, fallback_dir=fallback_dir)
        most = spec.retrieval.max_examples
        if encoder.embeds_texts:
            self._retrieval = Retrieval(encoder, source, tokenizer, most)
        else:
            self._near_duplicates = NearDuplicates(
                net, encoder, source, config.data.views, config.seed, most
            )

    def run(self, variables: Variables) -> dict[str, float]:
        """Runs all of them; fractions by name, such as "zeroshot/top1"."""
        metrics = {}
        if self._zeroshot is not None:
            self.zeroshot = self._zeroshot.run(variables)
            metrics["zeroshot/top1"] = self.zeroshot.top1
            if self.zeroshot.top5 is not None:
                metrics["zeroshot/top5"] = self.zeroshot.top5
        if self._retrieval is not None:
            self.retrieval = self._retrieval.run(variables)
            metrics |= {f"retrieval/{name}": v for name, v in self.retrieval.metrics.items()}
        if self._near_duplicates is not None:
            metrics["near_duplicates/recall@1"] = self._near_duplicates.run(variables)
        return metrics
