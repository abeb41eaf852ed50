"""Codecs: how a tier stores keys and values in few bits. Codes lie in `CodedSlots`, in the place of an array."""
