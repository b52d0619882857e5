#!/usr/bin/env python3
"""The binary as its users meet it. Usage: cli_test.py CHOIR [unittest arguments]"""
import array
import json
import math
import os
import pathlib
import pty
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.error
import urllib.request

import tiny_model

CHOIR = str(pathlib.Path(sys.argv[1]).resolve())
FAULTY_IO = pathlib.Path(CHOIR).parent / "tests/cli/libfaulty_io.so"
VERBS = "serve chat generate logits tokenize detokenize perplexity info bench pack upcycle adapter merge".split()
LATER = "quantize convert prune router data tune eval monitor".split()


def choir(*words, **options):
    options.setdefault("stdin", subprocess.DEVNULL)
    if "input" in options:
        del options["stdin"]
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run([CHOIR, *map(str, words)], stderr=subprocess.PIPE, timeout=300, text=True, **options)


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(prefix="choir-cli-")
        cls.folder = pathlib.Path(cls.temporary.name)
        cls.dense, cls.moe = cls.folder / "dense", cls.folder / "moe"
        cls.vocab = tiny_model.write(cls.dense)
        tiny_model.write(cls.moe, experts=4)

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def ok(self, *words, **options):
        done = choir(*words, **options)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def fails(self, code, says, *words, **options):
        done = choir(*words, **options)
        self.assertEqual(done.returncode, code, (words, done.stdout, done.stderr))
        lines = [l for l in done.stderr.splitlines() if l.startswith("choir: ")]
        self.assertEqual(len(lines), 1, done.stderr)
        self.assertRegex(lines[0], says)
        self.assertNotRegex(done.stderr, "ERROR: (Address|Leak)Sanitizer")
        return done


class Packs(Case):
    def logits(self, model, *more):
        out = self.folder / "logits.bin"
        self.ok("logits", model, "--tokens", "5,7,9,11,40,41", "--out", out, *more)
        return out.read_bytes()

    def test_same_bits(self):
        wanted, exact = self.logits(self.moe), self.logits(self.moe, "--exact")
        pack = self.folder / "moe.choir"
        self.assertEqual(self.ok("pack", self.moe, "-o", pack).strip(), str(pack))
        self.assertEqual(self.logits(pack), wanted)
        self.assertEqual(self.logits(pack, "--exact"), exact)
        for io in ("auto", "io_uring-plain", "pread"):
            for policy in ("lru", "lfu", "router"):
                more = ["--expert-io", io, "--expert-policy", policy, "--expert-memory"]
                self.assertEqual(self.logits(pack, *more, "50KiB"), wanted)
                self.assertEqual(self.logits(self.moe, *more, "200KiB"), wanted)
        about = json.loads(self.ok("info", pack, "--json"))
        folder = json.loads(self.ok("info", self.moe, "--json"))
        self.assertEqual(about.pop("format"), "pack")
        for key in ("format", "bytes_on_disk"):
            about.pop(key, None), folder.pop(key, None)
        self.assertEqual(about, folder)
        again = self.folder / "again.choir"
        self.ok("pack", self.moe, "-o", again, "--threads", 3)
        self.assertEqual(pack.read_bytes(), again.read_bytes())

    def test_quantised(self):
        sizes = {}
        for quant in ("q4_0", "q8_0", "bf16"):
            pack = self.folder / f"{quant}.choir"
            self.ok("pack", self.dense, "-o", pack, "--quant", quant)
            sizes[quant] = json.loads(self.ok("info", pack, "--json"))["bytes_dense"]
            self.logits(pack)
        self.assertLess(sizes["q4_0"], sizes["q8_0"])
        self.assertLess(sizes["q8_0"], sizes["bf16"])

    def routes(self):
        out = self.folder / "routes.jsonl"
        self.ok("logits", self.moe, "--tokens", "5,7,9,11,40,41,5,6,7,7,7,8", "--routes", out)
        return out

    def test_small_copies(self):
        pack = self.folder / "small.choir"
        self.ok("pack", self.moe, "-o", pack, "--small", "q2", "--usage", self.routes())
        self.assertIn("small experts: Q2", json.loads(self.ok("info", pack, "--json"))["types"])
        seen = [self.logits(self.moe)]
        self.assertEqual(self.logits(pack), seen[0])  # off by default
        for share in ("0.25", "0.5", "1"):
            seen.append(self.logits(pack, "--small-experts", share))
            for more in (["--expert-memory", "50KiB"], ["--memory", "1GiB"], ["--expert-memory", "1MiB", "--threads", "3"]):
                self.assertEqual(self.logits(pack, "--small-experts", share, *more), seen[-1])
        self.assertEqual(len(set(seen)), 4)
        text = self.folder / "text.txt"
        text.write_text("the cat sat on the mat " * 20)
        ppl = [json.loads(self.ok("perplexity", pack, "--file", text, "--context", 32, "--json", *more))["ppl"]
               for more in ([], ["--small-experts", "0"], ["--small-experts", "1"])]
        self.assertEqual(ppl[0], ppl[1])
        self.assertNotEqual(ppl[0], ppl[2])
        data = bytearray(pack.read_bytes())
        data[-4096 + 100] ^= 1  # the last copy
        pack.write_bytes(data)
        self.assertEqual(self.logits(pack), seen[0])  # nobody reads it
        self.fails(1, "checksum", "logits", pack, "--tokens", "5", "--small-experts", 1)

    def test_bad_small_copies(self):
        pack = self.folder / "bad-small.choir"
        run = ["logits", pack, "--tokens", "5"]
        self.fails(2, "must be q2, q3 or q4_0", "pack", self.moe, "-o", pack, "--small", "q8_0")
        self.fails(2, "--usage says which", "pack", self.moe, "-o", pack, "--usage", self.routes())
        self.fails(1, "is dense", "pack", self.dense, "-o", pack, "--small", "q2")
        bad = self.folder / "bad.jsonl"
        for text, says in (("", "nothing about layer 0"), ("[1]\n", "line 1: it is no JSON object"),
                           ('{"layer":99,"token":0,"experts":[0],"weights":[1]}\n', "line 1: .layer. is no layer")):
            bad.write_text(text)
            self.fails(1, says, "pack", self.moe, "-o", pack, "--small", "q2", "--usage", bad)
        self.fails(1, "cannot read", "pack", self.moe, "-o", pack, "--small", "q2", "--usage", self.folder / "none")
        self.assertFalse(pack.exists())
        self.fails(1, "holds no small copies", "logits", self.moe, "--tokens", "5", "--small-experts", 0.5)
        self.ok("pack", self.moe, "-o", pack)
        self.fails(1, "holds no small copies", *run, "--small-experts", 0.5)
        self.fails(2, "--small-experts", *run, "--small-experts", 1.5)
        self.fails(2, "--small-experts", *run, "--small-experts", "nan")
        self.ok("pack", self.moe, "-o", pack, "--small", "q3")
        self.fails(1, "does not say which experts are rare", *run, "--small-experts", 0.5)
        self.ok(*run, "--small-experts", 1)

    def test_bad_arguments(self):
        pack = self.folder / "x.choir"
        self.fails(2, "-o F.choir is missing", "pack", self.moe)
        self.fails(2, "must end in .choir", "pack", self.moe, "-o", self.folder / "x.gguf")
        self.fails(2, "must be q4_0, q8_0 or bf16", "pack", self.moe, "-o", pack, "--quant", "q3")
        self.fails(1, "cannot write /nowhere/x.choir.partial", "pack", self.moe, "-o", "/nowhere/x.choir")
        self.ok("pack", self.moe, "-o", pack)
        self.fails(1, "is packed already", "pack", pack, "-o", self.folder / "y.choir")
        self.fails(1, "must be auto, io_uring", "logits", pack, "--tokens", "1", "--expert-io", "floppy")
        self.fails(1, "must be lru", "logits", pack, "--tokens", "1", "--expert-policy", "fifo")
        self.fails(1, "the least to stream with", "logits", pack, "--tokens", "1", "--expert-memory", "1K")
        self.fails(1, r"too little for .*x.choir", "logits", pack, "--tokens", "1", "--memory", "1MiB")

    def test_damage(self):
        pack, bad = self.folder / "good.choir", self.folder / "bad.choir"
        self.ok("pack", self.moe, "-o", pack)
        good = pack.read_bytes()
        run = ["logits", bad, "--tokens", "5,7,9,11"]
        for at in (*range(0, 4096, 97), *range(4096, len(good), len(good) // 60)):
            data = bytearray(good)
            data[at] ^= 16
            bad.write_bytes(data)
            resident = choir(*run)
            self.assertIn(resident.returncode, (0, 1), resident.stderr)  # padding between tensors may change
            streamed = choir(*run, "--expert-memory", "50KiB", "--expert-io", "pread")
            self.assertIn(streamed.returncode, (0, 1), streamed.stderr)
        for size in (0, 7, 100, 4095, 4096, len(good) // 2, len(good) - 4096, len(good) - 1):
            bad.write_bytes(good[:size])
            self.fails(1, "truncated|not a .choir|GGUF|ends", *run)
        data = bytearray(good)
        data[-4096 + 100] ^= 1  # the last expert
        bad.write_bytes(data)
        self.fails(1, "checksum", *run)

    def test_kill(self):
        """After kill -9 at any time there is either no file or a whole one; the next call finishes."""
        self.kill_and_finish()

    def test_kill_with_small_copies(self):
        self.kill_and_finish("--small", "q3", "--usage", str(self.routes()))

    def kill_and_finish(self, *more):
        pack, wanted = self.folder / "killed.choir", self.folder / "whole.choir"
        self.ok("pack", self.moe, "-o", wanted, *more)
        pack.unlink(missing_ok=True)
        for i in range(25):
            process = subprocess.Popen([CHOIR, "pack", str(self.moe), "-o", str(pack), *more], stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL)
            time.sleep(i * 0.002)
            process.kill()
            process.wait()
            if pack.exists():
                self.assertEqual(pack.read_bytes(), wanted.read_bytes())
                pack.unlink()
            partial = pathlib.Path(f"{pack}.partial")
            if partial.exists() and partial.read_bytes() != wanted.read_bytes():  # else it lacks its name alone
                self.assertEqual(choir("info", partial).returncode, 1)
        self.ok("pack", self.moe, "-o", pack, *more)
        self.assertEqual(pack.read_bytes(), wanted.read_bytes())
        self.assertFalse(pathlib.Path(f"{pack}.partial").exists())

    def test_no_space(self):
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        pack = self.folder / "full.choir"
        self.fails(1, "cannot write .*full.choir.partial: File too large", "pack", self.moe, "-o", pack, preexec_fn=limit)
        self.assertFalse(pack.exists())
        self.ok("pack", self.moe, "-o", pack)


class Faults(Case):
    """What the system does to files, by tests/cli/faulty_io.c between choir and it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.plan = cls.folder / "faults"
        cls.plan.write_text("")
        cls.faulty = {**os.environ, "LD_PRELOAD": str(FAULTY_IO), "IO_FAULTS": str(cls.plan),
                      "ASAN_OPTIONS": os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"}

    def faults(self, words):
        beside = self.plan.with_suffix(".new")
        beside.write_text(words)
        os.replace(beside, self.plan)


class Syncs(Faults):
    """FAULTS 10: a sync that fails loses what was written. It is not called again, and a later run begins anew."""

    def each(self, command, out, right, old):
        """Each sync of the command fails in turn, until one run has fewer. `right` and `old` map names to bytes."""
        i = 0
        while True:
            i += 1
            self.empty(out)
            for name, data in old.items():
                (out.parent / name).write_bytes(data)
            self.faults(f"sync={i}")
            done = choir(*command, env=self.faulty)
            if done.returncode == 0:
                break
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr, r"^choir: cannot (save|sync) .*: Input/output error\n$")
            after = self.all(out)
            self.assertIn(after, (old, right), f"sync {i}: {sorted(after)}")  # no leftovers under any name
            if "folder of" not in done.stderr:
                self.assertEqual(after, old)
            if after == right:
                self.empty(out)
            self.ok(*command)
            self.assertEqual(self.all(out), right)
        self.assertEqual(self.all(out), right)
        return i - 1

    def all(self, out):
        return {str(f.relative_to(out.parent)): f.read_bytes() for f in out.parent.rglob("*") if f.is_file()}

    def empty(self, out):
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()

    def test_pack(self):
        out = self.folder / "packs" / "m.choir"
        self.empty(out)
        command = ["pack", self.moe, "-o", out]
        self.ok(*command)
        right = self.all(out)
        self.assertEqual(self.each(command, out, right, {}), 3)  # the data, the header, the folder
        self.ok("pack", self.moe, "-o", out, "--quant", "q8_0")
        old = self.all(out)
        self.assertNotEqual(old, right)
        self.assertEqual(self.each(command, out, right, old), 3)

    def test_upcycle(self):
        adapter = self.folder / "adapter"
        tiny_model.write_adapter(adapter, scale=0.1)
        out = self.folder / "made" / "up"
        self.empty(out)
        command = ["upcycle", self.dense, "--expert", f"a={adapter}", "--gate-init", "uniform", "-o", out]
        self.ok(*command)
        self.assertEqual(self.each(command, out, self.all(out), {}), 15)  # seven files, with the folder; its name

    def test_merge(self):
        adapter = self.folder / "to-merge"
        tiny_model.write_adapter(adapter, scale=0.1)
        out = self.folder / "merges" / "m"
        self.empty(out)
        command = ["merge", self.dense, "--adapter", adapter, "--adapter", f"{adapter}=0.5", "-o", out]
        self.ok(*command)
        self.assertEqual(self.each(command, out, self.all(out), {}), 7)  # three files, with the folder; its name


class Usage(Case):
    def test_help(self):
        text = self.ok("--help")
        for verb in VERBS + LATER:
            self.assertIn(verb, text)
        for verb in VERBS:
            page = self.ok(verb, "--help")
            self.assertEqual(page, self.ok("help", verb))
            self.assertIn("example:", page)
            self.assertIn(f"choir {verb}", page)
            self.assertTrue(all(len(line) < 160 for line in page.splitlines()))
            self.assertEqual(self.ok("help", "--man", verb), pathlib.Path(f"docs/man/choir-{verb}.1").read_text(),
                             "run scripts/man CHOIR")
        self.assertRegex(self.ok("--version"), r"^choir \d+\.\d+\.\d+\n$")

    def test_wrong_usage_is_2(self):
        self.assertEqual(choir().returncode, 2)
        self.fails(2, "'infoo' is no verb; the nearest is 'info'", "infoo")
        self.fails(2, "usage: choir tokenize", "tokenize")
        self.fails(2, "'jsn' is no option here; the nearest is --json", "info", self.dense, "--jsn")
        self.fails(2, "--threads is 300, must be 0 to 256", "generate", self.dense, "-p", "x", "-t", 300)
        self.fails(2, "--temperature is 'hot', must be a number", "generate", self.dense, "--temperature", "hot")
        self.fails(2, "-p TEXT is missing", "generate", self.dense)
        self.fails(2, "MODEL is missing", "generate", "-p", "x")
        self.fails(2, "--tokens is missing", "logits", self.dense)
        self.fails(2, "--file FILE is missing", "perplexity", self.dense)
        self.fails(2, "either", "info")
        self.fails(2, "go together", "serve", self.dense, "--tls-cert", "x")
        for address in ("8000", ":8000", "unix:/tmp/x", "127.0.0.1:65536", "127.0.0.1:http"):
            self.fails(2, "must be (HOST:PORT$|0 to 65535)", "serve", self.dense, "--http", address)

    def test_later_verbs_say_so(self):
        for verb in LATER:
            self.fails(1, f"'{verb}' is not there yet", verb, "x", "--y")

    def test_missing_files(self):
        for words in (["info", "/nowhere"], ["tokenize", "no-such-model", "x"], ["generate", "../x", "-p", "x"]):
            self.fails(1, "is neither a file, nor a folder, nor a name in", *words)
        self.fails(1, "cannot open /nowhere", "perplexity", self.dense, "--file", "/nowhere")
        self.fails(1, "[a-z]", "info", "/dev/null")
        empty = self.folder / "empty"
        empty.mkdir()
        self.fails(1, "empty", "info", empty)

    def test_broken_models(self):
        whole = (self.dense / "model.safetensors").read_bytes()
        broken = self.folder / "broken"
        tiny_model.write(broken)
        for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
            (broken / "model.safetensors").write_bytes(whole[:cut])
            self.fails(1, "broken", "info", broken)

    def test_a_full_output(self):
        with open("/dev/full", "w") as full:
            self.assertEqual(choir("info", self.dense, stdout=full).returncode, 1)
        def no_space():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        out = self.folder / "full.f32"
        self.fails(1, "cannot write", "logits", self.dense, "--tokens", "1,2,3", "--out", out, preexec_fn=no_space)
        self.assertEqual(list(self.folder.glob("full.f32*")), [])

    def test_names_lie_in_the_cache(self):
        cache = self.folder / "cache/choir/models"
        cache.parent.mkdir(parents=True)
        cache.mkdir()
        os.symlink(self.dense, cache / "tiny")
        home = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")}
        self.assertEqual(json.loads(self.ok("info", "tiny", "--json", env=home))["family"], "llama")
        self.fails(1, "neither", "info", ".hidden", env=home)


class Tokens(Case):
    def test_round_trip(self):
        for text in ("hello world", "", "é€😀 <|im_end|>", "a\nb\tc", " " * 50):
            got = json.loads(self.ok("tokenize", self.dense, text, "--json"))
            self.assertEqual(got["count"], len(got["ids"]))
            if got["ids"]:
                ids = ",".join(map(str, got["ids"]))
                self.assertEqual(json.loads(self.ok("detokenize", self.dense, ids, "--json"))["text"], text)
                self.assertEqual(self.ok("tokenize", self.dense, "--", text), ids + "\n")

    def test_files(self):
        path = self.folder / "text"
        path.write_text("hello\n" * 1000)
        ids = self.ok("tokenize", self.dense, "--file", path)
        (self.folder / "ids").write_text(f"[{ids.strip()}]")
        self.assertEqual(self.ok("detokenize", self.dense, "--file", self.folder / "ids"), path.read_text() + "\n")

    def test_bad_ids(self):
        self.fails(1, "the vocabulary ends at", "detokenize", self.dense, "5,100000")
        for ids in ("5,-1", "x", "5;6", "99999999999999999999", ","):
            self.fails(1, "IDS", "detokenize", self.dense, "--", ids)

    def test_bad_utf8(self):
        path = self.folder / "latin1"
        path.write_bytes(b"caf\xe9")
        self.fails(1, "UTF-8", "tokenize", self.dense, "--file", path)


class Numbers(Case):
    def test_info(self):
        got = json.loads(self.ok("info", self.moe, "--json"))
        self.assertEqual((got["family"], got["experts"], got["experts_per_token"]), ("mixtral", 4, 2))
        self.assertEqual(got["vocab"], self.vocab)
        self.assertIn("experts     4 in each of 2 layers", self.ok("info", self.moe))

    def test_logits_and_routes(self):
        out, routes = self.folder / "l.f32", self.folder / "r.jsonl"
        top = json.loads(self.ok("logits", self.moe, "--tokens", "5,7,9", "--out", out, "--routes", routes, "--exact"))
        logits = array.array("f", out.read_bytes())
        self.assertEqual(len(logits), 3 * self.vocab)
        last = logits[2 * self.vocab:]
        best = sorted(range(self.vocab), key=lambda i: -last[i])[:5]
        self.assertEqual([t["token"] for t in top["top"]], best)
        lines = [json.loads(line) for line in routes.read_text().splitlines()]
        self.assertEqual([(l["layer"], l["token"]) for l in lines], [(l, t) for l in range(2) for t in range(3)])
        for line in lines:
            self.assertEqual(len(set(line["experts"])), 2)
            self.assertAlmostEqual(sum(line["weights"]), 1, places=5)
            self.assertGreaterEqual(*line["weights"])

    def test_forced_expert(self):
        routes = self.folder / "f.jsonl"
        self.ok("logits", self.moe, "--tokens", "5,7", "--routes", routes, "--force-expert", 3)
        for line in map(json.loads, routes.read_text().splitlines()):
            self.assertEqual((line["experts"][0], line["weights"][0]), (3, 1))
        self.fails(1, "4", "logits", self.moe, "--tokens", "5,7", "--force-expert", 4)
        self.fails(1, "dense", "logits", self.dense, "--tokens", "5,7", "--routes", routes)
        self.fails(1, "the vocabulary ends at", "logits", self.dense, "--tokens", "5,100000")

    def test_perplexity(self):
        path = self.folder / "p"
        path.write_text("hello world, this is a text. " * 20)
        n = json.loads(self.ok("tokenize", self.dense, "--file", path, "--json"))["count"]
        whole, half = (json.loads(self.ok("perplexity", self.dense, "--file", path, "--context", 64, "--json", *more))
                       for more in ([], ["--second-half"]))
        rest = n % 64
        self.assertEqual(whole["tokens"], n // 64 * 63 + (rest - 1 if rest >= 2 else 0))
        self.assertEqual(half["tokens"], n // 64 * 31)
        for got in (whole, half):
            self.assertAlmostEqual(got["ppl"], math.exp(got["nll"] / got["tokens"]), places=3)
        path.write_text("h")
        self.fails(1, "too few", "perplexity", self.dense, "--file", path)

    def test_exact_is_close(self):
        path = self.folder / "q"
        path.write_text("hello world. " * 30)
        fast, exact = (json.loads(self.ok("perplexity", self.moe, "--file", path, "--json", *more))["ppl"]
                       for more in ([], ["--exact"]))
        self.assertLess(abs(fast / exact - 1), 0.05)

    def test_bench(self):
        got = json.loads(self.ok("bench", self.dense, "--prompt", 16, "--generate", 4, "--batch", "1,3", "--json"))
        self.assertEqual([run["batch"] for run in got["runs"]], [1, 3])
        self.fails(1, "--batch is '0'", "bench", self.dense, "--batch", "0")


class Generate(Case):
    def test_json(self):
        words = ["generate", self.dense, "-p", "hello", "-n", 8, "--ignore-eos", "--json"]
        got = json.loads(self.ok(*words, "--temperature", 0))
        self.assertEqual(len(got["token_ids"]), 8)
        self.assertEqual(got["finish_reason"], "length")
        self.assertEqual(got["usage"], {"prompt_tokens": 1, "cached_tokens": 0, "output_tokens": 8, "total_tokens": 9})
        self.assertIn("decode_ms", got["timings"])
        again = json.loads(self.ok(*words, "--temperature", 0, "--threads", 1))
        self.assertEqual(again["token_ids"], got["token_ids"])

    def test_seeds(self):
        words = ["generate", self.dense, "-p", "hello", "-n", 16, "--ignore-eos", "--json", "--temperature", 1]
        first, second, other = (json.loads(self.ok(*words, "--seed", s)) for s in (7, 7, 8))
        self.assertEqual(first["token_ids"], second["token_ids"])
        self.assertNotEqual(first["token_ids"], other["token_ids"])
        drawn = json.loads(self.ok(*words))
        self.assertEqual(json.loads(self.ok(*words, "--seed", drawn["seed"]))["token_ids"], drawn["token_ids"])

    def test_streamed_text_is_the_same(self):
        words = ["generate", self.dense, "-p", "hello", "-n", 12, "--temperature", 0, "--chat"]
        self.assertEqual(self.ok(*words), self.ok(*words, "--stream"))
        self.assertEqual(self.ok(*words), self.ok(*words, "-p", "-", input="hello"))

    def test_refusals(self):
        self.fails(1, "top_p", "generate", self.dense, "-p", "x", "--top-p", "0")
        self.fails(1, "4096", "generate", self.dense, "-p", "-", input="x" * 5000)
        self.fails(1, "no tokens|at least|empty|0 tokens", "generate", self.dense, "-p", "")


class Upcycle(Case):
    def test_wrong_usage(self):
        expert = ["--expert", "a=x"]
        self.fails(2, "-o OUT is missing", "upcycle", self.dense, *expert)
        self.fails(2, "--expert NAME=DIR is missing", "upcycle", self.dense, "-o", "x")
        self.fails(2, "--expert is 'a', must be NAME=DIR", "upcycle", self.dense, "-o", "x", "--expert", "a")
        self.fails(2, "hidden or uniform", "upcycle", self.dense, "-o", "x", *expert, "--gate-init", "y")
        self.fails(2, "q8_0, q4_1", "upcycle", self.dense, "-o", "x", *expert, "--quant", "q3")
        self.fails(1, "no sample text for 'a'", "upcycle", self.dense, "-o", "x.gguf", *expert)

    def test_uniform_gates_on_equal_experts_change_nothing(self):
        adapter, out = self.folder / "adapter", self.folder / "up"
        tiny_model.write_adapter(adapter, scale=0)
        self.ok("upcycle", self.dense, "--expert", f"a={adapter}", "--gate-init", "uniform", "--quant", "f32",
                "-o", out)
        self.assertEqual(json.loads(self.ok("info", out, "--json"))["experts"], 2)
        before, after = (json.loads(self.ok("logits", m, "--tokens", "5,7,9", "--exact"))["top"]
                         for m in (self.dense, out))
        self.assertEqual([t["token"] for t in before], [t["token"] for t in after])
        for a, b in zip(before, after):
            self.assertAlmostEqual(a["logit"], b["logit"], places=4)


class Merge(Case):
    BASE, ADAPTERS = "tests/fixtures/models/llama", "tests/fixtures/merge"

    def test_wrong_usage(self):
        words = ["merge", self.BASE, "--adapter", f"{self.ADAPTERS}/a", "-o", "x"]
        self.fails(2, "usage: choir merge BASE", "merge")
        self.fails(2, "-o OUT is missing", *words[:-2])
        self.fails(2, r"--adapter DIR\[=WEIGHT\] is missing", "merge", self.BASE, "-o", "x")
        self.fails(2, "the weight is 99, must be -8 to 8", *words, "--adapter", "b=99")
        self.fails(2, "--method is 'tie'; the nearest is ties", *words, "--method", "tie")
        self.fails(2, "--density is missing: the share that ties keeps", *words, "--method", "ties")
        self.fails(2, "--density is 0, must be over 0", *words, "--method", "ties", "--density", 0)
        self.fails(2, "--density is 1.5, must be 0 to 1", *words, "--method", "ties", "--density", 1.5)
        self.fails(2, "--density is for methods that prune, not for cat", *words, "--method", "cat", "--density", 1)
        self.fails(2, "--rank is for svd and methods that end in _svd, not cat", *words, "--method", "cat", "--rank", 3)
        self.fails(2, "--rank is 5000, must be 1 to 4096", *words, "--rank", 5000)
        self.fails(2, "--seed is for dare, not for svd", *words, "--seed", 3)
        self.fails(2, "--majority-sign-method is for ties", *words, "--majority-sign-method", "total")
        self.fails(2, "must be total or frequency", *words, "--method", "ties", "--density", 0.5,
                   "--majority-sign-method", "x")
        self.fails(2, "--dtype is 'q8_0', must be f32, bf16 or f16", *words, "--dtype", "q8_0")

    def test_refusals(self):
        words = ["merge", self.BASE, "--adapter", f"{self.ADAPTERS}/a"]
        self.fails(1, "is there already", *words, "-o", self.folder)
        self.fails(1, "none is no folder", *words, "--adapter", "none", "-o", self.folder / "x")
        self.fails(1, "has no place in the base|lacks|wants", "merge", self.dense, *words[2:], "-o", self.folder / "x")
        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        self.fails(1, "cannot write .*adapter_model.safetensors: File too large", *words, "-o", self.folder / "x",
                   preexec_fn=limit)
        self.assertEqual(list(self.folder.glob("x*")), [])

    def logits(self, *adapters):
        out = self.folder / "logits"
        words = [word for a in adapters for word in ("--adapter", a)]
        self.ok("logits", self.BASE, "--tokens", ",".join(str(i * 37 % 512) for i in range(30)), "--exact", *words,
                "--out", out)
        return array.array("f", out.read_bytes())

    def test_a_merge_is_what_a_live_mix_is(self):
        weights = {"a": 0.7, "b": -0.4, "c": 1}
        names = [word for n, w in weights.items() for word in ("--adapter", f"{n}={w}")]
        for method in (["cat"], ["svd", "--rank", 11]):
            out = self.folder / f"merged-{method[0]}"
            said = self.ok("merge", self.BASE, "--adapters", self.ADAPTERS, *names, "--method", *method, "-o", out)
            self.assertEqual(said, f"{out}: rank 11, 4 matrices, 16.5 KiB\n")
            mixed, merged = self.logits(*(f"{self.ADAPTERS}/{n}={w}" for n, w in weights.items())), self.logits(out)
            plain = self.logits()
            largest = max(map(abs, mixed))
            self.assertGreater(max(abs(x - y) for x, y in zip(plain, mixed)), 1e-3 * largest)
            self.assertLess(max(abs(x - y) for x, y in zip(merged, mixed)), 1e-5 * largest)


class Serving(Case):
    def start(self, *words, env=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{s.getsockname()[1]}"
        self.log = open(self.folder / "serve.log", "w+")
        server = subprocess.Popen([CHOIR, "serve", *map(str, words), "--listen", self.address], stderr=self.log,
                                  stdin=subprocess.DEVNULL, env=env)
        self.addCleanup(self.log.close)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        for _ in range(600):
            if server.poll() is not None or \
                    choir("info", "--server", self.address, "--api-key", "secret-1").returncode == 0:
                return server
            time.sleep(0.1)
        self.fail("the server never was SERVING")

    def said(self):
        self.log.seek(0)
        return self.log.read()

class Disk(Faults, Serving):
    """FAULTS 1 to 4 and 6 on real files: a pack whose experts are streamed by pread."""
    STREAM = ["--expert-io", "pread", "--expert-memory"]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.many, cls.pack = cls.folder / "many", cls.folder / "many.choir"
        tiny_model.write(cls.many, experts=16)
        choir("pack", cls.many, "-o", cls.pack).check_returncode()
        head = cls.pack.read_bytes()
        n_tensors, n_runs = struct.unpack_from("<II", head, 20)
        runs = [struct.unpack_from("<IIQQ", head, 4096 + 64 * n_tensors + 40 * i) for i in range(n_runs)]
        cls.runs = {(layer, expert): (offset, size) for layer, expert, offset, size in runs}
        cls.first_run = min(offset for offset, _ in cls.runs.values())
        cls.prompts = "acegikmoqsuwy"

    def answer(self, prompt, *more):
        return json.loads(self.ok("generate", *more, "-p", prompt, "-n", 1, "--temperature", 0, "--json"))["token_ids"]

    def ask(self, prompt):
        """Asks the server; a Popen, for questions that run beside each other."""
        return subprocess.Popen([CHOIR, "generate", "m", "-p", prompt, "-n", "1", "--temperature", "0", "--json",
                                 "--server", self.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def got(self, asked):
        out, said = asked.communicate(timeout=60)
        return asked.returncode, json.loads(out)["token_ids"] if asked.returncode == 0 else said

    def lost(self, got):
        self.assertEqual(got[0], 1, got)
        self.assertRegex(got[1], "cannot be read from disk")

    def experts_of(self, prompt):
        routes = self.folder / "routes.jsonl"
        ids = self.ok("tokenize", self.pack, "--", prompt).strip()
        self.ok("logits", self.pack, "--tokens", ids, "--routes", routes)
        lines = map(json.loads, routes.read_text().splitlines())
        return {(line["layer"], expert) for line in lines for expert in line["experts"]}

    def pair(self):
        """Two prompts, and an expert that the first wants and the second does not."""
        first = self.prompts[0]
        for other in self.prompts[1:]:
            alone = self.experts_of(first) - self.experts_of(other)
            if alone:
                return first, other, min(alone)
        self.fail("all prompts want the same experts")

    def at_experts(self, words, expert=None):
        begin, size = self.runs[expert] if expert else (self.first_run, 1 << 40)
        self.faults(f"name=.choir from={begin} to={begin + size} {words}")

    def test_bits(self):
        out = self.folder / "logits.bin"
        command = ["logits", self.pack, "--tokens", "5,7,9,11,40,41", "--out", out]
        self.ok(*command)
        wanted = out.read_bytes()
        for words in ("", "eio=1", "eio=2", "short=200", "short=700"):
            for memory in ("200KiB", "1MiB"):
                self.at_experts(words)
                self.ok(*command, *self.STREAM, memory, env=self.faulty)
                self.assertEqual(out.read_bytes(), wanted, words)
        self.at_experts("eio=-1")
        done = choir(*command, *self.STREAM, "1MiB", env=self.faulty)
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, "cannot be read from disk")

    def test_a_lost_expert(self):
        self.faults("")
        first, other, expert = self.pair()
        wanted = self.answer(other, self.pack)
        server = self.start(self.pack, "--served-model-name", "m", *self.STREAM, "1MiB", "--no-prefetch",
                            env=self.faulty)
        self.at_experts("eio=-1", expert)
        for _ in range(3):
            asked = self.ask(first), self.ask(other)
            self.lost(self.got(asked[0]))
            self.assertEqual(self.got(asked[1]), (0, wanted))
        self.assertRegex(self.said(), f"expert {expert[1]} of layer {expert[0]} is lost for 30 s: Input/output error")
        server.send_signal(signal.SIGTERM)
        self.assertEqual(server.wait(60), 0)

    def test_a_slow_expert(self):
        self.faults("")
        first, other, expert = self.pair()
        wanted = [self.answer(p, self.pack) for p in (first, other)]
        self.start(self.pack, "--served-model-name", "m", *self.STREAM, "1MiB", "--no-prefetch", env=self.faulty)
        self.assertEqual(self.got(self.ask(other)), (0, wanted[1]))  # its experts are resident now
        self.at_experts("sleep_ms=5000", expert)
        began = time.monotonic()
        waiting = self.ask(first)
        time.sleep(0.3)
        self.assertEqual(self.got(self.ask(other)), (0, wanted[1]))
        self.assertLess(time.monotonic() - began, 4)
        self.assertIsNone(waiting.poll())
        self.assertEqual(self.got(waiting), (0, wanted[0]))
        self.assertGreater(time.monotonic() - began, 4)

    def test_another_file(self):
        self.faults("")
        served, other = self.folder / "served.choir", self.folder / "other.choir"
        wanted = {p: self.answer(p, self.pack) for p in self.prompts}
        shutil.copy(self.pack, served)
        self.ok("pack", self.many, "-o", other, "--quant", "q8_0")
        # Room for one layer's two experts and a few more: each prompt reads.
        self.start(served, "--served-model-name", "m", *self.STREAM, "100KiB")
        os.replace(other, served)  # the open file goes on
        for p in self.prompts:
            self.assertEqual(self.got(self.ask(p)), (0, wanted[p]))

    def test_written_over(self):
        self.faults("")
        served = self.folder / "over.choir"
        wanted = {p: self.answer(p, self.pack) for p in self.prompts}
        shutil.copy(self.pack, served)
        self.start(served, "--served-model-name", "m", *self.STREAM, "100KiB")
        self.assertEqual(self.got(self.ask(self.prompts[0])), (0, wanted[self.prompts[0]]))
        with open(served, "r+b") as file:  # all of it but the header, which would be told at the next start
            file.seek(4096)
            file.write(bytes(range(1, 256)) * ((served.stat().st_size - 4096) // 255))
        n_lost = 0
        for p in self.prompts[1:]:
            got = self.got(self.ask(p))
            if got[0] == 0:
                self.assertEqual(got[1], wanted[p])
            else:
                self.lost(got)
                n_lost += 1
        self.assertGreater(n_lost, len(self.prompts) // 2)


class Serve(Serving):
    def test_a_life(self):
        config = self.folder / "serve.json"
        config.write_text('{"max-num-seqs": 4, "memory": "2GiB", "api-key": ["secret-1"]}')
        server = self.start(self.dense, self.moe, "--config", config, "--max-num-seqs", 8, "--served-model-name", "a",
                            "--override-generation-config", '{"temperature": 0}')
        said = self.said()
        self.assertIn("max-num-seqs = 8 (command line)", said)
        self.assertIn("memory = 2GiB (config file)", said)
        self.assertNotIn("secret-1", said)
        self.assertIn(f"listening on {self.address}", said)
        key = ["--server", self.address, "--api-key", "secret-1"]
        models = json.loads(self.ok("info", "--json", *key))["models"]
        self.assertEqual([m["name"] for m in models], ["a", "moe"])
        words = ["-p", "hello", "-n", 8, "--temperature", 0, "--json"]
        here, there = (json.loads(self.ok("generate", m, *words, *more))
                       for m, more in ((self.moe, []), ("moe", key)))
        self.assertEqual(here["token_ids"], there["token_ids"])
        self.assertEqual(here["text"], there["text"])
        usual = json.loads(self.ok("generate", "moe", "-p", "hello", "-n", 8, "--json", *key))
        self.assertEqual(here["token_ids"], usual["token_ids"])  # the override's temperature, 0
        talks = [self.ok("chat", m, "-n", 6, "--temperature", 0, *more, input="hello\nand then?\n")
                 for m, more in ((self.moe, []), ("moe", key))]
        self.assertEqual(*talks)
        self.fails(1, "nope", "generate", "nope", *words, *key)
        self.fails(1, "key|authoriz", "generate", "moe", *words, "--server", self.address)
        taken = choir("serve", self.dense, "--listen", self.address)
        self.assertEqual(taken.returncode, 1)
        self.assertIn("cannot listen on " + self.address, taken.stderr.splitlines()[-1])
        server.send_signal(signal.SIGTERM)
        self.assertEqual(server.wait(60), 0)
        self.fails(1, "[Cc]onnect|answers", "generate", "moe", *words, *key)

    def check_metrics(self, url, streamed):
        """What the real store tells Prometheus is what it told over gRPC."""
        with self.assertRaises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url + "/metrics", timeout=10)
        self.assertEqual(refused.exception.code, 401)
        refused.exception.close()
        asked = urllib.request.Request(url + "/metrics?experts=1", headers={"Authorization": "Bearer secret-1"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            lines = [l for l in answer.read().decode().splitlines() if not l.startswith("#")]
        found = {name: float(value) for name, value in (l.rsplit(" ", 1) for l in lines)}
        of = '{model="streamed"}'
        self.assertEqual(found["choir_expert_read_bytes_total" + of], streamed["bytes_read"])
        self.assertEqual(found["choir_experts" + of], streamed["experts"])
        self.assertEqual(found["choir_expert_held_bytes" + of], streamed["held_bytes"])
        loads = found["choir_expert_read_latency_seconds_count" + of]
        self.assertGreater(loads, 0)
        self.assertGreater(found["choir_expert_read_latency_seconds_sum" + of], 0)
        self.assertEqual(found['choir_expert_read_latency_seconds_bucket{model="streamed",le="+Inf"}'], loads)
        wanted = sum(found[f"choir_expert_{kind}_total{of}"] for kind in ("hits", "late_hits", "misses"))
        self.assertAlmostEqual(found["choir_expert_hits_total" + of] / wanted, streamed["hit_rate"], places=6)
        heat = [v for k, v in found.items() if k.startswith("choir_expert_heat{")]
        self.assertEqual(len(heat), streamed["experts"])
        self.assertGreater(max(heat), 0)

    def test_streamed_experts(self):
        pack = self.folder / "streamed.choir"
        self.ok("pack", self.moe, "-o", pack)
        server = self.start(pack, "--api-key", "secret-1", "--expert-memory", "64KiB", "--expert-io", "pread",
                            "--http", "127.0.0.1:0")
        self.assertIn("streamed by pread", self.said())
        key = ["--server", self.address, "--api-key", "secret-1"]
        words = ["-p", "hello", "-n", 8, "--temperature", 0, "--json"]
        here = json.loads(self.ok("generate", self.moe, *words))
        there = json.loads(self.ok("generate", "streamed", *words, *key))
        self.assertEqual(here["token_ids"], there["token_ids"])
        streamed = json.loads(self.ok("info", "--json", *key))["models"][0]["streamed"]
        self.assertEqual((streamed["io"], streamed["experts"]), ("pread", 8))
        self.assertGreater(streamed["bytes_read"], 0)
        self.check_metrics(re.search("health on (http://.*)", self.said())[1], streamed)
        self.assertIn("experts are streamed by pread", self.ok("info", *key))
        server.send_signal(signal.SIGTERM)
        self.assertEqual(server.wait(60), 0)

    def test_a_second_signal_stops_at_once(self):
        server = self.start(self.dense, "--shutdown-timeout", 600)
        client = subprocess.Popen([CHOIR, "generate", "--server", self.address, "-p", "hello", "--ignore-eos",
                                   "--stream"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        client.stdout.read(1)
        server.send_signal(signal.SIGINT)
        time.sleep(0.2)
        server.send_signal(signal.SIGINT)
        server.wait(60)
        client.communicate(timeout=60)

    def test_bad_configurations(self):
        bad = self.folder / "bad.json"
        bad.write_text('{"max-num-seq": 4}')
        self.fails(2, "the nearest is --max-num-seqs", "serve", self.dense, "--config", bad)
        for words, text in (("tempo", '{"tempo": 1}'), ("0 to 100", '{"temperature": 101}'), ("object", "[1]")):
            self.fails(2, words, "serve", self.dense, "--override-generation-config", text)
        done = choir("serve", self.dense, "--memory", "1K")
        self.assertEqual(done.returncode, 1)
        self.assertIn("--memory", done.stderr)
        self.fails(2, "must be HOST:PORT or unix:/path", "serve", self.dense, "--listen", "not an address")
        self.fails(2, "must be 0 to 65535", "serve", self.dense, "--listen", "127.0.0.1:65536")


class Chat(Case):
    """A conversation over a pseudo-terminal."""

    def open(self, *words, **environment):
        pid, self.terminal = pty.fork()
        if pid == 0:
            os.environ.update(TERM="xterm", **environment)
            os.execv(CHOIR, [CHOIR, "chat", str(self.dense), *words])
        self.pid, self.seen = pid, ""
        self.addCleanup(os.close, self.terminal)
        self.addCleanup(self.kill)

    def kill(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def expect(self, pattern, seconds=60):
        """What came until the pattern did; it is taken from what was seen."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            try:
                data = os.read(self.terminal, 65536) if ready else b""
            except OSError:
                data = b""
            if not data:
                self.fail(f"'{pattern}' did not come; seen: {self.seen[-500:]!r}")
            self.seen += data.decode(errors="replace")
        before, self.seen = self.seen[:found.end()], self.seen[found.end():]
        return before

    def send(self, text):
        os.write(self.terminal, text.encode())

    def prompt(self):
        """The prompt came, and the terminal is libedit's: it takes it over just after drawing the prompt."""
        self.expect(r"(^|\n|\r)> ")
        time.sleep(0.3)

    def left(self, last):
        """The exit code; `last` is sent again if the terminal was not libedit's yet and dropped it."""
        for i in range(600):
            if i % 40 == 0:
                self.send(last)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            ready, _, _ = select.select([self.terminal], [], [], 0.05)
            try:
                if ready:
                    os.read(self.terminal, 65536)
            except OSError:
                time.sleep(0.05)
        self.fail("chat did not leave")

    def test_ctrl_c_stops_the_answer_only(self):
        self.open("--ignore-eos", "--temperature", "1")
        self.prompt()
        self.send("hello\n")
        self.expect("\x1b\\[36m")
        time.sleep(0.3)
        self.send("\x03")
        self.expect(r"\(stopped\)")
        self.prompt()
        self.send("/help\n")
        self.expect("forget the conversation")
        self.prompt()
        self.send("/stats\n")
        self.expect("prompt|nothing")
        self.prompt()
        self.send("half a line")
        time.sleep(0.3)
        self.send("\x03")
        self.prompt()
        self.send("/help\n")
        self.expect("forget the conversation")
        self.prompt()
        self.send("\x03")
        self.expect("Ctrl-C again")
        self.prompt()
        self.assertEqual(self.left("\x03"), 0)

    def test_ctrl_d_and_quit_leave(self):
        for last in ("\x04", "/quit\n", "/exit\n"):
            self.open("-n", "4")
            self.prompt()
            self.send("hello\n")
            self.expect(r"\(cut at --max-tokens\)|\x1b\[0m")
            self.prompt()
            self.assertEqual(self.left(last), 0)

    def test_no_colour(self):
        self.open("-n", "4", NO_COLOR="1")
        self.prompt()
        self.send("hello\n")
        self.assertNotIn("\x1b[36m", self.expect(r"\n> "))

    def test_lines_from_a_pipe(self):
        saved = self.folder / "saved.json"
        text = f"hello\n/system Be brief.\nhello again\n/save {saved}\n/bogus\n"
        out = self.ok("chat", self.dense, "-n", 4, "--seed", 1, input=text)
        self.assertNotIn("\x1b", out)
        self.assertIn("'/bogus' is no command", out)
        roles = [m["role"] for m in json.loads(saved.read_text())]
        self.assertEqual(roles, ["system", "user", "assistant"])

    def test_a_full_context_is_told(self):
        small = self.folder / "small"
        tiny_model.write(small, context=256)
        out = choir("chat", small, "--ignore-eos", "--temperature", "1", "--seed", 3, input="hello\nand then?\n")
        self.assertIn("the context is full", out.stdout)
        self.assertRegex(out.stderr, "256")


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]])
