"""Token mixers that take what a layer below has made of a token, or hand it on: GMU, RWKV-7 and its channel mixing."""
