"""Scores by which a tier keeps tokens, one file each: what attention got noted, keys, values, or queries so far."""
