"""Between text and ids: tokenizers, chat templates, encoding and decoding piece by piece."""
