"""Adapters against weights with the change written into them, in every form that a model is computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import streamjax as sj
from streamjax.models import stack_layers, unstack_layers
from streamjax.models.lora.adapters import TARGETS
from streamjax.models.lora.attaching import ranks_of
from streamjax.parallel.mesh import make_mesh, shard_model, shardings
from tests.architectures import tiny_config
from tests.covering import rest_slow
from tests.parallel.small_models import MESHES
from tests.parallel.small_models import small_model as split_model
from tests.streaming.tiny_models import ALIBI, GQA, LOCAL, PARTIAL, build, random_tokens, read_stream

RANK, ALPHA = 3, 4.5
PLAIN = tuple(target for target in TARGETS if target != "gate")
CLIPPED = GQA.replace(family="mpt", num_kv_heads=4, clip_qkv=1.5, gated_mlp=False, norm="layer", activation="gelu")
CASES = {
    "gqa": (GQA, TARGETS),
    "local": (LOCAL, TARGETS),
    "alibi": (ALIBI, PLAIN),
    "partial": (PARTIAL, PLAIN),
    "clipped": (CLIPPED, PLAIN),
}
# Where the weights of a target are, and which of them: [layer] kernel -> its part, and the product of the factors.
PLACES = {
    "q": ("mixer.projections.qkv", lambda w: w[:, :, :-2], "er,rkgd->ekgd"),
    "k": ("mixer.projections.qkv", lambda w: w[:, :, -2:-1], "er,rkgd->ekgd"),
    "v": ("mixer.projections.qkv", lambda w: w[:, :, -1:], "er,rkgd->ekgd"),
    "o": ("mixer.projections.out", lambda w: w, "kgdr,re->kgde"),
    "gate": ("mlp.up", lambda w: w[:, :1], "er,rgf->egf"),
    "up": ("mlp.up", lambda w: w[:, -1:], "er,rgf->egf"),
    "down": ("mlp.down", lambda w: w, "fr,re->fe"),
}


def adapted(model, targets, seed=0):
    """`model` with adapters that change its outputs a lot."""
    random = np.random.default_rng(seed)
    model = sj.add_lora(model, RANK, ALPHA, targets, jax.random.key(seed))

    def draw(node):
        if not isinstance(node, sj.LoRAParam):
            return node
        return node.replace(jnp.asarray(random.normal(scale=0.4, size=node.shape), node.dtype))

    return jax.tree.map(draw, model, is_leaf=lambda node: isinstance(node, sj.LoRAParam))


def only(model, targets):
    """`model`, whose adapters on other targets do nothing."""

    def silence(path, leaf):
        name = jax.tree_util.keystr(path)
        return leaf if "_lora" not in name or any(f".{t}_lora" in name for t in targets) else jnp.zeros_like(leaf)

    return jax.tree_util.tree_map_with_path(silence, model)


def lookup(block, path):
    for name in path.split("."):
        block = getattr(block, name)
    return block


def written_into(base, model, targets):
    """`base`, one module a layer, with the adapters of `model` written into its weights by numpy."""
    base = jax.tree.map(np.array, base)
    for mine, theirs in zip(base.layers, model.layers, strict=True):
        for target in targets:
            path, part, product = PLACES[target]
            adapter = lookup(theirs, f"{path.rpartition('.')[0]}.{target}_lora")
            part(lookup(mine, path)[...])[...] += ALPHA / RANK * np.einsum(product, adapter.a[...], adapter.b[...])
    return jax.tree.map(jnp.asarray, base)


@pytest.mark.parametrize("case", rest_slow(CASES, "gqa"))
def test_new_adapters_change_nothing(case):
    config, targets = CASES[case]
    model, tokens = build(config), random_tokens(2, 9)
    with_adapters = sj.add_lora(model, RANK, ALPHA, targets, jax.random.key(0))
    np.testing.assert_array_equal(sj.forward(with_adapters, tokens), sj.forward(model, tokens))
    assert ranks_of(with_adapters) == {target: (RANK, ALPHA) for target in targets}
    assert not ranks_of(model)


@pytest.mark.usual("alibi", "gqa", "clipped")
@pytest.mark.quick
@pytest.mark.parametrize("case", CASES)
def test_forward_and_merge_against_written_weights(case):
    config, targets = CASES[case]
    base, tokens = build(config), random_tokens(2, 9)
    whole = adapted(base, targets)
    unchanged = sj.forward(base, tokens)
    for chosen in (targets, *((target,) for target in targets)):
        model = only(whole, chosen)
        expected = written_into(base, model, chosen)
        merged = sj.merge_lora(model)
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, expected)
        logits = sj.forward(model, tokens)
        np.testing.assert_allclose(logits, sj.forward(expected, tokens), atol=1e-4)
        assert np.abs(logits - unchanged).max() > 0.01


def test_adapters_on_some_targets():
    base, tokens = build(GQA), random_tokens(2, 9)
    for targets in (("q", "down"), ("v", "gate")):
        model = adapted(base, targets)
        np.testing.assert_allclose(
            sj.forward(model, tokens), sj.forward(written_into(base, model, targets), tokens), atol=1e-4
        )


def test_layers_whose_values_are_keys_have_no_adapter_of_values():
    """Gemma 4's global layers: there a target "v" has no weights of its own, and what "k" changes is both."""
    model = build(tiny_config("gemma4"))
    changed = adapted(model, ("q", "k", "v"))
    assert [block.mixer.projections.v_lora is None for block in changed.layers] == [False, True]
    tokens = random_tokens(2, 11) % model.config.vocab_size
    merged = sj.merge_lora(changed)
    np.testing.assert_allclose(sj.forward(merged, tokens), sj.forward(changed, tokens), atol=1e-4, rtol=0)
    assert np.abs(sj.forward(merged, tokens) - sj.forward(model, tokens)).max() > 0.01
    keys = merged.layers[1].mixer.projections.qkv[..., -1, :] - model.layers[1].mixer.projections.qkv[..., -1, :]
    assert np.abs(keys).max() > 0.01


@pytest.mark.parametrize("case", [pytest.param("gqa", marks=pytest.mark.slow), "local"])
def test_a_stream_equals_the_forward_pass(case):
    config, targets = CASES[case]
    model, tokens = adapted(build(config), targets), random_tokens(2, 12)
    _, logits = read_stream(model, sj.init_state(model, sj.kv.preset("dense", capacity=16), 2), tokens, [5, 1])
    np.testing.assert_allclose(logits, sj.forward(model, tokens), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(GQA.replace(num_layers=3), marks=pytest.mark.slow),
        LOCAL.replace(num_layers=5, windows=(5, None, 5, None, 5)),
    ],
)
def test_both_layouts_hold_the_same_adapters(config):
    single, tokens = adapted(build(config), TARGETS), random_tokens(2, 9)
    stacked = stack_layers(single)
    np.testing.assert_allclose(sj.forward(stacked, tokens), sj.forward(single, tokens), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), single)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(sj.merge_lora(stacked)), sj.merge_lora(single))
    key = jax.random.key(5)
    fresh = sj.add_lora(stack_layers(build(config)), RANK, ALPHA, ["v", "up"], key)
    jax.tree.map(
        np.testing.assert_array_equal, unstack_layers(fresh), sj.add_lora(build(config), RANK, ALPHA, ["up", "v"], key)
    )


def test_factors_are_drawn_as_the_paper_draws_them():
    """A normal, of a variance that keeps the size of its input; B zero; each layer and target on its own."""
    config = GQA.replace(d_model=64, mlp_dim=256)
    model = sj.add_lora(build(config), 32, 1.0, TARGETS, jax.random.key(0))
    found = {}
    for layer, block in enumerate(model.layers):
        for target in TARGETS:
            adapter = lookup(block, f"{PLACES[target][0].rpartition('.')[0]}.{target}_lora")
            a = np.asarray(adapter.a[...]).reshape(-1, 32)
            assert a.std() == pytest.approx(len(a) ** -0.5, rel=0.1)
            assert abs(a.mean()) < 0.1 * a.std()
            assert not np.any(adapter.b[...])
            found[layer, target] = a
    assert len({a[0, 0] for a in found.values()}) == len(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_are_float32_and_merge_in_the_dtype_of_the_weights(dtype):
    base = jax.tree.map(lambda x: x.astype(dtype), build(GQA))
    base.dtype = jnp.dtype(dtype)
    model, tokens = adapted(base, TARGETS), random_tokens(2, 9)
    adapters = [
        x for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, sj.LoRAParam)) if isinstance(x, sj.LoRAParam)
    ]
    assert {x.dtype for x in adapters} == {np.dtype("float32")}
    merged = sj.merge_lora(model)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(dtype)}
    apart = np.abs(sj.forward(model, tokens) - sj.forward(merged, tokens)).mean()
    assert apart < (1e-5 if dtype == "float32" else 0.1) * np.abs(sj.forward(merged, tokens)).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stacked"),
    [
        ("data2-fsdp2-tensor2", False),
        ("fsdp8", True),
        ("data2-tensor4", True),
    ],
)
def test_adapters_lie_on_the_mesh_of_their_model(name, stacked):
    """Made for a model that is split, split as their projection's axes are; the same numbers, and so is the merge."""
    base, tokens = split_model(stacked), np.asarray(random_tokens(8, 16))
    expected = adapted(base, TARGETS)
    mesh = make_mesh(**MESHES[name])
    with jax.set_mesh(mesh):
        fresh = sj.add_lora(shard_model(base, mesh), RANK, ALPHA, TARGETS, jax.random.key(0))
        model = shard_model(expected, mesh)
        logits, merged = sj.forward(model, tokens), sj.merge_lora(model)
    for tree in (fresh, merged):
        for array, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh)), strict=True):
            assert array.sharding.is_equivalent_to(sharding, array.ndim)
    block = (fresh.stack or fresh.layers)[0].mixer.projections
    for factor in (block.q_lora.a, block.o_lora.b) if "fsdp" in name else (block.v_lora.b, block.o_lora.a):
        assert factor[...].addressable_shards[0].data.size < factor[...].size
    np.testing.assert_allclose(logits, sj.forward(expected, tokens), atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, sj.merge_lora(expected))


def test_orbax_checkpoints_hold_adapters(tmp_path):
    single = adapted(build(GQA.replace(num_layers=3)), ["q", "down"])
    models = {False: single, True: stack_layers(single)}
    for stacked, model in models.items():
        sj.save(model, tmp_path / "model")
        found = sj.load(tmp_path / "model", dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, found, model)
        assert ranks_of(found) == ranks_of(model) == {"q": (RANK, ALPHA), "down": (RANK, ALPHA)}
        other = sj.load(tmp_path / "model", dtype="float32", scan_layers=not stacked)
        jax.tree.map(np.testing.assert_array_equal, other, models[not stacked])


def test_errors_say_what_to_do(tmp_path):
    model, plain, key = build(GQA), build(PARTIAL), jax.random.key(0)
    known = "q, k, v, o, gate, up, down"
    for message, model_, rank, alpha, targets in (
        (f"unknown LoRA target 'q_proj': choose from {known}", model, 4, 8, ["v", "q_proj"]),
        ("LoRA target 'gate': this model's MLP has none; choose from q, k, v, o, up, down", plain, 4, 8, ["gate"]),
        (f"no LoRA targets: choose from {known}", model, 4, 8, []),
        ("LoRA rank is 0: at least 1 is needed", model, 0, 8, ["q"]),
        ("LoRA alpha is -1: it must be positive", model, 4, -1, ["q"]),
        ("LoRA alpha is nan: it must be positive", model, 4, float("nan"), ["q"]),
    ):
        with pytest.raises(ValueError, match=message):
            sj.add_lora(model_, rank, alpha, targets, key)
    with_adapters = adapted(model, ["q"])
    has_them = "the model has LoRA adapters: merge_lora adds them to its weights, save_lora writes them alone"
    with pytest.raises(ValueError, match=has_them):
        sj.add_lora(with_adapters, 4, 8, ["k"], key)
    with pytest.raises(ValueError, match=has_them):
        sj.save_hf(with_adapters, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
