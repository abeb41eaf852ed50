"""Layers over the mesh axis `stage`: microbatches go from stage to stage, through all of them or on paths that skip."""
