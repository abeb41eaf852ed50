"""The head behind a whole sequence, for `jax.grad`: its derivative is written out, so that blocks may be left out.

Where the loss is a sum over tokens, the pass that makes logits takes their gradient at once, and the backward pass has
only to multiply. Else logits are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from streamjax.models.decoder import Decoder
from streamjax.models.layer_stacking import without_layers
from streamjax.parallel.rules import axes_of, free_spec
from streamjax.training.backprop import loss_kernels
from streamjax.training.backprop.head.passes import head_gradients, head_stats
from streamjax.training.backprop.sequence_chunks import zeros_like
from streamjax.training.backprop.trainable_parameters import combine, is_parameter, partition
from streamjax.training.objectives.objective import Batch, Linear, Objective, TokenStats

_OUTPUT = {"embedding", "head", "head_bias"}  # what logits are made of; of the first two the head, if there is one
Arrays = dict[str, Array]


def whole_sequence_loss(
    model: Decoder, hidden: Float[Array, "B T E"], prepared: Batch, objective: Objective, logits_chunk: int
) -> Float[Array, ""]:
    """The loss from hidden states behind the last norm, differentiable by `jax.grad` in these and in the model.

    Logits are made for `logits_chunk` tokens of a row at a time, of tokens that count. On a mesh each device does so
    with its own tokens: the output matrix is gathered once, and its gradient is reduced once.

    Args:
      model: only what is behind the last norm is read.
      hidden: of all tokens.
      prepared: what the objective made of the batch.
      objective: what is minimised.
      logits_chunk: tokens of a row whose logits exist at once.
    """
    counted, targets = objective.counted(prepared), prepared["targets"]
    if not objective.separable:
        stats = whole_sequence_stats(model, hidden, targets, logits_chunk, counted)
        return objective.loss(stats, prepared)

    def own(ends: Decoder, arrays: Arrays) -> Float[Array, " 1"]:
        return _loss(ends, arrays, objective, logits_chunk)[None]

    each = {name: x for name, x in prepared.items() if x.shape[:2] == targets.shape[:2]}
    return jnp.sum(_on_own_tokens(own, model, hidden, each, counted, sums=True))


def whole_sequence_stats(
    model: Decoder,
    hidden: Float[Array, "B T E"],
    targets: Int32[Array, "B T ..."],
    logits_chunk: int,
    counted: Bool[Array, "B T"] | None = None,
) -> TokenStats:
    """Statistics of all tokens, or of those that are `counted` and else zeros; see `whole_sequence_loss`."""

    def own(ends: Decoder, arrays: Arrays) -> TokenStats:
        return _stats(ends, arrays, logits_chunk)

    return _on_own_tokens(own, model, hidden, {"targets": targets}, counted)


def _on_own_tokens(
    compute: Callable[[Decoder, Arrays], Any],
    model: Decoder,
    hidden: Array,
    prepared: Arrays,
    counted: Array | None,
    sums: bool = False,
) -> Any:
    """`compute(ends, arrays)` of each device's tokens; `arrays` also has `hidden`, and `counted` if that is known.

    It returns arrays of one value a token, or (`sums`) [1].
    """
    arrays = {f"prepared_{name}": x for name, x in prepared.items()} | {"hidden": hidden}
    if counted is not None:
        arrays["counted"] = counted
    mesh, names = jax.sharding.get_abstract_mesh(), ("batch", "length")
    split = PartitionSpec() if mesh.empty else free_spec(names, hidden.shape[:2], mesh)
    axes = tuple(axis for entry in split for axis in axes_of(entry))
    if axes:
        compute = jax.shard_map(
            compute,
            mesh=mesh,
            axis_names=set(axes),
            in_specs=(PartitionSpec(), split),
            out_specs=PartitionSpec(axes) if sums else split,
            check_vma=False,
        )
    return compute(without_layers(model), arrays)


def _cut(arrays: Arrays) -> tuple[Array, Arrays, Array | None]:
    """Hidden states, the objective's arrays and what counts, as one chunk each."""
    chunk = {name: x[None] for name, x in arrays.items()}
    hidden, counted = chunk.pop("hidden"), chunk.pop("counted", None)
    return hidden, {name.removeprefix("prepared_"): x for name, x in chunk.items()}, counted


class _Parameters:
    """The parameters behind a model's last norm as lists of arrays, one list a parameter, and all others as one."""

    def __init__(self, ends: Decoder):
        names = _OUTPUT - ({"head"} if ends.head is None else {"embedding"})
        params, rest = partition(ends, nnx.Variable, names)
        self._nodes, tree = jax.tree.flatten(params, is_leaf=is_parameter)
        self._tree: Any = tree
        self.arrays: list[list[Array]] = [jax.tree.leaves(node) for node in self._nodes]
        self.rest_arrays, self._rest_tree = jax.tree.flatten(rest)

    def tree(self, arrays: Sequence[list[Array] | None]) -> Decoder:
        """The parameters as a tree, from lists; None for None."""
        pairs = zip(self._nodes, arrays, strict=True)
        found = [None if own is None else jax.tree.unflatten(jax.tree.structure(node), own) for node, own in pairs]
        tree: Decoder = jax.tree.unflatten(self._tree, found)
        return tree

    def others(self, arrays: list[Array]) -> Decoder:
        """All others as a tree."""
        tree: Decoder = jax.tree.unflatten(self._rest_tree, arrays)
        return tree

    def divided(self, params: list[list[Any]], rest: list[Any]) -> tuple[Decoder, Decoder]:
        """Trees of the parameters whose gradient is asked for, and of all others, from what `forward` is given."""
        trained = [any(primal.perturbed for primal in own) for own in params]
        first = [_values(own) if yes else None for own, yes in zip(params, trained, strict=True)]
        second = [None if yes else _values(own) for own, yes in zip(params, trained, strict=True)]
        return self.tree(first), combine(self.tree(second), self.others(_values(rest)))

    def sums(self, trained: Decoder, rest: Decoder, hidden: Array, targets: Array) -> Decoder:
        """Zeros to which gradients are added: kernels add in float32."""
        kernels = loss_kernels.applicable(combine(trained, rest), hidden[0], targets[0])
        return zeros_like(trained) if kernels else jax.tree.map(jnp.zeros_like, trained)

    def lists(self, grads: Decoder, trained: Decoder) -> list[list[Array] | None]:
        """Gradients as lists, in the dtypes of the parameters; None for what is not trained."""
        grads = jax.tree.map(lambda x, like: x.astype(like.dtype), grads, trained)
        nodes = self._tree.flatten_up_to(grads)
        return [None if node is None else jax.tree.leaves(node) for node in nodes]


def _loss(ends: Decoder, arrays: Arrays, objective: Objective, logits_chunk: int) -> Float[Array, ""]:
    hidden, prepared, counted = _cut(arrays)
    parameters = _Parameters(ends)

    @jax.custom_vjp
    def loss(params: Any, rest: Any, hidden: Array, prepared: Arrays, counted: Array | None) -> Array:
        ends = combine(parameters.tree(params), parameters.others(rest))
        stats = head_stats(ends, hidden, prepared["targets"], counted, logits_chunk, normed=True)
        first = {name: x[0] for name, x in prepared.items()}
        return objective.loss(TokenStats(*(x[0] for x in stats)), first)

    def forward(params: Any, *others: Any) -> tuple[Array, Any]:
        (trained, rest), (hidden, prepared, counted) = parameters.divided(params, others[0]), _values(others[1:])
        sums = parameters.sums(trained, rest, hidden, prepared["targets"])
        value, grads, d_hidden = head_gradients(
            trained, rest, hidden, prepared, objective, counted, logits_chunk, sums, normed=True
        )
        return value, (parameters.lists(grads, trained), d_hidden)

    def backward(kept: Any, slope: Any) -> tuple[Any, ...]:
        factor = _instantiated(slope)
        grads, d_hidden = jax.tree.map(lambda x: x * factor.astype(x.dtype), kept)
        return grads, None, d_hidden, None, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss(parameters.arrays, parameters.rest_arrays, hidden, prepared, counted)


def _stats(ends: Decoder, arrays: Arrays, logits_chunk: int) -> TokenStats:
    hidden, prepared, counted = _cut(arrays)
    parameters = _Parameters(ends)

    @jax.custom_vjp
    def stats(params: Any, rest: Any, hidden: Array, targets: Array, counted: Array | None) -> TokenStats:
        ends = combine(parameters.tree(params), parameters.others(rest))
        return head_stats(ends, hidden, targets, counted, logits_chunk, normed=True)

    def forward(params: Any, *others: Any) -> tuple[TokenStats, Any]:
        divided, values = parameters.divided(params, others[0]), _values(others)
        return stats(_values(params), *values), (divided, values[1:])

    def backward(kept: Any, slopes: TokenStats) -> tuple[Any, ...]:
        (trained, rest), (hidden, targets, counted) = kept
        prepared = Linear.prepared(targets, TokenStats(*map(_instantiated, slopes)))
        sums = parameters.sums(trained, rest, hidden, targets)
        _, grads, d_hidden = head_gradients(
            trained, rest, hidden, prepared, Linear(), counted, logits_chunk, sums, normed=True
        )
        return parameters.lists(grads, trained), None, d_hidden, None, None

    stats.defvjp(forward, backward, symbolic_zeros=True)
    found = stats(parameters.arrays, parameters.rest_arrays, hidden, prepared["targets"], counted)
    return TokenStats(*(x[0] for x in found))


def _values(primals: Any) -> Any:
    """Of what `jax.custom_vjp` hands over, the arrays."""
    return jax.tree.map(lambda primal: primal.value, primals)


def _instantiated(slope: Any) -> Array:
    return jnp.zeros(slope.shape, slope.dtype) if isinstance(slope, SymbolicZero) else slope
