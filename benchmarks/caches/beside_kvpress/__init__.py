"""The comparison with kvpress, `benchmarks.caches.versus_kvpress`: each side's methods, and what each side does."""
