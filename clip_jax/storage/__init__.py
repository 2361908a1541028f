"""The one layer for files: local, gs:// and s3:// alike.

locations  paths as users type them, listings, sizes and versions
faults     failures of a bucket: retries, counts, explanations
ranges     parts of files, many at a time
writing    atomic writes of files and folders; files that grow
remote     the clients of a bucket, configured once
for_orbax  changes to orbax by which checkpoints go to buckets

Reading parts of objects goes through TensorStore, everything else through fsspec (gcsfs, s3fs),
which `etils.epath` uses too, and with it orbax, TFDS and JAX's compilation cache. TensorFlow's own
file system is switched off: it reads 64 MiB ahead of every byte that it is asked for.
"""
