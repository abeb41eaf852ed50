"""Training adapters: gradients against weights with the change written into them, and a base that stays as it is."""

import itertools
from functools import cache, partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import streamjax as sj
from streamjax.models import stack_layers
from streamjax.models.lora.adapters import TARGETS
from streamjax.parallel.mesh import build_sharded, make_mesh, shard_model, shardings
from streamjax.training import (
    OptimizerConfig,
    loss_and_grad,
    make_optimizer,
    make_train_step,
    new_state,
    shard_batch,
    streaming_loss_and_grad,
)
from streamjax.training.backprop.trainable_parameters import combine, partition
from tests.training.gradient_checks import CONFIG, assert_same, gradient, random_batch, random_model

METHODS = ("full", "remat", "layer", "chunk")
GATED = CONFIG.replace(num_layers=4, windows=(5, None, 5, None))
PLAIN = CONFIG.replace(
    num_kv_heads=4,
    norm="layer",
    norm_bias=True,
    parallel_residual=True,
    gated_mlp=False,
    qkv_bias=True,
    clip_qkv=1.0,
    activation="gelu",
    tie_embeddings=False,
)
CASES = {
    "gated": (GATED, TARGETS),
    "plain": (PLAIN, tuple(t for t in TARGETS if t != "gate")),
    "window": (CONFIG.replace(windows=(5, 5)), TARGETS),
}
SCALE = 1.75  # alpha / rank
CUT = {"layer": {"chunk_size": 4}, "chunk": {"chunk_size": 4}}


def adapted(base, targets):
    """`base` with adapters of rank 2 whose factors are drawn."""
    random = np.random.default_rng(1)
    model = sj.add_lora(base, 2, 2 * SCALE, targets, jax.random.key(0))

    def draw(node):
        if not isinstance(node, sj.LoRAParam):
            return node
        return node.replace(jnp.asarray(0.3 * random.standard_normal(node.shape), node.dtype))

    return jax.tree.map(draw, model, is_leaf=lambda node: isinstance(node, sj.LoRAParam))


def written(model, base):
    """`base`, one module a layer, with the changes of `model`'s adapters written into its weights."""
    leaves, structure = jax.tree.flatten(base)
    copy = jax.tree.unflatten(structure, leaves)
    for mine, theirs in zip(copy.layers, model.layers, strict=True):
        to, of = mine.mixer.projections, theirs.mixer.projections
        parts = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}
        qkv = to.qkv[...]
        for target, members in parts.items():
            adapter = getattr(of, f"{target}_lora")
            change = jnp.einsum("er,rkgd->ekgd", adapter.a[...], adapter.b[...])
            qkv = qkv.at[:, :, members].add(SCALE * change)
        to.qkv = nnx.Param(qkv)
        to.out = nnx.Param(to.out[...] + SCALE * jnp.einsum("kgdr,re->kgde", of.o_lora.a[...], of.o_lora.b[...]))
        to, of = mine.mlp, theirs.mlp
        changes = [jnp.einsum("er,rgf->egf", x.a[...], x.b[...]) for x in (of.gate_lora, of.up_lora) if x is not None]
        to.up = nnx.Param(to.up[...] + SCALE * jnp.concatenate(changes, axis=1))
        to.down = nnx.Param(to.down[...] + SCALE * jnp.einsum("fr,re->fe", of.down_lora.a[...], of.down_lora.b[...]))
    return copy


@cache
def expected(case):
    """A model with adapters, a batch, and the loss and gradient by `jax.grad` through written weights."""
    config, targets = CASES[case]
    with jax.enable_x64(True):
        base = random_model(config)
        model, batch = adapted(base, targets), random_batch(config.vocab_size, 2, 11)
        batch["weights"] = batch["weights"].astype(np.float64)  # their sum counts, too
        adapters, rest = partition(model, sj.LoRAParam)

        def loss(adapters):
            return mean_nll(written(combine(adapters, rest), base), batch)

        return model, batch, jax.jit(jax.value_and_grad(loss))(adapters)


def mean_nll(model, batch):
    """The weighted mean of the negative log-likelihood."""
    logits = model.logits(model.hidden(jnp.asarray(batch["tokens"])))
    counted = batch["targets"] >= 0
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, batch["targets"], 0))
    weights = jnp.where(counted, batch["weights"], 0.0)
    return jnp.sum(nll * weights) / jnp.sum(weights)


def pairs(*axes):
    """Combinations of values; every other one is slow. Of three axes the rest has every pair of values."""
    return [
        pytest.param(
            *(value for _, value in each), marks=pytest.mark.slow if sum(place for place, _ in each) % 2 else ()
        )
        for each in itertools.product(*map(enumerate, axes))
    ]


@pytest.mark.usual("plain-layer-True", "window-chunk-True")
@pytest.mark.parametrize(("case", "method", "stacked"), pairs(tuple(CASES), METHODS, (False, True)))
def test_gradients_of_all_targets(case, method, stacked):
    model, batch, (loss, grads) = expected(case)
    with jax.enable_x64(True):
        model, grads = (stack_layers(model), stack_layers(grads)) if stacked else (model, grads)
        found = gradient(model, batch, method, trainable=sj.LoRAParam, **CUT.get(method, {}))
        assert_same(found, (loss, grads))
    assert len(jax.tree.leaves(found[1])) == 2 * len(CASES[case][1]) * (len(model.stack) + len(model.layers))


def products(jaxpr, found=None):
    """Shapes of all that matrix products make, sizes sorted, loops and branches included."""
    found = set() if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.add(tuple(sorted(size for size in equation.outvars[0].aval.shape if size > 1)))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            products(inner, found)
    return found


@pytest.mark.usual("layer-False", "chunk-True")  # the others leave it to JAX
@pytest.mark.parametrize(("method", "stacked"), pairs(METHODS, (False, True)))
def test_frozen_weights_cost_no_gradient(method, stacked):
    """No product of the program makes an array of a weight's shape, as there is one for each in full training."""
    config = CONFIG.replace(vocab_size=37, d_model=44, num_kv_heads=1, num_heads=3, head_dim=14, mlp_dim=52)
    model = jax.eval_shape(
        lambda key: stack_layers(sj.Decoder(config, key)) if stacked else sj.Decoder(config, key), jax.random.key(0)
    )
    model = jax.eval_shape(lambda model: sj.add_lora(model, 2, 4.0, TARGETS, jax.random.key(0)), model)
    batch = {name: jnp.asarray(x) for name, x in random_batch(37, 3, 10).items()}
    weights = {(5, 14, 44), (42, 44), (2, 44, 52), (44, 52)}  # qkv, out, up and gate, down

    def made(trainable):
        compute = partial(loss_and_grad, method=method, trainable=trainable, **CUT.get(method, {}))
        return products(jax.make_jaxpr(compute)(model, batch).jaxpr)

    assert weights <= made(nnx.Param)
    adapters = made(sj.LoRAParam)
    assert not weights & adapters
    assert {(2, 44), (2, 52), (2, 3, 14), (2, 2, 52)} & adapters  # those of adapters are there


@pytest.mark.slow
def test_floating_point_operations():
    """Two thirds of full training's: forward and back to the input, but not to the weights."""
    config = CONFIG.replace(d_model=64, head_dim=16, mlp_dim=192, vocab_size=300)
    base = sj.Decoder(config, jax.random.key(0))
    model, batch = sj.add_lora(base, 2, 4.0, TARGETS, jax.random.key(0)), random_batch(300, 2, 64)

    def flops(model, trainable):
        lowered = jax.jit(partial(loss_and_grad, trainable=trainable)).lower(model, batch)
        return lowered.compile().cost_analysis()["flops"]

    assert 0.6 < flops(model, sj.LoRAParam) / flops(base, nnx.Param) < 0.76


OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=0), 10)
SMALL = CONFIG.replace(num_layers=3, vocab_size=48, num_kv_heads=2, d_model=32, head_dim=8, mlp_dim=40)


def start(model):
    return new_state(model, OPTIMIZER, trainable=sj.LoRAParam)


def without_adapters(tree):
    return partition(tree, sj.LoRAParam)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "accumulation"),
    [("full", 2), pytest.param("layer", 1, marks=pytest.mark.slow), pytest.param("chunk", 2, marks=pytest.mark.slow)],
)
def test_training_changes_adapters_alone(method, accumulation):
    base, batch = sj.Decoder(SMALL, jax.random.key(0)), random_batch(48, 4, 9)
    model = sj.add_lora(base, 4, 8.0, ("q", "v", "down"), jax.random.key(1))
    before = jax.tree.map(np.array, model)
    state = start(model)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(
        x.size for x in jax.tree.leaves(partition(model, sj.LoRAParam)[0])
    )
    step = make_train_step(
        OPTIMIZER, accumulation=accumulation, method=method, trainable=sj.LoRAParam, **CUT.get(method, {})
    )
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, without_adapters(state.model), without_adapters(before))
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(state.model), jax.tree.leaves(before), strict=True):
        assert np.array_equal(new, old) != ("_lora" in jax.tree_util.keystr(path))


@pytest.mark.slow
def test_streams_train_adapters_alone():
    base = sj.Decoder(SMALL.replace(num_layers=1), jax.random.key(0))
    model = adapted(base, TARGETS)
    frozen = jax.tree.map(np.array, without_adapters(model))
    stream = sj.init_state(model, sj.kv.preset("streaming_llm", sinks=2, window=9), 2)
    batch = random_batch(48, 2, 12)
    loss, grads, after = streaming_loss_and_grad(model, stream, batch, chunk_size=5, trainable=sj.LoRAParam)
    expected_loss, whole, _ = streaming_loss_and_grad(model, stream, batch, chunk_size=5)
    assert float(loss) == float(expected_loss)
    assert jax.tree.structure(grads) == jax.tree.structure(partition(model, sj.LoRAParam)[0])
    chosen = partition(whole, sj.LoRAParam)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, chosen)
    step = make_train_step(OPTIMIZER, trainable=sj.LoRAParam, chunk_size=5)
    state, _ = step(new_state(model, OPTIMIZER, after, trainable=sj.LoRAParam), batch)
    jax.tree.map(np.testing.assert_array_equal, without_adapters(state.model), frozen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["layer", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "layer")]
)
def test_eight_devices_do_what_one_does(method):
    """Data, fsdp and tensor parallel, layers stacked; adapters and their moments split as their projections are."""
    batch = random_batch(48, 8, 12)
    options = {"method": method, "trainable": sj.LoRAParam, **CUT.get(method, {})}
    model = adapted(stack_layers(sj.Decoder(SMALL, jax.random.key(0))), TARGETS)
    loss, grads = loss_and_grad(model, batch, **options)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        state = build_sharded(start, mesh, shard_model(model, mesh))
        split = shard_batch(batch, mesh)
        found_loss, found = loss_and_grad(state.model, split, **options)
        placed = jax.tree.leaves(shardings(state, mesh))
        assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), placed, strict=True))
    assert float(found_loss) == pytest.approx(float(loss), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.max(np.abs(b))), found, grads)
    moment = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, sj.LoRAParam))
    sizes = {x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(moment) if x.ndim}
    assert sizes == {0.5}  # fsdp or tensor splits one axis of each factor
