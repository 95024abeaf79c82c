"""The smallest chat: a model, a template, a loop. `upg-jax chat` has more.

    python examples/chat.py MODEL

MODEL is a compressed model, a Hugging Face directory or a GGUF file, with a chat template. Ctrl-D ends.
"""

from __future__ import annotations

import sys

from upg_jax import UPGModel


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    model = UPGModel.from_file(sys.argv[1])
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            return
        prompt, answer = model.tokenizer.encode_chat(messages), ""
        room = model.config.max_position_embeddings - len(prompt)
        for token in model.stream(prompt, max_new_tokens=min(200, room), temperature=0.7):
            print(token.text, end="", flush=True)
            answer += token.text
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
