"""Commands that run models: `python -m infer.stream`, `chat`, `serve`, `batch`, `perplexity`, `recall` and others."""
