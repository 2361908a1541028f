"""Examples on their way to the device.

sources: random access to stored examples (tar, folder, tfds_source, digits, synthetic);
order: which example stands where in an epoch; images: bytes to pixels; tokenizer: text to ids;
pipeline: the batches of this host, and their transfer to the mesh.
"""
