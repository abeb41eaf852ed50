"""The parts of a layer that let tokens see each other."""
