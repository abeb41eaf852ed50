"""One gradient step in torch: gradient checkpointing by `transformers`, and StreamBP (2506.03077) written plainly.

The second is the published order on a Qwen2 of `transformers`: each layer's input is kept; a layer's keys and values
are computed once, for all tokens, and the rest of it chunk by chunk, each chunk's graph freed before the next is made;
of the logits those of one chunk exist. Autograd does everything inside a chunk.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from torch.nn import functional


def checkpointed(model: transformers.PreTrainedModel, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of [B, T] tokens, gradients in `.grad`: each layer's input is kept, and the logits of all tokens."""
    if not model.is_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    logits = model(tokens, use_cache=False).logits
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


class StreamBP:
    """Mean loss of [B, T] tokens, gradients in `.grad`, in chunks of `chunk` tokens, logits of `logits_chunk`."""

    def __init__(self, model: transformers.PreTrainedModel, chunk: int, logits_chunk: int):
        self.model, self.chunk, self.logits_chunk = model, chunk, logits_chunk
        self.head_dim = model.config.hidden_size // model.config.num_attention_heads

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        decoder = self.model.model
        with torch.no_grad():
            x = decoder.embed_tokens(tokens)
            rope = decoder.rotary_emb(x, torch.arange(tokens.shape[1])[None])
            inputs = []
            for layer in decoder.layers:
                inputs.append(x)
                x = self._rest(layer, x, *self._keys_and_values(layer, x, rope), rope, 0)
        loss, gradient = self._head(x, targets)
        for layer in reversed(decoder.layers):
            gradient = self._layer(layer, inputs.pop(), gradient, rope)
        decoder.embed_tokens(tokens).backward(gradient)
        return loss

    def _head(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = torch.zeros(()), torch.empty_like(x)
        for start in range(0, x.shape[1], self.logits_chunk):
            part = slice(start, start + self.logits_chunk)
            chunk = x[:, part].detach().requires_grad_()
            logits = self.model.lm_head(self.model.model.norm(chunk))
            share = functional.cross_entropy(logits.flatten(0, 1), targets[:, part].flatten(), reduction="sum")
            share = share / targets.numel()
            share.backward()
            loss, gradient[:, part] = loss + share.detach(), chunk.grad
        return loss, gradient

    def _layer(self, layer: torch.nn.Module, x: Tensor, gradient: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x.detach().requires_grad_()
        keys_values = self._keys_and_values(layer, x, rope)
        leaves = [y.detach().requires_grad_() for y in keys_values]
        result = torch.empty_like(x)
        for start in range(0, x.shape[1], self.chunk):
            part, seen = slice(start, start + self.chunk), min(start + self.chunk, x.shape[1])
            chunk = x[:, part].detach().requires_grad_()
            out = self._rest(layer, chunk, *(leaf[:, :, :seen] for leaf in leaves), rope, start)
            out.backward(gradient[:, part])
            result[:, part] = chunk.grad
        torch.autograd.backward(keys_values, [leaf.grad for leaf in leaves])
        return result.add_(x.grad)

    def _keys_and_values(self, layer: torch.nn.Module, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[B, K, T, D] each."""
        normed = layer.input_layernorm(x)
        keys = self._heads(layer.self_attn.k_proj(normed))
        return _rotate(keys, rope, 0), self._heads(layer.self_attn.v_proj(normed))

    def _rest(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        rope: tuple[Tensor, Tensor],
        start: int,
    ) -> Tensor:
        """A layer's output for the tokens from `start`, the last of those that have keys."""
        queries = _rotate(self._heads(layer.self_attn.q_proj(layer.input_layernorm(x))), rope, start)
        whole = start == 0  # then the causal mask is square, and torch needs no array of it
        mask = None if whole else torch.arange(start, keys.shape[2])[:, None] >= torch.arange(keys.shape[2])
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=whole, enable_gqa=True
        )
        x = x + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + layer.mlp(layer.post_attention_layernorm(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor], start: int) -> Tensor:
    cos, sin = (y[:, None, start : start + x.shape[2]] for y in rope)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
