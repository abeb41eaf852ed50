"""Flags that commands share: the model, the cache, sampling."""
