"""Objectives: cross-entropy, DPO and GRPO, from three numbers a token."""
