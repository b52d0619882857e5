#!/usr/bin/env python3
"""How long from starting the program to ready to serve, from a warm page cache, against llama.cpp's server?

  bench/startup.py MODEL.gguf [--choir build/choir] [--rounds 5]

Ready means that the health check says so. Prints the seconds of every round and the medians of both, and of
the rounds' ratios (above 1: Choir is sooner). Needs grpcio and grpcio-health-checking."""
import http.client
import pathlib
import socket
import statistics
import subprocess
import time

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import peer


def await_port(process, port):
    """Short waits: grpc's own reconnection would add up to a second."""
    while process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.002)
    raise RuntimeError(f"{process.args[0]} stopped with status {process.returncode}")


def choir_is_ready(port):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def llama_is_ready(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health")
    return connection.getresponse().status == 200


def seconds_to_ready(command, port, is_ready):
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        await_port(process, port)
        while not is_ready(port):
            time.sleep(0.002)
        return time.monotonic() - start
    finally:
        process.terminate()
        process.wait()


def main():
    a = peer.arguments(__doc__, 5, port=50161)
    pathlib.Path(a.model).read_bytes()  # warms the page cache

    choir = [a.choir, "serve", a.model, "--listen", f"127.0.0.1:{a.port}", "--threads", str(a.threads)]
    llama = [str(a.programs / "llama-server"), "-m", a.model, "-t", str(a.threads), "--port",
             str(a.port), "--no-webui"]
    ours, theirs = [], []
    for i in range(a.rounds):
        ours.append(seconds_to_ready(choir, a.port, choir_is_ready))
        theirs.append(seconds_to_ready(llama, a.port, llama_is_ready))
        print(f"round {i + 1}: ready after {ours[-1]:.2f} against {theirs[-1]:.2f} s", flush=True)
    ratio = statistics.median(t / o for o, t in zip(ours, theirs))
    print(f"median of {a.rounds}: {statistics.median(ours):.2f} against {statistics.median(theirs):.2f} s, "
          f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
