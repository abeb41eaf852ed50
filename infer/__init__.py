"""Command lines that run models: `python -m infer.stream`, `chat`, `perplexity`, `recall` and `demo`."""
