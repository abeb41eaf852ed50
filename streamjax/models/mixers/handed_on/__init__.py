"""Token mixers that take what a layer below has made of a token, or hand it on: GMU, and RWKV-7 with its channel mixing."""
