#!/usr/bin/env python3
"""Decoding a mixture of experts that is larger than memory: Choir's streamed experts beside llama.cpp's mmap.

Both run in turn, in one run, under the same cap: a memory cgroup where one may be made, else Choir's budget
alone. Choir reads a pack of the same model. Ratios count; the disk and its caches are the machine's.

  choir pack MODEL.gguf -o MODEL.choir
  bench/streaming.py --gguf MODEL.gguf --pack MODEL.choir --llama LLAMA_BIN_FOLDER

or, with a model of a real shape and random weights that it makes itself (bench/requirements.txt) and leaves in DIR:

  bench/streaming.py --make olmoe --folder DIR --llama LLAMA_BIN_FOLDER
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
import uuid

import peer

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Cap:
    """A memory cgroup (version 2, else 1) with a limit; without one, nothing."""

    def __init__(self, limit):
        self.folder = None
        name = f"choir-bench-{uuid.uuid4().hex[:8]}"
        for base, file in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
            folder = pathlib.Path(base) / name
            try:
                folder.mkdir()
                if not (folder / file).exists():
                    raise OSError("no memory controller here")
                (folder / file).write_text(str(limit))
                self.folder = folder
                return
            except OSError:
                try:
                    folder.rmdir()
                except OSError:
                    pass

    def enter(self):
        if self.folder is not None:
            (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def close(self):
        if self.folder is not None:
            for _ in range(50):  # a process that just ended may still be in it
                try:
                    self.folder.rmdir()
                    return
                except OSError:
                    time.sleep(0.1)


def drop_caches():
    try:
        pathlib.Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        pass


def run(command, limit):
    cap = Cap(limit)
    drop_caches()
    try:
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=cap.enter, check=False)
    finally:
        cap.close()
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout


def llama(args, batch, limit):
    out = run([str(x) for x in (args.llama / "llama-batched-bench", "-m", args.gguf, "-t", args.threads, "-c", 4096,
                                "-npp", args.prompt, "-ntg", args.llama_tokens, "-npl", batch, "--no-repack")], limit)
    return peer.decode_rate(out)


def choir(args, batch, limit):
    out = run([str(x) for x in (args.choir, "bench", args.pack, "--memory", limit, "--threads", args.threads, "--prompt",
                                args.prompt, "--generate", args.tokens, "--batch", batch, "--json")], limit)
    return json.loads(out)["runs"][0]


def make(args):
    """The model and its pack, as far as DIR does not have them."""
    import make_mixture
    args.folder.mkdir(parents=True, exist_ok=True)
    name = f"{args.make}-{args.type}-skew{args.skew:g}"
    args.gguf, args.pack = args.folder / f"{name}.gguf", args.folder / f"{name}.choir"
    if not args.gguf.exists():
        print(f"{name}: {make_mixture.write(args.gguf, args.make, args.type, args.skew)}", flush=True)
    if not args.pack.exists():
        subprocess.run([args.choir, "pack", args.gguf, "-o", args.pack], check=True, stdout=subprocess.DEVNULL)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", type=pathlib.Path)
    p.add_argument("--pack", type=pathlib.Path)
    p.add_argument("--make", metavar="SHAPE", help="one of make_mixture.py's, instead of --gguf and --pack")
    p.add_argument("--folder", type=pathlib.Path, help="where --make's files lie")
    p.add_argument("--type", default="q4_0", help="of --make: q4_0 or q8_0 [q4_0]")
    p.add_argument("--skew", default=0.0, type=float, help="of --make's routes [0]")
    p.add_argument("--llama", type=pathlib.Path, help="folder of llama.cpp's programs; without: Choir alone")
    p.add_argument("--choir", default=ROOT / "build" / "choir", type=pathlib.Path)
    p.add_argument("--share", default=0.4, type=float, help="of the model's bytes that memory may hold [0.4]")
    p.add_argument("--batches", default="1,8,16")
    p.add_argument("--prompt", default=16, type=int)
    p.add_argument("--tokens", default=24, type=int, help="that Choir decodes for each sequence")
    p.add_argument("--llama-tokens", default=4, type=int, help="that llama.cpp does: it takes its time")
    p.add_argument("--threads", default=os.cpu_count(), type=int)
    p.add_argument("--rounds", default=3, type=int)
    args = p.parse_args()
    if args.make and args.folder:
        make(args)
    elif not (args.gguf and args.pack):
        p.error("--gguf and --pack, or --make and --folder")
    limit = int(args.gguf.stat().st_size * args.share)
    print(f"{args.gguf.name}: {args.gguf.stat().st_size / 1e9:.2f} GB, memory {limit / 1e9:.2f} GB", flush=True)
    for batch in map(int, args.batches.split(",")):
        ours, theirs, runs = [], [], []
        for _ in range(args.rounds):
            runs.append(choir(args, batch, limit))
            ours.append(runs[-1]["decode_tokens_per_s"])
            if args.llama:
                theirs.append(llama(args, batch, limit))
        experts = runs[-1].get("experts", {})
        line = f"  batch {batch:2}: choir {statistics.median(ours):6.2f} tokens/s"
        if theirs:
            line += f", llama.cpp {statistics.median(theirs):5.2f}: {statistics.median(a / b for a, b in zip(ours, theirs)):5.1f} times"
        if experts:
            line += (f"; hits {100 * experts['hit_rate']:.0f} %, {experts['bytes_read'] / 1e9:.1f} GB at "
                     f"{experts['bytes_read'] / 1e9 / max(experts['busy_s'], 1e-9):.2f} GB/s")
        print(line, flush=True)


if __name__ == "__main__":
    main()
