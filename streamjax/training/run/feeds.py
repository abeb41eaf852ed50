"""What a run's steps train on, and how it is evaluated: text, pairs of answers, or answers that the model writes."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from streamjax.data import Tokenizer, default_data_dir, make_eval_batches, make_train_iterator
from streamjax.data.conversations.prepared import PreparedExamples, prepare_examples
from streamjax.data.pipeline import evaluate_on_examples, train_on_examples
from streamjax.models.decoder import Decoder
from streamjax.models.files.checkpoint import load
from streamjax.parallel.mesh import build_sharded, row_share
from streamjax.parallel.multiprocess import on_host
from streamjax.training.backprop.embedding_and_head import default_logits_chunk
from streamjax.training.backprop.log_probs import token_log_probs
from streamjax.training.backprop.loss_and_grad import whole_loss
from streamjax.training.distillation.alignment import alignment_loss
from streamjax.training.distillation.teacher import examples, predictions
from streamjax.training.objectives.distillation import Distillation
from streamjax.training.objectives.dpo import DPO
from streamjax.training.objectives.grpo import GRPO
from streamjax.training.objectives.objective import TokenStats
from streamjax.training.post_training.reference import (
    answer_log_probs,
    base_model,
    reference_key,
    stored_log_probs,
)
from streamjax.training.post_training.rollouts import Rollouts, divergence
from streamjax.training.run.config import TrainConfig
from streamjax.training.run.evaluation import evaluate
from streamjax.training.run.initial_state import new_stream
from streamjax.training.run.metrics import SampleWriter
from streamjax.training.run.state import shard_batch

_log = logging.getLogger(__name__)
Batch = Mapping[str, Any]
Found = dict[str, float]


@runtime_checkable
class Feed(Protocol):
    """Batches on the devices, and the measure of a model."""

    def next(self, model: Decoder, step: int) -> tuple[Batch, Found]:
        """The batch of a step, and what was measured while it was made. Raises StopIteration where the data ends."""
        ...

    def evaluate(self, model: Decoder) -> Found:
        """The model on held-out data."""
        ...

    def get_state(self) -> Any:
        """The place behind the last batch, as JSON can hold it."""
        ...

    def set_state(self, state: Any) -> None: ...

    def skip(self, steps: int) -> None:
        """Read so many batches, from the first on, and leave them out."""
        ...


def make_feed(config: TrainConfig, tokenizer: Tokenizer, model: Decoder, mesh: Mesh | None, workdir: Path) -> Feed:
    """The feed of a run that starts from `model`; `make_feed` is called before a checkpoint is restored.

    Raises:
      ValueError: data that cannot be read, or a reward that is not there.
    """
    share = row_share(mesh)
    shard = grain.sharding.ShardOptions(share.part, share.parts) if share.parts > 1 else None
    if isinstance(config.objective, DPO):
        return PairFeed(config, config.objective, tokenizer, model, mesh, shard)
    if isinstance(config.objective, GRPO):
        return RolloutFeed(config, config.objective, tokenizer, model, mesh, workdir)
    if isinstance(config.objective, Distillation):
        return TeacherFeed(config, config.objective, tokenizer, model, mesh, shard)
    return TextFeed(config, tokenizer, mesh, shard)


def _skip(batches: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(batches, count):
        pass


class TextFeed:
    """Documents and conversations, for cross-entropy."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh | None, shard: Any):
        self._config, self._tokenizer, self._mesh = config, tokenizer, mesh
        self._batches = make_train_iterator(config.data, shard=shard)
        self._held_out = make_eval_batches(config.data, config.eval_batches, shard=shard)

    def next(self, model: Decoder, step: int) -> tuple[Batch, Found]:
        return shard_batch(next(self._batches), self._mesh), {}

    def evaluate(self, model: Decoder) -> Found:
        stream = build_sharded(lambda model: new_stream(self._config, model), self._mesh, model)
        chunk_size = self._config.backprop.chunk_size
        return evaluate(model, self._held_out, self._tokenizer, self._mesh, stream=stream, chunk_size=chunk_size)

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)

    def skip(self, steps: int) -> None:
        _skip(self._batches, steps)


class TeacherFeed(TextFeed):
    """Documents and conversations with what a teacher makes of them, for distillation."""

    def __init__(
        self, config: TrainConfig, objective: Distillation, tokenizer: Tokenizer, model: Decoder, mesh: Mesh | None,
        shard: Any,
    ):  # fmt: skip
        super().__init__(config, tokenizer, mesh, shard)
        self._objective, self._layers = objective, config.distill.layers
        name = config.distill.teacher
        assert name is not None
        self._teacher = load(name, jnp.dtype(config.dtype), mesh)
        ours, theirs = model.config, self._teacher.config
        for field in ("vocab_size", "d_model", "num_layers") if objective.matches == "layers" else ("vocab_size",):
            if getattr(ours, field) != getattr(theirs, field):
                raise ValueError(
                    f"config.distill.teacher={name} has {field} {getattr(theirs, field)}, and the student "
                    f"{getattr(ours, field)}: they must be the same"
                )
        if objective.top_k > theirs.vocab_size:
            raise ValueError(f"config.objective.top_k is {objective.top_k}: the vocabulary has {theirs.vocab_size} ids")

    def next(self, model: Decoder, step: int) -> tuple[Batch, Found]:
        batch, found = super().next(model, step)
        return self._taught(batch), found

    def evaluate(self, model: Decoder) -> Found:
        """The text's loss, and how far the student is from its teacher: what is minimised."""
        found, losses, counts = super().evaluate(model), [], []
        for host in self._held_out:
            batch = self._taught(shard_batch(host, self._mesh))
            losses.append(float(_distance(model, batch, self._objective, self._layers)))
            counts.append(float(np.sum(host["weights"])))
        return found | {"eval_distance": float(np.average(losses, weights=counts))}

    def _taught(self, batch: Batch) -> Batch:
        if self._objective.matches == "layers":
            inputs, outputs = examples(self._teacher, batch, self._layers)
            return {**batch, "layer_inputs": inputs, "layer_outputs": outputs}
        ids, logp = predictions(self._teacher, batch, self._objective.top_k)
        return {**batch, "teacher_ids": ids, "teacher_logp": logp}


@partial(jax.jit, static_argnames=("objective", "layers"))
def _distance(model: Decoder, batch: Batch, objective: Distillation, layers: tuple[int, ...]) -> Array:
    """The objective's loss of a batch."""
    if objective.matches == "layers":
        return alignment_loss(model, batch, layers)
    chunk = default_logits_chunk(model, batch["tokens"].shape[0])
    return whole_loss(model, batch, objective.prepare(batch), objective, chunk)


class PairFeed:
    """Pairs of answers with their log-probabilities under the reference, for DPO."""

    def __init__(
        self, config: TrainConfig, objective: DPO, tokenizer: Tokenizer, model: Decoder, mesh: Mesh | None, shard: Any
    ):
        self._config, self._objective, self._mesh, self._shard = config, objective, mesh, shard
        self._chunk = config.backprop.chunk_size
        train = prepare_examples(config.data, "train", tokenizer=tokenizer)
        held_out = prepare_examples(config.data, "validation", tokenizer=tokenizer)
        self._batches = train_on_examples(config.data, train, config.data.batch_size, shard=shard)
        self._held_out = evaluate_on_examples(config.data, held_out, config.eval_batches, shard=shard)
        self._train_logp = self._held_out_logp = None
        if config.reference == "stored":
            self._train_logp = self._stored(model, train)
            self._held_out_logp = self._stored(model, held_out)

    def next(self, model: Decoder, step: int) -> tuple[Batch, Found]:
        return self._with_reference(model, next(self._batches), self._train_logp), {}

    def evaluate(self, model: Decoder) -> Found:
        """The loss, and by how much, in units of 1 / beta, answers are likelier than under the reference."""
        rewards, losses = [], []
        for host in self._held_out:
            batch = self._with_reference(model, host, self._held_out_logp)
            loss, gained, counted = _compare(model, batch, self._objective, self._chunk)
            counts = on_host(counted).reshape(-1, 2).all(axis=1)
            rewards.append(on_host(gained).reshape(-1, 2)[counts])
            losses.append((float(loss), int(counts.sum())))
        chosen, rejected = np.concatenate(rewards).T
        return {
            "eval_loss": sum(loss * count for loss, count in losses) / sum(count for _, count in losses),
            "eval_margin": float(np.mean(chosen - rejected)),
            "eval_accuracy": float(np.mean(chosen > rejected)),
            "eval_chosen_reward": float(np.mean(chosen)),
            "eval_rejected_reward": float(np.mean(rejected)),
        }

    def get_state(self) -> Any:
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state)

    def skip(self, steps: int) -> None:
        _skip(self._batches, steps)

    def _with_reference(self, model: Decoder, host: Batch, stored: np.ndarray | None) -> Batch:
        numbers = host["example"]
        batch = {name: x for name, x in host.items() if name != "example"}
        if stored is not None:
            return shard_batch({**batch, "reference_logp": stored[numbers].reshape(-1)}, self._mesh)
        batch = shard_batch(batch, self._mesh)
        return {**batch, "reference_logp": answer_log_probs(base_model(model), batch, self._chunk)}

    def _stored(self, model: Decoder, examples: PreparedExamples) -> np.ndarray:
        """Computed batch by batch, at the first run of this model and these pairs."""
        config = self._config
        about = {
            "pairs": examples.sha256(),
            "seq_len": config.data.seq_len,
            "dtype": config.dtype,
            "weights": config.weights,
            "model": None if config.model is None else (config.to_json_dict()["model"], config.seed),
        }
        in_order = dataclasses.replace(config.data, shuffle_seed=None, num_workers=0, epochs=1)

        def compute() -> np.ndarray:
            _log.info("computing reference log-probabilities of %d pairs", len(examples))
            batches = evaluate_on_examples(in_order, examples, len(examples), shard=self._shard)
            found = []
            for host in batches:
                batch = {name: x for name, x in host.items() if name != "example"}
                found.append(on_host(answer_log_probs(model, shard_batch(batch, self._mesh), self._chunk)))
            return np.concatenate(found).reshape(-1, 2)[: len(examples)].astype(np.float32)

        folder = default_data_dir() / "reference_logp"
        return stored_log_probs(reference_key(config.init_from, about), len(examples), folder, compute)


@partial(jax.jit, static_argnames=("objective", "chunk_size"))
def _compare(model: Decoder, batch: Batch, objective: DPO, chunk_size: int | None) -> tuple[Array, Array, Array]:
    """The loss of pairs, how much each row gained on the reference in units of 1 / beta, and which rows count."""
    logp = token_log_probs(model, batch, chunk_size=chunk_size)
    gained = jnp.sum(batch["weights"] * logp, axis=1) - batch["reference_logp"]
    loss = objective.loss(TokenStats(logp, logp, logp), objective.prepare(batch))
    return loss, objective.beta * gained, jnp.any(batch["weights"] > 0, axis=1)


class RolloutFeed:
    """Prompts that the model answers, for GRPO; its answers serve `updates` steps.

    Of several processes each has all prompts and answers, which all of their devices write together.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: GRPO,
        tokenizer: Tokenizer,
        model: Decoder,
        mesh: Mesh | None,
        workdir: Path,
    ):
        self._config, self._objective, self._mesh = config, objective, mesh
        self._settings = config.rollouts
        self._rollouts = Rollouts(config.rollouts, tokenizer, config.data.seq_len)
        room = config.rollouts.max_new_tokens
        self._prompts = prepare_examples(config.data, "train", room=room, tokenizer=tokenizer)
        self._held_out = prepare_examples(config.data, "validation", room=room, tokenizer=tokenizer)
        count = config.data.batch_size // config.rollouts.group_size
        self._batches = train_on_examples(config.data, self._prompts, count)
        self._reference = None
        if objective.kl and not config.lora.rank:  # adapters leave the weights that the run began with
            self._reference = jax.tree.map(jnp.copy, model)
        self._samples = SampleWriter(workdir)
        self._left = 0
        self._batch: dict[str, np.ndarray] = {}
        self._found: Found = {}

    def next(self, model: Decoder, step: int) -> tuple[Batch, Found]:
        if not self._left:
            self._batch, self._found = self._write(model, step)
            self._left = self._settings.updates
        self._left -= 1
        return self._placed(self._batch), self._found

    def evaluate(self, model: Decoder) -> Found:
        """The reward of the likeliest answers to held-out prompts."""
        size, most = self._config.data.batch_size, self._config.data.batch_size * self._config.eval_batches
        totals: list[float] = []
        numbers = list(range(min(len(self._held_out), most)))
        for first in range(0, len(numbers), size):
            some = numbers[first : first + size]
            filled = [*some, *[some[-1]] * (size - len(some))]
            rewarded = self._answer(model, self._held_out, filled, None)
            totals += rewarded.total[: len(some)].tolist()
        return {"eval_reward": float(np.mean(totals))}

    def get_state(self) -> Any:
        """The place among the prompts, and answers that more steps are to learn from."""
        state = {"prompts": self._batches.get_state(), "left": self._left}
        if self._left:
            stream = io.BytesIO()
            np.savez(stream, allow_pickle=False, **self._batch)
            state |= {"batch": base64.b64encode(stream.getvalue()).decode(), "found": self._found}
        return state

    def set_state(self, state: Any) -> None:
        self._batches.set_state(state["prompts"])
        self._left = state["left"]
        if self._left:
            with np.load(io.BytesIO(base64.b64decode(state["batch"]))) as arrays:
                self._batch = dict(arrays)
            self._found = state["found"]

    def skip(self, steps: int) -> None:
        _skip(self._batches, -(-steps // self._settings.updates))

    def _write(self, model: Decoder, step: int) -> tuple[dict[str, np.ndarray], Found]:
        """New answers, their rewards and log-probabilities."""
        numbers = np.repeat(next(self._batches)["example"], self._settings.group_size).tolist()
        key = jax.random.fold_in(jax.random.key(self._config.seed), step)
        rewarded = self._answer(model, self._prompts, numbers, key)
        batch = self._rollouts.batch(self._ids(self._prompts, numbers), rewarded)
        found = self._rollouts.metrics(rewarded)
        if jax.process_index() == 0:
            self._samples.write(step, self._rollouts.samples(rewarded))
        placed = self._placed(batch)
        chunk_size = self._config.backprop.chunk_size
        several, penalised = self._settings.updates > 1, self._objective.kl > 0
        logp = token_log_probs(model, placed, chunk_size=chunk_size) if several or penalised else None
        if several:
            batch["old_logp"] = on_host(logp)
        if penalised:
            reference = base_model(model) if self._reference is None else self._reference
            batch["reference_logp"] = on_host(token_log_probs(reference, placed, chunk_size=chunk_size))
            assert logp is not None
            found["kl"] = divergence(on_host(logp), batch["reference_logp"], batch["weights"])
        return batch, found

    def _placed(self, batch: dict[str, np.ndarray]) -> Batch:
        """All rows of a batch on the devices; each of several processes has all of them, and passes its own."""
        index, count = row_share(self._mesh)
        size = self._config.data.batch_size // count
        return shard_batch({name: x[index * size : (index + 1) * size] for name, x in batch.items()}, self._mesh)

    def _answer(self, model: Decoder, examples: PreparedExamples, numbers: list[int], key: Any) -> Any:
        records = [examples.values[number] for number in numbers]
        return self._rollouts.answer(model, self._ids(examples, numbers), records, key)

    def _ids(self, examples: PreparedExamples, numbers: list[int]) -> list[np.ndarray]:
        return [examples.texts[number][0].ids for number in numbers]
