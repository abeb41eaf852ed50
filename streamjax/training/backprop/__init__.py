"""The gradient of a long sequence, exact and chunk by chunk, in several orders."""
