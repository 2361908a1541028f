"""The training run: mesh, model, data, state, step, loop, logs."""
