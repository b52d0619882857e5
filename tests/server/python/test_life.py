"""Drain, stop, watchdog: the way down."""
import os
import pathlib
import signal
import threading
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

pytestmark = pytest.mark.simulated
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def wait_for(condition, seconds=5):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_drain(launch, stub, help):
    server = launch("--step-ms", "10", "--pause-ms", "800", "--shutdown-ms", "20000")
    s = stub(server)
    channel = server.channel()
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    assert next(watch).status == SERVING
    running = s.Generate(help.request(sampling={"max_tokens": 300}))
    next(running)
    server.signal()
    assert next(watch).status == NOT_SERVING
    # In the pause, new requests are still taken.
    assert help.ids(list(s.Generate(help.request(sampling={"max_tokens": 2}), timeout=5)))

    def refused():
        try:
            list(s.Generate(help.request(sampling={"max_tokens": 1}), timeout=5))
            return False
        except grpc.RpcError as e:
            assert e.code() == grpc.StatusCode.UNAVAILABLE, e
            return True

    assert wait_for(refused)
    assert server.health(channel=channel) == NOT_SERVING
    events = list(running)
    assert events[-1].HasField("done") and sum(len(e.delta.token_ids) for e in events) == 300
    with pytest.raises(grpc.RpcError) as error:
        list(watch)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.wait_exit() == 0


def test_drain_has_a_limit(launch, stub, help):
    server = launch("--step-ms", "10", "--pause-ms", "100", "--shutdown-ms", "700")
    running = stub(server).Generate(help.request(sampling={"max_tokens": 4000}))
    next(running)
    server.signal()
    with pytest.raises(grpc.RpcError) as error:
        list(running)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.wait_exit() == 0


def test_second_signal_stops_at_once(launch, stub, help):
    server = launch("--step-ms", "10", "--pause-ms", "100", "--shutdown-ms", "60000")
    running = stub(server).Generate(help.request(sampling={"max_tokens": 4000}))
    next(running)
    server.signal()
    time.sleep(0.5)
    assert next(running).HasField("delta")
    began = time.monotonic()
    server.signal(signal.SIGINT)
    with pytest.raises(grpc.RpcError) as error:
        list(running)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert server.wait_exit() == 0
    assert time.monotonic() - began < 5


def test_idle_server_leaves_quickly(launch):
    server = launch("--pause-ms", "50")
    server.signal()
    assert server.wait_exit(5) == 0


def test_the_wall_clock_jumps(launch, stub, help, request, tmp_path):
    """An hour ahead and two back: no deadline comes early or late, and health stays."""
    jump = tmp_path / "jump"
    jump.write_bytes(bytes(8))
    library = pathlib.Path(request.config.getoption("--build")).absolute() / "tests/server/libclock_jump.so"
    server = launch("--step-ms", "20", environment={
        "LD_PRELOAD": str(library), "CLOCK_JUMP": str(jump),
        "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"})
    s, channel = stub(server), server.channel()

    def ask(tokens, seconds):
        return s.Generate(help.request(sampling={"max_tokens": tokens, "ignore_eos": True}), timeout=seconds)

    fine, late = ask(100, 30), ask(100000, 4)
    next(fine), next(late)
    for seconds in (3600, -7200, 0):
        with jump.open("r+b") as f:
            f.write(seconds.to_bytes(8, "little", signed=True))
        time.sleep(0.3)
        assert server.health(channel=channel) == SERVING
        assert list(ask(3, 10))[-1].HasField("done")
    assert list(fine)[-1].HasField("done")
    with pytest.raises(grpc.RpcError) as error:
        list(late)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_watchdog_tells_health(launch, stub, help):
    server = launch("--stall-ms", "2500", "--stalled-after-ms", "400")
    s = stub(server)
    channel = server.channel()
    result = {}

    def ask():
        result["events"] = list(s.Generate(help.request("<|stall|>"), timeout=30))

    thread = threading.Thread(target=ask)
    thread.start()
    assert wait_for(lambda: server.health(channel=channel) == NOT_SERVING, 2)
    assert server.health("simulated", channel=channel) == NOT_SERVING
    assert wait_for(lambda: server.health(channel=channel) == SERVING, 5)
    thread.join()
    assert result["events"][-1].HasField("done")


def test_watchdog_exits(launch, stub, help):
    server = launch("--stall-ms", "60000", "--stalled-after-ms", "300", "--watchdog-exit-ms", "500")
    call = stub(server).Generate(help.request("<|stall|>"))
    assert server.wait_exit(10) == 1
    output = server.process.stdout.read()
    assert "giving up" in output
    stacks = {s.split()[2]: s.splitlines()[1:] for s in output.split("\nthread ")[1:]}
    assert len(stacks["choir-engine"]) > 3, output
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
