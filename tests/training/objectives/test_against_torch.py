"""Losses of SFT, DPO and GRPO and the norms of their gradients, against torch on transformers' model."""

import jax
import numpy as np
import optax
import pytest

import streamjax as sj
from streamjax.data import DataConfig, load_tokenizer
from streamjax.data.conversations.prepared import prepare_examples
from streamjax.data.pipeline import evaluate_on_examples
from streamjax.training import DPO, GRPO, CrossEntropy, group_advantages, loss_and_grad, token_log_probs
from tests.training.conftest import CONFIG

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ROWS = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Ours, its peer in float64, and a second pair of them: the reference."""
    found = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("models") / str(seed)
        ours = jax.jit(lambda key: sj.Decoder(CONFIG.replace(vocab_size=259), key))(jax.random.key(seed))
        sj.save_hf(ours, folder)
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        found.append((ours, peer))
    return found


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """What the data pipeline makes of a file: rows of conversations, and of pairs."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "talks.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes"}]}\n'
        '{"prompt": "one ", "completion": "two and more"}\n{"prompt": "a", "completion": "b"}\n' * 3
    )
    (folder / "pairs.jsonl").write_text('{"prompt": "one ", "chosen": "two", "rejected": "of a kind"}\n' * 9)
    found = {}
    for name, kind in (("talks", "conversations"), ("pairs", "preferences")):
        file = str(folder / f"{name}.jsonl")
        config = DataConfig(source=file, format=kind, packing="rows", seq_len=32, batch_size=ROWS)
        examples = prepare_examples(config, "train", tokenizer=load_tokenizer())
        batch = next(iter(evaluate_on_examples(config, examples, 1)))
        found[name] = {key: x for key, x in batch.items() if key != "example"}
    return found


def peer_log_probs(peer, batch):
    """[B, T] in float64, by the logits of whole rows."""
    logits = peer(torch.tensor(np.asarray(batch["tokens"], np.int64))).logits
    targets = torch.tensor(np.asarray(batch["targets"], np.int64))
    return torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]


def grad_norm(peer, loss):
    peer.zero_grad()
    loss.backward()
    return float(torch.sqrt(sum(torch.sum(p.grad**2) for p in peer.parameters() if p.grad is not None)))


def compare(model, peer, batch, objective, loss):
    """Ours against torch's: the loss, and the norm of the gradient."""
    found, grads = loss_and_grad(model, batch, objective=objective)
    assert float(found) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(optax.tree.norm(grads)) == pytest.approx(grad_norm(peer, loss), rel=1e-4)


def test_sft(models, batches):
    [(model, peer), _] = models
    batch = batches["talks"]
    weights = torch.tensor(batch["weights"]).double()
    loss = -(peer_log_probs(peer, batch) * weights).sum() / weights.sum()
    compare(model, peer, batch, CrossEntropy(), loss)


def test_dpo(models, batches):
    (model, peer), (reference, peer_reference) = models
    batch = dict(batches["pairs"])
    batch["reference_logp"] = np.sum(batch["weights"] * np.asarray(token_log_probs(reference, batch)), axis=1)
    weights = torch.tensor(batch["weights"]).double()
    with torch.no_grad():
        before = (peer_log_probs(peer_reference, batch) * weights).sum(1)
    gained = (peer_log_probs(peer, batch) * weights).sum(1) - before
    loss = -torch.nn.functional.logsigmoid(0.3 * (gained[0::2] - gained[1::2])).mean()
    compare(model, peer, batch, DPO(beta=0.3), loss)


@pytest.mark.usual("token")
@pytest.mark.parametrize("normalisation", ["sequence", "token"])
def test_grpo(models, batches, normalisation):
    (model, peer), (reference, peer_reference) = models
    batch = dict(batches["talks"])
    rng = np.random.default_rng(0)
    old = np.asarray(token_log_probs(model, batch)) + rng.normal(0, 0.3, batch["weights"].shape).astype(np.float32)
    batch["old_logp"], batch["reference_logp"] = old, np.asarray(token_log_probs(reference, batch))
    batch["advantages"] = np.asarray(group_advantages(np.array([1.0, 0.0, 0.5, 2.0], np.float32), 2))
    weights, before = torch.tensor(batch["weights"]).double(), torch.tensor(old).double()
    logp = peer_log_probs(peer, batch)
    with torch.no_grad():
        gap_to = peer_log_probs(peer_reference, batch)
    ratio, advantages = torch.exp(logp - before), torch.tensor(batch["advantages"]).double()[:, None]
    clipped = torch.clamp(ratio, 0.8, 1.2)
    gap = gap_to - logp
    each = -torch.minimum(ratio * advantages, clipped * advantages) + 0.05 * (torch.exp(gap) - gap - 1)
    if normalisation == "sequence":
        loss = ((each * weights).sum(1) / weights.sum(1)).mean()
    else:
        loss = (each * weights).sum() / weights.sum()
    compare(model, peer, batch, GRPO(kl=0.05, normalisation=normalisation), loss)
