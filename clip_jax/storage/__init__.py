"""The one layer for files: local, gs:// and s3:// alike.

locations  paths as users type them, listings, sizes and versions
faults     which failures of a bucket are waited out, how they are counted, and what they mean
ranges     parts of files, many at a time
writing    files that are whole or not there; files that grow
remote     the clients behind a bucket, set up once

Reading parts of objects goes through TensorStore, everything else through fsspec (gcsfs, s3fs),
which `etils.epath` uses too, and with it orbax, TFDS and JAX's compilation cache. TensorFlow's own
file system is switched off: it reads 64 MiB ahead of every byte that it is asked for.
"""
