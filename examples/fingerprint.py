"""Compute the fingerprint of a Hugging Face folder by docs/fingerprint.md, with hashlib alone.

usage: python fingerprint.py HF      prints what `olmo-bridge fingerprint HF` prints first
"""

import hashlib
import json
import sys
from pathlib import Path

BLOCK = 4 << 20
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def tree(hashes: list[bytes]) -> bytes:
    if len(hashes) < 2:
        return hashes[0] if hashes else sha256()
    left = 1 << (len(hashes) - 1).bit_length() - 1  # the largest power of two that leaves some
    return sha256(b"\1", tree(hashes[:left]), tree(hashes[left:]))


def main(folder: Path) -> None:
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            for name, entry in json.loads(file.read(length)).items():
                if name == "__metadata__" or name.endswith(BUFFERS):
                    continue
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                sizes = [min(BLOCK, end - at) for at in range(begin, end, BLOCK)]
                root = tree([sha256(b"\0", file.read(size)) for size in sizes])
                shape = ",".join(map(str, entry["shape"]))
                found[name] = root, f"{DTYPES[entry['dtype']]} {shape} {name}".encode()
    config = json.loads((folder / "config.json").read_text())
    if config.get("tie_word_embeddings", config["model_type"] == "gpt2"):
        embedding = next(n for n in found if n.endswith(("embed_tokens.weight", "wte.weight")))
        if found.get("lm_head.weight", (None,))[0] == found[embedding][0]:
            del found["lm_head.weight"]
    print(tree([sha256(b"\2", *found[name]) for name in sorted(found, key=str.encode)]).hex())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
