#!/usr/bin/env python3
"""How much do 16 streaming clients get from Choir's server and from llama.cpp's, same model and threads?

  bench/serve_clients.py MODEL.gguf [--choir build/choir] [--clients 16] [--rounds 3]

Each round starts one server, lets every client stream one answer to its own prompt at the same time, stops
it, and does the same with the other; the medians of the rounds' ratios are printed (tokens/s and time to
first token; above 1: Choir is better). 900 bytes of prompt are about 200 tokens. Needs grpcio and grpcio-tools."""
import http.client
import importlib
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import peer

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = pathlib.Path("/usr/share/common-licenses/GPL-3").read_text()


def prompts(n, n_bytes):
    """Different places of one text, so that no prefix is shared."""
    return [TEXT[1000 * i + 37 * i:][:n_bytes] for i in range(n)]


class Choir:
    def __init__(self, a, port, *options):
        import grpc
        from grpc_tools import protoc
        out = tempfile.mkdtemp()
        protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}",
                     f"--grpc_python_out={out}", str(ROOT / "proto" / "choir.proto")])
        sys.path.insert(0, out)
        self.grpc, self.pb = grpc, importlib.import_module("choir_pb2")
        self.stubs = importlib.import_module("choir_pb2_grpc")
        self.target = f"127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [a.choir, "serve", a.model, "--listen", self.target, "--threads", str(a.threads),
             "--max-num-seqs", str(a.clients), *options], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        with grpc.insecure_channel(self.target) as channel:
            grpc.channel_ready_future(channel).result(timeout=60)

    def stats(self):
        with self.grpc.insecure_channel(self.target) as channel:
            return self.stubs.ChoirStub(channel).GetStats(self.pb.GetStatsRequest()).models[0]

    def tokens(self, prompt, n_tokens):
        """Yields every token's id."""
        pb = self.pb
        with self.grpc.insecure_channel(
                self.target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            request = pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(
                temperature=0, max_tokens=n_tokens, ignore_eos=True))
            for event in self.stubs.ChoirStub(channel).Generate(request):
                yield from event.delta.token_ids

    def stream(self, prompt, n_tokens):
        """Yields at every token."""
        for _ in self.tokens(prompt, n_tokens):
            yield


class Llama:
    def options(self, a):  # pylint: disable=unused-argument
        return []

    def __init__(self, a, port):
        self.port = port
        self.process = subprocess.Popen(
            [str(a.programs / "llama-server"), "-m", a.model, "-t", str(a.threads), "-np",
             str(a.clients), "-c", str(1024 * a.clients), "--port", str(port), "--no-webui", *self.options(a)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            try:
                c = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                c.request("GET", "/health")
                if c.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError("llama-server did not start")

    def stream(self, prompt, n_tokens):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        c.request("POST", "/completion", json.dumps(
            {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "stream": True,
             "ignore_eos": True, "cache_prompt": False}),
            {"Content-Type": "application/json"})
        for line in c.getresponse():
            if line.startswith(b"data: ") and not json.loads(line[6:]).get("stop"):
                yield


def measure(server, a):
    """(tokens per second of all clients together, median time to first token)."""
    first, counts = [0.0] * a.clients, [0] * a.clients

    def client(i, prompt):
        start = time.monotonic()
        for _ in server.stream(prompt, a.generate):
            if counts[i] == 0:
                first[i] = time.monotonic() - start
            counts[i] += 1

    threads = [threading.Thread(target=client, args=(i, p))
               for i, p in enumerate(prompts(a.clients, a.prompt_bytes))]
    start = time.monotonic()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    seconds = time.monotonic() - start
    server.process.send_signal(signal.SIGTERM)
    server.process.wait()
    if min(counts) < a.generate // 2:
        raise RuntimeError(f"a client got {min(counts)} of {a.generate} tokens")
    return sum(counts) / seconds, statistics.median(first)


def main():
    a = peer.arguments(__doc__, 3, clients=16, generate=64, prompt_bytes=900)
    speed, wait = [], []
    for i in range(a.rounds):
        ours = measure(Choir(a, 50151), a)
        theirs = measure(Llama(a, 50152), a)
        speed.append(ours[0] / theirs[0])
        wait.append(theirs[1] / ours[1])
        print(f"round {i + 1}: {ours[0]:.0f} against {theirs[0]:.0f} tokens/s ({speed[-1]:.2f}), "
              f"first token {ours[1]:.2f} against {theirs[1]:.2f} s ({wait[-1]:.2f})", flush=True)
    print(f"median of {a.rounds} ratios with {a.clients} clients: tokens/s "
          f"{statistics.median(speed):.2f}, time to first token {statistics.median(wait):.2f}")


if __name__ == "__main__":
    main()
