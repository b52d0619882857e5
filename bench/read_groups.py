#!/usr/bin/env python3
"""What taking turns saves where sequences of several topics share streamed experts.

  bench/read_groups.py MODEL.choir --memory 410MB [--clients 10] [--generate 128] [--rounds 3]

Clients stream answers to beginnings of the five domains' texts (models/domains), two a domain by default, all at once, from a
server that lets groups take turns and from one that does not (--max-hold 0), one after the other in each round. Printed
are tokens/s, bytes read a token, groups, and the longest wait for a token. Answers must be the same. Needs grpcio and grpcio-tools."""
import argparse
import pathlib
import signal
import statistics
import sys
import threading
import time

import serve_clients

DOMAINS = ["bible", "french", "jargon", "python", "wordnet"]


def prompts(n, n_bytes):
    texts = [(serve_clients.ROOT / "models/domains" / d / "valid.txt").read_bytes() for d in DOMAINS]
    return [texts[i % 5][2000 * (i // 5):][:n_bytes].decode(errors="ignore") for i in range(n)]


def run(a, hold):
    server = serve_clients.Choir(a, 50153, "--memory", a.memory, "--max-hold", str(hold), "--max-num-batched-tokens", "64",
                                 "--max-model-len", str(a.prompt_bytes + a.generate))
    texts = prompts(a.clients, a.prompt_bytes)
    gaps, answers, groups = [0.0] * a.clients, [[] for _ in texts], []

    def client(i):
        last = None
        for token in server.tokens(texts[i], a.generate):
            now = time.monotonic()
            gaps[i] = max(gaps[i], now - (last or now))
            last = now
            answers[i].append(token)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(a.clients)]
    start = time.monotonic()
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        groups.append(server.stats().experts.groups)
        time.sleep(0.25)
    seconds, experts = time.monotonic() - start, server.stats().experts
    server.process.send_signal(signal.SIGTERM)
    server.process.wait()
    n = sum(map(len, answers))
    return {"rate": n / seconds, "read": experts.bytes_read / n, "gap": max(gaps), "groups": max(groups),
            "hits": experts.hit_rate, "answers": answers}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--choir", default="build/choir")
    p.add_argument("--memory", required=True)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--clients", type=int, default=10)
    p.add_argument("--generate", type=int, default=128)
    p.add_argument("--prompt-bytes", type=int, default=200)
    p.add_argument("--hold", type=int, default=2000, help="ms [2000]")
    p.add_argument("--rounds", type=int, default=3)
    a = p.parse_args()
    ratios = []
    for i in range(a.rounds):
        together, turns = run(a, 0), run(a, a.hold)
        if together["answers"] != turns["answers"]:
            sys.exit("the answers differ")
        ratios.append(turns["rate"] / together["rate"])
        for name, r in (("together", together), ("in turns", turns)):
            print(f"round {i + 1}, {name}: {r['rate']:6.1f} tokens/s, {r['read'] / 1e6:5.1f} MB read a token, hits {100 * r['hits']:.0f} %, "
                  f"at most {r['groups']} groups, longest wait {1000 * r['gap']:.0f} ms", flush=True)
    print(f"median of {a.rounds} ratios: {statistics.median(ratios):.2f} times the tokens/s")


if __name__ == "__main__":
    main()
