"""Tiers that pass on, or read, a part of what they get, or note something beside it."""
