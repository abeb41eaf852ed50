"""What a tier is: a rule for storing tokens. What it evicts falls to the next tier of its cascade."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Array, Float, Int32

from pallas_kernels.partial import Partial
from streamjax.attention.rotary import Rotary
from streamjax.kv.query import KVSpec, KVTokens, Query, State, Stored


class Tier:
    """A rule for storing tokens. Subclasses are frozen dataclasses.

    For each chunk a cascade calls, of all its tiers in order, `absorb`, `attend`, `observe` and `insert` (`store` of
    the last tier). Most tiers store a chunk after it has attended, by `insert`. A tier that keeps the first tokens of a
    stream at places of its own takes them out of the chunk before it attends, by `absorb`.

    Every array of a state is [B, K or 1, S, ...], cut to its rank, so that one rule shards them all.
    """

    shares_values: ClassVar[bool] = False  # whether values without channels are understood, see `Cache.shares_values`
    keeps_all: ClassVar[bool] = False  # whether streams end when it is full
    last_because: ClassVar[str] = ""  # why no tier may stand behind it in a cascade; empty where one may

    @property
    def slots(self) -> int:
        """How many tokens it holds."""
        raise NotImplementedError

    @property
    def reach_back(self) -> int | None:
        """Positions that it adds to how far back a query sees. None: no fixed number; a query sees all of its chunk."""
        return None

    @property
    def wants_noted(self) -> Any | None:
        """How attention that tokens get before they come has to be noted, a `Noting`; None where it is not asked."""
        return None

    @property
    def keeps_notes(self) -> bool:
        """Whether it notes by itself the attention that its tokens get (`observe`), where it wants it noted."""
        return False

    @property
    def watches(self) -> bool:
        """Whether it is told of every chunk's queries (`observe`), also where it asks for no attention."""
        return False

    @property
    def evicts_per_head(self) -> bool:
        """Whether each key head keeps tokens of its own, so that the tiers behind it get other ones from each."""
        return False

    @property
    def chooses_every(self) -> int | None:
        """Tokens of the stream after which it chooses what goes: no chunk that it sees reaches beyond that.

        Its state has `clock`, the tokens since then, int32 [B].
        """
        return None

    @property
    def alters_every(self) -> int | None:
        """How many tokens it takes in at least between two changes of what queries read of those that it holds.

        None: a token that has come is read as it is read in its own chunk, whole and at its true position, until it
        falls or a choice ends (`chooses_every`). Of tiers that choose what is read, or code or move what they hold, it
        is the number of tokens that are coded together, or 1.
        """
        return 1

    def unaltered(self, state: State) -> Int32[Array, " B"] | int:
        """How many tokens it can take in before such a change."""
        return 0

    def room(self, state: State) -> Int32[Array, " B"] | int:
        """How many tokens it can take in before one falls to the next tier, at least."""
        return 0

    @property
    def needs_ids(self) -> bool:
        """Whether tokens have to come with their ids."""
        return False

    @property
    def made_for(self) -> str | None:
        """A fingerprint of the model that it was measured with; None where it serves every model."""
        return None

    @property
    def needs_outputs(self) -> bool:
        """Whether tokens have to come with what takes values to the layer's output."""
        return False

    def observe(self, state: State, query: Query, lse: Float[Array, "B C H"], reach: int | None) -> State:
        """After the chunk attended: note how much attention each token got. `lse` is of all that the chunk saw."""
        return state

    @property
    def span(self) -> int:
        """Positions that its keys take up: as many as its slots, unless it moves keys to other positions."""
        return self.slots

    def init(self, spec: KVSpec) -> State:
        """An empty state."""
        raise NotImplementedError

    def stored(self, state: State, rotary: Rotary | None) -> Stored:
        """All tokens that it holds, for who lays them out anew. `rotary` is what rotates keys.

        Raises:
          ValueError: a tier that cannot say.
        """
        raise ValueError(f"the tokens of {self!r} cannot be taken out of it")

    def absorb(self, state: State, query: Query, tokens: KVTokens) -> tuple[State, KVTokens]:
        """Before the chunk attends: take what this tier keeps for good; return the tokens that are left."""
        return state, tokens

    def attend(self, state: State, query: Query, reach: int | None) -> Partial:
        """Attention of the chunk's queries to what is stored; `reach` is the cascade's, in positions."""
        raise NotImplementedError

    def store(self, state: State, tokens: KVTokens) -> State:
        """`insert` into the last tier of a cascade: what it evicts is gone and need not be read."""
        return self.insert(state, tokens)[0]

    def insert(self, state: State, tokens: KVTokens) -> tuple[State, KVTokens]:
        """After the chunk attended: store its tokens. Returns as many tokens as came in; those evicted are `valid`."""
        if self.last_because:
            raise ValueError(f"{type(self).__name__} must be the last tier of a Cascade: {self.last_because}")
        return state, tokens
