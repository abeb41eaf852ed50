"""Serving: many endless streams through one compiled step of fixed shape, and OpenAI's HTTP API in front of it."""
