"""Random access to stored examples, one file a format: tar, TFRecord, TFDS, folders, digits."""
