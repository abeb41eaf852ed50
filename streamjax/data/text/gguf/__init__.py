"""Tokenizers in the metadata of GGUF files, byte-level BPE and SentencePiece's, as `tokenizer.json` would have them."""
