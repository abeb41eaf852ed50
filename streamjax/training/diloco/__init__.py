"""Streaming DiLoCo: replicas that train apart and exchange a few layers at a time, in few bits, now and then."""
