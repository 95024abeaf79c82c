"""A small model with a byte-level tokenizer, as a GGUF file."""

from __future__ import annotations

from pathlib import Path

from small_models import llama

END = "<|end|>"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def byte_level_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its published table."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def write(path: Path) -> Path:
    """Writes the model: the 256 bytes, `he`, and an end of text are its tokens."""
    tokens = [END, *byte_level_alphabet()]
    tokens += [f"<unused{i}>" for i in range(llama.VOCABULARY - len(tokens))]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t.startswith("<") and len(t) > 1 else 1 for t in tokens],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    metadata["tokenizer.ggml.tokens"][-1] = "he"
    metadata["tokenizer.ggml.token_type"][-1] = 1
    return llama.write_gguf(path, llama.weights(), "Q8_0", metadata)
