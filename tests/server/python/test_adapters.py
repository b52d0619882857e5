"""LoadAdapter, UnloadAdapter, ListAdapters, and requests that name adapters. The simulated model's adapters shift the
letters of its answers, so that each token tells with which version it was computed."""
import concurrent.futures
import json
import os
import random
import shutil
import signal
import struct
import threading
import time

import grpc
import pytest

INVALID, PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION
NOT_FOUND, EXISTS = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS
pytestmark = pytest.mark.simulated


def refused(call):
    """The error of a stream, or of a unary call that is made here."""
    with pytest.raises(grpc.RpcError) as error:
        call() if callable(call) else list(call)
    return error.value


def write(folder, shift, size=4096, data=None, **settings):
    """A whole adapter in the place of what lies there: one rename for each file, as careful operators do."""
    folder.mkdir(exist_ok=True)
    for name, content in (("adapter_config.json", json.dumps({"shift": shift, "bytes": size, **settings}).encode()),
                          ("adapter_model.safetensors",
                           struct.pack("<Q", 2) + b"{}" + (bytes([shift]) * size if data is None else data))):
        new = folder / f".{name}.new"
        new.write_bytes(content)
        os.replace(new, folder / name)


def swap(home, name, shift, **settings):
    """The same by a link to a folder, which is one rename for both files."""
    folder = home / f".{name}-{random.getrandbits(64):x}"
    write(folder, shift, **settings)
    old, link = os.readlink(home / name) if (home / name).is_symlink() else None, home / f".{name}.new"
    link.symlink_to(folder.name)
    os.replace(link, home / name)
    if old:
        shutil.rmtree(home / old)


@pytest.fixture
def home(tmp_path):
    for name, shift in (("one", 1), ("two", 2), ("five", 5)):
        write(tmp_path / name, shift)
    return tmp_path


@pytest.fixture
def served(home, launch, stub):
    server = launch("--adapters", str(home))
    return server, stub(server)


def letters(shift, n=16, first=0):
    return "".join(chr(97 + (first + i + shift) % 26) for i in range(n))


class Asker:
    """Greedy answers to one prompt; shift() says by how much they are shifted, and fails if it is not one shift."""

    def __init__(self, choir, help):
        self.choir, self.help = choir, help
        self.first = ord(self.answer()[0][0]) - 97

    def answer(self, **fields):
        events = list(self.choir.Generate(self.help.request(**fields), timeout=60))
        return self.help.text(events), events[0].started

    def shift(self, **fields):
        text, _ = self.answer(**fields)
        shift = (ord(text[0]) - 97 - self.first) % 26
        assert text == letters(shift, len(text), self.first), text
        return shift


@pytest.fixture
def ask(served, help):
    return Asker(served[1], help)


def names(choir, pb, **fields):
    return [a.name for a in choir.ListAdapters(pb.ListAdaptersRequest(**fields), timeout=5).adapters]


def adapter(choir, pb, name):
    return next(a for a in choir.ListAdapters(pb.ListAdaptersRequest(), timeout=5).adapters if a.name == name)


def load(choir, pb, name, **fields):
    return choir.LoadAdapter(pb.LoadAdapterRequest(name=name, **fields), timeout=20)


def mix(pb, **weights):
    return [pb.AdapterWeight(adapter=name, weight=weight) for name, weight in weights.items()]


def test_requests_name_adapters(ask, pb):
    assert ask.shift() == 0
    assert [ask.shift(adapter=name) for name in ("one", "two", "five", "one")] == [1, 2, 5, 1]
    assert ask.shift(mix=mix(pb, one=1, five=2)) == 11
    assert ask.shift(mix=mix(pb, two=-1)) == 24
    assert ask.shift(mix=mix(pb, two=0)) == 0
    assert ask.shift(adapter="") == 0
    for fields, said in (({}, ""), ({"adapter": "two"}, "two"), ({"mix": mix(pb, two=1)}, "two"),
                         ({"mix": mix(pb, one=0.5, two=-8)}, "one=0.5,two=-8")):
        assert ask.answer(**fields)[1].adapter == said


@pytest.mark.parametrize("fields, code, words", [
    ({"adapter": "nobody"}, NOT_FOUND, ["nobody"]),
    ({"mix": [("one", 1), ("nobody", 1)]}, NOT_FOUND, ["nobody"]),
    ({"mix": [("one", 9)]}, INVALID, ["mix[0].weight is 9", "-8 to 8"]),
    ({"mix": [("one", 1), ("two", -8.5)]}, INVALID, ["mix[1].weight is -8.5", "-8 to 8"]),
    ({"mix": [("one", float("nan"))]}, INVALID, ["mix[0].weight is", "nan", "-8 to 8"]),
    ({"mix": [("one", float("inf"))]}, INVALID, ["mix[0].weight is inf", "-8 to 8"]),
    ({"mix": [("one", 1), ("one", 2)]}, INVALID, ["mix[1].adapter", "one", "mix[0]"]),
    ({"mix": [("", 1)]}, INVALID, ["mix[0].adapter is empty", "256"]),
    ({"mix": [("x" * 257, 1)]}, INVALID, ["mix", "adapter", "257", "256"]),
    ({"mix": [(f"a{i}", 1) for i in range(9)]}, INVALID, ["mix", "more than 8"]),
    ({"mix": [("one", 1)], "adapter": "two"}, INVALID, ["at most one of adapter, auto_adapter and mix"]),
    ({"mix": [("one", 1)], "auto_adapter": True}, INVALID, ["at most one of adapter, auto_adapter and mix"]),
    ({"auto_adapter": True}, PRECONDITION, ["auto_adapter", "yet"]),
    ({"adapter": "../one"}, INVALID, ["name"]),
    ({"adapter": "a\nb"}, INVALID, ["name"]),
    ({"adapter": "x" * 257}, INVALID, ["adapter", "257", "256"]),
])
def test_bad_adapters_of_requests(ask, served, help, pb, fields, code, words):
    if "mix" in fields:
        fields = {**fields, "mix": [pb.AdapterWeight(adapter=a, weight=w) for a, w in fields["mix"]]}
    error = refused(served[1].Generate(help.request(**fields), timeout=10))
    assert error.code() == code, error.details()
    for word in words:
        assert word in error.details(), error.details()
    assert ask.shift(adapter="one") == 1


def test_lists(served, ask, pb):
    choir = served[1]
    assert names(choir, pb) == ["five", "one", "two"]
    assert names(choir, pb, limit=2) == ["five", "one"]
    assert names(choir, pb, after="five") == ["one", "two"]
    assert names(choir, pb, after="oh") == ["one", "two"]
    assert names(choir, pb, after="two", model="simulated") == []
    answer = choir.ListAdapters(pb.ListAdaptersRequest(limit=2), timeout=5)
    assert answer.more and not choir.ListAdapters(pb.ListAdaptersRequest(limit=3), timeout=5).more
    a = adapter(choir, pb, "one")
    assert (a.state, a.kind, a.rank, a.type, list(a.targets), a.model) == \
        (pb.REGISTERED, "simulated", 8, "f32", ["attn_q"], "simulated")
    assert (a.digest, a.requests, a.in_use, a.error) == ("", 0, 0, "") and a.file_bytes == 4106
    assert ask.shift(adapter="one") == 1
    b = adapter(choir, pb, "one")
    assert (b.state, b.requests, b.loads, b.bytes, b.version) == (pb.RESIDENT, 1, 1, 4096, a.version)
    assert len(b.digest) == 16
    error = refused(lambda: choir.ListAdapters(pb.ListAdaptersRequest(model="nobody"), timeout=5))
    assert error.code() == NOT_FOUND
    error = refused(lambda: choir.ListAdapters(pb.ListAdaptersRequest(after="x" * 257), timeout=5))
    assert error.code() == INVALID and "after" in error.details()


def test_loads(served, ask, home, pb):
    choir = served[1]
    first = load(choir, pb, "x", path="two")
    assert first.changed and first.adapter.state == pb.RESIDENT and ask.shift(adapter="x") == 2
    again = load(choir, pb, "x", path="two")
    assert not again.changed and again.adapter.version == first.adapter.version
    error = refused(lambda: load(choir, pb, "x", path="five"))
    assert error.code() == EXISTS and "x" in error.details() and ask.shift(adapter="x") == 2
    shutil.copytree(home / "two", home / "copy")
    assert not load(choir, pb, "x", path="copy").changed or ask.shift(adapter="x") == 2  # the same weights
    other = load(choir, pb, "x", path="five", replace=True)
    assert other.changed and other.adapter.version > first.adapter.version and ask.shift(adapter="x") == 5
    assert other.adapter.digest != first.adapter.digest
    assert load(choir, pb, "p", path="one", pin=True).adapter.pinned
    choir.UnloadAdapter(pb.UnloadAdapterRequest(name="x"), timeout=5)
    assert refused(lambda: choir.UnloadAdapter(pb.UnloadAdapterRequest(name="x"), timeout=5)).code() == NOT_FOUND
    error = refused(choir.Generate(ask.help.request(adapter="x"), timeout=5))
    assert error.code() == NOT_FOUND and "x" in error.details()
    assert load(choir, pb, "x", path="one").changed and ask.shift(adapter="x") == 1


@pytest.mark.parametrize("fields, codes, words", [
    ({"name": "x", "path": "../x"}, [INVALID], ["path", "../x"]),
    ({"name": "x", "path": "one/../../x"}, [INVALID], ["path"]),
    ({"name": "x", "path": "/etc"}, [INVALID], ["path", "/etc"]),
    ({"name": "x", "path": "out"}, [INVALID], ["x"]),
    ({"name": "x", "path": "y" * 1025}, [INVALID], ["path", "1025", "1024"]),
    ({"name": "x", "path": "nowhere"}, [PRECONDITION], ["x", "not there"]),
    ({"name": "nowhere"}, [PRECONDITION], ["nowhere"]),
    ({"name": ""}, [INVALID], ["name"]),
    ({"name": "../x", "path": "one"}, [INVALID], ["name"]),
    ({"name": "a b", "path": "one"}, [INVALID], ["name"]),
    ({"name": "x" * 257, "path": "one"}, [INVALID], ["name", "257", "256"]),
    ({"name": "x", "path": "one", "model": "nobody"}, [NOT_FOUND], ["nobody"]),
    ({"name": "x", "path": "no-config"}, [PRECONDITION], ["x", "adapter_config.json"]),
    ({"name": "x", "path": "no-tensors"}, [PRECONDITION], ["x", "adapter_model.safetensors"]),
    ({"name": "x", "path": "pickle"}, [PRECONDITION], ["x", "adapter_model.bin"]),
    ({"name": "x", "path": "no-json"}, [PRECONDITION], ["x", "adapter_config.json"]),
    ({"name": "x", "path": "cut"}, [PRECONDITION, INVALID], ["x", "bytes"]),
    ({"name": "x", "path": "torn"}, [PRECONDITION, grpc.StatusCode.DATA_LOSS], ["x", "byte 7"]),
    ({"name": "x", "path": "huge"}, [PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED], ["x"]),
])
def test_bad_loads(served, ask, home, tmp_path_factory, pb, fields, codes, words):
    choir = served[1]
    outside = tmp_path_factory.mktemp("outside")
    write(outside / "a", 9)
    (home / "out").symlink_to(outside / "a")
    for name in ("no-config", "no-tensors", "pickle", "no-json"):
        write(home / name, 3)
    (home / "no-config/adapter_config.json").unlink()
    (home / "no-tensors/adapter_model.safetensors").unlink()
    (home / "pickle/adapter_model.safetensors").rename(home / "pickle/adapter_model.bin")
    (home / "no-json/adapter_config.json").write_text("{")
    write(home / "cut", 3, data=bytes([3]) * 4000)
    write(home / "torn", 3, data=bytes([3]) * 7 + b"\4" + bytes([3]) * 4088)
    write(home / "huge", 3, size=1 << 20, bytes=1 << 40)
    before = names(choir, pb)
    error = refused(lambda: choir.LoadAdapter(pb.LoadAdapterRequest(**fields), timeout=20))
    assert error.code() in codes, (error.code(), error.details())
    for word in words:
        assert word in error.details(), error.details()
    assert names(choir, pb) == before
    assert ask.shift(adapter="one") == 1


def test_without_adapters(choir, help, pb):
    assert names(choir, pb) == []
    error = refused(lambda: load(choir, pb, "x", path="one"))
    assert error.code() == PRECONDITION and "--adapters" in error.details()
    error = refused(lambda: choir.UnloadAdapter(pb.UnloadAdapterRequest(name="x"), timeout=5))
    assert error.code() == PRECONDITION
    error = refused(choir.Generate(help.request(adapter="one"), timeout=5))
    assert error.code() == NOT_FOUND and "one" in error.details()
    assert not choir.GetStats(pb.GetStatsRequest(), timeout=5).models[0].HasField("adapters")


def test_admin_wants_a_key(home, launch, stub, pb):
    server = launch("--adapters", str(home), "--api-key", "secret")
    choir = stub(server)
    for call in (lambda **more: choir.LoadAdapter(pb.LoadAdapterRequest(name="one"), timeout=5, **more),
                 lambda **more: choir.ListAdapters(pb.ListAdaptersRequest(), timeout=5, **more),
                 lambda **more: choir.UnloadAdapter(pb.UnloadAdapterRequest(name="one"), timeout=5, **more)):
        assert refused(call).code() == grpc.StatusCode.UNAUTHENTICATED
        assert refused(lambda: call(metadata=[("authorization", "Bearer wrong")])).code() == \
            grpc.StatusCode.UNAUTHENTICATED
        call(metadata=[("authorization", "Bearer secret")])


def test_a_cold_adapter_holds_up_its_own_requests_alone(home, launch, stub, help, pb):
    write(home / "slow", 7, make_ms=1500)
    choir = stub(launch("--adapters", str(home)))
    ask = Asker(choir, help)
    assert ask.shift(adapter="one") == 1
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        cold = pool.submit(ask.shift, adapter="slow")
        cold_load = pool.submit(load, choir, pb, "slower", path="slow")
        others = 0
        while not cold.done():
            assert ask.shift() == 0 and ask.shift(adapter="one") == 1
            assert "slow" in names(choir, pb)
            others += 1
        assert cold.result() == 7 and others > 3
        assert cold_load.result().changed
    a = adapter(choir, pb, "slow")
    assert a.waits == 1 and a.wait_ms > 1000
    stats = choir.GetStats(pb.GetStatsRequest(), timeout=5).models[0].adapters
    assert stats.waits >= 1 and stats.wait_ms >= a.wait_ms and stats.loads == 3 and stats.in_use == 0


def test_running_requests_keep_their_version(served, ask, home, help, pb):
    choir = served[1]
    write(home / "one", 1)
    call = choir.Generate(help.request("<|slow|>", adapter="one", sampling={"max_tokens": 40}), timeout=60)
    events = [next(call), next(call)]
    write(home / "one", 9)
    assert load(choir, pb, "one", replace=True).changed
    assert ask.shift(adapter="one") == 9
    choir.UnloadAdapter(pb.UnloadAdapterRequest(name="one"), timeout=5)
    events += list(call)
    text = help.text(events)
    assert len(text) == 40 and text == letters(ord(text[0]) - 97, 40)
    base = list(choir.Generate(help.request("<|slow|>", sampling={"max_tokens": 2}), timeout=60))
    assert (ord(text[0]) - ord(help.text(base)[0])) % 26 == 1
    assert "one" not in names(choir, pb)
    assert refused(choir.Generate(help.request(adapter="one"), timeout=5)).code() == NOT_FOUND


def test_a_folder_that_vanishes(served, ask, home, pb):
    choir = served[1]
    shutil.rmtree(home / "two")
    error = refused(choir.Generate(ask.help.request(adapter="two"), timeout=10))
    assert error.code() == PRECONDITION and "two" in error.details(), error
    assert adapter(choir, pb, "two").state == pb.FAILED and adapter(choir, pb, "two").error != ""
    assert ask.shift(adapter="one") == 1
    write(home / "two", 4)
    load(choir, pb, "two", replace=True)
    assert ask.shift(adapter="two") == 4 and adapter(choir, pb, "two").error == ""


def test_poison_is_quarantined(home, launch, stub, help, pb):
    """FAULTS 28: a poisoned adapter's requests end DATA_LOSS; after some it is given to nobody until it is loaded anew."""
    write(home / "bad", 3, poison=True)
    choir = stub(launch("--adapters", str(home)))
    ask = Asker(choir, help)
    codes = [refused(choir.Generate(help.request(adapter="bad"), timeout=10)).code() for _ in range(4)]
    assert codes == [grpc.StatusCode.DATA_LOSS] * 3 + [PRECONDITION]
    a = adapter(choir, pb, "bad")
    assert a.state == pb.QUARANTINED and a.quarantined
    assert ask.shift() == 0 and ask.shift(adapter="one") == 1
    help.pages_back(choir)
    write(home / "bad", 3)
    load(choir, pb, "bad", replace=True)
    assert ask.shift(adapter="bad") == 3 and not adapter(choir, pb, "bad").quarantined


def test_swaps_under_traffic(home, launch, stub, help, pb):
    """Loads, reloads and unloads while requests run: no stale token, no failed request, no growing memory."""
    many, n_swaps = 6, 300
    now = {f"m{i}": 0 for i in range(many)}  # the last swap whose load has returned: nothing older may be seen
    for name in now:
        swap(home, name, 0, size=65536)
    server = launch("--adapters", str(home), "--adapter-bytes", "700000")
    choir = stub(server)
    ask = Asker(choir, help)
    stop, history = threading.Event(), {name: [0] for name in now}

    def client(seed):
        chance, n = random.Random(seed), 0
        while not stop.is_set():
            name = f"m{chance.randrange(many)}"
            before = now[name]
            shift = ask.shift(adapter=name)
            after = len(history[name])
            assert shift in history[name][before:after + 1], (name, shift, history[name][before:after + 1])
            n += 1
        return n

    chance = random.Random(7)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, seed) for seed in range(4)]
        held = []
        try:
            for i in range(n_swaps):
                name = f"m{chance.randrange(many)}"
                shift = (history[name][-1] + 1) % 26
                history[name].append(shift)  # from now on it may be seen
                swap(home, name, shift, size=65536)
                load(choir, pb, name, replace=True)
                now[name] = len(history[name]) - 1
                extra = f"x{i % 3}"
                load(choir, pb, extra, path=chance.choice(["one", "two", "five"]), replace=True)
                choir.UnloadAdapter(pb.UnloadAdapterRequest(name=extra), timeout=5)
                assert not any(c.done() for c in clients), [c.exception() for c in clients if c.done()]
                if i % 20 == 19:
                    memory = choir.GetStats(pb.GetStatsRequest(), timeout=5).server
                    held.append(next(u.bytes for u in memory.memory if u.what == "adapters"))
        finally:
            stop.set()
        assert all(c.result() > 20 for c in clients)
    assert max(held[len(held) // 2:]) <= 2 * max(held[:len(held) // 2])
    help.pages_back(choir)
    stats = choir.GetStats(pb.GetStatsRequest(), timeout=5).models[0]
    assert stats.failed == 0 and stats.adapters.in_use == 0 and stats.adapters.held_bytes <= 700000
    assert stats.adapters.registered == many + 3
    for name in now:
        assert ask.shift(adapter=name) == history[name][-1]


def test_kill_while_loading(home, launch, stub, help, pb):
    """FAULTS 9: whenever the server is killed, a new one has what the folder has, and loading again is OK."""
    write(home / "slow", 7, make_ms=400)
    files = {f: f.read_bytes() for f in home.rglob("*") if f.is_file()}
    for wait in (0.02, 0.1, 0.2, 0.35, 0.5):
        server = launch("--adapters", str(home))
        choir = stub(server)
        assert names(choir, pb) == ["five", "one", "slow", "two"]
        assert {a.state for a in choir.ListAdapters(pb.ListAdaptersRequest(), timeout=5).adapters} == {pb.REGISTERED}
        loading = choir.LoadAdapter.future(pb.LoadAdapterRequest(name="x", path="slow"), timeout=20)
        time.sleep(wait)
        server.signal(signal.SIGKILL)
        server.wait_exit()
        assert loading.exception() is not None or loading.result().changed
        assert {f: f.read_bytes() for f in home.rglob("*") if f.is_file()} == files
    choir = stub(launch("--adapters", str(home)))
    assert load(choir, pb, "x", path="slow").changed and not load(choir, pb, "x", path="slow").changed
    assert Asker(choir, help).shift(adapter="x") == 7


def test_many_wait_for_little_memory(home, launch, stub, help, pb):
    """More adapters wanted at once than memory holds: each request is answered in its turn."""
    for i in range(20):
        write(home / f"a{i}", i, size=100000)
    choir = stub(launch("--adapters", str(home), "--adapter-bytes", "450000"))
    ask = Asker(choir, help)
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(ask.shift, adapter=f"a{i % 20}") for i in range(60)]
        assert [a.result() for a in asked] == [i % 20 for i in range(60)]
    stats = choir.GetStats(pb.GetStatsRequest(), timeout=5).models[0].adapters
    assert stats.evictions > 0 and stats.held_bytes <= 450000 and stats.waits > 0 and stats.in_use == 0


def test_a_server_that_stops_while_it_loads(home, launch, stub, pb):
    write(home / "slow", 7, make_ms=1000)
    server = launch("--adapters", str(home))
    choir = stub(server)
    waiting = [choir.LoadAdapter.future(pb.LoadAdapterRequest(name=f"x{i}", path="slow"), timeout=20) for i in range(30)]
    time.sleep(0.3)
    server.signal()
    time.sleep(0.1)
    server.signal()
    assert server.wait_exit(20) == 0
    assert all(w.exception() is not None or w.result().changed for w in waiting)
