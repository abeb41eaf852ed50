"""Reading and answering at once: source and output in groups of tokens with positions of their own, and policies."""

from streamjax.streaming.simultaneous.groups import GroupedState, advance_group, group_step, init_groups, read_group
from streamjax.streaming.simultaneous.session import SimultaneousSession
from streamjax.streaming.simultaneous.waiting import generate_while_reading

__all__ = [
    "GroupedState",
    "SimultaneousSession",
    "advance_group",
    "generate_while_reading",
    "group_step",
    "init_groups",
    "read_group",
]
