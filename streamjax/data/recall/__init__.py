"""Tasks of recall: facts hidden in text of any length, for training and for measuring."""
