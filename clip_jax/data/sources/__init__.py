"""Random access to stored examples: tar, TFRecord, TFDS, folders, digits."""
