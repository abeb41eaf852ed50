"""Statistics of tokens' logits by the platform's kernels, which never write the logits, where there are such kernels.

They are taken for large vocabularies on TPUs, where the compiler's figures say that they win (docs/kernels.md). All
else is left to XLA, in pieces (`head/passes.py`): GPUs, an output with a bias, and meshes that split the tokens, unless
`jax.shard_map` took their axes by hand, as every backprop method does. Where the vocabulary is split each device calls
the kernel on its own part. Which it is, is logged once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int32

from pallas_kernels import api
from pallas_kernels.api import LogitStats, platforms
from streamjax.attention.sharded import Names, per_device_call
from streamjax.models.decoder import Decoder
from streamjax.parallel.rules import free_spec
from streamjax.training.objectives.objective import Batch, Objective, TokenStats

KERNEL_TOKENS = 256  # a kernel works in blocks; fewer tokens would be padding mostly
KERNEL_VOCABULARY = 8192  # logits of a smaller one are small


def applicable(ends: Decoder, hidden: Float[Array, "B C E"], targets: Int32[Array, "B C ..."]) -> bool:
    """Whether the platform's kernels do it: see the module. They read one target a token."""
    mesh, config = jax.sharding.get_abstract_mesh(), ends.config
    others = set(mesh.axis_names) - set(mesh.manual_axes) - set(_axes(ends))
    takes = (
        targets.ndim == 2
        and platforms.takes_tokens(hidden.shape[2], hidden.dtype.name)
        and ends.head_bias is None
        and config.vocab_size >= KERNEL_VOCABULARY
        and hidden.shape[0] * hidden.shape[1] >= KERNEL_TOKENS
        and all(mesh.shape[axis] == 1 for axis in others)
    )
    platforms.log_choice("statistics of logits", "pallas" if takes else "xla")
    return takes


def token_stats(ends: Decoder, hidden: Float[Array, "B C E"], targets: Int32[Array, "B C"]) -> TokenStats:
    """Statistics of tokens from hidden states behind the last norm; differentiable."""
    return _by_row(_stats(ends, hidden, targets), hidden)


def loss_and_gradients(
    ends: Decoder, hidden: Float[Array, "B C E"], prepared: Batch, objective: Objective, d_matrix: Array | None
) -> tuple[Float[Array, ""], Float[Array, "B C E"], Array | None]:
    """Loss of a chunk, float32 gradient of `hidden`, and `d_matrix` with that of the output matrix added, if any.

    hidden: behind the last norm. d_matrix: of the shape of the output matrix, of any float dtype.
    """
    stats = _stats(ends, hidden, prepared["targets"])
    loss, slopes = jax.value_and_grad(lambda stats: objective.loss(_by_row(stats, hidden), prepared))(stats)
    axes, matrix = _axes(ends), _matrix_names(ends)
    known = _settings(ends)

    def call(x: Array, w: Array, targets: Array, lse: Array, logit: Array, d_lse: Array, mean: Array, d_w: Any) -> Any:
        count, first = _share(w.shape[known["vocab_axis"]], axes)
        slopes = LogitStats(logit, d_lse, mean / count)
        d_x, d_w = api.token_stats_gradients(x, w, targets - first, lse, slopes, d_w, **known)
        return jax.lax.psum(d_x, axes) if axes else d_x, d_w

    reads = *_reads(ends, hidden, prepared["targets"]), stats.lse, *slopes, d_matrix
    names = _HIDDEN, matrix, *[_EACH] * 5, matrix
    d_x, d_matrix = per_device_call(call, names, (_HIDDEN, None if d_matrix is None else matrix), reads)
    return loss, _scaled(ends, d_x).reshape(hidden.shape), d_matrix


_HIDDEN: Names = (None, None)
_EACH: Names = (None,)


def _stats(ends: Decoder, hidden: Float[Array, "B C E"], targets: Int32[Array, "B C"]) -> LogitStats:
    axes, known = _axes(ends), _settings(ends)

    def call(x: Array, w: Array, targets: Array) -> tuple[Array, Array, Array]:
        _, first = _share(w.shape[known["vocab_axis"]], axes)
        logit, lse, mean = api.token_stats(x, w, targets - first, **known)
        if axes:
            logit, mean = jax.lax.psum(logit, axes), jax.lax.pmean(mean, axes)
            lse = jax.nn.logsumexp(jax.lax.all_gather(lse, axes), axis=0)
        return logit, lse, mean

    names = _HIDDEN, _matrix_names(ends), _EACH
    return LogitStats(*per_device_call(call, names, (_EACH, _EACH, _EACH), _reads(ends, hidden, targets)))


def _axes(ends: Decoder) -> tuple[str, ...]:
    """Mesh axes whose devices each have a part of the vocabulary."""
    mesh = jax.sharding.get_abstract_mesh()
    found = None if mesh.empty else free_spec(("vocab",), (ends.config.vocab_size,), mesh)[0]
    return (found,) if isinstance(found, str) else found or ()


def _share(size: int, axes: tuple[str, ...]) -> tuple[int, Array | int]:
    """How many parts the vocabulary has, each of `size` entries, and the first entry of this device's."""
    return (jax.lax.axis_size(axes), jax.lax.axis_index(axes) * size) if axes else (1, 0)


def _matrix_names(ends: Decoder) -> Names:
    return ("vocab", None) if ends.head is None else (None, "vocab")


def _reads(ends: Decoder, hidden: Float[Array, "B C E"], targets: Int32[Array, "B C"]) -> tuple[Array, Array, Array]:
    """Tokens one after another, scaled, the output matrix in their dtype, and targets."""
    matrix = ends.embedding if ends.head is None else ends.head
    return rearrange(_scaled(ends, hidden), "b c e -> (b c) e"), matrix[...].astype(hidden.dtype), targets.reshape(-1)


def _scaled(ends: Decoder, x: Array) -> Array:
    """Hidden states, or their gradient, times the scale of the logits."""
    scale = ends.config.logit_scale
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def _settings(ends: Decoder) -> dict[str, Any]:
    return {"vocab_axis": 0 if ends.head is None else 1, "softcap": ends.config.logit_softcap}


def _by_row(stats: LogitStats, hidden: Float[Array, "B C E"]) -> TokenStats:
    logit, lse, mean = (x.reshape(hidden.shape[:2]) for x in stats)
    return TokenStats(logit - lse, lse, mean)
