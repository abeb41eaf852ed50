"""Budgets, one file each: how one total of tokens is divided over the layers of a model, or the heads of a layer."""
