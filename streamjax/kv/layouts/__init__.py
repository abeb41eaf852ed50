"""Layers that are looked at or laid out anew beside compaction: lazy ones, and tokens of several states in one."""
