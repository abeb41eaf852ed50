"""Models in GGUF files, llama.cpp's format: weights in blocks of few bits, one table of architectures."""
