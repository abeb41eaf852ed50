"""`--mesh`, `--cache_mesh`: commands split a model and its cache over devices and print what they print without."""

import jax
import pytest

import streamjax as sj
from streamjax.commands import chat, perplexity, stream
from streamjax.commands.flags.meshes import parse_mesh, parse_meshes
from tests.commands.command_helpers import read_json

SMALL = "--chunk_size=64"
MESH = "--mesh=data=2,fsdp=2,tensor=2"  # of the suite's eight devices


@pytest.fixture
def sessions(monkeypatch) -> list[sj.Session]:
    """Every session that a command makes."""
    made = []

    class Noted(sj.Session):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr(sj, "Session", Noted)
    return made


def is_split(tree) -> bool:
    """Whether all of a tree lies on the eight devices, and some array of it in parts."""
    leaves = jax.tree.leaves(tree)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
    return any(not leaf.is_fully_replicated for leaf in leaves)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    """A model whose two key/value heads two devices share."""
    config = sj.UniformConfig(
        vocab_size=259, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16, max_position=32,
        bos_token_id=256,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "two_heads"
    sj.save_hf(jax.jit(lambda: sj.Decoder(config, jax.random.key(2)))(), folder)
    return folder


@pytest.mark.slow
def test_a_split_stream_costs_what_a_whole_one_costs_and_goes_on_whole(
    command, two_heads, text_file, tmp_path, sessions
):
    data = text_file.read_bytes()[:256]
    costs = []
    for name, mesh in (("split", [MESH]), ("whole", [])):
        saved = command(stream, SMALL, *mesh, f"--save_state={tmp_path}/{name}", stdin=data[:128], model=two_heads)
        assert saved.status == 0, saved.err
        then = command(
            stream, SMALL, f"--load_state={tmp_path}/split", f"--json={tmp_path}/{name}.json", *mesh,
            stdin=data[128:], model=two_heads,
        )  # fmt: skip
        assert then.status == 0, then.err
        costs.append(read_json(tmp_path / f"{name}.json")["nats_per_token"])
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)
    split, split_loaded, whole, whole_loaded = sessions
    for session in (split, split_loaded):
        assert is_split(session.model)
        assert is_split(session.state.layers)
    for session in (whole, whole_loaded):
        assert len(jax.tree.leaves(session.state)[0].sharding.device_set) == 1


def test_a_split_model_answers_what_the_whole_one_answers(command, two_heads, sessions):
    options = ["--chunk_size=32", "--max_new_tokens=6", "--temperature=0"]
    answers = [command(chat, *options, *mesh, stdin="hello\n/cache\n", model=two_heads) for mesh in ([MESH], [])]
    assert [answer.status for answer in answers] == [0, 0], answers[0].err
    assert answers[0].out == answers[1].out
    assert is_split(sessions[0].model)


@pytest.mark.slow
def test_caches_are_compared_on_a_split_model(command, two_heads, text_file, tmp_path, sessions):
    found = []
    for mesh in ([MESH], []):
        outcome = command(
            perplexity, f"--input={text_file}", SMALL, "--max_tokens=128", f"--json={tmp_path}/p.json", "--png=",
            "--cache=window", "--cache=dense", *mesh, model=two_heads,
        )  # fmt: skip
        assert outcome.status == 0, outcome.err
        found.append([run["nats_per_token"] for run in read_json(tmp_path / "p.json")["runs"]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(found[0]) == 2
    assert is_split(sessions[0].model)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("tensor=8", {"tensor": 8}),
        ("data=2,tensor=4", {"data": 2, "tensor": 4}),
        ("context=2,fsdp=-1", {"context": 2, "fsdp": 4}),
    ],
)
def test_meshes_are_described_in_one_word(text, shape):
    assert {axis: size for axis, size in parse_mesh(text).shape.items() if size > 1} == shape


def test_no_mesh_is_the_default():
    assert parse_mesh(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensro=4", "--mesh=tensro=4: no mesh axis 'tensro'; did you mean 'tensor'?"),
        ("8", "--mesh=8: no mesh axis '8'; known: context, data, expert, fsdp, tensor"),
        ("tensor", "--mesh=tensor: give tensor once, with a number of devices, such as tensor=4"),
        ("tensor=two", "--mesh=tensor=two: give tensor once, with a number of devices"),
        ("tensor=2,tensor=4", "--mesh=tensor=2,tensor=4: give tensor once"),
        ("tensor=3", "a mesh of tensor 3 does not fit 8 devices"),
        ("tensor=0", "mesh axis tensor is 0: use a positive size, or -1"),
    ],
)
@pytest.mark.parametrize("module", [stream, chat, perplexity])
def test_wrong_meshes_end_a_command_with_one_line(command, module, text, message):
    outcome = command(module, f"--mesh={text}")
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.count("\n") == 1


APART = ["--mesh=tensor=2", "--cache_mesh=data=1,tensor=2"]
CACHES = {
    "dense": "--cache=dense:capacity=200",
    "inst_infer": "--cache=inst_infer:sinks=1,window=7,capacity=64,page=4,top_k=2",
}


def lies_on(tree) -> set[int]:
    """The numbers of the devices that a tree lies on."""
    return {device.id for leaf in jax.tree.leaves(tree) for device in leaf.devices()}


def require_apart(session):
    """The model lies on the first two devices, the cache's last tier on the next two, whatever was read."""
    assert session.tokens_seen
    assert lies_on(session.model) == {0, 1}
    for *front, last in session.state.layers:
        assert lies_on(front) <= {0, 1}
        assert lies_on(last) == {2, 3}
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(last))


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_a_model_whose_cache_lies_on_a_second_mesh_answers_the_same(command, two_heads, sessions, name):
    options = ["--chunk_size=32", "--max_new_tokens=12", "--temperature=1", "--repetition_penalty=1.1", CACHES[name]]
    turns = "and what is there besides?\n/cache\n"
    apart, whole = (command(chat, *options, *mesh, stdin=turns, model=two_heads) for mesh in (APART, []))
    assert [apart.status, whole.status] == [0, 0], apart.err
    assert apart.out == whole.out
    assert len(apart.out) > 40
    require_apart(sessions[0])
    assert lies_on(sessions[1].state) == {0}


@pytest.mark.slow
def test_a_stream_on_a_second_mesh_costs_the_same_and_goes_on_with_it(
    command, two_heads, text_file, tmp_path, sessions
):
    data, costs = text_file.read_bytes()[:128], []
    for name, mesh in (("apart", APART), ("whole", [])):
        options = [SMALL, CACHES["inst_infer"], *mesh]
        saved = command(stream, *options, f"--save_state={tmp_path}/{name}", stdin=data[:80], model=two_heads)
        assert saved.status == 0, saved.err
        files = [f"--load_state={tmp_path}/{name}", f"--json={tmp_path}/{name}.json"]
        then = command(stream, *options, *files, stdin=data[80:], model=two_heads)
        assert then.status == 0, then.err
        costs.append(read_json(tmp_path / f"{name}.json")["nats_per_token"])
    assert costs[0] == pytest.approx(costs[1], rel=1e-5)
    for session in sessions[:2]:
        require_apart(session)
    with pytest.raises(ValueError, match="compact is not there for streams whose tokens lie on a second mesh"):
        sessions[0].compact(sj.kv.preset("window", window=4))


def test_two_meshes_share_the_devices():
    both = parse_meshes("tensor=2", "data=2,tensor=-1")
    assert [d.id for d in both.model.devices.flat] == [0, 1]
    assert [d.id for d in both.cache.devices.flat] == [2, 3, 4, 5, 6, 7]
    assert both.cache.shape["tensor"] == 3
    left = parse_meshes("tensor=-1", "tensor=2")
    assert (left.model.size, [d.id for d in left.cache.devices.flat]) == (6, [6, 7])
    alone = parse_meshes(None, "tensor=4")
    assert (alone.model, [d.id for d in alone.cache.devices.flat]) == (None, [1, 2, 3, 4])
    assert parse_meshes(None, None) == (None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--cache_mesh=tensor=8"],
            "--cache_mesh=tensor=8: the model takes 1 devices and the cache 8 others",
        ),
        (["--mesh=tensor=8", "--cache_mesh=tensor=-1"], "the model takes 8 devices and the cache 1 others"),
        (["--mesh=tensor=-1", "--cache_mesh=tensor=-1"], "both take the devices that are left: number one"),
        (["--cache_mesh=tensro=4"], "--cache_mesh=tensro=4: no mesh axis 'tensro'; did you mean 'tensor'?"),
        (["--cache_mesh=tensor=2", "--cache=streaming_llm"], "--cache=streaming_llm has no part that lies on a second"),
        (["--cache_mesh=tensor=2", "--cache=h2o"], "--cache=h2o has no part"),
        (
            ["--cache_mesh=tensor=2", "--cache=mikv:window=4,size=4,every=4,group=4,capacity=16"],
            "only windows, sinks",
        ),
        (
            ["--cache_mesh=tensor=2", "--cache=inst_infer:attend_on=host"],
            "take dense, or inst_infer with attend_on=mesh",
        ),
        (["--cache_mesh=context=2", "--cache=dense"], "make its axis context 1"),
        (["--cache_mesh="], "it is empty"),
    ],
)
def test_a_second_mesh_that_cannot_be_is_one_line(command, two_heads, flags, message):
    outcome = command(stream, *flags, stdin="text", model=two_heads)
    assert outcome.status != 0
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_drafts_and_second_meshes_exclude_each_other(command, two_heads):
    outcome = command(chat, "--cache_mesh=tensor=2", "--cache=dense", "--draft=ngram", stdin="hi\n", model=two_heads)
    assert "neither a draft nor a smaller cache for answers reads a second mesh" in outcome.err
