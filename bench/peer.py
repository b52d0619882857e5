"""The peer to beat: llama.cpp from the PyPI source package llama-cpp-python, built for this machine.

Used by the benchmarks in this folder; `build()` takes about 15 minutes on two cores, once."""
import argparse
import os
import pathlib
import re
import subprocess
import sys
import tarfile

VERSION = "0.3.36"
TARGETS = ["llama-bench", "llama-batched-bench", "llama-server"]


def cache_folder() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(base) / "choir" / "peer"


def build() -> pathlib.Path:
    """The folder of llama.cpp's programs; built on first use."""
    root = cache_folder()
    programs = root / "build" / "bin"
    if all((programs / t).exists() for t in TARGETS):
        return programs
    root.mkdir(parents=True, exist_ok=True)
    print(f"building llama.cpp {VERSION} in {root} (about 15 minutes, once)", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary",
                    ":all:", "-d", str(root), f"llama-cpp-python=={VERSION}"], check=True)
    with tarfile.open(next(root.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(root, filter="data")
    source = next(root.glob("llama_cpp_python-*/vendor/llama.cpp"))
    subprocess.run(["cmake", "-S", str(source), "-B", str(root / "build"), "-G", "Ninja",
                    "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DGGML_NATIVE=ON",
                    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"],
                   check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["ninja", "-C", str(root / "build"), *TARGETS], check=True,
                   stdout=subprocess.DEVNULL)
    return programs


def decode_rate(text) -> float:
    """Decoded tokens/s of the last row that llama-batched-bench has printed."""
    rows = [line for line in text.splitlines() if re.match(r"^\|\s+\d", line)]
    return float(rows[-1].split("|")[8])  # S_TG t/s


def arguments(description, rounds, **numbers) -> argparse.Namespace:
    """What every benchmark against the peer takes, its own numbers (NAME=default), and `programs`."""
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("--choir", default="build/choir")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=rounds)
    for name, default in numbers.items():
        p.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    p.add_argument("--peer", help="folder with llama.cpp's programs")
    a = p.parse_args()
    a.programs = pathlib.Path(a.peer) if a.peer else build()
    return a
