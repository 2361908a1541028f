"""Trains CLIP: python main.py --config=configs/vit_b32.py --workdir=runs/my_run

The same as python -m clip_jax train, which works from any folder once clip_jax is installed.
"""

import sys

from clip_jax.training import cli

if __name__ == "__main__":
    cli.main(sys.argv[1:], command=f"python {sys.argv[0]}", example="configs/vit_b32.py")
