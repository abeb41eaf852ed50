"""Low-rank adapters on a model's projections: attach, merge, and PEFT's files."""
