"""Every field, wrong: a status code and a sentence that names the field, the value and the limit."""
import grpc
import pytest

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


def refused(call):
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    return error.value


@pytest.mark.parametrize("sampling, words", [
    ({"temperature": -1}, ["sampling.temperature", "-1", "100"]),
    ({"temperature": 101}, ["sampling.temperature", "101", "100"]),
    ({"temperature": float("nan")}, ["sampling.temperature", "nan"]),
    ({"temperature": float("inf")}, ["sampling.temperature", "inf"]),
    ({"top_p": 0}, ["sampling.top_p", "0"]),
    ({"top_p": 1.5}, ["sampling.top_p", "1.5", "1"]),
    ({"min_p": -0.5}, ["sampling.min_p", "-0.5"]),
    ({"min_p": 2}, ["sampling.min_p", "2"]),
    ({"repetition_penalty": 0}, ["sampling.repetition_penalty", "0"]),
    ({"repetition_penalty": 11}, ["sampling.repetition_penalty", "11", "10"]),
    ({"presence_penalty": 3}, ["sampling.presence_penalty", "3", "2"]),
    ({"frequency_penalty": -3}, ["sampling.frequency_penalty", "-3", "-2"]),
    ({"max_tokens": 0}, ["sampling.max_tokens", "0", "1"]),
    ({"min_tokens": 17}, ["sampling.min_tokens", "17", "16"]),
    ({"stop": ["x"] * 17}, ["sampling.stop", "16"]),
    ({"stop": ["x" * 257]}, ["sampling.stop[0]", "257", "256"]),
    ({"stop": ["ok", ""]}, ["sampling.stop[1]", "empty"]),
    ({"stop_token_ids": [1] * 49}, ["sampling.stop_token_ids", "48"]),
    ({"stop_token_ids": [1, 4000000000]}, ["sampling.stop_token_ids[1]", "4000000000"]),
    ({"logit_bias": {i: 1.0 for i in range(1025)}}, ["sampling.logit_bias", "1024"]),
    ({"logit_bias": {4000000000: 1.0}}, ["sampling.logit_bias", "4000000000"]),
    ({"logit_bias": {1: 101.0}}, ["sampling.logit_bias", "101", "100"]),
    ({"logit_bias": {1: float("nan")}}, ["sampling.logit_bias", "nan"]),
    ({"logprobs": 21}, ["sampling.logprobs", "21", "20"]),
    ({"n": 0}, ["sampling.n", "0", "64"]),
    ({"n": 65}, ["sampling.n", "65", "64"]),
    ({"n": 2**31}, ["sampling.n", "2147483648", "64"]),
])
def test_sampling(choir, help, sampling, words):
    error = refused(choir.Generate(help.request(sampling=sampling), timeout=10))
    assert error.code() == INVALID
    for word in words:
        assert word in error.details(), error.details()


@pytest.mark.parametrize("fields, code, words", [
    ({"request_id": "x" * 129}, INVALID, ["request_id", "129", "128"]),
    ({"model": "x" * 257}, INVALID, ["model", "257", "256"]),
    ({"model": "nobody"}, grpc.StatusCode.NOT_FOUND, ["nobody"]),
    ({"priority": 1000001}, INVALID, ["priority", "1000001", "1000000"]),
    ({"adapter": "french"}, grpc.StatusCode.NOT_FOUND, ["adapter", "french"]),
    ({"auto_adapter": True}, PRECONDITION, ["auto_adapter", "yet"]),
    ({"ensemble": "three"}, PRECONDITION, ["ensemble", "not there yet"]),
    ({"adapter": "x" * 257}, INVALID, ["adapter", "257", "256"]),
])
def test_fields(choir, help, fields, code, words):
    error = refused(choir.Generate(help.request(**fields), timeout=10))
    assert error.code() == code
    for word in words:
        assert word in error.details(), error.details()


def test_mix_and_router_version(choir, help, pb):
    part = pb.AdapterWeight(adapter="a", weight=1)
    error = refused(choir.Generate(help.request(mix=[part]), timeout=10))
    assert error.code() == grpc.StatusCode.NOT_FOUND and "adapter a" in error.details()
    error = refused(choir.Generate(help.request(mix=[part], adapter="b"), timeout=10))
    assert error.code() == INVALID and "at most one of" in error.details()
    error = refused(choir.Generate(help.request(mix=[part] * 9), timeout=10))
    assert error.code() == INVALID and "mix" in error.details() and "8" in error.details()
    error = refused(choir.Generate(help.request(routing=pb.Routing(router_version=3)), timeout=10))
    assert error.code() == PRECONDITION and "routing.router_version is 3" in error.details()


def test_inputs(choir, help, pb):
    error = refused(choir.Generate(pb.GenerateRequest(), timeout=10))
    assert error.code() == INVALID and "prompt" in error.details()
    error = refused(choir.Generate(help.request(""), timeout=10))
    assert error.code() == INVALID or error.code() is None
    error = refused(choir.Generate(help.request(tokens=pb.TokenList()), timeout=10))
    assert error.code() == INVALID and "tokens.ids" in error.details()
    error = refused(choir.Generate(help.request(tokens=pb.TokenList(ids=[1, 2**32 - 1])), timeout=10))
    assert error.code() == INVALID and "tokens.ids[1] is 4294967295" in error.details()
    error = refused(choir.Generate(help.request(chat=pb.Chat()), timeout=10))
    assert error.code() == INVALID and "chat.messages" in error.details()
    many = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")] * 4097)
    error = refused(choir.Generate(help.request(chat=many), timeout=10))
    assert error.code() == INVALID and "4096" in error.details()
    for role in ("", "x" * 65):
        chat = pb.Chat(messages=[pb.ChatMessage(role=role, content="x")])
        error = refused(choir.Generate(help.request(chat=chat), timeout=10))
        assert error.code() == INVALID and "chat.messages[0].role" in error.details()
    for field in ("tools_json", "variables_json"):
        for text in ("{", "3", '{"a":1,"a":2}' if field == "variables_json" else "{}"):
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")], **{field: text})
            error = refused(choir.Generate(help.request(chat=chat), timeout=10))
            assert error.code() == INVALID and f"chat.{field}" in error.details()


def test_prompt_over_the_context_says_both_numbers(choir, help, pb):
    limit = choir.ListModels(pb.ListModelsRequest(), timeout=5).models[0].max_tokens
    ids = [1] * (limit + 5)
    error = refused(choir.Generate(help.request(tokens=pb.TokenList(ids=ids)), timeout=10))
    assert error.code() == INVALID
    assert str(limit + 5) in error.details() and str(limit) in error.details()


def raw(channel, method, data):
    call = channel.unary_stream(f"/choir.v1.Choir/{method}")
    return refused(call(data, timeout=10))


def field(number, data):
    out, n = bytearray([number << 3 | 2]), len(data)
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out) + data


@pytest.mark.parametrize("name, data, words", [
    ("bad UTF-8 in a prompt", field(3, b"a\xff"), ["prompt", "UTF-8"]),
    ("half a character", field(3, "\u2615".encode()[:2]), ["prompt", "UTF-8"]),
    ("a lone surrogate", field(3, b"\xed\xa0\x80"), ["prompt", "UTF-8"]),
    ("overlong", field(3, b"\xc0\x80"), ["prompt", "UTF-8"]),
    ("a NUL in a prompt", field(3, b"a\0b"), ["prompt", "NUL"]),
    ("a NUL in an id", field(1, b"a\0b"), ["request_id", "NUL"]),
    ("bad UTF-8 in a message", field(5, field(1, field(1, b"user") + field(2, b"\xfe"))),
     ["chat.messages[0].content", "UTF-8"]),
    ("a NUL in a stop", field(3, b"x") + field(6, field(11, b"\0")), ["sampling.stop[0]", "NUL"]),
    ("cut short", b"\x1a\x05ab", ["well-formed"]),
    ("a group", b"\x1b\x1c", ["well-formed"]),
    ("field number 0", b"\x02\x00", ["well-formed"]),
    ("wrong wire type", b"\x18\x01", ["prompt", "wire type"]),
    ("sampling twice", field(3, b"x") + field(6, b"") + field(6, b""), ["sampling", "twice"]),
    ("endless varint", b"\x60" + b"\xff" * 11, ["well-formed"]),
])
def test_wire(shared, name, data, words):
    error = raw(shared.channel(), "Generate", data)
    assert error.code() == INVALID, name
    for word in words:
        assert word in error.details(), error.details()


def test_unknown_fields_are_ignored(shared, help, pb):
    data = help.request().SerializeToString() + field(15, b"new") + b"\xf8\x7f\x01"
    call = shared.channel().unary_stream("/choir.v1.Choir/Generate",
                                         response_deserializer=pb.GenerateEvent.FromString)
    assert list(call(data, timeout=60))[-1].HasField("done")


def test_too_many_fields(shared):
    error = raw(shared.channel(), "Generate", field(3, b"x") + b"\xf8\x7f\x01" * 300000)
    assert error.code() == INVALID and "262144" in error.details()


def test_too_large_a_message(shared, stub, help):
    s = stub(shared)
    error = refused(s.Generate(help.request("x" * (5 << 20)), timeout=10))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert help.ids(list(s.Generate(help.request(), timeout=60)))


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_messages_are_bounded_too(choir, help, pb, algorithm):
    text = "hello " * 2000
    plain = choir.Tokenize(pb.TokenizeRequest(text=text), timeout=10)
    assert choir.Tokenize(pb.TokenizeRequest(text=text), timeout=10, compression=algorithm) == plain
    before = choir.GetStats(pb.GetStatsRequest(), timeout=5).server.resident_bytes
    with pytest.raises(grpc.RpcError) as error:
        choir.Tokenize(pb.TokenizeRequest(text="x" * (100 << 20)), timeout=60, compression=algorithm)
    assert error.value.code() == INVALID and "4194304" in error.value.details()
    after = choir.GetStats(pb.GetStatsRequest(), timeout=5).server.resident_bytes
    assert after < before + (64 << 20)


def test_damaged_compression(shared):
    """A frame that says it is compressed and is not."""
    import struct
    from test_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, Peer, frame, frames_of, request_headers
    peer = Peer(shared)
    headers = request_headers("/choir.v1.Choir/Tokenize", ("grpc-encoding", "gzip"))
    body = b"\1" + struct.pack(">I", 20) + b"\x1f\x8b\x08\0" + b"\xff" * 16
    peer.send(frame(HEADERS, END_HEADERS, 1, headers) + frame(DATA, END_STREAM, 1, body))
    frames = frames_of(peer, 1)
    assert frames[0][0] == HEADERS and frames[0][1] & END_STREAM and b"damaged" in frames[0][3]
    peer.close()


def test_no_message_at_all(shared):
    call = shared.channel().stream_stream("/choir.v1.Choir/Generate")
    error = refused(call(iter([]), timeout=10))
    assert error.code() == INVALID


def test_unknown_methods_and_those_to_come(shared, choir, pb):
    for path in ("/choir.v1.Choir/Nothing", "/other.Service/Do", "/"):
        error = refused(shared.channel().unary_stream(path)(b"", timeout=10))
        assert error.code() == grpc.StatusCode.UNIMPLEMENTED, path
    for call in (choir.Feedback, choir.ListRouterVersions, choir.PromoteRouter, choir.RollbackRouter,
                 choir.GetRouterStats):
        with pytest.raises(grpc.RpcError) as error:
            call.__call__({choir.Feedback: pb.FeedbackRequest(),
                           choir.ListRouterVersions: pb.ListRouterVersionsRequest(),
                           choir.PromoteRouter: pb.PromoteRouterRequest(),
                           choir.RollbackRouter: pb.RollbackRouterRequest(),
                           choir.GetRouterStats: pb.GetRouterStatsRequest()}[call], timeout=10)
        assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "not there yet" in error.value.details()


def test_a_refusal_costs_nothing(choir, help, pb):
    before = choir.GetStats(pb.GetStatsRequest(), timeout=5).models[0].accepted
    for _ in range(20):
        refused(choir.Generate(help.request(sampling={"n": 0}), timeout=10))
    assert choir.GetStats(pb.GetStatsRequest(), timeout=5).models[0].accepted == before
