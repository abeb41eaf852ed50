"""Caches that are trained for a real model, and caches of which its layers share a part."""
