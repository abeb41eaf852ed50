"""Snapshots of a training run in the memory of its machines, which outlive its processes and the loss of a machine.

Each machine has a keeper, a small process that holds what the training processes of that machine give it, and codes of
what other machines' keepers hold (`stripes.py`). Keepers go on when training processes die. Those that are started
again ask the keepers, and compute what a lost machine held from the codes. Knows no model and no run.
"""
