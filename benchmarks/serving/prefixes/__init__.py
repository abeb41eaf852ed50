"""Beginnings that requests share: what reading them once saves, and which states are worth their bytes."""
