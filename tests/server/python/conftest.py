"""A server to test and stubs to test it with.

The target is the simulated test server unless --server-command names another one, for example
    pytest tests/server/python --server-command "build/choir serve MODEL.gguf"
which is started with `--listen 127.0.0.1:PORT --http 127.0.0.1:PORT` behind it. Tests marked `simulated` are skipped then.
"""
import http.client
import importlib
import os
import pathlib
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[3]


def pytest_addoption(parser):
    parser.addoption("--server-command", default=os.environ.get("CHOIR_TEST_SERVER", ""))
    parser.addoption("--build", default=os.environ.get("CHOIR_BUILD", "build"))


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--server-command"):
        return
    skip = pytest.mark.skip(reason="needs the simulated engine")
    for item in items:
        if "simulated" in item.keywords:
            item.add_marker(skip)


def make_stubs(folder):
    import grpc_tools
    own = pathlib.Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(["protoc", f"-I{ROOT}/proto", f"-I{own}", f"--python_out={folder}",
                        f"--grpc_python_out={folder}", "choir.proto"])
    assert code == 0, "protoc failed on choir.proto"


@pytest.fixture(scope="session", autouse=True)
def stubs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stubs")
    make_stubs(folder)
    sys.path.insert(0, str(folder))
    return folder


@pytest.fixture(scope="session")
def pb(stubs):
    return importlib.import_module("choir_pb2")


@pytest.fixture(scope="session")
def rpc(stubs):
    return importlib.import_module("choir_pb2_grpc")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One server process. `args` are the test server's knobs."""

    def __init__(self, config, args=(), max_files=None, environment=None):
        command = config.getoption("--server-command")
        self.is_real = bool(command)
        if not command:
            command = str(pathlib.Path(config.getoption("--build")) / "tests/server/test_server")
        self.port = free_port()
        self.target = f"127.0.0.1:{self.port}"
        self.http_port = free_port()

        def limit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

        self.process = subprocess.Popen(
            [*shlex.split(command), "--listen", self.target, "--http", f"127.0.0.1:{self.http_port}", *args],
            cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **(environment or {})}, preexec_fn=limit if max_files else None)
        self.channels = []

    def channel(self, **options):
        """A connection of its own: channels of one process share connections otherwise."""
        pairs = [("grpc.use_local_subchannel_pool", 1), *options.items()]
        channel = grpc.insecure_channel(self.target, options=pairs)
        self.channels.append(channel)
        return channel

    def health(self, service="", channel=None):
        stub = health_pb2_grpc.HealthStub(channel or self.channel())
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status

    def http(self, path, method="GET", headers=None, body=None):
        """(status, headers, text) of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=10)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def wait_serving(self, seconds=60):
        end = time.monotonic() + seconds
        channel = self.channel()
        while time.monotonic() < end:
            assert self.process.poll() is None, self.process.stdout.read()
            try:
                if self.health(channel=channel) == health_pb2.HealthCheckResponse.SERVING:
                    return self
            except grpc.RpcError:
                pass
            time.sleep(0.05)
        raise AssertionError("the server does not get to SERVING")

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait_exit(self, seconds=20):
        return self.process.wait(timeout=seconds)

    def close(self):
        for channel in self.channels:
            channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.output = self.process.stdout.read()


@pytest.fixture(scope="session")
def shared(request):
    """One server for tests that leave it as they found it."""
    server = Server(request.config).wait_serving()
    yield server
    server.signal()
    assert server.wait_exit() == 0, server.process.stdout.read()
    server.close()
    for bad in ("Sanitizer", "runtime error", "choir: bug"):
        assert bad not in server.output, server.output


@pytest.fixture
def launch(request):
    """launch("--step-ms", "20") starts a server for one test."""
    servers = []

    def start(*args, wait=True, max_files=None, environment=None):
        server = Server(request.config, args, max_files, environment)
        servers.append(server)
        return server.wait_serving() if wait else server

    yield start
    for server in servers:
        server.close()
        for bad in ("Sanitizer", "runtime error", "choir: bug"):
            assert bad not in server.output, server.output


@pytest.fixture
def choir(shared, rpc):
    return rpc.ChoirStub(shared.channel())


@pytest.fixture
def stub(rpc):
    return lambda server, **options: rpc.ChoirStub(server.channel(**options))


class Helpers:
    """What most tests do with a stream."""

    def __init__(self, pb):
        self.pb = pb

    def request(self, prompt="Hello", **fields):
        sampling = {"max_tokens": 16, "temperature": 0}
        sampling.update(fields.pop("sampling", {}))
        if "tokens" not in fields and "chat" not in fields:
            fields["prompt"] = prompt
        return self.pb.GenerateRequest(sampling=self.pb.Sampling(**sampling), **fields)

    def text(self, events):
        return "".join(e.delta.text for e in events if e.WhichOneof("event") == "delta")

    def ids(self, events, index=0):
        return [i for e in events if e.WhichOneof("event") == "delta" and e.delta.index == index
                for i in e.delta.token_ids]

    def pages_back(self, stub, seconds=10):
        """Waits until no page is held by a request: all are free or only in the prefix cache."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = stub.GetStats(self.pb.GetStatsRequest(), timeout=5).models[0]
            if stats.running == 0 and stats.waiting == 0 and \
                    stats.kv_pages_free + stats.kv_pages_cached == stats.kv_pages:
                return stats
            time.sleep(0.05)
        raise AssertionError(f"pages are still held: {stats}")


@pytest.fixture(scope="session")
def help(pb):
    return Helpers(pb)
