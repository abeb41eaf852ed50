"""Merge rules, one file each: what becomes of the tokens that a tier cannot keep, in those that it keeps."""
