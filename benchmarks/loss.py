"""Speed of the softmax loss, value and gradients, on one CPU: clip_jax next to open_clip.

    python benchmarks/loss.py
    python benchmarks/loss.py --pairs=8192 --width=768

Needs open_clip_torch. Memory is the peak of the process, less its memory before the first call. The
memory on a TPU pod comes from the TPU compiler (needs libtpu, no TPU):

    python benchmarks/loss.py --topology=v5e:16x16
"""

import argparse
import functools
import os

import numpy as np
import turns

COMPETITORS = ("open_clip", "plain", "ring")
LOGIT_SCALE = np.float32(np.log(1 / 0.07))


def embeddings(count: int, width: int) -> list[np.ndarray]:
    """Makes two arrays of unit vectors, float32 [count, width]."""
    rng = np.random.default_rng(0)
    both = [rng.normal(size=(count, width)).astype(np.float32) for _ in range(2)]
    return [x / np.linalg.norm(x, axis=1, keepdims=True) for x in both]


def clip_jax_loss(method: str, count: int, width: int, tile: int) -> tuple[turns.Step, dict]:
    import jax
    import jax.numpy as jnp

    from clip_jax import losses

    # No mesh: "all_gather" is the plain form then, one logits matrix and jax.grad.
    loss = functools.partial(losses.softmax_loss, method=method, tile=tile)
    arguments = jax.device_put([*embeddings(count, width), jnp.float32(LOGIT_SCALE)])
    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
    return lambda: float(jax.block_until_ready(program(*arguments))[0]), {}


def open_clip_loss(count: int, width: int) -> tuple[turns.Step, dict]:
    import open_clip
    import torch

    images, texts = (torch.from_numpy(x).requires_grad_() for x in embeddings(count, width))
    scale = torch.tensor(LOGIT_SCALE, requires_grad=True)

    def take_step() -> float:
        loss = open_clip.ClipLoss(cache_labels=True)(images, texts, scale.exp())
        torch.autograd.grad(loss, (images, texts, scale))
        return loss.item()

    return take_step, {}


def prepare(args: argparse.Namespace) -> tuple[turns.Step, dict]:
    if args.worker == "open_clip":
        return open_clip_loss(args.pairs, args.width)
    method = "ring" if args.worker == "ring" else "all_gather"
    return clip_jax_loss(method, args.pairs, args.width, args.tile)


def on_topology(name: str, tile: int) -> None:
    """Prints the temporary memory of both sharded forms, from the TPU compiler."""
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-256",
        "JAX_PLATFORMS": "cpu",
    }
    import sys

    sys.path.insert(0, str(turns.ROOT))
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from clip_jax import choices, losses, sharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    mesh = sharding.make_mesh(devices=topology.devices)
    place = jax.sharding.NamedSharding(mesh, sharding.EVERY_AXIS)
    print(f"{name}, bfloat16\n\n| method | batch | width | temporary MiB |\n|---|---|---|---|")
    for method in choices.LOSS_METHODS:
        for batch, width in ((32_768, 512), (262_144, 768), (1_048_576, 768)):
            if method == "all_gather" and batch > 262_144:
                continue  # does not fit
            embeds = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16, sharding=place)
            loss = functools.partial(losses.softmax_loss, mesh=mesh, method=method, tile=tile)
            grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
            compiled = grad.lower(embeds, embeds, jnp.float32(0)).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
            print(f"| {method} | {batch:,} | {width} | {temporary:,.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--tile", type=int, default=1024, help="tile of the ring: loss.tile")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each competitor")
    parser.add_argument("--topology", help="such as v5e:16x16: what the TPU compiler says instead")
    parser.add_argument("--verbose", action="store_true", help="show what the competitors print")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return turns.work(lambda: prepare(args))
    if args.topology:
        return on_topology(args.topology, args.tile)
    workers = turns.take_turns(__file__, list(COMPETITORS), args.rounds)
    print(f"{args.pairs:,} x {args.width}, float32; medians of {args.rounds} calls")
    print(turns.versions("jax", "torch", "open_clip_torch"))
    print("\n| | speed over open_clip | s | fastest - slowest | GiB over start | loss |")
    print("|---|---|---|---|---|---|")
    for worker in workers:
        memory = worker.steps[-1]["peak"] - worker.ready["before"]
        speed = workers[0].seconds / worker.seconds
        print(
            f"| {worker.competitor} | {speed:.2f} | {worker.seconds:.2f} | {worker.spread} "
            f"| {memory:.2f} | {worker.ready['loss']:.5f} |"
        )
    return None


if __name__ == "__main__":
    main()
