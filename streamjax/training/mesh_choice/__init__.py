"""How a training step is split over devices: a search over meshes, by what a step computes, holds and exchanges."""
