"""Commands that train what a cache needs of a model: directions, convolutions, networks. The model is frozen."""
