"""Examples on their way to the device.

sources: random access to stored examples (tar, tfrecord_source and tfds_source, their shard_index;
folder; digits; files: paths and reads; labels, tar_labels: their classes); mixture: several of
them; order: which example stands where in a run; images (with crops): bytes to pixels; captions and
tokenizer (with bpe): text to ids; rows: all of that for a position; pipeline (on loading's threads,
or processes, with worker): the batches of this host; feed: their way onto the mesh.
"""
