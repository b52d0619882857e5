"""Generate: what a good client sees."""
import concurrent.futures
import threading
import time

import grpc
import pytest


def test_order_of_events(choir, help):
    events = list(choir.Generate(help.request(), timeout=60))
    kinds = [e.WhichOneof("event") for e in events]
    assert kinds[0] == "started" and kinds[-1] == "done"
    assert set(kinds[1:-1]) == {"delta"}
    done = events[-1].done
    assert list(done.finish_reason) in (["length"], ["stop"])
    assert done.usage.prompt_tokens == events[0].started.prompt_tokens > 0
    assert done.usage.output_tokens >= len(help.ids(events)) > 0
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.output_tokens
    assert done.timings.prefill_ms >= 0 and done.timings.decode_ms >= 0


def test_request_id_is_kept_or_made(choir, help):
    own = next(choir.Generate(help.request(request_id="mine-1"), timeout=60))
    assert own.started.request_id == "mine-1"
    made = {next(choir.Generate(help.request(), timeout=60)).started.request_id for _ in range(3)}
    assert len(made) == 3 and "" not in made


def test_same_id_twice_is_fine(choir, help):
    calls = [choir.Generate(help.request(request_id="twin"), timeout=60) for _ in range(2)]
    assert all(list(c)[-1].HasField("done") for c in calls)


def test_prompt_tokens_and_chat(choir, help, pb):
    ids = choir.Tokenize(pb.TokenizeRequest(text="Hello"), timeout=5).ids
    by_text = list(choir.Generate(help.request("Hello"), timeout=60))
    by_ids = list(choir.Generate(help.request(tokens=pb.TokenList(ids=ids)), timeout=60))
    assert help.ids(by_text) == help.ids(by_ids)
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hello")])
    rendered = choir.Tokenize(pb.TokenizeRequest(chat=chat), timeout=5).ids
    by_chat = list(choir.Generate(help.request(chat=chat), timeout=60))
    assert by_chat[0].started.prompt_tokens == len(rendered) > len(ids)


def test_seed_is_told_and_repeats(choir, help):
    sampling = {"temperature": 1.0, "max_tokens": 12}
    first = list(choir.Generate(help.request(sampling=sampling), timeout=60))
    sampling["seed"] = first[0].started.seed
    again = list(choir.Generate(help.request(sampling=sampling), timeout=60))
    assert again[0].started.seed == first[0].started.seed
    assert help.ids(first) == help.ids(again)


def test_max_tokens(choir, help):
    events = list(choir.Generate(help.request(sampling={"max_tokens": 5, "ignore_eos": True}), timeout=60))
    assert len(help.ids(events)) == 5
    assert list(events[-1].done.finish_reason) == ["length"]


def test_logprobs(choir, help):
    events = list(choir.Generate(help.request(sampling={"logprobs": 2, "max_tokens": 4}), timeout=60))
    deltas = [e.delta for e in events if e.HasField("delta")]
    seen = [(i, p) for d in deltas for i, p in zip(d.token_ids, d.logprobs, strict=True)]
    assert seen
    for token, logprob in seen:
        assert logprob.token == token and logprob.logprob <= 0 and len(logprob.top) == 2
    none = list(choir.Generate(help.request(), timeout=60))
    assert all(not e.delta.logprobs for e in none)


def test_several_answers(choir, help):
    events = list(choir.Generate(
        help.request(sampling={"n": 3, "max_tokens": 6, "temperature": 1, "seed": 5, "ignore_eos": True}),
        timeout=60))
    assert {e.delta.index for e in events if e.HasField("delta")} == {0, 1, 2}
    assert len(events[-1].done.finish_reason) == 3
    for index in range(3):
        assert len(help.ids(events, index)) == 6


@pytest.mark.simulated
def test_end_of_text_and_stops(choir, help):
    short = list(choir.Generate(help.request("<|short|>"), timeout=60))
    assert help.text(short) == "ok" and list(short[-1].done.finish_reason) == ["stop"]
    events = list(choir.Generate(help.request("x", sampling={"max_tokens": 60, "stop": ["mno"]}), timeout=60))
    assert help.text(events).endswith("l") and "m" not in help.text(events)
    assert list(events[-1].done.stop_match) == ["mno"]


@pytest.mark.simulated
def test_text_is_whole_characters(choir, help):
    events = list(choir.Generate(help.request("<|accent|>", sampling={"max_tokens": 64}), timeout=60))
    text = help.text(events)
    assert text.startswith("na\u00efve \u2615 \U0001f600 na") and "\ufffd" not in text[:-1]


@pytest.mark.simulated
def test_a_nul_that_the_model_writes_arrives(choir, help, pb):
    events = list(choir.Generate(help.request("<|nul|>", sampling={"max_tokens": 6}), timeout=60))
    ids = help.ids(events)
    assert 0 in ids and help.text(events).encode() == bytes(ids)
    assert choir.Detokenize(pb.DetokenizeRequest(ids=[97, 0, 98]), timeout=5).text == "a\0b"


@pytest.mark.simulated
def test_routes(choir, help, pb):
    events = list(choir.Generate(
        help.request(routing=pb.Routing(return_routes=True), sampling={"max_tokens": 3}), timeout=60))
    for delta in (e.delta for e in events if e.HasField("delta") and e.delta.token_ids):
        assert delta.routes.n_layers == 2 and delta.routes.n_used == 2
        assert len(delta.routes.experts) == len(delta.routes.weights) == 4


def test_64_streams_at_once(shared, stub, help):
    stubs = [stub(shared) for _ in range(4)]
    request = help.request("Hello", sampling={"max_tokens": 32, "ignore_eos": True})
    alone = help.ids(list(stubs[0].Generate(request, timeout=120)))

    def one(i):
        return help.ids(list(stubs[i % 4].Generate(request, timeout=300)))

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert all(a == alone for a in answers)
    help.pages_back(stubs[0])


def with_logprobs(help, events):
    """Tokens with everything that is said of them, bit for bit."""
    assert events[-1].HasField("done")
    return help.ids(events), [p.SerializeToString() for e in events if e.HasField("delta")
                              for p in e.delta.logprobs]


def test_same_answer_alone_and_among_31_others(shared, stub, help):
    """Others join and leave all the while; the second time the prompt's pages are in the prefix cache."""
    mine = help.request("The wolves came down to the river at night. " * 12, sampling={
        "temperature": 0.8, "top_p": 0.95, "seed": 7, "logprobs": 3, "max_tokens": 32, "ignore_eos": True})
    stubs = [stub(shared) for _ in range(4)]
    alone = with_logprobs(help, list(stubs[0].Generate(mine, timeout=120)))
    assert len(alone[0]) == 32

    def other(i):
        time.sleep(0.02 * (i % 8))
        request = help.request(f"{i} green bottles. " * (1 + i % 7), sampling={
            "temperature": i % 3 / 2, "seed": i, "max_tokens": 4 + 3 * (i % 9), "ignore_eos": True})
        assert list(stubs[i % 4].Generate(request, timeout=300))[-1].HasField("done")

    with concurrent.futures.ThreadPoolExecutor(31) as pool:
        others = [pool.submit(other, i) for i in range(31)]
        for _ in range(3):
            assert with_logprobs(help, list(stubs[1].Generate(mine, timeout=300))) == alone
        for o in others:
            o.result()
    help.pages_back(stubs[0])


def test_cancel_frees_pages(choir, help):
    call = choir.Generate(help.request(sampling={"max_tokens": 500, "ignore_eos": True}), timeout=60)
    next(call)
    next(call)
    call.cancel()
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.CANCELLED
    help.pages_back(choir)


def test_disconnect_frees_pages(shared, stub, choir, help):
    before = choir.GetStats(help.pb.GetStatsRequest(), timeout=5).models[0].cancelled
    channel = shared.channel()
    call = type(choir)(channel).Generate(
        help.request(sampling={"max_tokens": 1000, "ignore_eos": True}), timeout=60)
    next(call)
    channel.close()
    stats = help.pages_back(choir)
    assert stats.cancelled >= before


@pytest.mark.simulated
def test_deadline_while_decoding(launch, stub, help):
    server = launch("--step-ms", "20")
    s = stub(server)
    call = s.Generate(help.request(sampling={"max_tokens": 2000}), timeout=0.6)
    events = []
    with pytest.raises(grpc.RpcError) as error:
        for event in call:
            events.append(event)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(events) > 3
    help.pages_back(s)


@pytest.mark.simulated
def test_deadline_in_the_queue(launch, stub, help):
    server = launch("--step-ms", "20", "--max-sequences", "1")
    s = stub(server)
    running = s.Generate(help.request(sampling={"max_tokens": 300}))
    next(running)
    with pytest.raises(grpc.RpcError) as error:
        list(s.Generate(help.request("other"), timeout=0.3))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert next(running).HasField("delta")
    running.cancel()
    stats = help.pages_back(s)
    assert stats.prompt_tokens == len("Hello")


@pytest.mark.simulated
def test_slow_reader_holds_nobody(launch, stub, help):
    """One client reads nothing while another takes a long answer; the first gets all of its own later."""
    server = launch("--outbox", "4096")
    small = {"grpc.http2.lookahead_bytes": 1024, "grpc.http2.bdp_probe": 0}
    slow = stub(server, **small).Generate(
        help.request(sampling={"max_tokens": 4000, "logprobs": 2}), timeout=120)
    next(slow)
    fast = stub(server)
    events = list(fast.Generate(help.request(sampling={"max_tokens": 3000}), timeout=60))
    assert len(help.ids(events)) == 3000
    rest = list(slow)
    assert sum(len(e.delta.token_ids) for e in rest) == 4000
    help.pages_back(fast)


@pytest.mark.simulated
def test_reader_that_stopped_is_ended(launch, stub, help):
    server = launch("--outbox", "4096", "--slow-reader-ms", "500", "--stuck-ms", "1500")
    small = {"grpc.http2.lookahead_bytes": 1024, "grpc.http2.bdp_probe": 0}
    slow = stub(server, **small).Generate(
        help.request(sampling={"max_tokens": 4000, "logprobs": 2}), timeout=120)
    next(slow)
    other = stub(server)
    stats = help.pages_back(other, seconds=20)
    assert stats.running == 0
    time.sleep(3)
    with pytest.raises(grpc.RpcError) as error:
        list(slow)
    assert error.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED,
                                  grpc.StatusCode.ABORTED)


@pytest.mark.simulated
def test_poisoned_logits_are_data_loss(choir, help):
    call = choir.Generate(help.request("<|nan|>"), timeout=60)
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.DATA_LOSS
    assert ("grpc-retry-pushback-ms", "-1") in [tuple(m) for m in error.value.trailing_metadata()]
    assert help.text(list(choir.Generate(help.request("still here"), timeout=60)))


@pytest.mark.simulated
def test_full_queue_is_refused_at_once(launch, stub, help):
    server = launch("--step-ms", "20", "--max-sequences", "1", "--max-queued", "2")
    s = stub(server)
    request = help.request(sampling={"max_tokens": 3000})
    running = [s.Generate(request)]
    next(running[0])  # it runs now: the other two fill the queue
    running += [s.Generate(request) for _ in range(2)]
    end = time.monotonic() + 5
    while s.GetStats(help.pb.GetStatsRequest()).models[0].waiting < 2 and time.monotonic() < end:
        time.sleep(0.02)
    with pytest.raises(grpc.RpcError) as error:
        list(s.Generate(help.request(), timeout=10))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    pushback = dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]
    assert int(pushback) > 0
    for call in running:
        call.cancel()
    help.pages_back(s)


def test_cancel_storm(choir, help):
    """Cancels at every moment from before the request is read to after its end."""
    stop = threading.Event()

    def many(k):
        for i in range(40):
            call = choir.Generate(help.request(sampling={"max_tokens": 24}), timeout=60)
            time.sleep((i * 7 + k * 3) % 20 / 1000)
            call.cancel()
            try:
                list(call)
            except grpc.RpcError as e:
                assert e.code() == grpc.StatusCode.CANCELLED
        stop.set()

    threads = [threading.Thread(target=many, args=(k,)) for k in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    help.pages_back(choir)
