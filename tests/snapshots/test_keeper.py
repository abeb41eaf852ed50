"""Keepers of several machines: what they are given is everywhere when they say so, and survives any one of them."""

import threading

import pytest

from streamjax.snapshots import client
from streamjax.snapshots.choosing import Reader, held_by, newest
from streamjax.snapshots.keeper import Keeper
from streamjax.snapshots.messages import connect, request

KEY = b"of this run"
SECONDS = 120  # a generous deadline for what keepers do


class Machine:
    """A keeper in a thread, and a training process's connection to it."""

    def __init__(self, folder, number):
        self.path = str(folder / str(number))
        self.keeper = Keeper(self.path, KEY, 3600)
        self.thread = threading.Thread(target=self.keeper.run, daemon=True)
        self.thread.start()
        self.connection = connect(self.path, KEY)
        self.address = ["127.0.0.1", self.ask(op="listen", host="127.0.0.1")["port"]]

    def ask(self, data=(), **head):
        return request(self.connection, head, data)[0]

    def status(self):
        return self.ask(op="status")["held"]

    def end(self):
        self.ask(op="stop")
        self.connection.close()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


def join(machines, start_id, keep=None, lost=1):
    others = [[number, machine.address] for number, machine in enumerate(machines)]
    for number, machine in enumerate(machines):
        layout = [len(machines), 8, lost]
        machine.ask(op="join", start_id=start_id, layout=layout, host=number, others=others, keep=keep)


def put(machines, start_id, step, datas):
    for number, (machine, data) in enumerate(zip(machines, datas, strict=True)):
        machine.ask([data], op="put", start_id=start_id, step=step, process=number, local=[number])


def wait(machines, start_id, step):
    return all(
        machine.ask(op="wait", start_id=start_id, step=step, seconds=SECONDS)["complete"] for machine in machines
    )


@pytest.fixture
def machines(tmp_path):
    found = [Machine(tmp_path, number) for number in range(4)]
    yield found
    for machine in found:
        machine.end()


def read_all(machines, name):
    held = held_by([(machine.address, machine.status()) for machine in machines])[name]
    reader = Reader(name, held, KEY)
    found = [bytes(reader.read(process)) for process in range(4)]
    reader.close()
    return found


def test_any_machine_may_be_lost_and_another_takes_its_place(machines):
    datas = [bytes([number]) * (1000 + 37 * number) for number in range(4)]
    join(machines, "first")
    put(machines, "first", 10, datas)
    assert wait(machines, "first", 10)
    for lost in range(4):
        assert read_all(machines[:lost] + machines[lost + 1 :], ("first", 10)) == datas
    # The run begins again, with the machines in another order: snapshots of both starts are told apart.
    again = machines[::-1]
    join(again, "second", keep=["first", 10])
    assert read_all(again[1:], ("first", 10)) == datas
    later = [data[::-1] + b"!" for data in datas]
    put(again[:3], "second", 20, later[:3])
    held = held_by([(machine.address, machine.status()) for machine in again])
    assert newest(held) == ("first", 10)
    again[3].ask([later[3]], op="put", start_id="second", step=20, process=3, local=[3])
    assert wait(again, "second", 20)
    assert [[held[:2] for held in machine.status()] for machine in again] == [[["second", 20]]] * 4


def test_what_is_of_another_start_is_refused(machines):
    join(machines, "first")
    with pytest.raises(OSError, match="started again"):
        machines[0].ask([b"x"], op="put", start_id="before", step=1, process=0, local=[0])
    with pytest.raises(OSError, match="another run"):
        connect(machines[0].path, b"another key")
    assert machines[0].status() == []


def test_a_snapshot_is_not_everywhere_before_all_have_given_theirs(machines):
    join(machines, "first", lost=2)
    put(machines[:3], "first", 5, [b"abc"] * 3)
    assert not machines[0].ask(op="wait", start_id="first", step=5, seconds=0)["complete"]
    assert newest(held_by([(machine.address, machine.status()) for machine in machines])) is None


def test_a_socket_is_where_its_path_is_short_enough(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 30)))
    path = client.socket_path(b"key")
    assert len(bytes(path)) <= 100
    assert path.parent.is_dir()
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert client.socket_path(b"key") == path
