"""OpenAI's HTTP API in front of a serving engine, and the page at `/`."""
