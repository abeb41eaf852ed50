"""Rollouts: a model's own answers to prompts, rewarded, as a batch for GRPO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int32

from streamjax.data.text.tokenizers import Tokenizer
from streamjax.field_checks import Count, Finite, Interval, Positive, Size, check_fields
from streamjax.kv.presets import parse_preset, preset
from streamjax.kv.presets.registry import Built
from streamjax.models.decoder import Decoder
from streamjax.parallel.multiprocess import gather_json, on_host
from streamjax.streaming.generate import generate
from streamjax.streaming.sampling import Sampler
from streamjax.streaming.state import init_state
from streamjax.training.objectives.grpo import group_advantages
from streamjax.training.post_training.rewards import Answer, Reward, find_reward, rewards_of


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How a run with GRPO gets answers, and what they are worth.

    Attributes:
      rewards: functions by name, see `find_reward`; an answer's reward is their weighted sum.
      reward_weights: one for each of them; 1 where there are none.
      group_size: answers to a prompt, which are compared with each other. A batch has `data.batch_size` answers.
      max_new_tokens: of an answer. A row has `data.seq_len` tokens, so a prompt may have `seq_len - max_new_tokens`.
      updates: steps on the same answers before new ones are written.
      temperature, top_k, top_p: how answers are sampled; see `Sampler`. The loss takes probabilities at temperature 1.
      cache: that answers are written with, by the name and options of a preset; a dense one where None.
      scaled: divide a group's advantages by their standard deviation; see `group_advantages`.
      samples: prompts of a rollout whose answers are written to samples.jsonl.
    """

    rewards: tuple[str, ...] = ("exact_match",)
    reward_weights: tuple[Finite, ...] = ()
    group_size: Annotated[int, Interval(2, 2**31 - 1)] = 8
    max_new_tokens: Size = 64
    updates: Size = 1
    temperature: Positive = 1.0
    top_k: Count = 0
    top_p: Annotated[float, Interval(0, 1, above=True)] = 1.0
    cache: str | None = None
    scaled: bool = True
    samples: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.rewards:
            raise ValueError("RolloutConfig.rewards is empty: name one, such as exact_match or module:function")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"RolloutConfig.reward_weights has {len(self.reward_weights)} weights for {len(self.rewards)} rewards"
            )
        self.built_cache(1)

    def built_cache(self, seq_len: int) -> Built:
        """The cache for streams of at most `seq_len` tokens."""
        if self.cache is None:
            return preset("dense", capacity=seq_len)
        name, options = parse_preset(self.cache)
        return preset(name, **options)

    @property
    def sampler(self) -> Sampler:
        return Sampler(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


class Rewarded(NamedTuple):
    """Answers with what they got: `each` is a value a function and answer, `total` their weighted sum."""

    answers: list[Answer]
    each: np.ndarray
    total: np.ndarray


class Rollouts:
    """Writes and rewards answers.

    Args:
      config: how.
      tokenizer: of the model.
      seq_len: T, tokens of a prompt and its answer.

    Raises:
      ValueError: an unknown reward, or one of a module that cannot be imported.
    """

    def __init__(self, config: RolloutConfig, tokenizer: Tokenizer, seq_len: int):
        self.config, self._tokenizer, self._seq_len = config, tokenizer, seq_len
        self._functions: list[Reward] = [find_reward(name) for name in config.rewards]
        self._weights = np.asarray(config.reward_weights or (1.0,) * len(config.rewards))
        self.cache = config.built_cache(seq_len)

    def answer(
        self,
        model: Decoder,
        prompts: Sequence[Int32[np.ndarray, " _"]],
        records: Sequence[Mapping[str, Any]],
        key: Array | None,
    ) -> Rewarded:
        """An answer to each prompt, sampled with the key, or the likeliest tokens without one.

        Of several processes the first one asks the rewards, and tells the others.
        """
        longest = self._seq_len - self.config.max_new_tokens
        rows = np.zeros((len(prompts), longest), np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            row[: len(prompt)] = prompt
        ends = tuple(dict.fromkeys((*model.config.eos_token_ids, *self._tokenizer.eos_ids)))
        _, tokens = generate(
            model,
            init_state(model, self.cache, len(prompts)),
            rows,
            prompt_lengths=[len(prompt) for prompt in prompts],
            max_new_tokens=self.config.max_new_tokens,
            sampler=Sampler(temperature=0) if key is None else self.config.sampler,
            key=key,
            stop_tokens=[token for token in ends if token < model.config.vocab_size],
        )
        answers = []
        for prompt, record, row in zip(prompts, records, on_host(tokens), strict=True):
            ids = [int(token) for token in row if token >= 0]
            text = self._tokenizer.decode(ids)
            asked = self._tokenizer.decode(prompt.tolist())
            answers.append(Answer(asked, text, ids, record, bool(ids) and ids[-1] in ends))
        each = np.zeros((len(self._functions), len(answers)))
        if jax.process_index() == 0:
            each = rewards_of(answers, self.config.rewards, self._functions)
        each = np.asarray(gather_json(each.tolist())[0])
        return Rewarded(answers, each, self._weights @ each)

    def batch(self, prompts: Sequence[Int32[np.ndarray, " _"]], rewarded: Rewarded) -> dict[str, np.ndarray]:
        """Rows of prompts and answers, with the answers' advantages: what GRPO reads, but for log-probabilities."""
        shape = len(prompts), self._seq_len
        tokens, targets, weights = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for i, (prompt, answer) in enumerate(zip(prompts, rewarded.answers, strict=True)):
            ids = np.concatenate([prompt, np.asarray(answer.tokens, np.int32)])
            count = len(ids) - 1
            tokens[i, :count], targets[i, :count] = ids[:-1], ids[1:]
            weights[i, len(prompt) - 1 : count] = 1.0
        total = np.asarray(rewarded.total, np.float32)
        advantages = np.asarray(group_advantages(total, self.config.group_size, scaled=self.config.scaled))
        return {"tokens": tokens, "targets": targets, "weights": weights, "advantages": advantages}

    def metrics(self, rewarded: Rewarded) -> dict[str, float]:
        """Means over the answers of a rollout."""
        total, answers = rewarded.total, rewarded.answers
        spread = np.std(total.reshape(-1, self.config.group_size), axis=1)
        several = len(self.config.rewards) > 1
        each = zip(self.config.rewards, rewarded.each, strict=True) if several else ()
        return {
            "reward": float(np.mean(total)),
            "reward_std": float(np.mean(spread)),
            **{f"reward/{name}": float(np.mean(values)) for name, values in each},
            "answer_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
            "answers_ended": float(np.mean([answer.ended for answer in answers])),
        }

    def samples(self, rewarded: Rewarded) -> list[dict[str, Any]]:
        """The answers of the first prompts, as they are written down."""
        count = min(self.config.samples * self.config.group_size, len(rewarded.answers))
        return [
            {
                "prompt": answer.prompt,
                "answer": answer.text,
                "reward": float(rewarded.total[i]),
                **{f"reward/{name}": float(rewarded.each[j, i]) for j, name in enumerate(self.config.rewards)},
                "ended": answer.ended,
            }
            for i, answer in enumerate(rewarded.answers[:count])
        ]


def divergence(logp: Array | np.ndarray, reference: Array | np.ndarray, weights: np.ndarray) -> float:
    """The mean over answers' tokens of exp(d) - d - 1, d = reference - logp: the estimate that GRPO penalises."""
    gap = np.where(weights > 0, np.asarray(reference, np.float64) - np.asarray(logp, np.float64), 0.0)
    return float(np.sum(np.where(weights > 0, np.expm1(gap) - gap, 0.0)) / max(float(np.sum(weights)), 1.0))
