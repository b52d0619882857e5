"""What only a raw HTTP/2 client can see or do: trailers-only refusals, floods, huge headers, idle peers."""
import socket
import struct
import time

import grpc
import pytest

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, CONTINUATION = 0, 1, 3, 4, 6, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name, value):
    """HPACK: literal without indexing, new name, no Huffman."""
    def text(data):
        n = len(data)
        if n < 127:
            return bytes([n]) + data
        out, n = bytearray([127]), n - 127
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        out.append(n)
        return bytes(out) + data
    return b"\x00" + text(name.encode()) + text(value.encode())


def request_headers(path, *more):
    pairs = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"),
             ("content-type", "application/grpc"), ("te", "trailers"), *more]
    return b"".join(literal(n, v) for n, v in pairs)


class Peer:
    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self.buffer = b""

    def send(self, data):
        self.socket.sendall(data)

    def call(self, stream, path, message, *more):
        self.send(frame(HEADERS, END_HEADERS, stream, request_headers(path, *more)) +
                  frame(DATA, END_STREAM, stream, b"\0" + struct.pack(">I", len(message)) + message))

    def next(self):
        """(kind, flags, stream, payload), or None when the peer has closed."""
        while True:
            if len(self.buffer) >= 9:
                n = int.from_bytes(self.buffer[:3], "big")
                if len(self.buffer) >= 9 + n:
                    kind, flags = self.buffer[3], self.buffer[4]
                    stream = int.from_bytes(self.buffer[5:9], "big")
                    payload = self.buffer[9:9 + n]
                    self.buffer = self.buffer[9 + n:]
                    if kind == SETTINGS and not flags & ACK:
                        self.send(frame(SETTINGS, ACK, 0))
                    if kind == PING and not flags & ACK:
                        self.send(frame(PING, ACK, 0, payload))
                    return kind, flags, stream, payload
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self.buffer += data

    def until(self, wanted):
        """Frames up to the first one that `wanted` takes; None at the connection's end."""
        while (f := self.next()) is not None:
            if wanted(f):
                return f
        return None

    def close(self):
        self.socket.close()


def frames_of(peer, stream):
    """The frames of a stream until it ends."""
    frames = []
    while (f := peer.next()) is not None:
        if f[2] != stream:
            continue
        if f[0] in (DATA, HEADERS, RST):
            frames.append(f)
        if f[0] == RST or (f[0] in (DATA, HEADERS) and f[1] & END_STREAM):
            break
    return frames


@pytest.mark.parametrize("name", ["bad", "unknown model", "unimplemented"])
def test_refusals_are_trailers_only(shared, help, name):
    path = "/choir.v1.Choir/Feedback" if name == "unimplemented" else "/choir.v1.Choir/Generate"
    request = help.request(sampling={"n": 99}) if name == "bad" else help.request(model="nobody")
    peer = Peer(shared)
    peer.call(1, path, request.SerializeToString())
    frames = frames_of(peer, 1)
    assert [f[0] for f in frames if f[0] != RST] == [HEADERS] and frames[0][1] & END_STREAM
    peer.close()


def test_an_answer_has_headers_then_data_then_trailers(shared, help):
    peer = Peer(shared)
    peer.call(1, "/choir.v1.Choir/Generate", help.request().SerializeToString())
    kinds = [f[0] for f in frames_of(peer, 1)]
    assert kinds[0] == HEADERS and kinds[-1] == HEADERS and kinds.count(HEADERS) == 2
    assert set(kinds[1:-1]) == {DATA}
    peer.close()


@pytest.mark.simulated
def test_no_headers_before_the_first_token(launch, help):
    server = launch("--step-ms", "700")
    peer = Peer(server)
    peer.call(1, "/choir.v1.Choir/Generate", help.request(sampling={"max_tokens": 2}).SerializeToString())
    peer.socket.settimeout(0.4)
    try:
        early = peer.until(lambda f: f[0] == HEADERS)
    except TimeoutError:
        early = None
    assert early is None
    peer.socket.settimeout(10)
    assert peer.until(lambda f: f[0] == HEADERS)[2] == 1
    peer.close()


def test_ping_flood_is_cheap_and_sent_away(shared, choir, help):
    """Many connections full of pings whose answers nobody reads: others are served, memory stays."""
    pings = frame(PING, 0, 0, b"12345678") * 10000
    before = choir.GetStats(help.pb.GetStatsRequest(), timeout=5).server.resident_bytes
    for _ in range(30):
        peer = Peer(shared)
        peer.socket.setblocking(False)
        try:
            peer.send(pings)
        except OSError:
            pass
        peer.close()
        assert choir.ListModels(help.pb.ListModelsRequest(), timeout=5).models
    peer = Peer(shared)
    try:
        for _ in range(20):
            peer.send(pings)
    except OSError:
        pass
    try:
        goaway = peer.until(lambda f: f[0] == GOAWAY)
    except OSError:
        goaway = None
    assert goaway is None or b"too_many_pings" in goaway[3]
    peer.close()
    assert help.ids(list(choir.Generate(help.request(), timeout=60)))
    # A sanitizer keeps 256 MiB of what was freed, and gives the rest back in its own time.
    for _ in range(60):
        after = choir.GetStats(help.pb.GetStatsRequest(), timeout=5).server.resident_bytes
        if after < before + (400 << 20):
            break
        time.sleep(0.5)
    assert after < before + (400 << 20)


def test_huge_headers_are_refused(shared, choir, help):
    peer = Peer(shared)
    block = request_headers("/choir.v1.Choir/Generate", ("x-large", "x" * 100000))
    parts = [block[i:i + 16000] for i in range(0, len(block), 16000)]
    for i, part in enumerate(parts):
        flags = END_HEADERS if i == len(parts) - 1 else 0
        peer.send(frame(HEADERS if i == 0 else CONTINUATION, flags, 1, part))
    peer.send(frame(DATA, END_STREAM, 1, b"\0\0\0\0\0"))
    end = peer.until(lambda f: f[2] == 1 and f[0] in (HEADERS, RST, DATA) or f[0] == GOAWAY)
    assert end is None or end[0] in (HEADERS, RST, GOAWAY)
    assert end is None or end[0] != HEADERS or end[1] & END_STREAM
    assert help.ids(list(choir.Generate(help.request(), timeout=60)))
    peer.close()


def test_rapid_resets(shared, choir, help):
    message = help.request(sampling={"max_tokens": 64}).SerializeToString()
    peer = Peer(shared)
    try:
        for i in range(400):
            stream = 1 + 2 * i
            peer.call(stream, "/choir.v1.Choir/Generate", message)
            peer.send(frame(RST, 0, stream, struct.pack(">I", 8)))
    except OSError:
        pass
    assert help.ids(list(choir.Generate(help.request(), timeout=60)))
    peer.close()
    help.pages_back(choir)


def test_garbage_and_idle_connections(shared, choir, help):
    idle = [Peer(shared) for _ in range(200)]
    silent = [socket.create_connection(("127.0.0.1", shared.port)) for _ in range(50)]
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", shared.port)) as s:
            s.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)))
    began = time.monotonic()
    assert help.ids(list(choir.Generate(help.request(), timeout=60)))
    assert time.monotonic() - began < 30
    for peer in idle:
        peer.close()
    for s in silent:
        s.close()


@pytest.mark.simulated
def test_one_address_may_not_connect_too_often(launch, rpc, pb):
    """A crowd beyond the burst is closed at once; the rate lets later ones in."""
    server = launch()
    early = rpc.ChoirStub(server.channel())
    assert early.ListModels(pb.ListModelsRequest(), timeout=5).models
    for _ in range(3000):
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
        except OSError:
            pass
    assert early.ListModels(pb.ListModelsRequest(), timeout=5).models
    late = rpc.ChoirStub(server.channel())
    assert late.ListModels(pb.ListModelsRequest(), timeout=20, wait_for_ready=True).models


@pytest.mark.simulated
def test_more_connections_than_files(launch, rpc, pb):
    """The listener outlives a lack of file descriptors, and open connections do not notice."""
    server = launch(max_files=160)
    early = rpc.ChoirStub(server.channel())
    assert early.ListModels(pb.ListModelsRequest(), timeout=5).models
    crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(400)]
    time.sleep(0.3)
    assert early.ListModels(pb.ListModelsRequest(), timeout=5).models
    for s in crowd:
        s.close()
    late = rpc.ChoirStub(server.channel())
    assert late.ListModels(pb.ListModelsRequest(), timeout=20, wait_for_ready=True).models


@pytest.mark.simulated
def test_a_message_that_never_comes(launch, stub, help):
    server = launch("--stuck-ms", "500")
    peer = Peer(server)
    peer.send(frame(HEADERS, END_HEADERS, 1, request_headers("/choir.v1.Choir/Generate")))
    frames = frames_of(peer, 1)
    assert frames and frames[-1][0] in (HEADERS, RST)
    s = stub(server)
    assert s.GetStats(help.pb.GetStatsRequest(), timeout=5).server.open_calls <= 2
    peer.close()


@pytest.mark.simulated
def test_too_many_calls(launch, stub, help):
    server = launch("--step-ms", "20", "--max-calls", "4")
    s = stub(server)
    running = [s.Generate(help.request(sampling={"max_tokens": 1000})) for _ in range(4)]
    for call in running:
        next(call)
    with pytest.raises(grpc.RpcError) as error:
        list(s.Generate(help.request(), timeout=5))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "4" in error.value.details()
    for call in running:
        call.cancel()
