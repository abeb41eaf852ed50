"""From the last hidden states to what losses read of their logits, and back: of tokens that count, in blocks."""
