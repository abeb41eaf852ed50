"""What the stages of the chunk pipeline have each: layers, their keys and states, and chunk memories.

All devices run one program. Stacked layers that the mesh deals out evenly are alike on every stage. Others are dealt
out here, in branches of the program, of which each device takes its stage's. What stages hold lies in slots that all of
them have: of each kind as many as the stage with the most of it needs. Of such layers a device reads its own weights,
whole, out of those that it has of all layers along `context`, and sums gradients of its own alone.

A chunk memory is kept by the stages that read it, as keys are: the stage that makes a chunk's pages hands them on
behind the chunk, and their gradients come back with the chunk's cotangent. One memory at most goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from streamjax.attention.context.exchange import place
from streamjax.attention.landmarks.page_attention import LandmarkPages
from streamjax.models.block import Block
from streamjax.models.config import ModelConfig
from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import with_layers
from streamjax.training.backprop.chunk_order import Buffers, LayerGroup
from streamjax.training.backprop.gradient_options import GradientOptions
from streamjax.training.backprop.gradient_reduction import Reduction, as_parameters
from streamjax.training.backprop.sequence_chunks import ChunkedSequence, zeros_like
from streamjax.training.backprop.storage import landmark_memory
from streamjax.training.backprop.storage.landmark_memory import Memories, source_of
from streamjax.training.backprop.storage.layer_stack import LayerStack, layer_stacks
from streamjax.training.backprop.trainable_parameters import partition

Chunk = Float[Array, "B C E"]
Kind = TypeVar("Kind")
Item = TypeVar("Item")


class StageState(NamedTuple):
    """What is in a stage's slots: keys and states of its layers, and memories; or gradients of these."""

    buffers: Buffers
    memories: list[LandmarkPages]


class Program(NamedTuple):
    """What some stage runs.

    group: its layers. weights, buffers: in which slots these and their keys lie. memories: pairs of the layer that
    makes a memory and the memory's slot. taken, given: which memory comes with a chunk, and which goes on with it, of
    those that the stage has; with their places among all that chunks have with them.
    """

    group: LayerGroup
    weights: Sequence[int]
    buffers: Sequence[int]
    memories: Sequence[tuple[int, int]] = ()
    taken: tuple[int, int] | None = None
    given: tuple[int, int] | None = None


class Stages(NamedTuple):
    """All stages' programs, and which one is this device's.

    stores: for each slot the group and the number of its buffer of that kind. sources: for each slot of a memory one of
    the layers whose memory lies there. handed: the same of memories that go on with chunks. sums: zeros for the
    gradients of the weights in their slots. finish: from those summed over chunks to the gradients of stacked layers
    and of single ones.
    """

    programs: list[Program]
    mine: Int[Array, ""] | int
    config: ModelConfig
    sequence: ChunkedSequence
    stores: list[tuple[LayerGroup, int]]
    sources: list[int]
    handed: list[int]
    sums: list[Block]
    finish: Callable[[list[Block]], tuple[list[Block], list[Block]]]

    def empty(self, dtype: Any, local: bool) -> StageState:
        """Zeros for all slots, or (`local`) for the gradients of what a chunk may see."""
        batch = self.sequence.batch_size
        buffers = [group.empty_buffer(n, batch, dtype, local) for group, n in self.stores]
        return StageState(buffers, [self._memory(source, dtype) for source in self.sources])

    def nothing_handed(self, dtype: Any) -> list[LandmarkPages]:
        """Zeros for the pages that go on with a chunk."""
        return [self._memory(source, dtype, 1) for source in self.handed]

    def _memory(self, source: int, dtype: Any, chunks: int | None = None) -> LandmarkPages:
        return landmark_memory.empty_memory(self.config, source, self.sequence, dtype, chunks)

    def forward(
        self, x: Chunk, handed: list[LandmarkPages], state: StageState, i: Any
    ) -> tuple[Chunk, list[LandmarkPages], StageState]:
        """Chunk i through this device's layers: output, pages that go on with it, and what is kept."""

        def run(program: Program, x: Chunk, handed: list[LandmarkPages], state: StageState, i: Any) -> Any:
            keys, remembered = _of_program(program, state)
            if program.taken is not None:
                source, at = program.taken
                remembered[source] = landmark_memory.write(remembered[source], handed[at], i)
            x, keys, remembered, _ = program.group.forward(x, keys, remembered, i, self.sequence, write=True)
            if program.given is not None:
                source, at = program.given
                handed = _put(handed, [at], [landmark_memory.own_pages(remembered[source], i, handed[at])])
            return x, handed, _put_back(program, state, keys, remembered)

        return self._run(run, x, handed, state, i)

    def backward(
        self,
        x: Chunk,
        d_x: Chunk,
        d_handed: list[LandmarkPages],
        state: StageState,
        sums: list[Block],
        d_state: StageState,
        i: Any,
        counts: Bool[Array, ""],
    ) -> tuple[Chunk, list[LandmarkPages], list[Block], StageState]:
        """Chunk i back through this device's layers, of which `x` is the input: its cotangent, that of the pages that
        came with it, and the sums with its part added, if it `counts`."""

        def run(
            program: Program,
            x: Chunk,
            d_x: Chunk,
            d_handed: list[LandmarkPages],
            state: StageState,
            sums: list[Block],
            d_state: StageState,
            i: Any,
            counts: Any,
        ) -> Any:
            (keys, remembered), (d_keys, d_remembered) = (_of_program(program, each) for each in (state, d_state))
            if program.given is not None:
                source, at = program.given
                d_remembered[source] = landmark_memory.add_pages(d_remembered[source], d_handed[at], i)
            group, sequence = program.group, self.sequence
            *_, held = group.forward(x, keys, remembered, i, sequence, write=False)
            grads = [sums[n] for n in program.weights]
            d_x, grads, d_keys, d_remembered = group.backward(
                d_x, held, keys, remembered, grads, d_keys, d_remembered, i, sequence, counts
            )
            if program.taken is not None:
                source, at = program.taken
                d_handed = _put(d_handed, [at], [landmark_memory.own_pages(d_remembered[source], i, d_handed[at])])
            sums = _put(sums, program.weights, grads)
            return d_x, d_handed, sums, _put_back(program, d_state, d_keys, d_remembered)

        return self._run(run, x, d_x, d_handed, state, sums, d_state, i, counts)

    def _run(self, run: Callable[..., Any], *arguments: Any) -> Any:
        """This device's branch."""
        if len(self.programs) == 1:
            return run(self.programs[0], *arguments)
        branches = [lambda *given, program=program: run(program, *given) for program in self.programs]
        return jax.lax.switch(self.mine, branches, *arguments)


def stages_of(
    model: Decoder, sequence: ChunkedSequence, options: GradientOptions, split: Decoder | None, reduction: Reduction
) -> Stages:
    """The stages of a model that was dealt out by the mesh, or else is here; arguments as of `loss_and_grad`."""
    if split is None or any(x.context is not None for x in jax.tree.leaves(list(split.stack))):
        return stages_of_rows(model, sequence, options, split, reduction)
    return stages_of_layers(model, sequence, options, split, reduction)


def stages_of_rows(
    model: Decoder, sequence: ChunkedSequence, options: GradientOptions, split: Decoder | None, reduction: Reduction
) -> Stages:
    """The stages of a model whose stacked layers the mesh has dealt out: `model` has this stage's."""
    whole = model if split is None else with_layers(model, reduction.gather(list(model.stack), list(split.stack)), [])
    (rows,) = layer_stacks(whole, options.trainable, None, Reduction())
    (own,) = layer_stacks(model, options.trainable, split, reduction)
    group, sums = LayerGroup.make(rows, sequence), rows.zero_sums(options.grad_dtype)
    places = range(len(group.stores))
    return Stages(
        [Program(group, range(len(sums)), places)],
        0,
        model.config,
        sequence,
        [(group, n) for n in places],
        [],
        [],
        sums,
        lambda sums: (own.finish(sums), []),
    )


def stages_of_layers(
    model: Decoder, sequence: ChunkedSequence, options: GradientOptions, split: Decoder, reduction: Reduction
) -> Stages:
    """The stages of any model; each device along `context` has all of its layers."""
    config, (stage, count) = model.config, place()
    layers = [model.layer(n) for n in range(config.num_layers)]
    splits = [split.layer_and_row(n)[0] for n in range(config.num_layers)]  # those of a stack's rows are the stack's
    dealt = [range(d * len(layers) // count, (d + 1) * len(layers) // count) for d in range(count)]
    _, weights = deal([[_kind(layers[n]) for n in numbers] for numbers in dealt])
    first = {slot: n for d, numbers in enumerate(dealt) for n, slot in zip(numbers, weights[d], strict=True)}

    def of_stage(d: int) -> list[Block]:
        found = dict(zip(weights[d], dealt[d], strict=True))
        return [
            layers[found[slot]] if slot in found else jax.tree.map(jnp.zeros_like, layers[first[slot]])
            for slot in sorted(first)
        ]

    chosen = as_parameters(jax.lax.switch(stage, [partial(of_stage, d) for d in range(count)]))
    whole = reduction.gather(chosen, [splits[first[slot]] for slot in sorted(first)])
    groups = [
        LayerGroup.make(
            LayerStack([whole[n] for n in weights[d]], dealt[d][0], False, model, options.trainable, None, Reduction()),
            sequence,
        )
        for d in range(count)
    ]
    _, buffers = deal([list(zip(group.stores, group.beside, strict=True)) for group in groups])
    stores = {slot: (groups[d], n) for d in range(count) for n, slot in enumerate(buffers[d])}
    memories = _Memories.of(config, dealt)
    programs: list[Program] = []
    numbers = []
    for d in range(count):
        known = memories.source_slots(d), memories.taken(d), memories.given(d)
        program = Program(groups[d], weights[d], buffers[d], *known)
        alike = (n for n, other in enumerate(programs) if config.hsa is None and other[1:] == program[1:])
        number = next(alike, len(programs))
        programs[number : number + 1] = [program]
        numbers.append(number)

    def finish(sums: list[Block]) -> tuple[list[Block], list[Block]]:
        grads = []
        for d in range(count):
            for n, slot in zip(dealt[d], weights[d], strict=True):
                params, dims = (partition(x, options.trainable)[0] for x in (layers[n], splits[n]))
                own = jax.tree.map(lambda x, d=d: jnp.where(stage == d, x, 0), sums[slot])
                total = reduction.reduce(own, dims)
                grads.append(jax.tree.map(lambda param, grad: grad.astype(param.dtype), params, total))
        period, end = len(model.stack), model.stacked_layers
        stack = [jax.tree.map(lambda *rows: jnp.stack(rows), *grads[i:end:period]) for i in range(period)]
        return stack, grads[end:]

    return Stages(
        programs,
        jnp.asarray(numbers)[stage],
        config,
        sequence,
        [stores[slot] for slot in sorted(stores)],
        memories.sources,
        memories.handed,
        [zeros_like(partition(block, options.trainable)[0], options.grad_dtype) for block in whole],
        finish,
    )


class _Memories(NamedTuple):
    """Where stages have chunk memories. touched: which each makes or reads. live: which goes on behind each.

    sources, places: a source for each slot, and the slots of what is touched. handed, handed_places: the same of what
    goes on.
    """

    touched: list[list[int]]
    live: list[int | None]
    sources: list[int]
    places: list[list[int]]
    handed: list[int]
    handed_places: list[list[int]]

    @classmethod
    def of(cls, config: ModelConfig, dealt: list[range]) -> _Memories:
        found = [source_of(config, n) for n in range(config.num_layers)]
        touched = [sorted({s for n in numbers if (s := found[n]) is not None}) for numbers in dealt]
        live = [
            next((s for s in found[numbers.stop :] if s is not None and s < numbers.stop), None) for numbers in dealt
        ]

        def slots(stages: list[list[int]]) -> tuple[list[int], list[list[int]]]:
            heads = {s: config.memory_block(s).attention for stage in stages for s in stage}
            _, places = deal([[(heads[s].num_kv_heads, heads[s].head_dim) for s in stage] for stage in stages])
            pairs = zip(itertools.chain(*places), itertools.chain(*stages), strict=True)
            found = dict(sorted(pairs))
            return list(found.values()), places

        return cls(touched, live, *slots(touched), *slots([[] if s is None else [s] for s in live]))

    def source_slots(self, stage: int) -> list[tuple[int, int]]:
        return list(zip(self.touched[stage], self.places[stage], strict=True))

    def given(self, stage: int) -> tuple[int, int] | None:
        source = self.live[stage]
        return None if source not in self.touched[stage] else (source, self.handed_places[stage][0])

    def taken(self, stage: int) -> tuple[int, int] | None:
        source = self.live[stage - 1] if stage else None
        return None if source not in self.touched[stage] else (source, self.handed_places[stage - 1][0])


def deal(stages: Sequence[Sequence[Kind]]) -> tuple[list[Kind], list[list[int]]]:
    """Slots, as many of each kind as some stage has things of it, and in which of them each stage has its own.

    Example:
      >>> deal([["window", "full"], ["full", "full"]])
      (['window', 'full', 'full'], [[0, 1], [1, 2]])
    """
    slots: list[Kind] = []
    places = []
    for things in stages:
        mine: list[int] = []
        for kind in things:
            free = [n for n, other in enumerate(slots) if other == kind and n not in mine]
            if not free:
                slots.append(kind)
            mine.append(free[0] if free else len(slots) - 1)
        places.append(mine)
    return slots, places


def _kind(block: Block) -> Any:
    """What layers have in common that a program may take for each other."""
    leaves, structure = jax.tree.flatten(block)
    return structure, [(x.shape, x.dtype) for x in leaves]


def _of_program(program: Program, state: StageState) -> tuple[Buffers, dict[int, LandmarkPages]]:
    keys = [state.buffers[n] for n in program.buffers]
    return keys, {source: state.memories[n] for source, n in program.memories}


def _put_back(program: Program, state: StageState, keys: Buffers, remembered: Memories) -> StageState:
    places, memories = [n for _, n in program.memories], [remembered[source] for source, _ in program.memories]
    return StageState(_put(state.buffers, program.buffers, keys), _put(state.memories, places, memories))


def _put(items: list[Item], places: Sequence[int], new: Sequence[Item]) -> list[Item]:
    """`items` with new ones in some places."""
    found = list(items)
    for place_of, item in zip(places, new, strict=True):
        found[place_of] = item
    return found
