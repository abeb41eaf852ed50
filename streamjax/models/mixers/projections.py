"""The projections of an attention layer: queries, keys and values in, heads out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from streamjax.models.config import AttentionConfig
from streamjax.models.lora.adapters import Adapter, add_adapted
from streamjax.models.norms import Norm
from streamjax.models.parameters import kernel, product, zeros
from streamjax.models.quantisation import merge_axes


class Projections(nnx.Module):
    """Queries, keys and values from one fused product, and the product back to the residual stream.

    `qkv` is `[d_model, K, G + 2, D]`: for each key/value head its G query heads (each with its output gate behind it,
    where there are such), then its key, then its value (which is left out where values are keys), so that one product
    reads the input once and tensor parallelism splits over key/value heads. Adapters (`lora.py`) change members of it:
    all queries of a group, its key, or its value. `gain` scales the initial weights of `out`.
    """

    def __init__(self, config: AttentionConfig, d_model: int, key: Array, dtype: jnp.dtype, gain: float = 1.0):
        d, kv, group, width = d_model, config.num_kv_heads, config.group_size, config.head_dim
        members = config.members
        self.config = config
        key_in, key_out = jax.random.split(key)
        axes = ("embed", "kv_heads", "group", "head_dim")
        self.qkv = kernel(key_in, (d, kv, members, width), axes, d, dtype)
        self.qkv_bias = zeros((kv, members, width), axes[1:], dtype) if config.qkv_bias else None
        axes = ("kv_heads", "group", "head_dim", "embed")
        self.out = kernel(key_out, (kv, group, width, d), axes, config.num_heads * width, dtype, gain, (0, 1, 2))
        self.out_bias = zeros((d,), ("activation_embed",), dtype) if config.out_bias else None
        of_norm = "head_dim" if config.qk_norm_over == "head" else "heads"
        norms = [
            None if config.qk_norm is None else Norm(n, config.qk_norm, dtype, of_norm) for n in config.qk_norm_widths
        ]
        self.q_norm, self.k_norm = norms[0], norms[1] if config.keys_of is None else None
        self.v_norm = None if config.value_norm is None else Norm(width, config.value_norm, dtype, "head_dim")
        self.q_lora: Adapter | None = nnx.data(None)
        self.k_lora: Adapter | None = nnx.data(None)
        self.v_lora: Adapter | None = nnx.data(None)
        self.o_lora: Adapter | None = nnx.data(None)

    def split(
        self, x: Float[Array, "B T W"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Queries, keys and values, normalised and clipped as the config says, not rotated."""
        return self.split_gated(x)[:3]

    def split_gated(
        self, x: Float[Array, "B T W"]
    ) -> tuple[
        Float[Array, "B T H D"], Float[Array, "B T K D"], Float[Array, "B T K D"], Float[Array, "B T H D"] | None
    ]:
        """The same, and what gates the heads' outputs, before its sigmoid; None where nothing does."""
        x, handed = self._apart(x)
        qkv, before, gate = self._product(x, 0), self.config.query_members, None
        q, shape = qkv[..., :before, :], (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        if self.config.output_gate:
            q, gate = q[..., 0::2, :], q[..., 1::2, :].reshape(shape)
        q = self._normed(q.reshape(shape), self.q_norm)
        return q, *(handed if handed is not None else self._keys(qkv[..., before:, :])), gate

    def keys(self, x: Float[Array, "B T W"]) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        """Keys and values of `split`, without the work for the queries."""
        x, handed = self._apart(x)
        return handed if handed is not None else self._keys(self._product(x, self.config.query_members))

    def _apart(self, x: Float[Array, "B T W"]) -> tuple[Float[Array, "B T E"], tuple[Array, Array] | None]:
        """The layer's own input, and the keys and values [B, T, K, D] behind it of the layer whose keys it reads."""
        received = self.config.received
        if not received:
            return x, None
        k, v = rearrange(x[..., -received:], "b t (n k d) -> n b t k d", n=2, d=self.config.head_dim)
        return x[..., :-received], (k, v)

    def _product(self, x: Float[Array, "B T E"], first: int) -> Float[Array, "B T K g D"]:
        """The fused product, from member `first` of each group on."""
        qkv = product("bte,ekgd->btkgd", x, self.qkv[:, :, first:])
        key = self.config.query_members - first
        qkv = add_adapted(qkv, x, (self.q_lora, -first), (self.k_lora, key), (self.v_lora, key + 1))
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[:, first:].astype(x.dtype)
        return qkv if self.config.clip_qkv is None else jnp.clip(qkv, -self.config.clip_qkv, self.config.clip_qkv)

    def _keys(self, pair: Float[Array, "B T K m D"]) -> tuple[Float[Array, "B T K D"], Float[Array, "B T K D"]]:
        k, v = pair[..., 0, :], pair[..., -1, :]  # one of both where values are keys
        return self._normed(k, self.k_norm), v if self.v_norm is None else self.v_norm(v)

    def _normed(self, x: Float[Array, "B T N D"], norm: Norm | None) -> Float[Array, "B T N D"]:
        if norm is None or self.config.qk_norm_over == "head":
            return x if norm is None else norm(x)
        return norm(rearrange(x, "b t n d -> b t (n d)")).reshape(x.shape)

    def join(
        self, heads: Float[Array, "B T H D"], dtype: jnp.dtype, gate: Float[Array, "B T H D"] | None = None
    ) -> Float[Array, "B T E"]:
        """Project the heads' outputs, times the sigmoid of `gate`, back to `d_model` channels."""
        heads = heads if gate is None else heads * jax.nn.sigmoid(gate.astype(heads.dtype))
        # One matrix: contracted over its three head axes apart, XLA would transpose the weight at every call.
        x = rearrange(heads, "b t h d -> b t (h d)").astype(dtype)
        y = product("btf,fe->bte", x, merge_axes(self.out[...], 0, 3))
        y = y if self.o_lora is None else y + self.o_lora(x)
        y = y if self.out_bias is None else y + self.out_bias[...].astype(dtype)
        return y if self.config.out_scale == 1.0 else y * self.config.out_scale
