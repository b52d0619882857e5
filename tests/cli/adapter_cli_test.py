#!/usr/bin/env python3
"""Adapters as users of the binary meet them. Usage: adapter_cli_test.py CHOIR [unittest arguments]"""
import array
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import unittest

import cli_test
import tiny_model
from cli_test import choir

TOKENS = "5,7,9,11,40,41,99"


def tensors_of(folder):
    """{name: (shape, values)} of an adapter's f32 tensors."""
    data = (folder / "adapter_model.safetensors").read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + length])
    found = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        found[name] = about["shape"], list(struct.unpack_from(f"<{(end - begin) // 4}f", data, 8 + length + begin))
    return found


def write_tensors(folder, tensors):
    tiny_model.write_tensors(folder / "adapter_model.safetensors",
                             [(name, shape, values) for name, (shape, values) in tensors.items()])


def merged(base, out, weighted):
    """The dense model with the adapters' changes in its weights, each by its weight."""
    shutil.copytree(base, out)
    data = (base / "model.safetensors").read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8:8 + length])
    values = array.array("f", data[8 + length:])
    for folder, weight in weighted:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = tensors_of(folder)
        for name, (shape, a) in tensors.items():
            if not name.endswith("lora_A.weight"):
                continue
            rank, cols = shape
            (rows, _), b = tensors[name.replace("lora_A", "lora_B")]
            at = header[name.removeprefix("base_model.model.").replace("lora_A.", "")]["data_offsets"][0] // 4
            scale = weight * config["lora_alpha"] / config["r"]
            for i in range(rows):
                for j in range(cols):
                    values[at + i * cols + j] += scale * sum(b[i * rank + k] * a[k * cols + j] for k in range(rank))
    (out / "model.safetensors").write_bytes(data[:8 + length] + values.tobytes())


# What is wrong with an adapter, and what the one sentence about it says. Each gets a good one's folder.
def no_config(folder):
    (folder / "adapter_config.json").unlink()


def no_tensors(folder):
    (folder / "adapter_model.safetensors").unlink()


def pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def config(**changes):
    def change(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


def config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def tensor(change):
    def rewrite(folder):
        tensors = tensors_of(folder)
        change(tensors, next(n for n in tensors if n.endswith("layers.0.mlp.gate_proj.lora_A.weight")))
        write_tensors(folder, tensors)
    return rewrite


def transpose(tensors, name):
    (rows, cols), values = tensors[name]
    tensors[name] = (cols, rows), values


def put(value):
    def change(tensors, name):
        tensors[name][1][3] = value
    return change


def rename(to):
    def change(tensors, name):
        tensors[name.replace("layers.0.mlp.gate_proj", to)] = tensors.pop(name)
    return change


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


BAD = {
    "no-config": (no_config, "adapter_config.json"),
    "no-tensors": (no_tensors, "adapter_model.safetensors"),
    "pickle": (pickle, "adapter_model.bin.*(pickle|safetensors)"),
    "empty-config": (config_text(""), "adapter_config.json"),
    "no-json": (config_text("{'r': 2}"), "adapter_config.json"),
    "no-object": (config_text("[]"), "adapter_config.json|object"),
    "no-kind": (config(peft_type=None), "peft_type"),
    "unknown-kind": (config(peft_type="OFTV9"), "OFTV9"),
    "absurd-rank": (config(r=10**9), "rank|r is|shape|1000000000"),
    "zero-rank": (config(r=0), "rank| r "),
    "another-rank": (config(r=3), r"\[2, 32\]|rank|shape|rows"),
    "negative-rank": (config(r=-4), "rank| r "),
    "no-alpha": (config(lora_alpha="much"), "lora_alpha"),
    "wrong-shape": (tensor(transpose), "gate_proj"),
    "nan": (tensor(put(float("nan"))), "gate_proj.*(NaN|finite)"),
    "infinity": (tensor(put(float("inf"))), "gate_proj.*(NaN or infinity|finite)"),
    "no-such-layer": (tensor(rename("layers.7.mlp.gate_proj")), "layers.7"),
    "no-such-module": (tensor(rename("layers.0.mlp.middle_proj")), "middle_proj"),
    "alone": (tensor(lambda t, name: t.pop(name)), "lora_A|gate_proj"),
    "cut": (cut, "adapter_model.safetensors|tensor|byte"),
    "huge-header": (huge_header, "header"),
}
# What only the tensors' bytes show: a registry that reads headers finds it when somebody wants the adapter.
BY_BYTES = {"nan", "infinity"}


class Adapters(cli_test.Serving):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.one, cls.two, cls.none = cls.folder / "one", cls.folder / "two", cls.folder / "none"
        tiny_model.write_adapter(cls.one)
        tiny_model.write_adapter(cls.two, rank=3, seed=11)
        tiny_model.write_adapter(cls.none, scale=0)

    def logits(self, model, *more):
        out = self.folder / "logits.bin"
        self.ok("logits", model, "--tokens", TOKENS, "--out", out, *more)
        return array.array("f", out.read_bytes())

    def near(self, a, b, share):
        self.assertEqual(len(a), len(b))
        limit = share * max(map(abs, b))
        self.assertLess(max(abs(x - y) for x, y in zip(a, b)), limit)

    def far(self, a, b):
        self.assertGreater(max(abs(x - y) for x, y in zip(a, b)), 0.05 * max(map(abs, b)))

    def bad(self, name):
        """A folder that is wrong in the way of that name."""
        folder = self.folder / "bad" / name
        if not folder.exists():
            shutil.copytree(self.one, folder)
            BAD[name][0](folder)
        return folder


class Local(Adapters):
    def test_logits_are_those_of_merged_weights(self):
        for i, weighted in enumerate([[(self.one, 1)], [(self.two, -0.5)], [(self.one, 0.5), (self.two, 2)]]):
            whole = self.folder / f"merged-{i}"
            merged(self.dense, whole, weighted)
            words = [w for folder, weight in weighted for w in ("--adapter", f"{folder}={weight}")]
            got, want = self.logits(self.dense, "--exact", *words), self.logits(whole, "--exact")
            self.near(got, want, 1e-4)
            self.far(want, self.logits(self.dense, "--exact"))

    def test_no_change_is_the_base(self):
        base = self.logits(self.dense)
        self.assertEqual(self.logits(self.dense, "--adapter", self.none), base)
        self.assertEqual(self.logits(self.dense, "--adapter", f"{self.one}=0"), base)
        alone = self.logits(self.dense, "--adapter", self.one)
        self.assertEqual(self.logits(self.dense, "--adapter", f"{self.one}=1"), alone)
        self.assertEqual(self.logits(self.dense, "--adapter", self.one, "--adapter", f"{self.two}=0"), alone)

    def test_a_path_that_ends_like_a_weight(self):
        odd = self.folder / "odd=0.5"
        shutil.copytree(self.one, odd)
        alone = self.logits(self.dense, "--adapter", self.one)
        self.assertEqual(self.logits(self.dense, "--adapter", f"{odd}=1"), alone)
        self.assertEqual(self.logits(self.dense, "--adapter", f"{odd}/"), alone)
        self.fails(1, "odd", "logits", self.dense, "--tokens", "5", "--adapter", odd)

    def test_types(self):
        exact = self.logits(self.dense, "--exact", "--adapter", self.one)
        seen = set()
        for kind, share in (("f32", 1e-6), ("f16", 2e-3), ("bf16", 1e-2), ("int8", 3e-2)):
            got = self.logits(self.dense, "--exact", "--adapter", self.one, "--adapter-dtype", kind)
            self.near(got, exact, share)
            seen.add(got.tobytes())
        self.assertEqual(len(seen), 4)

    def test_perplexity(self):
        text = self.folder / "text.txt"
        text.write_text("the cat sat on the mat, the dog did not " * 20)
        whole = self.folder / "merged-ppl"
        merged(self.dense, whole, [(self.two, 1)])
        base, adapted, wanted = (
            json.loads(self.ok("perplexity", m, "--file", text, "--context", 64, "--exact", "--json", *more))
            for m, more in ((self.dense, []), (self.dense, ["--adapter", self.two]), (whole, [])))
        self.assertAlmostEqual(adapted["ppl"] / wanted["ppl"], 1, places=4)
        self.assertGreater(abs(adapted["ppl"] / base["ppl"] - 1), 0.01)
        self.assertEqual(adapted["tokens"], base["tokens"])

    def test_answers(self):
        words = ["-p", "hello", "-n", 12, "--temperature", 0, "--json"]
        whole = self.folder / "merged-answers"
        merged(self.dense, whole, [(self.one, 1), (self.two, 0.5)])
        mix = ["--adapter", self.one, "--adapter", f"{self.two}=0.5", "--exact"]
        base, got, want = (json.loads(self.ok("generate", m, *words, *more))["token_ids"]
                           for m, more in ((self.dense, ["--exact"]), (self.dense, mix), (whole, ["--exact"])))
        self.assertEqual(got, want)
        self.assertNotEqual(got, base)
        talk = ["-n", 6, "--temperature", 0]
        self.assertEqual(self.ok("chat", self.dense, *talk, *mix, input="hello\n"),
                         self.ok("chat", whole, *talk, "--exact", input="hello\n"))

    def test_bench(self):
        words = ["bench", self.dense, "--prompt", 16, "--generate", 4, "--batch", "1,3", "--json"]
        runs = json.loads(self.ok(*words, "--adapter", self.one, "--adapter", self.two))["runs"]
        self.assertEqual([r["batch"] for r in runs], [1, 3])

    def test_wrong_usage(self):
        for verb in (["logits", self.dense, "--tokens", 5], ["perplexity", self.dense, "--file", self.dense / "config.json"],
                     ["generate", self.dense, "-p", "x"], ["chat", self.dense], ["bench", self.dense]):
            self.fails(2, "the weight is 9, must be -8 to 8", *verb, "--adapter", f"{self.one}=9")
            self.fails(2, "--adapter is '', must be DIR", *verb, "--adapter", "")
            self.fails(2, "--adapter is '=0.5', must be DIR", *verb, "--adapter", "=0.5")
            self.fails(2, "given 9 times, a mix has at most 8", *verb, *["--adapter", "x"] * 9)
            self.fails(2, "must be auto, f32, f16, bf16 or int8", *verb, "--adapter-dtype", "q4_0")
            self.fails(2, "one is given twice", *verb, "--adapter", self.one, "--adapter", f"{self.one}=0.5")
            self.fails(1, "there|no such|cannot", *verb, "--adapter", self.folder / "nowhere")
        again = self.folder / "again"
        again.symlink_to(self.one)
        self.fails(1, "in the mix already", "logits", self.dense, "--tokens", 5, "--adapter", self.one, "--adapter", again)
        self.fails(2, "is not list, load or unload", "adapter", "lost")
        self.fails(2, "usage: choir adapter load NAME", "adapter", "load")
        self.fails(2, "usage: choir adapter unload NAME", "adapter", "unload", "a", "b")
        self.fails(2, "--pin and --replace go with load", "adapter", "list", "--pin")
        self.fails(1, "[Cc]onnect", "adapter", "list", "--server", "127.0.0.1:1")

    def test_bad_adapters(self):
        for name, (_, says) in BAD.items():
            with self.subTest(name):
                self.fails(1, says, "logits", self.dense, "--tokens", "5", "--adapter", self.bad(name))
                self.fails(1, says, "generate", self.dense, "-p", "x", "-n", 1, "--adapter", self.bad(name))


class Served(Adapters):
    def home(self, *bad):
        """A folder of adapters: one and two, a .gguf that is none, and bad ones."""
        home = self.folder / f"home-{self.id().rsplit('.', 1)[1]}"
        home.mkdir()
        for good in (self.one, self.two):
            shutil.copytree(good, home / good.name)
        for name in bad:
            shutil.copytree(self.bad(name), home / name)
        return home

    def ask(self, *more):
        return json.loads(self.ok("generate", "--server", self.address, "-p", "hello", "-n", 8, "--temperature", 0,
                                  "--json", *more))

    def adapter(self, *words):
        return self.ok("adapter", *words, "--server", self.address)

    def refused(self, says, *words):
        self.fails(1, says, "adapter", *words, "--server", self.address)

    def listed(self):
        return {a["name"]: a for a in json.loads(self.adapter("list", "--json"))}

    def stop(self, server):
        server.send_signal(signal.SIGTERM)
        self.assertEqual(server.wait(60), 0, self.said())

    def test_a_life(self):
        home = self.home()
        server = self.start(self.dense, "--adapters", home, "--lora-modules", f"mine={self.none}",
                            "--adapter-memory", "1MiB", "--adapter-dtype", "f32")
        self.assertRegex(self.said(), r"dense: 2 adapters registered from .* in \d+\.\d+ s, 0 left out")
        self.assertEqual(set(self.listed()), {"one", "two", "mine"})
        self.assertEqual({a["state"] for a in self.listed().values()}, {"registered"})
        base = self.ask()["token_ids"]
        self.assertEqual(self.ask("--adapter", "mine")["token_ids"], base)
        words = ["-p", "hello", "-n", 8, "--temperature", 0, "--json", "--adapter-dtype", "f32"]
        for mix in (["one"], ["two"], ["one=0.5", "two=2"], ["one=-1"]):
            there = self.ask(*[w for m in mix for w in ("--adapter", m)])
            here = json.loads(self.ok("generate", self.dense, *words,
                                      *[w for m in mix for w in ("--adapter", self.folder / m)]))
            self.assertEqual(there["token_ids"], here["token_ids"])
            self.assertNotEqual(there["token_ids"], base)
            self.assertEqual(there["adapter"], ",".join(mix))
        one = self.listed()["one"]
        self.assertEqual((one["state"], one["kind"], one["rank"], one["type"], one["requests"]),
                         ("resident", "LoRA", 2, "f32", 3))
        self.assertEqual(set(one["targets"]), {"ffn_gate", "ffn_up", "ffn_down"})
        self.fails(1, "nobody", "generate", "--server", self.address, "-p", "x", "--adapter", "nobody")
        self.assertRegex(self.adapter("list"), r"(?m)^one +resident +LoRA +2 ")
        self.assertRegex(self.adapter("unload", "two"), "two: unloaded")
        self.refused("no adapter two", "unload", "two")
        self.fails(1, "no adapter two", "generate", "--server", self.address, "-p", "x", "--adapter", "two")
        self.assertRegex(self.adapter("load", "two"), "two: LoRA of rank 3")
        self.assertEqual(self.ask("--adapter", "two")["adapter"], "two")
        self.stop(server)

    def test_load_and_replace(self):
        home = self.home()
        server = self.start(self.dense, "--adapters", home)
        answers = {name: self.ask("--adapter", name)["token_ids"] for name in ("one", "two")}
        first = json.loads(self.adapter("load", "x", "one", "--json"))
        self.assertTrue(first["changed"])
        again = json.loads(self.adapter("load", "x", "one", "--json"))
        self.assertFalse(again["changed"])
        self.assertEqual(again["version"], first["version"])
        self.assertEqual(self.ask("--adapter", "x")["token_ids"], answers["one"])
        self.refused("x has other weights already", "load", "x", "two")
        self.assertEqual(self.ask("--adapter", "x")["token_ids"], answers["one"])
        other = json.loads(self.adapter("load", "x", "two", "--replace", "--json"))
        self.assertGreater(other["version"], first["version"])
        self.assertNotEqual(other["digest"], first["digest"])
        self.assertEqual(self.ask("--adapter", "x")["token_ids"], answers["two"])
        # The same place with other files is the name's next version; no page of the old one is found again.
        shutil.copytree(self.one, home / "new")
        (home / "two").rename(home / "old")
        (home / "new").rename(home / "two")
        self.adapter("load", "two", "--replace")
        self.assertEqual(self.ask("--adapter", "two")["token_ids"], answers["one"])
        self.assertEqual(self.ask("--adapter", "x")["token_ids"], answers["two"])
        self.adapter("load", "kept", "one", "--pin")
        self.assertTrue(self.listed()["kept"]["pinned"])
        self.stop(server)

    def test_paths_stay_beneath_the_folder(self):
        home = self.home()
        outside = self.folder / "outside"
        shutil.copytree(self.one, outside)
        (home / "link").symlink_to(outside)
        (home / "linked").mkdir()
        (home / "linked/adapter_config.json").symlink_to(outside / "adapter_config.json")
        shutil.copy(outside / "adapter_model.safetensors", home / "linked")
        (home / "secret").mkdir()
        shutil.copy(outside / "adapter_config.json", home / "secret")
        (home / "secret/adapter_model.safetensors").symlink_to("/etc/passwd")
        server = self.start(self.dense, "--adapters", home)
        before = set(self.listed())
        for path in ("../outside", "one/../../outside", str(outside), "/etc", "link", "linked", "secret", "..", "."):
            self.refused(r"^choir: 127.0.0.1:\d+: .*adapter x", "load", "x", path)
        for name in ("../outside", "/etc", "a/../../outside", "..", "one/", ".x", "", "a b", "a\nb", "x" * 257):
            self.refused("name", "load", name, "one")
            if name != "":
                self.fails(1, "name|adapter", "generate", "--server", self.address, "-p", "x", "--adapter", name)
        self.refused("not there", "load", "x", "nowhere")
        self.refused("x", "load", "x", "one/adapter_config.json")
        self.assertEqual(set(self.listed()), before)
        self.assertEqual(self.ask("--adapter", "one")["adapter"], "one")
        self.stop(server)

    def test_bad_adapters_are_left_out(self):
        home = self.home(*BAD)
        (home / "nonsense.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
        server = self.start(self.dense, "--adapters", home)
        said = self.said()
        for name, (_, says) in BAD.items():
            lines = [line for line in said.splitlines() if f"/{name} " in line]
            if name in BY_BYTES:
                self.assertEqual(lines, [])
                continue
            self.assertEqual(len(lines), 1, (name, lines))
            self.assertRegex(lines[0], says)
        self.assertRegex(said, "nonsense.gguf is left out")
        good = {"one", "two", *BY_BYTES}
        self.assertRegex(said, rf"{len(good)} adapters registered .*, {len(BAD) - len(BY_BYTES) + 1} left out")
        self.assertEqual(set(self.listed()), good)
        for name, (_, says) in BAD.items():
            self.refused(says, "load", name)
            self.fails(1, name, "generate", "--server", self.address, "-p", "x", "--adapter", name)
        for name in BY_BYTES:
            self.assertEqual(self.listed()[name]["state"], "failed")
            self.assertRegex(self.listed()[name]["error"], BAD[name][1])
        self.assertEqual(self.ask("--adapter", "one")["adapter"], "one")
        self.assertEqual(set(self.listed()), good)
        self.stop(server)

    def test_a_folder_that_vanishes(self):
        home = self.home()
        server = self.start(self.dense, "--adapters", home)
        wanted = self.ask("--adapter", "one")["token_ids"]
        shutil.rmtree(home / "two")
        self.fails(1, "adapter two", "generate", "--server", self.address, "-p", "x", "--adapter", "two")
        self.refused("adapter two", "load", "two")
        self.assertEqual(self.ask("--adapter", "one")["token_ids"], wanted)
        shutil.rmtree(home / "one")  # what is in memory does not need it
        self.assertEqual(self.ask("--adapter", "one")["token_ids"], wanted)
        shutil.copytree(self.two, home / "two")
        self.adapter("load", "two", "--replace")
        self.assertEqual(self.ask("--adapter", "two")["adapter"], "two")
        self.stop(server)

    def test_wrong_flags(self):
        run = ["serve", self.dense, "--listen", "127.0.0.1:0"]
        self.fails(2, "--lora-modules is 'x', must be NAME=DIR", *run, "--lora-modules", "x")
        self.fails(2, "--lora-modules is '=x', must be NAME=DIR", *run, "--lora-modules", "=x")
        self.fails(2, "name", *run, "--lora-modules", "../x=y")
        self.fails(2, "the name a twice", *run, "--lora-modules", "a=x", "--lora-modules", "a=y")
        self.fails(2, "must be auto, f32", *run, "--adapter-dtype", "q8")
        self.fails(2, "--adapter-memory", *run, "--adapter-memory", "0")
        for words, says in ((["--adapters", self.folder / "nowhere"], "nowhere"),
                            (["--lora-modules", f"x={self.folder}/nowhere"], "--lora-modules x: .*not there"),
                            (["--lora-modules", f"x={self.bad('wrong-shape')}"], "--lora-modules x: .*gate_proj")):
            done = choir(*run, *words)
            self.assertEqual(done.returncode, 1, done.stderr)
            self.assertRegex(done.stderr.splitlines()[-1], says)
        server = self.start(self.dense)
        self.refused("takes no adapters", "load", "one")
        self.assertEqual(self.adapter("list"), "no adapters\n")
        self.fails(1, "no adapter one", "generate", "--server", self.address, "-p", "x", "--adapter", "one")
        self.stop(server)
        server = self.start(self.dense, "--lora-modules", f"one={self.one}")
        self.refused("no folder of adapters", "load", "two")
        self.stop(server)

    def test_many(self):
        home = self.home()
        for i in range(1100):
            (home / f"a{i:04}").mkdir()
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                os.link(home / "one" / name, home / f"a{i:04}" / name)
        server = self.start(self.dense, "--adapters", home, "--adapter-memory", "32KiB")
        names = [a["name"] for a in json.loads(self.adapter("list", "--json"))]
        self.assertEqual(names, sorted([f"a{i:04}" for i in range(1100)] + ["one", "two"]))
        wanted = self.ask("--adapter", "one")["token_ids"]
        for i in random.Random(3).sample(range(1100), 20):
            self.assertEqual(self.ask("--adapter", f"a{i:04}")["token_ids"], wanted)
        held = [a for a in self.listed().values() if a["state"] == "resident"]
        self.assertLessEqual(sum(a["bytes"] for a in held), 32 << 10)
        self.assertGreater(sum(a["evictions"] for a in self.listed().values()), 0)
        self.stop(server)

    def test_kill_while_loading(self):
        """FAULTS 9: after kill -9 at any time the registry is what the folder says, and loading again is OK."""
        home = self.home()
        files = {f: f.read_bytes() for f in home.rglob("*") if f.is_file()}
        for i in range(8):
            server = self.start(self.dense, "--adapters", home)
            self.assertEqual(set(self.listed()), {"one", "two"})
            self.assertEqual(self.listed()["one"]["error"], "")
            self.adapter("load", "one")
            clients = [subprocess.Popen([cli_test.CHOIR, "adapter", "load", name, path, "--server", self.address],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                       for name, path in (("x", "one"), ("one", "one"), ("y", "two"))]
            time.sleep(i * 0.004)
            server.kill()
            server.wait()
            for client in clients:
                client.wait()
            self.assertEqual({f: f.read_bytes() for f in home.rglob("*") if f.is_file()}, files)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[2:]])
