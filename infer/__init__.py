"""Commands that run models: `python -m infer.stream` and the like.

They are `stream`, `chat`, `serve`, `batch`, `perplexity`, `recall`, `leaderboard` and `demo`.
"""
