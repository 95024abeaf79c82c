"""Calibration on families other than Llama: every projection's input is the one that `transformers` gives it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hf_families import dense_model, make, tensors

from upg_jax.compress._activations import run_network
from upg_jax.models import weights

IDS = np.random.default_rng(1).integers(1, 101, (2, 40)).astype(np.int32)


def inputs_of_modules(name):
    """The input of every linear module, and for experts that of their block and the probabilities of each, by name."""
    import torch

    model, found, hooks = make(name)[0], {}, []
    for module_name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "MixtralTopKRouter":

            def note(module, args, output, key=module_name):
                found[key] = args[0].detach().numpy().reshape(-1, args[0].shape[-1]), output

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(torch.tensor(IDS, dtype=torch.long), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["gemma3", "phi3", "qwen2", "mixtral"])
def test_inputs_are_those_of_transformers(name):
    expected, visited = inputs_of_modules(name), {}

    def visit(names, batches):
        for key in names:
            visited[key] = np.concatenate([np.asarray(x).reshape(-1, x.shape[-1]) for x in batches])
        return {key: tensors(name)[key] for key in names}

    config = dense_model(name).config
    run_network(config, weights(config), lambda key: jnp.asarray(tensors(name)[key]), IDS, visit)
    assert set(visited) == {key for w in weights(config) if w.linear for key in w.names(config.num_layers)}
    compared = 0
    for key, x in visited.items():
        module = key.removesuffix(".weight")
        if ".experts." not in module:
            np.testing.assert_allclose(x, expected[module][0], atol=2e-4, rtol=0, err_msg=key)
            compared += 1
        elif module.endswith((".w1", ".w3")):
            block, expert = module[: module.index(".block_sparse_moe")], int(module.split(".")[-2])
            inputs, (_, _, chosen) = expected[f"{block}.mlp.gate"]
            mine = (chosen.numpy() == expert).any(axis=1)
            np.testing.assert_allclose(x[mine], inputs[mine], atol=2e-4, rtol=0, err_msg=key)
            assert not x[~mine].any()
            assert 0 < mine.sum() < mine.size
            compared += 1
    assert compared >= 4 * config.num_layers + 1
