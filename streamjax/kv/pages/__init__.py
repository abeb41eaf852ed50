"""Parts of tiers of pages: indexes, the choice of pages, search, boundaries, host memory, files."""
