"""Models on several devices: the same answers as on one, and no more communication than two sums a layer."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.versions import needs
from sharding import models
from sharding.models import GREEDY, PROMPTS

from upg_jax import CheckpointError, UPGModel, combine, partition, use_backend
from upg_jax._cut import PADDING
from upg_jax._sparse_dense import unavailable_reason
from upg_jax.inference._steps import advance
from upg_jax.models import parse_config
from upg_jax.models._tensor_parallel import cuts, local_config

pytestmark = needs("shard_map")

# Products are summed in another order; logits are of order 1 to 10, as in tests/models.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: models.write(directory, name))


@pytest.fixture(scope="module")
def single(path_of):
    """The model on one device, and its answers."""

    @functools.cache
    def answer(name):
        model = UPGModel.from_file(path_of(name), pack=False)
        return model, [one.ids for one in model.generate(PROMPTS, **GREEDY)]

    return answer


def mesh_of(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("data", "model")[-len(shape) :])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama", (2,)),
        pytest.param("llama", (4,), marks=pytest.mark.slow),
        pytest.param("llama", (8,), marks=pytest.mark.slow),
        ("phi3", (4,)),
        pytest.param("phi3", (3,), marks=pytest.mark.slow),
        ("qwen3", (2, 4)),
        pytest.param("qwen3", (4, 2), marks=pytest.mark.slow),
        pytest.param("mixtral", (2,), marks=pytest.mark.slow),
        pytest.param("mixtral", (2, 4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_same_tokens_as_on_one_device(name, shape, path_of, single):
    _, expected = single(name)
    model = UPGModel.from_file(path_of(name), mesh=mesh_of(*shape), pack=False)
    assert [one.ids for one in model.generate(PROMPTS, **GREEDY)] == expected


@pytest.mark.parametrize("batch", [1, 2])
def test_the_same_logits_and_a_cache_of_the_devices_heads(batch, path_of, single):
    """One sequence is on all devices of the other axis, two are shared out."""
    alone, _ = single("phi3")
    model = UPGModel.from_file(path_of("phi3"), mesh=mesh_of(2, 4), pack=False)
    logits, cache = model.forward([PROMPTS[0]] * batch)
    expected, whole = alone.forward([PROMPTS[0]] * batch)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    layers, _, _, *rest = whole.keys[0].shape
    local = local_config(model.config, 4).num_kv_heads
    shapes = {shard.data.shape for shard in cache.keys[0].addressable_shards}
    assert shapes == {(layers, 1, local, *rest)}
    assert logits.is_fully_replicated
    assert cache.lengths.is_fully_replicated


def test_the_caller_may_have_set_another_mesh(path_of, single):
    """`jax.make_mesh` gives explicit axes, a model has others."""
    _, (expected, _) = single("llama")
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        model = UPGModel.from_file(path_of("llama"), mesh=mesh, pack=False)
        answer = model.generate(PROMPTS[0], **GREEDY)
        streamed = []
        for token in model.stream(PROMPTS[0], **GREEDY):
            streamed.append(token.id)
            assert jax.sharding.get_abstract_mesh() == mesh.abstract_mesh
        ids = jnp.asarray([PROMPTS[0]])
        logits, _ = model.forward(ids)
    assert answer.ids == expected
    assert [token for token in streamed if token is not None] == expected
    assert logits[0, -1].argmax() == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", models.CONFIGS)
def test_streaming(name, path_of, single):
    model = UPGModel.from_file(path_of(name), mesh=mesh_of(2), pack=False)
    streamed = [token.id for token in model.stream(PROMPTS[0], **GREEDY)]
    assert [token for token in streamed if token is not None] == single(name)[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_packed_while_loading(name, path_of, single):
    model = UPGModel.from_file(path_of(name), mesh=mesh_of(2), pack=True)
    assert "q_proj+k_proj+v_proj" in model.params["layers"]
    assert [one.ids for one in model.generate(PROMPTS, **GREEDY)] == single(name)[1]


def test_each_device_has_its_part_of_the_planes(path_of):
    model = UPGModel.from_file(path_of("qwen3"), mesh=mesh_of(4))
    layers = model.params["layers"]
    planes = [leaf for leaf in jax.tree.leaves(layers) if leaf.dtype in (jnp.int8, jnp.uint8) and leaf.size]
    assert planes
    for leaf in planes:
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 4}


native = pytest.mark.skipif(unavailable_reason("native") is not None, reason="needs the compiled kernels")


@native
@pytest.mark.parametrize(("name", "logits"), [("llama", []), ("phi3", ["all-gather"])])
def test_a_step_sums_twice_a_layer_and_sends_nothing_else_but_logits(name, logits, path_of):
    """Layers run as a loop, so that the text has the sums of one layer."""
    model = UPGModel.from_file(path_of(name), mesh=mesh_of(4))
    cache = model.init_cache(2, 32)
    with use_backend("native"):
        step = advance.lower(
            model.params, model.config, jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.bool_), cache
        )
        text = step.compile().as_text()
    assert "upg_jax.attend" in text
    assert "upg_jax.sparse_dense" in text
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (\S+) ({names})(?:-start)?\(", text)
    assert [kind for _, kind in found if kind == "all-reduce"] == ["all-reduce"] * 2
    assert [kind for _, kind in found if kind != "all-reduce"] == logits
    assert all(shape.startswith("f32[2,") for shape, _ in found)


@pytest.mark.slow
def test_gradients_of_norms_and_scales_are_those_of_one_device(path_of, single):
    alone, _ = single("qwen3")
    model = UPGModel.from_file(path_of("qwen3"), mesh=mesh_of(2, 2), pack=False)
    ids = jnp.asarray(PROMPTS[0])[None]

    def gradients(model):
        params, rest = partition(model.params)

        def loss(params):
            from upg_jax.models import forward

            return jnp.mean(forward(combine(params, rest), model.config, ids)[0] ** 2)

        return jax.jit(jax.grad(loss))(params)

    found, expected = gradients(model), gradients(alone)
    for slot in ("attention_norm", "mlp_norm", "q_norm", "k_norm"):
        np.testing.assert_allclose(found["layers"][slot], expected["layers"][slot], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["embed_tokens"], expected["embed_tokens"], rtol=1e-3, atol=1e-4)
    for slot in ("o_proj", "down_proj"):
        scales = found["layers"][slot].block.scales
        np.testing.assert_allclose(scales, expected["layers"][slot].scales, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("name", models.CONFIGS)
def test_every_feature_has_a_place_and_queries_meet_their_keys(name, devices):
    config = parse_config(models._COMMON | models.CONFIGS[name])
    found, local = cuts(config, devices), local_config(config, devices)
    group, dim = config.num_heads // config.num_kv_heads, config.head_dim

    def heads(runs):
        return [None if first == PADDING else head for first, n in runs for head in _heads(first, n, dim)]

    queries, keys = found["q_proj"][1], found["k_proj"][1]
    assert found["o_proj"] == ("in", queries)
    assert sorted(h for runs in queries for h in heads(runs) if h is not None) == [*range(config.num_heads)]
    for of_queries, of_keys in zip(map(heads, queries), map(heads, keys), strict=True):
        assert (len(of_queries), len(of_keys)) == (local.num_heads, local.num_kv_heads)
        shared = local.num_heads // local.num_kv_heads
        for i, head in enumerate(of_queries):
            key = of_keys[i // shared]
            assert key == (None if head is None else head // group)
    rows = sum(n for _, n in found["q_proj+k_proj+v_proj"][1][0])
    assert rows == (local.num_heads + 2 * local.num_kv_heads) * dim


def _heads(first, count, dim):
    assert first % dim == count % dim == 0 or first == PADDING
    return range(first // dim, first // dim + count // dim)


def test_a_projection_that_is_dense_and_an_unknown_axis_are_refused_by_name(tmp_path, path_of):
    path = models.write(tmp_path, "llama", dense=("down_proj",))
    with pytest.raises(CheckpointError, match=r"only compressed projections .*'down_proj' is dense"):
        UPGModel.from_file(path, mesh=mesh_of(2))
    with pytest.raises(ValueError, match=r"axis must be one of the mesh's \('model',\); got 'heads'"):
        UPGModel.from_file(path_of("llama"), mesh=mesh_of(2), axis="heads")


@pytest.mark.parametrize("kind", ["int", "str", "list", "AbstractMesh"])
def test_what_is_no_mesh_is_refused_before_anything_is_read(kind):
    abstract = mesh_of(2).abstract_mesh
    given = {"int": 2, "str": "model", "list": jax.devices()[:2], "AbstractMesh": abstract}[kind]
    with pytest.raises(TypeError, match=rf"from_file: mesh must be a jax\.sharding\.Mesh; got {kind}; "):
        UPGModel.from_file("nothing.safetensors", mesh=given)


def test_an_axis_that_is_no_name_or_has_no_mesh_is_refused_before_anything_is_read():
    with pytest.raises(TypeError, match=r"from_file: axis must be the name .* got \['model'\]"):
        UPGModel.from_file("nothing.safetensors", mesh=mesh_of(2), axis=["model"])
    with pytest.raises(ValueError, match=r"axis is for a mesh; got axis 'heads' and no mesh"):
        UPGModel.from_file("nothing.safetensors", axis="heads")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((1, 4), False),
        pytest.param((1, 4), True, marks=pytest.mark.slow),
        pytest.param((2, 2), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_processes_generate_together(shape, more, path_of, single):
    """On one row of devices, sums over the axis "model" cross from one process to the other."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path]),
    }
    port = free_port()
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                here / "two_processes.py",
                str(i),
                str(port),
                str(list(shape)),
                path_of("llama"),
                json.dumps(more),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-3000:]
    expected = single("llama")[1]
    for text, _ in outputs:
        seen = json.loads(text.splitlines()[-1])
        assert seen.pop("generated") == expected
        assert seen == ({"streamed": expected[0], "next": expected[0][0]} if more else {})
