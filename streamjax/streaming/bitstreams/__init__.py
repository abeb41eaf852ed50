"""Keys and values as bits that can be sent: CacheGen (Liu et al., 2310.07240)."""

from streamjax.streaming.bitstreams.cachegen import Profile, decode, encode, measure_profile
from streamjax.streaming.bitstreams.sending import Choice, choose

__all__ = ["Choice", "Profile", "choose", "decode", "encode", "measure_profile"]
