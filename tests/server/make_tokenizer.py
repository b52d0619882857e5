"""Writes tests/fixtures/server/tokenizer.json: a byte-level BPE tokenizer without merges, so that every
byte is a token (ids 0 .. 255 by value), and the special tokens that steer the test server's engine."""
import json
import pathlib

SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|short|>", "<|accent|>", "<|nul|>", "<|stall|>",
            "<|nan|>", "<|slow|>"]


def byte_letters():
    """GPT-2's table: printable bytes stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            letters[byte] = chr(byte)
        else:
            letters[byte] = chr(256 + extra)
            extra += 1
    return letters


vocab = {letter: byte for byte, letter in byte_letters().items()}
added = [{"id": 256 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
          "normalized": False, "special": True} for i, text in enumerate(SPECIALS)]
tokenizer = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
              "ignore_merges": False, "vocab": vocab, "merges": []},
}
target = pathlib.Path(__file__).resolve().parent.parent / "fixtures/server/tokenizer.json"
target.write_text(json.dumps(tokenizer, ensure_ascii=True) + "\n")
