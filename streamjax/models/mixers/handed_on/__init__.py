"""Token mixers that take what a layer below has made of a token, or hand it on: gated memory units and RWKV-7."""
