"""Metrics and health over HTTP: what they say, who may read them, and clients that mean no good."""
import json
import os
import re
import socket
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

simulated = pytest.mark.simulated
HEAD = re.compile(r"# (HELP|TYPE) (choir_[a-z_]+) (.+)")
LABEL = r'[a-z]+="(?:[^"\\\n]|\\\\|\\"|\\n)*"'
SAMPLE = re.compile(r"(choir_[a-z_]+)(?:\{(" + LABEL + r"(?:," + LABEL + r")*)\})? (-?[0-9.e+-]+|\+Inf)")
# Of the message's fields, what /metrics calls them.
FIELDS = {
    "healthy": "healthy", "running": "requests_running", "waiting": "requests_waiting",
    "paused": "requests_paused", "kv_pages": "kv_pages", "kv_pages_free": "kv_pages_free",
    "kv_pages_cached": "kv_pages_cached", "steps": "steps_total", "prompt_tokens": "prompt_tokens_total",
    "cached_tokens": "cached_tokens_total", "output_tokens": "output_tokens_total",
    "accepted": "requests_accepted_total", "refused": "requests_refused_total", "done": "requests_done_total",
    "cancelled": "requests_cancelled_total", "expired": "requests_expired_total",
    "failed": "requests_failed_total", "preempted": "preemptions_total", "late": "late_sequences_total",
}
EXPERT_FIELDS = {
    "experts": "experts", "slots": "expert_slots", "slots_used": "expert_slots_used",
    "budget_bytes": "expert_budget_bytes", "held_bytes": "expert_held_bytes", "hits": "expert_hits_total",
    "late_hits": "expert_late_hits_total", "misses": "expert_misses_total", "reads": "expert_reads_total",
    "bytes_read": "expert_read_bytes_total", "retries": "expert_read_retries_total",
    "damaged": "expert_damaged_total", "failed": "expert_failed_total", "prefetched": "expert_prefetched_total",
    "prefetch_used": "expert_prefetch_used_total", "prefetching": "expert_prefetching",
    "groups": "expert_groups", "step_tokens": "expert_step_tokens",
}
# What the simulated model says besides, before its first step; it grows by one a step.
EXPERT_OTHERS = {"expert_late_total": 113, "expert_prefetch_wasted_total": 106, "expert_predicted_total": 107,
                 "expert_predicted_right_total": 108}
EXPERT_SECONDS = {"expert_stall_seconds_total": 1.5, "expert_busy_seconds_total": 2.5}


def parse(text):
    """{(name, labels): value}, as strict as the format: head before samples, a metric's lines together."""
    assert text.endswith("\n")
    found, seen, current, kind = {}, set(), None, None
    lines = text[:-1].split("\n")
    for number, line in enumerate(lines):
        head = HEAD.fullmatch(line)
        if head and head[1] == "HELP":
            current, kind = head[2], None
            assert current not in seen, line
            seen.add(current)
            assert lines[number + 1].startswith(f"# TYPE {current} "), line
        elif head:
            kind = head[3]
            assert head[2] == current and kind in ("counter", "gauge", "histogram"), line
            assert (kind == "counter") == current.endswith("_total"), line
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample and kind, line
            suffix = sample[1].removeprefix(current)
            assert suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",)), line
            key = (sample[1].removeprefix("choir_"), sample[2] or "")
            assert key not in found, line
            found[key] = float(sample[3])
            assert kind != "counter" or found[key] >= 0, line
    # A parser that others wrote agrees, to the last sample.
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    assert len(samples) == len(found)
    return found


def scrape(server, query="", **options):
    status, headers, text = server.http("/metrics" + query, **options)
    assert status == 200, text
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parse(text)


def error_of(answer, status):
    assert answer[0] == status, answer
    assert answer[1]["Content-Type"] == "application/json"
    error = json.loads(answer[2])["error"]
    assert set(error) == {"message", "type", "code"} and all(error.values())
    return error


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.03)
    return False


class Raw:
    """A connection that says what it likes."""

    def __init__(self, server):
        self.socket = socket.create_connection(("127.0.0.1", server.http_port), timeout=10)

    def send(self, data):
        try:
            self.socket.sendall(data)
            return True
        except (BrokenPipeError, ConnectionResetError):
            return False

    def read(self, seconds=10):
        """All until the peer closes; None if it does not within the time."""
        self.socket.settimeout(seconds)
        got = b""
        try:
            while chunk := self.socket.recv(65536):
                got += chunk
        except TimeoutError:
            return None
        except ConnectionResetError:
            pass
        return got


def test_metrics_are_those_of_get_stats(shared, choir, help, pb):
    list(choir.Generate(help.request(), timeout=60))
    help.pages_back(choir)
    time.sleep(0.15)  # the text is at most 100 ms old
    found, stats = scrape(shared), choir.GetStats(pb.GetStatsRequest(), timeout=5)
    model = stats.models[0]
    for field, name in FIELDS.items():
        assert found[name, f'model="{model.model}"'] == getattr(model, field), field
    of = f'model="{model.model}"'
    assert found["step_rows_total", of] / found["steps_total", of] == pytest.approx(model.mean_batch_rows)
    assert 1e3 * found["step_seconds_total", of] / found["steps_total", of] == pytest.approx(model.mean_step_ms)
    assert 1e3 * found["last_step_seconds", of] == pytest.approx(model.last_step_ms, abs=1e-5)
    assert found["build_info", f'version="{stats.server.version}"'] == 1
    assert found["draining", ""] == 0 and 0 < found["uptime_seconds", ""] <= stats.server.uptime_s
    assert found["calls_total", ""] == stats.server.calls - 1  # the call that asked
    assert found["refused_calls_total", ""] == stats.server.refused_calls
    assert found["internal_errors_total", ""] == stats.server.internal_errors
    assert found["resident_memory_bytes", ""] > 1 << 20
    assert {what for name, what in found if name == "memory_bytes"} == \
        {f'what="{use.what}"' for use in stats.server.memory}


def test_counters_grow(shared, choir, help):
    help.pages_back(choir)
    time.sleep(0.15)
    before = scrape(shared)
    events = list(choir.Generate(help.request(sampling={"max_tokens": 7, "ignore_eos": True}), timeout=60))
    usage = events[-1].done.usage
    help.pages_back(choir)
    time.sleep(0.15)
    after = scrape(shared)
    grown = {name: after[name, labels] - before[name, labels] for name, labels in before
             if labels.startswith("model=")}
    assert grown["output_tokens_total"] == usage.output_tokens == 7
    assert grown["prompt_tokens_total"] == usage.prompt_tokens
    assert grown["cached_tokens_total"] == usage.cached_tokens
    assert grown["requests_accepted_total"] == grown["requests_done_total"] == 1
    assert grown["steps_total"] >= 7 and grown["step_seconds_total"] > 0
    assert grown["requests_failed_total"] == grown["requests_refused_total"] == 0


def test_paths_and_methods(shared):
    assert shared.http("/healthz")[::2] == (200, "ok\n")
    assert shared.http("/readyz?verbose")[::2] == (200, "ready\n")
    for path in ("/", "/metrics/", "/metricsx", "/v1/models", "//metrics", "/%6detrics", "/../metrics"):
        assert error_of(shared.http(path), 404)["code"] == "not_found"
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        for path in ("/metrics", "/healthz"):
            answer = shared.http(path, method, body="x" if method == "POST" else None)
            assert error_of(answer, 405)["code"] == "method_not_allowed"
            assert answer[1]["Allow"] == "GET, HEAD"
    assert shared.http("/metrics", "BREW")[0] in (400, 501)
    status, headers, text = shared.http("/metrics", "HEAD")
    assert status == 200 and int(headers["Content-Length"]) > 1000 and text == ""


def test_one_connection_many_requests(shared):
    raw = Raw(shared)
    raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3 +
             b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n" +
             b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answers = raw.read().split(b"HTTP/1.1 200 OK\r\n")
    assert len(answers) == 6 and answers[-1].endswith(b"\r\n\r\nready\n")
    assert all(a.endswith(b"\r\n\r\nok\n") for a in answers[1:4]) and answers[4].endswith(b"\r\n\r\n")
    raw = Raw(shared)
    raw.send(b"GET http://elsewhere/healthz HTTP/1.0\r\n\r\n")
    assert raw.read().endswith(b"ok\n")


@simulated
def test_streamed_experts(launch, stub, help, pb):
    server = launch("--stream-experts", "2")
    s = stub(server)
    of = 'model="simulated"'
    found = scrape(server)  # before the first step
    for name, value in {**EXPERT_OTHERS, **EXPERT_SECONDS}.items():
        assert found["" + name, of] == value, name
    list(s.Generate(help.request(sampling={"max_tokens": 5}), timeout=10))
    help.pages_back(s)
    time.sleep(0.15)
    found, experts = scrape(server), s.GetStats(pb.GetStatsRequest(), timeout=5).models[0].experts
    for field, name in EXPERT_FIELDS.items():
        assert found[name, of] == getattr(experts, field), field
    steps = found["steps_total", of]
    for name, value in EXPERT_OTHERS.items():
        assert found[name, of] == value + steps, name
    assert found["expert_streaming_info", of + ',io="pread",policy="router"'] == 1
    latency = "expert_read_latency_seconds"
    buckets = [(float(labels.split('le="')[1][:-1]), n) for (name, labels), n in found.items()
               if name == latency + "_bucket"]
    assert buckets == sorted(buckets) and buckets[-1][0] == float("inf")
    for le, n in buckets:  # 1 at once, 20 and more in 128 to 256 us, 3 for ever
        assert n == 1 + (20 + steps) * (le >= 256e-6) + 3 * (le == float("inf")), le
    assert found[latency + "_count", of] == buckets[-1][1]
    assert found[latency + "_sum", of] == pytest.approx(3.5)
    assert not any(name == "expert_heat" for name, _ in found)
    for query in ("?experts=0", "?experts", "?x=1&experts=11"):
        assert not any(name == "expert_heat" for name, _ in scrape(server, query))
    heat = {labels: value for (name, labels), value in scrape(server, "?a=b&experts=1").items()
            if name == "expert_heat"}
    assert heat == {f'{of},layer="{l}",expert="{x}"': 0.5 + 2 * l + x for l in range(2) for x in range(2)}


@simulated
@pytest.mark.parametrize("name,label", [('a"b\\c\nd', 'a\\"b\\\\c\\nd'), ("\u2615 {x=\"1\"}", '\u2615 {x=\\"1\\"}'),
                                        ("\udcff", "(not UTF-8)")])
def test_label_values_are_escaped(launch, name, label):
    server = launch("--name", name)
    assert scrape(server)["healthy", f'model="{label}"'] == 1


@simulated
def test_key(launch):
    server = launch("--api-key", "sesame")
    for value in (None, "Bearer sesam", "Bearer sesamee", "sesame", "", "Bearer ", "Basic sesame"):
        answer = server.http("/metrics", headers={"Authorization": value} if value is not None else {})
        assert error_of(answer, 401)["code"] == "invalid_api_key"
        assert answer[1]["WWW-Authenticate"] == "Bearer"
    assert scrape(server, headers={"Authorization": "Bearer sesame"})
    assert scrape(server, headers={"authorization": "bearer sesame"})
    assert server.http("/healthz")[0] == server.http("/readyz")[0] == 200


@simulated
def test_garbage_and_giants(launch):
    server = launch()
    assert server.http("/metrics", headers={"X": "y" * 15000})[0] == 200
    line = b"GET /metrics HTTP/1.1\r\n"
    bad = [line + b"X: " + b"y" * 20000 + b"\r\n\r\n",                        # one header too long
           line + b"".join(b"X%d: y\r\n" % i for i in range(4000)) + b"\r\n",  # too many
           b"GET /" + b"y" * 200000,                                          # a line without an end
           b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n",
           b"GET /metrics HTTP/9.9\r\n\r\n",
           b"\0" * 5000 + b"\n", b"\r\n\r\n\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
           line + b"Content-Length: 99999999999\r\n\r\n" + b"y" * 100000,
           line + b"Content-Length: -1\r\n\r\n",
           line + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + b"y" * 1000,
           line + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"y" * 4096 + b"\r\n1000\r\n" + b"y" * 4096]
    for data in bad:
        raw = Raw(server)
        raw.send(data)
        answer = raw.read()
        assert answer is not None, data[:80]
        assert not answer or answer.startswith(b"HTTP/1.1 4"), (data[:80], answer[:80])
    assert scrape(server)


@simulated
def test_slow_senders_are_closed(launch):
    server = launch("--http-request-ms", "600", "--http-idle-ms", "1500")
    silent, idle, began = Raw(server), Raw(server), time.monotonic()
    idle.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    slow = Raw(server)
    for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 200:  # each byte in time, all of them never
        if not slow.send(bytes([byte])):
            break
        time.sleep(0.05)
    took = time.monotonic() - began
    assert 0.5 < took < 3, took
    assert silent.read(1) == b""  # said nothing, and is gone as well
    assert idle.read(5).endswith(b"ok\n")  # had asked: the longer limit was its
    assert 1.4 < time.monotonic() - began < 5


@simulated
def test_none_stays_for_ever(launch):
    """A chunk's length without an end fills the buffer, and reading rests: the place is free again in time."""
    server = launch("--http-connections", "4", "--http-request-ms", "400")
    crowd = [Raw(server) for _ in range(3)]
    for raw in crowd:
        raw.send(b"GET /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        time.sleep(0.05)
        raw.send(b"1" * 100000)
    for raw in crowd:
        assert raw.read(3) is not None
    for _ in range(12):  # more than there are places
        assert server.http("/healthz")[0] == 200


def n_open(server):
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def slow_readers(server, n):
    """They ask for a large text and read nothing of it."""
    peers = []
    for _ in range(n):
        raw = Raw(server)
        raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.send(b"GET /metrics?experts=1 HTTP/1.1\r\nHost: x\r\n\r\n" * 4)
        peers.append(raw)
    return peers


@simulated
def test_who_reads_nothing_is_not_read_from(launch):
    server = launch("--stream-experts", "60000")
    raw, = slow_readers(server, 1)
    raw.socket.setblocking(False)
    end, sent = time.monotonic() + 2, 0
    while time.monotonic() < end:
        try:
            sent += raw.socket.send(bytes(1 << 20))
        except BlockingIOError:
            time.sleep(0.001)
    assert sent < 24 << 20  # what the kernel's buffers take


@simulated
def test_answers_that_wait_are_bounded(launch):
    server = launch("--stream-experts", "60000", "--http-request-ms", "3000", "--http-idle-ms", "3000")
    before, readers = n_open(server), slow_readers(server, 30)
    assert wait_for(lambda: server.http("/metrics")[0] == 503, 3)
    assert error_of(server.http("/metrics?experts=1"), 503)["code"] == "overloaded"
    assert server.http("/healthz")[0] == server.http("/readyz")[0] == 200
    assert wait_for(lambda: server.http("/metrics")[0] == 200, 10)  # they had their time
    assert wait_for(lambda: n_open(server) <= before + 1, 5) and len(readers) == 30


@simulated
def test_requests_in_a_row_are_limited(launch):
    server = launch()
    raw = Raw(server)
    raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
    answers = raw.read().split(b"HTTP/1.1 ")[1:]
    assert 50 <= len(answers) < 150
    assert all(a.startswith(b"200 ") for a in answers[:-1]) and answers[-1].startswith(b"429 ")
    assert json.loads(answers[-1].split(b"\r\n\r\n")[1])["error"]["code"] == "rate_limit_exceeded"
    raw, ask = Raw(server), b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    raw.send(ask * 50)
    time.sleep(0.5)  # ten more by now
    raw.send(ask * 8 + b"GET /readyz HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert raw.read().count(b"HTTP/1.1 200 OK") == 59


@simulated
def test_an_idle_crowd_hinders_nobody(launch, stub, help):
    server = launch("--step-ms", "1")
    s = stub(server)
    list(s.Generate(help.request(), timeout=10))
    crowd = [Raw(server) for _ in range(500)]
    for raw in crowd[::2]:
        raw.send(b"GET /metr")
    for path in ("/healthz", "/readyz", "/metrics"):
        began = time.monotonic()
        assert server.http(path)[0] == 200
        assert time.monotonic() - began < 2
    assert wait_for(lambda: n_open(server) < 300, 5)
    assert list(s.Generate(help.request(), timeout=10))[-1].HasField("done")
    for raw in crowd:
        raw.socket.close()
    assert server.http("/healthz")[0] == 200


@simulated
def test_the_crowd_that_is_let_in_is_the_newest(launch):
    server = launch("--http-connections", "8")
    crowd = []
    for _ in range(30):
        crowd.append(Raw(server))
        crowd[-1].send(b"GET")
        assert server.http("/healthz")[0] == 200
    assert crowd[0].read(5) == b""
    crowd[-1].send(b" /healthz HTTP/1.0\r\n\r\n")
    assert crowd[-1].read(5).endswith(b"ok\n")


@simulated
def test_connections_in_quick_succession(launch):
    """Each takes over the descriptor of the one before, and is heard all the same."""
    server = launch()
    for i in range(200):
        raw = Raw(server)
        raw.send(b"GET /healthz HTTP/1.0\r\nX: " + b"y" * (i % 2 * 9000) + b"\r\n\r\n")
        assert raw.read(2).endswith(b"ok\n"), i
        raw.socket.close()


@simulated
def test_scrapes_do_not_slow_steps(launch, stub, help):
    """Many who scrape without a pause: the text is made ten times a second, whoever asks."""
    server = launch("--step-ms", "2", "--stream-experts", "1000")
    s, stop, n = stub(server), threading.Event(), []

    def hammer():
        while not stop.is_set():
            raw = Raw(server)
            raw.send(b"GET /metrics?experts=1 HTTP/1.1\r\nHost: x\r\n\r\n" * 49 +
                     b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            n.append((raw.read() or b"").count(b"HTTP/1.1 200"))

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for t in threads:
        t.start()
    events = list(s.Generate(help.request(sampling={"max_tokens": 400}), timeout=60))
    stop.set()
    for t in threads:
        t.join()
    assert events[-1].HasField("done") and sum(n) > 100


@simulated
def test_drain_is_ready_no_more(launch, stub, help):
    server = launch("--step-ms", "10", "--pause-ms", "300", "--shutdown-ms", "20000")
    running = stub(server).Generate(help.request(sampling={"max_tokens": 200}))
    next(running)
    assert server.http("/readyz")[::2] == (200, "ready\n")
    server.signal()
    assert wait_for(lambda: server.http("/readyz")[::2] == (503, "draining\n"), 2)
    assert server.http("/healthz")[::2] == (200, "ok\n")
    assert wait_for(lambda: scrape(server)["draining", ""] == 1, 2)
    assert list(running)[-1].HasField("done")
    assert server.wait_exit() == 0
    with pytest.raises(ConnectionRefusedError):
        server.http("/healthz")


@simulated
def test_a_hung_engine_is_told(launch, stub, help):
    server = launch("--stall-ms", "2500", "--stalled-after-ms", "400")
    call = stub(server).Generate(help.request("<|stall|>"), timeout=30)
    assert wait_for(lambda: server.http("/healthz")[0] == 503, 2)
    status, _, text = server.http("/healthz")
    assert status == 503 and "no progress" in text and text.count("\n") == 1
    assert wait_for(lambda: server.http("/readyz")[0] == 503, 1)
    assert scrape(server)["healthy", 'model="simulated"'] == 0
    assert wait_for(lambda: server.http("/healthz")[0] == 200 and server.http("/readyz")[0] == 200, 5)
    assert list(call)[-1].HasField("done")


@simulated
def test_taken_http_port_is_refused(launch, shared):
    second = launch("--http", f"127.0.0.1:{shared.http_port}", wait=False)
    assert second.wait_exit() == 1
    assert f"cannot listen on 127.0.0.1:{shared.http_port}: Address already in use" in second.process.stdout.read()
