"""What a run will need on a TPU pod: compiled for it, without one.

cli.py        the command            make.py       compiles a step and gathers the figures
topology.py   v5e:16x16 as devices   search.py     compiles the promising settings
chips.py      the table of chips     suggest.py    what would fit
table.py      figures for people     estimate.py   rough needs before compiling

From the text of a compiled program: hlo.py reads it, loops.py counts turns, groups.py tells who
talks to whom, flops.py what an instruction does, network.py how long an exchange takes, cost.py
adds all of it up and parts.py names where the time goes. model_flops.py is what a model needs.
"""
