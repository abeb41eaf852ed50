"""Tokens that say little leave a layer's computation while a model is fine-tuned (LeMo, 2501.09767)."""
