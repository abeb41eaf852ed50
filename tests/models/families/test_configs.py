"""config.json: published files read as transformers reads them, every field is honoured or refused, and writing."""

import itertools
import json
import warnings

import pytest
import torch
import transformers as hf

from streamjax.models import RopeConfig, UniformConfig
from streamjax.models.families import FAMILIES, find_family, gemma, read_config, write_config
from streamjax.models.families.config_fields import HARMLESS, Fields
from tests.covering import rest_slow
from tests.models.families.published_configs import GEMMA_3_4B, PUBLISHED


def parse(values):
    """transformers' own reading of a config.json."""
    renamed = json.dumps(values).replace('"type": "su"', '"type": "longrope"')  # the old name fails in 5.23
    return hf.AutoConfig.for_model(**json.loads(renamed))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(PUBLISHED[name])
    theirs = parse(PUBLISHED[name])
    newer = {**theirs.to_dict(), "bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    assert read_config(newer) == config
    with torch.device("meta"):
        peer = hf.AutoModelForCausalLM.from_config(theirs)
    ends = ("e_score_correction_bias", "layer_scalar")
    others = [buffer for name, buffer in peer.named_buffers() if name.endswith(ends)]
    assert config.parameter_count == sum(parameter.numel() for parameter in (*peer.parameters(), *others))
    assert read_config(write_config(config)) == config


def test_multimodal_gemma():
    config = read_config(GEMMA_3_4B)
    flat = UniformConfig.from_model_config(config)
    newer = {**GEMMA_3_4B, "text_config": parse(GEMMA_3_4B).text_config.to_dict()}
    assert read_config(newer) == config.replace(bos_token_id=2)
    assert config.eos_token_ids == (1, 106)
    assert flat.rope == RopeConfig(theta=1_000_000.0, kind="linear", factor=8.0)
    assert flat.local_rope == RopeConfig()
    assert flat.windows[:7] == (1024,) * 5 + (None, 1024)
    assert (flat.num_heads, flat.num_kv_heads, flat.head_dim, flat.vocab_size) == (8, 4, 256, 262_208)
    assert config.tie_embeddings


def test_multimodal_ministral():
    text = PUBLISHED["ministral-3-3b-text"]
    values = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": text}
    values |= {"vision_config": {"hidden_size": 1024}, "image_token_index": 10, "spatial_merge_size": 2}
    values |= {"vision_feature_layer": -1, "projector_hidden_act": "gelu", "multimodal_projector_bias": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_config(values) == read_config(text)
    with pytest.raises(ValueError, match=r"'text_config.model_type' is 'mistral'; streamjax has 'ministral3' here"):
        read_config({**values, "text_config": {**text, "model_type": "mistral"}})
    for beta in (-1, "x", float("nan")):
        rope = {**text["rope_parameters"], "llama_4_scaling_beta": beta}
        with pytest.raises(ValueError, match="field 'llama_4_scaling_beta' is"):
            read_config({**text, "rope_parameters": rope})


@pytest.mark.parametrize("name", [*PUBLISHED, "gemma-3-4b"])
def test_every_field_of_transformers_is_read_or_known_to_be_harmless(name):
    values = GEMMA_3_4B if name == "gemma-3-4b" else PUBLISHED[name]
    fields = Fields(parse(values).to_dict())
    find_family(values).read(fields)
    left = set(fields.values) - fields.seen - HARMLESS - {"is_encoder_decoder", "quantization_config"}
    for section in fields.sections.values():
        left |= set(section.values) - section.seen - HARMLESS - {"is_encoder_decoder"}
    assert not left


BY_FAMILY = {find_family(values).name: values for values in [*PUBLISHED.values(), GEMMA_3_4B]}
NO_SIZE = {
    "hidden_size_per_layer_input",
    "num_kv_shared_layers",
    "attn_scale",
    "first_k_dense_replace",
    "max_window_layers",
    "num_ln_in_parallel_attn",
    "clip_qkv",
    "beta_fast",
    "beta_slow",
    "llama_4_scaling_beta",
    "mscale",
    "mscale_all_dim",
    "bos_token_id",
    "eos_token_id",
}


def numbers(values, place=()):
    """Where a config.json has numbers, those in its sections too; lists of them as a whole."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, (*place, name))
        elif isinstance(value, (int, float, list)) and not isinstance(value, bool):
            yield (*place, name)


def changed(values, place, value):
    if not place:
        return value
    return {**values, place[0]: changed(values[place[0]], place[1:], value)}


def complaint(values):
    """What reading a config.json says: an error, or a warning; None where it is read without a word."""
    with warnings.catch_warnings(record=True) as unknown:
        warnings.simplefilter("always")
        try:
            read_config(values)
        except ValueError as error:
            return str(error)
    return str(unknown[0].message) if unknown else None


PARTS = rest_slow(range(5), 0)  # every fifth of what may be wrong: with each field a few values, other ones in turn


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", BY_FAMILY)
def test_numbers_that_cannot_be_meant_are_refused(family, part):
    """Every number that a family reads: NaN, infinite, negative, 0, beyond all sizes, true, text, a list, an object."""
    values = BY_FAMILY[family]
    unread = HARMLESS - {"bos_token_id", "eos_token_id"} | {"embedding_fraction", *gemma._VISION_FIELDS.split()}
    places = [place for place in numbers(values) if place[-1] not in unread and place[0] not in unread]
    assert len(places) > 5
    wrong = []
    for place in places:
        if place == ("sliding_window",) and not values.get("use_sliding_window", True):
            continue  # it plays no part
        bad = [float("nan"), float("inf"), -float("inf"), -1, 10**400, True, "8", [float("nan")], {"a": 1}]
        wrong += [(place, value) for value in bad + [0, 0.0] * (place[-1] not in NO_SIZE)]
    for place, value in wrong[part :: len(PARTS)]:
        said = complaint(changed(values, place, value))
        assert said, f"{place} = {value!r} was read without a word"
        assert "\n" not in said
        assert len(said) < 700


@pytest.mark.parametrize("name", BY_FAMILY)
def test_what_transformers_writes_beside_the_architecture_is_no_news(name):
    """Its own bookkeeping, with every default written out, and what SmolLM2, Unsloth and transformers.js add."""
    plain = hf.PretrainedConfig()
    written = {**plain.__dict__, **plain.to_dict(), **json.loads(plain.to_json_string(use_diff=False))}
    written |= {"_model_name_or_path": "a run", "unk_token_id": 0, "is_llama_config": True, "unsloth_version": "2025.1"}
    written |= {
        "transformers.js_config": {"dtype": "q4"},
        "use_cache": True,
        "dtype": "bfloat16",
        "torch_dtype": "float32",
    }
    known = {"vocab_size", "architectures", "model_type", "tie_word_embeddings", *BY_FAMILY[name]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_config({**{key: value for key, value in written.items() if key not in known}, **BY_FAMILY[name]})
    with pytest.warns(UserWarning, match="config.json has fields that streamjax does not know: attention_twist"):
        read_config({**BY_FAMILY[name], "attention_twist": 0.5})


REFUSED = {
    "quantised": ("llama-3.1-8b", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "partial rotary": ("llama-3.1-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "activation": ("llama-3.1-8b", {"hidden_act": "mish"}, "'hidden_act' is 'mish'; streamjax has gelu"),
    "rope kind": ("llama-3.1-8b", {"rope_scaling": {"rope_type": "ntk"}}, "rope_type 'ntk'; streamjax has default"),
    "rope field": (
        "qwen2.5-7b",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}},
        "'mrope_section' is not implemented",
    ),
    "rope lacks": ("llama-3.1-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
    "heads": ("llama-3.1-8b", {"num_attention_heads": 33}, "hidden_size 4096 is not a multiple"),
    "kv heads": ("llama-3.1-8b", {"num_key_value_heads": 5}, "must be a multiple of num_kv_heads 5"),
    "type": ("llama-3.1-8b", {"num_hidden_layers": "32"}, "'num_hidden_layers' is '32'; expected int"),
    "boolean": ("llama-3.1-8b", {"num_hidden_layers": True}, "'num_hidden_layers' is True"),
    "null": ("llama-3.1-8b", {"hidden_size": None}, "'hidden_size' is null"),
    "mixed mistral": ("mistral-7b", {"layer_types": ["full_attention"] * 32}, "layer_types"),
    "layer type": ("qwen3-0.6b", {"layer_types": ["chunked_attention"] * 28}, "'chunked_attention'"),
    "layer count": ("qwen3-0.6b", {"layer_types": ["full_attention"] * 3}, "3 entries for 28 layers"),
    "no window": ("qwen3-0.6b", {"layer_types": ["sliding_attention"] * 28}, "'sliding_window' is null"),
    "phi rope": ("phi-3-mini-128k", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "Phi-3 architecture has"),
    "bidirectional 2": ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "bidirectional 3": ("gemma-3-1b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "gemma 3 soft cap": ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "gemma 3 flat rope": ("gemma-3-1b", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters has 'rope_theta'"),
    "falcon layout": ("falcon-40b", {"parallel_attn": False}, "parallel_attn"),
    "falcon norms": ("falcon-7b", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
    "falcon 40b norms": ("falcon-40b", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
    "falcon kv heads": ("falcon-7b", {"multi_query": False, "num_kv_heads": 8}, "num_kv_heads"),
    "mpt biases": ("mpt-7b", {"no_bias": False}, "no_bias"),
    "mpt logit scale": ("mpt-7b", {"logit_scale": 0.5}, "logit_scale"),
    "mpt ratio": ("mpt-7b", {"expansion_ratio": 2}, "expansion_ratio"),
    "mpt norm": ("mpt-7b", {"norm_type": "rmsnorm"}, "norm_type"),
    "mpt positions": ("mpt-7b", {"attn_config": {"alibi": False}}, "'alibi'"),
    "mpt multi-query": ("mpt-7b", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type"),
    "mpt qk norm": ("mpt-7b", {"attn_config": {"qk_ln": True}}, "qk_ln"),
    "mpt prefix": ("mpt-7b", {"attn_config": {"prefix_lm": True}}, "prefix_lm"),
    "gemma 4 embeddings": (
        "gemma-4-31b-text",
        {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 1000},
        "'vocab_size_per_layer_input' is 1000: it must be vocab_size, 262144",
    ),
    "gemma 4 shared keys": (
        "gemma-4-31b-text",
        {"num_kv_shared_layers": 1000},
        "'num_kv_shared_layers' is 1000: layer 0 has sliding attention, and no layer of this kind below has keys",
    ),
    "gemma 4 bidirectional": (
        "gemma-4-31b-text",
        {"use_bidirectional_attention": "all"},
        "use_bidirectional_attention",
    ),
    "gemma 4 heads": ("gemma-4-31b-text", {"per_layer_config": {"3": {"window": 3}}}, "'per_layer_config' has"),
    "gemma 4 rope": ("gemma-4-31b-text", {"rope_parameters": {"local": {}}}, "rope_parameters must have sliding_att"),
    "llama 4 chunks": ("llama-4-scout-text", {"layer_types": ["sliding_attention"] * 48}, "'sliding_attention'; this"),
    "llama 4 layers": ("llama-4-scout-text", {"layer_types": ["chunked_attention"]}, "1 entries for 48 layers"),
    "llama 4 no chunk": (
        "llama-4-scout-text",
        {"layer_types": ["chunked_attention"] * 48, "attention_chunk_size": None},
        "'attention_chunk_size' is null",
    ),
    "llama 4 experts": ("llama-4-scout-text", {"moe_layers": [48]}, "'moe_layers' must have numbers of the 48 layers"),
    "llama 4 scaled": (
        "llama-4-scout-text",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}},
        "'use_qk_norm' is true: a rotation of kind 'yarn' scales what it undoes",
    ),
    "proportional": (
        "llama-3.1-8b",
        {"rope_scaling": {"rope_type": "proportional"}},
        "rope_type 'proportional'; streamjax has default",
    ),
    "token ids": ("mpt-7b", {"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    name, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        read_config({**PUBLISHED[name], **changes})
    assert len(str(error.value).splitlines()) == 1


ONE_OF_EACH_FAMILY = {values["model_type"]: name for name, values in PUBLISHED.items()}


def mutations(values, path=()):
    """Copies of a config with one field, at any depth, replaced by something odd."""
    for name, value in values.items():
        for odd in (None, True, 0, -1, 3, 0.5, "x", [], [None], [[1]], {}, {"a": 1}):
            yield {**values, name: odd}
        if isinstance(value, dict):
            yield from ({**values, name: inner} for inner in mutations(value))


@pytest.mark.filterwarnings("ignore:config.json has fields")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", rest_slow([*PUBLISHED, "gemma-3-4b"], *ONE_OF_EACH_FAMILY.values()))
def test_odd_values_are_read_or_refused_in_one_line(name, part):
    values = GEMMA_3_4B if name == "gemma-3-4b" else {**PUBLISHED[name], "num_hidden_layers": 4, "n_layers": 4}
    refusals = []
    for odd in itertools.islice(mutations(values), part, None, len(PARTS)):
        try:
            read_config(odd)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 50 / len(PARTS)
    assert all(len(message.splitlines()) == 1 for message in refusals)


def test_missing_field():
    values = {name: value for name, value in PUBLISHED["llama-3.1-8b"].items() if name != "vocab_size"}
    with pytest.raises(ValueError, match="field 'vocab_size' is missing"):
        read_config(values)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("LlamaForSequenceClassification", "LlamaForCausalLM"),
        ("Llama4ForSequenceClassification", "Llama4ForCausalLM"),
        ("Gemma3TextModel", "Gemma3ForCausalLM"),
        ("MixtralForTokenClassification", "MixtralForCausalLM"),
        ("Qwen4ForCausalLM", "Qwen.ForCausalLM"),
        ("LlamaModel", "Ll.*"),
    ],
)
def test_unknown_architectures(name, near):
    with pytest.raises(
        ValueError, match=f"unknown architecture '{name}'; did you mean '{near}'\\? Known families: .*falcon.*qwen3"
    ):
        read_config({**PUBLISHED["llama-3.1-8b"], "architectures": [name]})
    values = {**PUBLISHED["llama-3.1-8b"], "architectures": None}
    assert find_family(values).name == "llama"
    with pytest.raises(ValueError, match=r"Gemma 3n is not implemented: .* \(AltUp\), .*\(Laurel\)"):
        find_family({"architectures": ["Gemma3nForConditionalGeneration"], "model_type": "gemma3n"})
    with pytest.raises(ValueError, match=r"unknown architecture 'qwen9'; did you mean 'qwen.'"):
        find_family({**values, "model_type": "qwen9"})
    for odd in ("x" * 10_000, "é\n\0", "", "GPT"):
        with pytest.raises(ValueError, match="unknown architecture") as error:
            find_family({"architectures": [odd], "model_type": odd})
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 1000


def test_architecture_and_model_type_agree():
    with pytest.raises(ValueError, match="'LlamaForCausalLM' and model_type 'mistral' contradict each other"):
        find_family({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"})


def test_unknown_fields_are_reported_when_they_hold_something():
    values = {**PUBLISHED["llama-3.1-8b"], "residual_scale": 2.0, "residual_bias": None}
    with pytest.warns(UserWarning, match="does not know: residual_scale$"):
        read_config(values)


def test_token_ids():
    values = PUBLISHED["llama-3.1-8b"]
    assert read_config(values).eos_token_ids == (128001, 128008, 128009)
    config = read_config(values, {"eos_token_id": [7, 128008], "bos_token_id": None, "temperature": 0.6})
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (7, 128008, 128001, 128009))  # both files' together
    config = read_config({**values, "eos_token_id": None, "bos_token_id": None})
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    for wrong in (128256, -1, 2**31, 2**40):
        for places in (({**values, "eos_token_id": [128001, wrong]}, None), (values, {"eos_token_id": wrong})):
            outside = f"has {wrong}, which is outside the vocabulary of 128256"
            message = f"field 'eos_token_id' ({outside}|is .*{wrong}.*; expected token ids)"
            with pytest.raises(ValueError, match=message):
                read_config(*places)
    with pytest.raises(ValueError, match=r"ModelConfig.eos_token_ids has 128256, which is outside the vocabulary"):
        config.replace(eos_token_ids=(128256,))
    with pytest.raises(ValueError, match="field 'eos_token_id' is \\[True\\]; expected token ids"):
        read_config({**values, "eos_token_id": True})


def test_llama_dimensions():
    config = read_config(PUBLISHED["llama-3.1-8b"])
    assert config.parameter_count == 8_030_261_248
    assert config.blocks[-1].mixer.rope == RopeConfig(
        theta=500_000.0,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )


SMALL = UniformConfig(
    vocab_size=20, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, max_position=64
)


def test_what_a_family_cannot_express():
    cases = {
        "qk_norm": (
            {"qk_norm": True},
            "family 'llama' cannot express qk_norm = True .*; family qwen3 or lfm2 can",
        ),
        "windows": (
            {"windows": (8,) * 2},
            "cannot express windows = .*; family mistral or phi3 or smollm3 or ministral3 can",
        ),
        "sizes of window": ({"windows": (8, 4)}, r"windows = \(8, 4\)"),
        "norm": ({"norm": "layer"}, r"norm = 'layer'"),
        "one bias": ({"qkv_bias": True}, r"out_bias = False.*; family qwen2 can"),
        "logit bias": ({"logit_bias": True}, r"logit_bias = True"),
        "yarn for phi": (
            {"family": "phi3", "rope": RopeConfig(kind="yarn", factor=2.0, original_max_position=32)},
            "family 'phi3' cannot",
        ),
        "unknown": ({"family": "gpt5"}, "unknown ModelConfig.family 'gpt5'; use one of llama, mistral"),
        "slopes": ({"family": "mpt", "position": "alibi", "alibi_slopes": (0.5,) * 4}, "family 'mpt' cannot"),
        "heads": ({"num_heads": 3, "num_kv_heads": 3}, "family 'llama' cannot.*hidden_size 16 is not a multiple"),
    }
    for changes, message in cases.values():
        with pytest.raises(ValueError, match=message) as error:
            write_config(SMALL.replace(**changes).expand())
        assert len(str(error.value).splitlines()) == 1


def test_equal_spellings_can_be_written():
    for changes in (
        {"windows": (None,) * 2},
        {"attention_scale": 0.5},
        {"rope": RopeConfig(rotary_dim=4, beta_fast=7.0)},
        {"norm_bias": True},
        {"sink_token": True, "bos_token_id": 3, "eos_token_ids": (4, 5)},
    ):
        values = write_config(SMALL.replace(**changes).expand())
        back = read_config(values)
        assert (back.sink_token, back.bos_token_id) == ("sink_token" in changes, changes.get("bos_token_id"))
        assert back.eos_token_ids == changes.get("eos_token_ids", ())


def test_families_are_named_after_their_registry():
    assert all(name == family.name for name, family in FAMILIES.items())


@pytest.mark.parametrize(
    ("name", "kind"), [("deepseek-v2-lite", hf.DeepseekV2Config), ("deepseek-v3", hf.DeepseekV3Config)]
)
@pytest.mark.parametrize("field", ["moe_intermediate_size", "n_routed_experts", "n_shared_experts", "kv_lora_rank"])
def test_what_deepseek_leaves_out_is_as_transformers_has_it(name, kind, field):
    values = {key: value for key, value in PUBLISHED[name].items() if key != field}
    assert read_config(values) == read_config({**values, field: getattr(kind(), field)})
