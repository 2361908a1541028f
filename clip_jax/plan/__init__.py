"""Plans a run on a TPU pod: compiles its step for the pod, without one.

cli.py        the command            make.py       compiles a step and gathers the figures
topology.py   v5e:16x16 as devices   search.py     compiles the promising settings
chips.py      the table of chips     suggest.py    suggests settings that fit
table.py      figures for people     estimate.py   rough needs before compiling
step_cost.py  figures of a step      progress.py   lines while it compiles

plan --budget: budget_cli.py is the command, units.py reads its amounts, budget.py chooses a config
by stored plans (plans.json), and accuracy.py predicts its accuracy from published.csv.

From the text of a compiled program: hlo.py reads it, loops.py finds trip counts, groups.py the
devices of a collective, flops.py the operations and bytes of an instruction, network.py the time of
a collective. kernels.py times Pallas kernels, whose grids mosaic.py reads. cost.py adds all of it
up, and parts.py attributes it to parts of the model.
"""
