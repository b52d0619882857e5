#!/usr/bin/env python3
"""All ids of a large mixed-language text against Hugging Face tokenizers, and the time per length.

  compare_tokenizer.py CHOIR [--gguf MODEL.gguf] [--fixtures tests/fixtures] [--bytes N] [--time]

CHOIR is the program. --gguf compares a GGUF file's own tokenizer (byte-level BPE). --fixtures compares
every pre-tokenizer pattern of tests/fixtures/tokenizer, each in a folder with a tiny model beside it. With
--time the text grows fourfold, and becomes one word. Exit status 1 if any id differs. With --record nothing
is compared: the text goes to mixed.txt of the fixtures' tokenizer folder, and what Hugging Face makes of it
(per tokenizer the number of ids and their hash) to mixed.json. Needs Python with tokenizers and gguf."""
import argparse
import json
import pathlib
import random
import resource
import subprocess
import sys
import tempfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers as P

# A script: what its words are made of, how long they are, what lies between them.
LATIN = "abcdefghijklmnopqrstuvwxyz"
SCRIPTS = {
    "latin": (LATIN, 1, 12, " "),
    "accents": ("aàâäãåæbcçdeéèêëfghiîïjklmnñoôöøœpqrstuùûüvwxyÿzßžšřčłńąęğış", 1, 11, " "),
    "combining": ("a\u0300e\u0301o\u0308u\u0327n\u0303i\u0302x\u0336\u0489c\u20dd", 2, 9, " "),
    "cyrillic": ("абвгдеёжзийклмнопрстуфхцчшщъыьэюяіїєґў", 1, 13, " "),
    "greek": ("αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊΐἀἑᾳ", 1, 11, " "),
    "arabic": ("ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأةىپچگ\u064b\u0651\u0640", 2, 9, " "),
    "hebrew": ("אבגדהוזחטיכלמנסעפצקרשתםןףץך\u05b0\u05b7\u05bc", 2, 8, " "),
    "devanagari": ("कखगघचछजझटठडढणतथदधनपफबभमयरलवशषसहअआइई\u093e\u093f\u0940\u0947\u094d\u0902", 2, 9, " "),
    "thai": ("กขคงจฉชซญดตถทธนบปผพฟมยรลวศสหอ\u0e31\u0e34\u0e35\u0e48\u0e49เแโไา", 4, 30, " "),
    "hangul": ("가나다라마바사아자차카타파하한국어는을이의에도로각\u1100\u1161\u11a8", 1, 6, " "),
    "han": ("的一是不了人我在有他这中大来上国個們為說時間電車東京漢字学校\U00020000\U0002a6d6", 4, 20, "，"),
    "kana": ("あいうえおかきくけこのはをがですますアイウエオカンーッャ日本語", 4, 20, "、"),
    "georgian": ("აბგდევზთიკლმნოპჟრსტუფქღყშჩცძწჭხჯჰ", 2, 9, " "),
    "armenian": ("աբգդեզէըթժիլխծկհձղճմյնշոչպջռսվտրցւփքօֆ", 2, 9, " "),
    "ethiopic": ("ሀለሐመሠረሰሸቀበተነአከወዘየደገጠፀፈ፩፪", 2, 7, "፡"),
    "tamil": ("அஆஇகஙசஞடணதநபமயரலவழளறன\u0bbe\u0bbf\u0bcd", 2, 9, " "),
    "tibetan": ("ཀཁགངཅཆཇཉཏཐདནཔཕབམཙཚཛཝཞཟའཡརལཤསཧཨ\u0f72\u0f74", 1, 5, "\u0f0b"),
    "fullwidth": ("ＡＢＣａｂｃ１２３！？（）ﬁﬂ①②Ⅷ½²㎏", 1, 8, "\u3000"),
    "mathematics": ("∀∃∈∑∏√∞≤≥≠→⇒αβπ𝐱𝑦𝒛𝔸ℝℕ²³⁴₁₂", 1, 7, " "),
}
EMOJI = ["😀", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪🇫🇷", "👍🏽", "☃\ufe0f", "1\ufe0f\u20e3", "🧑🏿\u200d💻",
         "\U0001fae8", "\U000e0067", "❤"]
SPACES = [" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\t\t", "\u00a0", "\u2003", "\u3000", "\u200b",
          "\u2028", "\u0085", "\u180e", "\u202f", " \n ", "\n    ", "\x0b", "\x0c", "\x00", "\ufeff", " " * 9, "\r"]
CODE = ["def f(x):\n    return x ** 2  # note\n", "for (int i = 0; i < n; i++) { a[i] += b[i]; }\n", "x=1;y==22;z+=3.4e-5",
        "<div class=\"a-b\">&nbsp;</div>", "https://example.com/a/b?c=d&e=%20#f", "SELECT * FROM t WHERE id='7';",
        "{\"k\": [1, 2.5, null]}", "XMLHttpRequest camelCase snake_case SCREAMING_CASE", "0xDEADBEEF 1_000_000",
        "I'll don't WE'VE it's 'S 'tis y'all're", "```\n$ ls -la | grep x\n```", "\\frac{a}{b}", "/* --- */ //// ...!!!"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<|im_sta"]


def word(rng, script):
    letters, least, most, _ = SCRIPTS[script]
    text = "".join(rng.choice(letters) for _ in range(rng.randint(least, most)))
    change = rng.random()
    return text.upper() if change < 0.05 else text.capitalize() if change < 0.2 else text


def number(rng):
    digits = rng.choice(["0123456789"] * 5 + ["٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３４５６７８９"])
    text = "".join(rng.choice(digits) for _ in range(rng.randint(1, 12)))
    return text if rng.random() < 0.7 else text[:3] + rng.choice(",.:-/") + text[3:]


def sentence(rng):
    script = rng.choice(list(SCRIPTS) + ["latin"] * 6)
    between = SCRIPTS[script][3]
    out = []
    for _ in range(rng.randint(2, 14)):
        kind = rng.random()
        out.append(number(rng) if kind < 0.06 else rng.choice(EMOJI) if kind < 0.1 else
                   rng.choice(CODE) if kind < 0.13 else rng.choice(SPECIAL) if kind < 0.135 else
                   chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x110000)])) if kind < 0.15
                   else word(rng, script))
        out.append(rng.choice(SPACES) if rng.random() < 0.12 else
                   rng.choice(".,;:!?…—“”'\"()[]") + between if rng.random() < 0.15 else between)
    return "".join(out) + rng.choice([". ", ".\n", "。", "?! ", "\n\n", " "])


def mixed_text(n_bytes, seed=20240611):
    """valid UTF-8 of about n_bytes, the same on every machine"""
    rng, parts, n = random.Random(seed), [], 0
    while n < n_bytes:
        parts.append(sentence(rng))
        n += len(parts[-1].encode())
    return "".join(parts)


# ---- the two sides
def gguf_tokenizer(path):
    """Hugging Face's tokenizer out of GGUF metadata: byte-level BPE with the pre-tokenizer of SmolLM"""
    import gguf
    fields = gguf.GGUFReader(path).fields
    value = lambda key: fields["tokenizer.ggml." + key].contents()
    if value("model") != "gpt2" or value("pre") != "smollm":
        sys.exit(f"{path}: only byte-level BPE with the pre-tokenizer smollm is known here")
    tokens, types = value("tokens"), value("token_type")
    merges = [tuple(m.split(" ")) for m in value("merges")]
    hf = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    hf.pre_tokenizer = P.Sequence([P.Digits(individual_digits=True), P.ByteLevel(add_prefix_space=False)])
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([t for t, kind in zip(tokens, types) if kind == 3])
    hf.add_tokens([t for t, kind in zip(tokens, types) if kind == 4])
    return hf


def case_json(fixtures, path):
    tokenizer = json.loads(path.read_text())["tokenizer"]
    name = tokenizer["model"].pop("file")
    model = json.loads((fixtures / f"tokenizer/models/{name}.json").read_text())
    tokenizer["model"] = model | tokenizer["model"]
    return json.dumps(tokenizer)


def choir_ids(choir, model, file):
    """the ids, and the seconds of CPU they took"""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    start = spent()
    done = subprocess.run([choir, "tokenize", str(model), "--file", str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{model}: {done.stderr}")
    line = done.stdout.strip()
    return [int(x) for x in line.split(",")] if line else [], spent() - start


def compare(name, want, got, hf):
    if want == got:
        print(f"{name}: {len(want)} ids, all the same", flush=True)
        return True
    at = next((i for i, (a, b) in enumerate(zip(want, got)) if a != b), min(len(want), len(got)))
    around = lambda ids: [hf.id_to_token(i) for i in ids[at:at + 6]]
    print(f"{name}: {len(want)} ids, Choir gives {len(got)}; the first difference is at {at}:\n"
          f"  behind {hf.decode(want[max(0, at - 8):at])!r}\n  wanted {around(want)}\n  got    {around(got)}", flush=True)
    return False


def hash_of(ids):
    """FNV-1a over the ids' bytes, lowest first, as tests/engine/tokenizer_test.c does it"""
    h = 0xCBF29CE484222325
    for byte in b"".join(i.to_bytes(4, "little") for i in ids):
        h = (h ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return f"{h:016x}"


def record(gguf, fixtures, text):
    tokenizers = {"gguf": gguf_tokenizer(gguf)} if gguf else {}
    for path in sorted((fixtures / "tokenizer/cases").glob("*.json")):
        tokenizers[path.stem] = Tokenizer.from_str(case_json(fixtures, path))
    found = {}
    for name, hf in tokenizers.items():
        ids = hf.encode(text).ids
        found[name] = [len(ids), hash_of(ids)]
    (fixtures / "tokenizer/mixed.txt").write_bytes(text.encode())
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items())
    (fixtures / "tokenizer/mixed.json").write_text("{" + lines + "}\n")


def folder_of(tiny, json_text, folder):
    """a model folder with this tokenizer: the tiny model's files, by link"""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to((tiny / name).resolve())
    (folder / "tokenizer.json").write_text(json_text)
    return folder


def report_times(choir, model, work, text):
    empty = work / "empty"
    empty.write_text("")
    base = min(choir_ids(choir, model, empty)[1] for _ in range(3))
    n = len(text.encode())
    for name, one in (("mixed text", text), ("one word", "a" * n), ("spaces before a digit", " " * (n - 1) + "1")):
        took = []
        for times in (1, 4):
            long = work / "long"
            # the digit stays at the end, the word stays one word
            long.write_bytes((one[0] * (n * times - 1) + one[-1] if len(set(one[:-1])) == 1 else one * times).encode())
            took.append(min(choir_ids(choir, model, long)[1] for _ in range(3)) - base)
        print(f"{name}: {n} bytes in {took[0]:.3f} s, four times as much in {took[1]:.3f} s: "
              f"{took[1] / took[0]:.2f} times (loading, {base:.3f} s, taken off)", flush=True)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("choir")
    a.add_argument("--gguf")
    a.add_argument("--fixtures", type=pathlib.Path)
    a.add_argument("--only", default="", help="only cases whose name has this in it")
    a.add_argument("--bytes", type=int, default=1 << 20)
    a.add_argument("--time", action="store_true")
    a.add_argument("--record", action="store_true")
    a = a.parse_args()
    text, same = mixed_text(a.bytes), True
    if a.record: return record(a.gguf, a.fixtures, text)
    with tempfile.TemporaryDirectory() as work:
        work = pathlib.Path(work)
        file = work / "text"
        file.write_bytes(text.encode())
        print(f"{file.stat().st_size} bytes of text", flush=True)
        if a.gguf:
            hf = gguf_tokenizer(a.gguf)
            same &= compare("gguf", hf.encode(text).ids, choir_ids(a.choir, a.gguf, file)[0], hf)
            if a.time: report_times(a.choir, a.gguf, work, text)
        for path in sorted((a.fixtures / "tokenizer/cases").glob("*.json")) if a.fixtures else []:
            if a.only not in path.stem: continue
            source = case_json(a.fixtures, path)
            hf = Tokenizer.from_str(source)
            model = folder_of(a.fixtures / "models/llama", source, work / path.stem)
            same &= compare(path.stem, hf.encode(text).ids, choir_ids(a.choir, model, file)[0], hf)
            if a.time: report_times(a.choir, model, work, text)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
