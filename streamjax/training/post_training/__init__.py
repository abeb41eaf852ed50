"""Post-training: the reference that DPO and GRPO compare with, answers that a model writes, and their rewards"""
