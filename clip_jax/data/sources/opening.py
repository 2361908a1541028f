"""Opens the source that a config names."""

from etils import epath
from ml_collections import ConfigDict

from clip_jax.data.sources import synthetic
from clip_jax.data.sources.base import Source
from clip_jax.errors import UserError


def create(
    spec: ConfigDict,
    image_size: int,
    seed: int,
    *,
    fallback_dir: epath.Path | None = None,
    run: int = 1,
    cached_chunks: int = 0,
) -> Source:
    """The source that `spec` names.

    Args:
      spec: the fields of `source()` in configs/default.py.
      image_size: pixels along a side, for sources that draw their images.
      seed: of sources that draw their images.
      fallback_dir: directory for indices of shards whose own cannot be written to.
      run: neighbours in a tar shard that are read at once.
      cached_chunks: of these, how many are held in memory; 0: every example is read by itself.

    Raises:
      UserError: the data is not there or not in the expected form.
    """
    if spec.type == "digits":
        from clip_jax.data.sources.digits import DigitScenes

        return DigitScenes(spec.split, image_size, seed)
    if spec.type == "folder":
        from clip_jax.data.sources.folder import ImageFolder

        return ImageFolder(
            spec.path,
            spec.text_key,
            spec.label_key,
            spec.group_keys,
            image_key=spec.image_key,
            run=run,
            cached_chunks=cached_chunks,
        )
    if spec.type == "tar":
        from clip_jax.data.sources.tar import TarShards

        keys = spec.text_key, spec.label_key, spec.group_keys
        return TarShards(
            spec.path, *keys, fallback_dir=fallback_dir, run=run, cached_chunks=cached_chunks
        )
    if spec.type == "tfds":
        from clip_jax.data.sources.tfds import TfdsSource

        return TfdsSource(spec, fallback_dir)
    if spec.type == "tfrecord":
        from clip_jax.data.sources.tfrecord_source import TfRecordSource

        return TfRecordSource(spec, fallback_dir)
    if spec.type == "synthetic":
        return synthetic.Synthetic(spec.size, image_size, seed)
    raise UserError(
        f"The config names no data it can read: source.type is {spec.type!r}, and must be one of "
        '"digits", "folder", "tar", "tfds", "tfrecord", "synthetic". To try it with the embedded '
        "set, add --config.data.source.type=digits --config.data.source.split=train to the command."
    )
