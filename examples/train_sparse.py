"""A training loop of one's own on a compressed model: distillation with Adam, then the same encoding.

    upg-jax compress MODEL half --density 0.5 --method sparsegpt
    python examples/train_sparse.py half MODEL text.txt trained.safetensors

`upg-jax recover` is this with a schedule, checkpoints and a budget.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import upg_jax
from upg_jax.train import Student, Teacher, TokenWindows, distillation_loss


@partial(jax.jit, donate_argnums=(0, 1), static_argnums=5)
def step(trained, state, rest, teacher, ids, optimizer):
    def loss(trained):
        logits = rest.with_trained(trained).logits(ids)
        return distillation_loss(logits, teacher.logits(ids), ids, language_model=0.25).total

    value, gradient = jax.value_and_grad(loss)(trained)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(trained, updates), state, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()

    # As it was compressed: packing for speed would join projections.
    compressed = upg_jax.UPGModel.from_file(options.compressed, pack=False)
    student = Student.from_model(compressed)
    teacher = Teacher.from_model(upg_jax.UPGModel.from_file(options.dense))
    text = TokenWindows(compressed.encode(options.text.read_text(encoding="utf-8")), options.window, batch=2)

    optimizer = optax.adam(optax.cosine_decay_schedule(6e-4, options.steps))
    # Copies, because a step reuses the memory of what it is given.
    trained, rest = jax.tree.map(jnp.copy, student.trained()), student.without_trained()
    state = optimizer.init(trained)
    for i in range(options.steps):
        trained, state, value = step(trained, state, rest, teacher, jnp.asarray(text[i]), optimizer)
        print(f"step {i + 1}: loss {float(value):.3f}")

    with upg_jax.UPGDecompressor.from_safetensors(options.compressed) as file:
        names = [name for name in file.names() if file.info(name).kind == "mdcsr"]
        dense_names = [name for name in file.names() if name not in names]
        tensors = {name: file.get_layer(name) for name in names} | {n: file.get_array(n) for n in dense_names}
        tensors |= rest.with_trained(trained).tensors()
        upg_jax.save(options.out, tensors, model=file.model)


if __name__ == "__main__":
    main()
