"""Guessed tokens in the engine: who guesses, whether it is worth a wider pass, and the pass that reads them."""
