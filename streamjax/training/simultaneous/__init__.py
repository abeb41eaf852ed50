"""Training to answer while reading: rows of two groups of tokens, in the order in which they come, and their loss."""

from streamjax.training.simultaneous.grouped_rows import GroupedRows, wait_k_rows
from streamjax.training.simultaneous.loss import group_positions, grouped_hidden, grouped_loss, grouped_nats

__all__ = ["GroupedRows", "group_positions", "grouped_hidden", "grouped_loss", "grouped_nats", "wait_k_rows"]
