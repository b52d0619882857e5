#!/usr/bin/env python3
"""What do many adapters cost a server, and what does llama.cpp's do with eight?

  bench/adapters.py MODEL.gguf [--folder DIR] [--adapters 1000] [--rank 8] [--rounds 3]

Writes adapters of random numbers on all linear matrices (PEFT folders, F16) to DIR once, and prints
  batch   tokens/s of a batch of 32 with 1, 8, 32 and 64 different adapters, of the base's, in one process;
  zipf    tokens/s of 32 clients that ask for all of them by Zipf's law, of 32 clients that ask the base, one server;
          memory holds a tenth of the adapters;
  peer    tokens/s of a batch of 32 with 8 adapters from Choir, and of the batches of 4 that llama.cpp makes of it,
          since it batches no different adapters together; both programs' own benches, in turn;
  served  the same of 32 clients, from Choir's server and from llama.cpp's;
  cold    time to first token with an adapter that is on disk alone and with the same one in memory, next to its bytes
          over the disk's bandwidth (direct reads of the same files, in the same run) and 20 ms; of a server that is idle,
          and of one that decodes for others meanwhile; memory holds a tenth of the adapters, and is full.
--only names some of them. Ratios count, medians of the rounds. Needs a dense model, numpy, gguf, grpcio and grpcio-tools."""
import argparse
import concurrent.futures
import http.client
import itertools
import json
import mmap
import os
import pathlib
import random
import signal
import statistics
import struct
import subprocess
import tempfile
import threading
import time

import gguf
import numpy

import peer
import serve_clients

MODULES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
           "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
           "ffn_down": "mlp.down_proj"}
PIECE = 1 << 20
RANDOM = numpy.random.default_rng(0).standard_normal(1 << 22, numpy.float32).astype(numpy.float16)


# -- adapters --

def linears(model):
    """(GGUF's name without the ending, PEFT's module, inputs, outputs) of every matrix, and the architecture."""
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    found = []
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk" and parts[2] in MODULES and parts[-1] == "weight":
            name = f"base_model.model.model.layers.{parts[1]}.{MODULES[parts[2]]}"
            found.append((".".join(parts[:3]), name, int(tensor.shape[0]), int(tensor.shape[1])))
    return found, architecture


def factors(shapes, rank, number):
    """A [rank, inputs] and B [outputs, rank] of each matrix, so small that the base still answers; every adapter has
    the same random numbers, begun elsewhere."""
    at = 7919 * number
    for _, _, inputs, outputs in shapes:
        pair = []
        for rows, cols, size in ((rank, inputs, inputs ** -0.5), (outputs, rank, 0.01)):
            at = (at + 12289) % (1 << 20)
            pair.append((RANDOM[at:at + rows * cols] * numpy.float16(size)).reshape(rows, cols))
        yield pair


def write_peft(folder, shapes, rank, number):
    header, arrays, at = {}, [], 0
    for (_, name, _, _), pair in zip(shapes, factors(shapes, rank, number)):
        for letter, array in zip("AB", pair):
            header[f"{name}.lora_{letter}.weight"] = {"dtype": "F16", "shape": list(array.shape),
                                                      "data_offsets": [at, at + array.nbytes]}
            arrays.append(array)
            at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [m.split(".")[1] for m in MODULES.values()]}))
    with open(folder / "adapter_model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays:
            file.write(array.tobytes())


def write_gguf(path, shapes, architecture, rank, number):
    out = gguf.GGUFWriter(str(path), architecture)
    out.add_string("general.type", "adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", float(rank))
    for (name, _, _, _), (a, b) in zip(shapes, factors(shapes, rank, number)):
        out.add_tensor(f"{name}.weight.lora_a", a)
        out.add_tensor(f"{name}.weight.lora_b", b)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def make_adapters(a):
    """Those that DIR lacks. Returns their names and the bytes of one file."""
    shapes, architecture = linears(a.model)
    if not shapes:
        raise SystemExit(f"{a.model} has none of the matrices that adapters are made for here")
    a.peft = a.folder / f"rank{a.rank}"
    names = [f"a{i:04}" for i in range(a.adapters)]
    for i, name in enumerate(names):
        if not (a.peft / name / "adapter_model.safetensors").exists():
            write_peft(a.peft / name, shapes, a.rank, i)
    a.ggufs = [a.folder / f"rank{a.rank}-{i}.gguf" for i in range(a.different)]
    for i, path in enumerate(a.ggufs):
        if not path.exists():
            write_gguf(path, shapes, architecture, a.rank, i)
    return names, (a.peft / names[0] / "adapter_model.safetensors").stat().st_size


# -- clients --

numbers = itertools.count(random.SystemRandom().randrange(1 << 30))


def prompt(n_bytes):
    """None begins like another, so no KV is shared."""
    n = next(numbers)
    return f"{n:x} " + serve_clients.TEXT[37 * (n % 500):][:n_bytes]


class ChoirClient:
    def __init__(self, server):
        self.pb, grpc = server.pb, server.grpc
        self.channel = grpc.insecure_channel(server.target, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = server.stubs.ChoirStub(self.channel)

    def ask(self, text, n_tokens, adapter):
        """Seconds to the first token."""
        start, first, n = time.monotonic(), 0, 0
        for event in self.stub.Generate(self.pb.GenerateRequest(
                prompt=text, adapter=adapter or "", sampling=self.pb.Sampling(
                    temperature=0, max_tokens=n_tokens, ignore_eos=True))):
            if event.delta.token_ids and n == 0:
                first = time.monotonic() - start
            n += len(event.delta.token_ids)
        if n != n_tokens:
            raise RuntimeError(f"{n} of {n_tokens} tokens")
        return first


class LlamaClient:
    def __init__(self, server):
        self.port = server.port

    def ask(self, text, n_tokens, adapter):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", "/completion", json.dumps(
            {"prompt": text, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False,
             "lora": [] if adapter is None else [{"id": adapter, "scale": 1.0}]}), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        connection.close()
        if answer["tokens_predicted"] != n_tokens:
            raise RuntimeError(f"{answer['tokens_predicted']} of {n_tokens} tokens")


def stop(server):
    server.process.send_signal(signal.SIGTERM)
    server.process.wait()


def together(clients, a, adapters, n_asked):
    """Every client asks n_asked times, for the next of `adapters`; (tokens/s of all, seconds to each first token)."""
    queue, lock = iter(adapters), threading.Lock()

    def run(client):
        waits = []
        for _ in range(n_asked):
            with lock:
                adapter = next(queue)
            waits.append(client.ask(prompt(a.prompt_bytes), a.generate, adapter))
        return waits

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        waits = list(itertools.chain(*pool.map(run, clients)))
    return len(waits) * a.generate / (time.monotonic() - start), waits


# -- what is measured --

def decode(a, n, rounds):
    """What choir bench says of a batch of 32 with n different adapters."""
    out = subprocess.run(
        [a.choir, "bench", a.model, "--threads", str(a.threads), "--batch", "32", "--prompt", "16", "--generate", "12",
         "--random-adapters", str(n), "--adapter-rank", str(a.rank), "--rounds", str(rounds), "--json"],
        capture_output=True, text=True, check=True).stdout
    return json.loads(out)["runs"][0]["random_adapters"]


def batch(a, _names, _bytes):
    for n in (1, 8, 32, 64):
        print(f"batch: {n:2} different adapters of rank {a.rank} in 32 rows: "
              f"{100 * decode(a, n, 3 * a.rounds)['ratio']:.1f} % of the base's tokens/s", flush=True)


def serve(a, *options):
    return serve_clients.Choir(a, 50154, "--adapters", str(a.peft), *options)


def memory_for(n, n_bytes):
    """Adapters in memory; what loading takes, and what is kept for the next load, is within it too."""
    return "--adapter-memory", str(n * (n_bytes + (1 << 16)))


def zipf(a, names, n_bytes):
    server = serve(a, *memory_for(len(names) // 10, n_bytes))
    clients = [ChoirClient(server) for _ in range(a.clients)]
    weights = [1 / (i + 1) for i in range(len(names))]
    ratios, waits, base_waits = [], [], []
    together(clients, a, itertools.repeat(None), 1)
    together(clients, a, random.Random(0).choices(names, weights, k=4 * a.clients), 4)
    before = server.stats().adapters
    for i in range(a.rounds):
        base, wait = together(clients, a, itertools.repeat(None), 4)
        base_waits += wait
        ours, wait = together(clients, a, random.Random(i + 1).choices(names, weights, k=4 * a.clients), 4)
        waits += wait
        ratios.append(ours / base)
    after = server.stats().adapters
    stop(server)
    loads, asked = after.loads - before.loads, after.requests - before.requests
    print(f"zipf: {len(names)} adapters of rank {a.rank}, {a.clients} clients: {100 * statistics.median(ratios):.1f} % of the base's "
          f"tokens/s ({', '.join(f'{100 * r:.1f}' for r in ratios)}); {asked} requests, {loads} loads of {n_bytes / 1e6:.1f} MB, "
          f"each {(after.load_ms - before.load_ms) / max(loads, 1):.1f} ms; first token, median and p95: "
          f"{1e3 * statistics.median(waits):.0f} and {1e3 * numpy.percentile(waits, 95):.0f} ms, "
          f"base {1e3 * statistics.median(base_waits):.0f} and {1e3 * numpy.percentile(base_waits, 95):.0f} ms", flush=True)


class Llama(serve_clients.Llama):
    def options(self, a):
        return ["--lora", ",".join(map(str, a.ggufs)), "--lora-init-without-apply"]


def llama_decode(a, n_rows, *options):
    out = subprocess.run(
        [str(a.programs / "llama-batched-bench"), "-m", a.model, "-t", str(a.threads), "-c", str(n_rows * 64), "-npp", "16",
         "-ntg", "12", "-npl", str(n_rows), *options], capture_output=True, text=True, check=True).stdout
    return peer.decode_rate(out)


def against_peer(a, _names, _bytes):
    ratios, bases = [], []
    for i in range(a.rounds):
        ours = decode(a, a.different, 1)
        theirs, their_base = llama_decode(a, 32 // a.different, "--lora", str(a.ggufs[0])), llama_decode(a, 32)
        ratios.append(ours["decode_tokens_per_s"] / theirs)
        bases.append(ours["base_tokens_per_s"] / their_base)
        print(f"peer: round {i + 1}: {a.different} adapters in 32 rows {ours['decode_tokens_per_s']:.0f} tokens/s, {32 // a.different} rows "
              f"of one {theirs:.0f}; base {ours['base_tokens_per_s']:.0f} against {their_base:.0f}", flush=True)
    print(f"peer: {a.different} different adapters of rank {a.rank}: {statistics.median(ratios):.2f} times llama.cpp's tokens/s; "
          f"base alone {statistics.median(bases):.2f} times", flush=True)


def served(a, names, _bytes):
    ratios, bases = [], []
    for i in range(a.rounds):
        speeds = []
        for server, client, adapters in ((serve(a), ChoirClient, names[:a.different]), (Llama(a, 50155), LlamaClient, range(a.different))):
            clients = [client(server) for _ in range(a.clients)]
            together(clients, a, itertools.cycle(adapters), 1)
            speeds.append([together(clients, a, itertools.repeat(None), 2)[0], together(clients, a, itertools.cycle(adapters), 2)[0]])
            stop(server)
        (our_base, ours), (their_base, theirs) = speeds
        ratios.append(ours / theirs)
        bases.append(our_base / their_base)
        print(f"served: round {i + 1}: {a.different} adapters {ours:.0f} against {theirs:.0f} tokens/s, "
              f"base {our_base:.0f} against {their_base:.0f}", flush=True)
    print(f"served: {a.different} different adapters of rank {a.rank}, {a.clients} clients: {statistics.median(ratios):.2f} times "
          f"llama.cpp's tokens/s; base alone {statistics.median(bases):.2f} times", flush=True)


def disk_bandwidth(paths):
    """Bytes a second of direct reads, a file after the other, four pieces in flight."""
    pieces = [(path, at) for path in paths for at in range(0, path.stat().st_size, PIECE)]
    own = threading.local()

    def read(piece):
        if not hasattr(own, "buffer"):
            own.buffer = mmap.mmap(-1, PIECE)
        fd = os.open(piece[0], os.O_RDONLY | os.O_DIRECT)
        n = os.preadv(fd, [own.buffer], piece[1])
        os.close(fd)
        return n

    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        total = sum(pool.map(read, pieces))
    return total / (time.monotonic() - start)


def cold_and_warm(client, names):
    """Seconds to the first token of each name's first request, and of the one after it; of a few tokens each, so that
    their own times vary little."""
    waits = [(client.ask(prompt(8), 1, name), client.ask(prompt(8), 1, name)) for name in names]
    return [w[0] for w in waits], [w[1] for w in waits]


def print_cold(what, waits):
    (c50, c99), (w50, w99) = (1e3 * numpy.percentile(w, (50, 99)) for w in waits)
    print(f"cold: {what}: first token after {c50:.1f} ms (median) and {c99:.1f} ms (p99 of {len(waits[0])}), "
          f"warm {w50:.1f} and {w99:.1f}: {c50 - w50:.1f} and {c99 - w99:.1f} ms more", flush=True)


def cold(a, names, n_bytes):
    resident = names[:len(names) // 10]
    names = names[-a.cold:]
    server = serve(a, *memory_for(len(resident), n_bytes))
    client = ChoirClient(server)
    for name in resident:
        client.ask(prompt(8), 1, name)
    rate = disk_bandwidth([a.peft / n / "adapter_model.safetensors" for n in names])
    allowed = n_bytes / rate + 0.020
    idle = cold_and_warm(client, names[::2])
    ended = threading.Event()

    def others_decode(c):
        while not ended.is_set():
            c.ask(prompt(a.prompt_bytes), a.generate, None)

    with concurrent.futures.ThreadPoolExecutor(max(a.others, 1)) as pool:
        others = [pool.submit(others_decode, ChoirClient(server)) for _ in range(a.others)]
        try:
            time.sleep(2)
            busy = cold_and_warm(client, names[1::2])
        finally:
            ended.set()
    for other in others:
        other.result()
    stats = server.stats().adapters
    stop(server)
    print(f"cold: {n_bytes / 1e6:.1f} MB at {rate / 1e9:.2f} GB/s and 20 ms: {1e3 * allowed:.1f} ms allowed; a load took "
          f"{stats.load_ms / stats.loads:.1f} ms")
    print_cold("idle", idle)
    print_cold(f"beside {a.others} that decode", busy)


PARTS = {"batch": batch, "zipf": zipf, "peer": against_peer, "served": served, "cold": cold}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--choir", default="build/choir")
    p.add_argument("--peer", help="folder with llama.cpp's programs; without: built once")
    p.add_argument("--folder", type=pathlib.Path, help="where the adapters lie [a temporary one]")
    p.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--adapters", type=int, default=1000)
    p.add_argument("--different", type=int, default=8, help="adapters of peer and served [8]")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--generate", type=int, default=64)
    p.add_argument("--prompt-bytes", type=int, default=100)
    p.add_argument("--cold", type=int, default=400, help="adapters of `cold`, half for each of its servers [400]")
    p.add_argument("--others", type=int, default=8, help="clients that decode meanwhile [8]")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    unknown = set(a.only.split(",")) - set(PARTS)
    if unknown:
        p.error(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if {"peer", "served"} & set(a.only.split(",")):
        a.programs = pathlib.Path(a.peer) if a.peer else peer.build()
    with tempfile.TemporaryDirectory() as temporary:
        a.folder = a.folder or pathlib.Path(temporary)
        names, n_bytes = make_adapters(a)
        for part in a.only.split(","):
            PARTS[part](a, names, n_bytes)


if __name__ == "__main__":
    main()
