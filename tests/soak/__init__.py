"""Hours in the life of a stream and of a run: `make soak`. A weekly run takes a twentieth of it."""
