"""Tiers that keep every token and fewer channels of it: channels that queries need, or coordinates of low rank."""
