"""Examples on their way to the device.

sources: random access to stored examples (tar with tar_index, folder, tfds_source with tfrecord,
digits; files: their paths and reads); order: which example stands where in an epoch; images: bytes
to pixels; tokenizer (with bpe): text to ids; pipeline (on loading's tf.data): the batches of this
host, and their transfer to the mesh.
"""
