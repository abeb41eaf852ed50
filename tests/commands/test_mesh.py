"""`--mesh`: commands split a model over devices and print what they print without."""

import jax
import pytest

import streamjax as sj
from streamjax.commands import chat, perplexity, stream
from streamjax.commands.flags.model import parse_mesh
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
