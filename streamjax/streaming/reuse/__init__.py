"""What was read once, read again in another place: edits in the middle of a stream, chunks encoded apart and joined."""

from streamjax.streaming.reuse.anchoring import AnchorPool
from streamjax.streaming.reuse.editing import edit
from streamjax.streaming.reuse.joining import EncodedChunk, encode_chunk, join
from streamjax.streaming.reuse.side_by_side import side_by_side

__all__ = ["AnchorPool", "EncodedChunk", "edit", "encode_chunk", "join", "side_by_side"]
