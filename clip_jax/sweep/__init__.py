"""Scaling studies: python -m clip_jax sweep trains a grid of settings and fits a power law.

cli.py      the command              results.py  compute, loss and error of the finished runs
grid.py     the grid as runs         law.py      power laws with their intervals
figure.py   loss and error against compute, drawn
"""
