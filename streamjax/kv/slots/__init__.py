"""Arrays with one entry a slot: rings, lists of slots that are written anywhere, and slots that lie over devices."""
