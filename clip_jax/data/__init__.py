"""Training and evaluation data: examples from storage to the device.

sources    random access to stored examples: tar, TFRecord, TFDS, folders, digits
mixture    several sources as one, and their order
order      the example at each position of a run
images     image files to pixels; crops: the part that is kept
tokenizer  captions to ids; bpe: OpenAI's encoding
rows       the pixels and ids at each position
loading    rows in parallel, as batches: by threads, or by those of processes
pipeline   the batches of a host, for training and for evaluation
feed       batches onto the mesh
arguments  command-line arguments that name data
"""
