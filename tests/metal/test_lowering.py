"""The Metal lowerings inside JAX's transforms, through the emulator: one example of each, checked against the bound.

`UPG_JAX_BACKEND=emulator python -m pytest tests/sparse_dense` runs all of the primitive's tests on them.
"""

from __future__ import annotations

import concurrent.futures
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bounds import assert_within_bound
from helpers.layers import Case, stacked
from helpers.versions import needs

import upg_jax
from metal_ops import KernelError
from upg_jax import BackendError, MdCSR, sparse_dense, use_backend
from upg_jax._sparse_dense import _metal_device, _metal_lowering, choose_backend, unavailable_reason

CASES = (Case("random", (33, 67)), Case("empty_rows", (33, 67), "prime", "float32", 8))
LAYERS = tuple(Case("random", (67, 67), "prime", seed=i) for i in range(3))


def product(x, w, s):
    return x @ w.T * s


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 0), (2, 3)], ids=str)
def test_products_of_any_batch(emulator, case, lead):
    x = case.x(*lead)
    y = jax.jit(sparse_dense)(x, case.layer)
    assert_within_bound(y, product, x, case.levels, case.scales, terms=case.terms)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(emulator, dtype):
    case = Case("random", (33, 67), "prime", dtype)
    y = jax.jit(sparse_dense)(case.x(3), case.layer)
    assert_within_bound(y, product, case.x(3), case.levels, case.scales, terms=case.terms, dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_and_decoding(emulator, case):
    x, ct = case.x(3), case.cotangent(3)
    x_bar = jax.jit(lambda x, ct: jax.vjp(lambda x: sparse_dense(x, case.layer), x)[1](ct)[0])(x, ct)
    operands = (ct, case.levels, case.scales)
    assert_within_bound(x_bar, lambda g, w, s: (g * s) @ w, *operands, terms=case.terms)
    expected = (case.levels * case.scales[:, None]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(MdCSR.to_dense)(case.layer), expected)


def test_vmap_over_layers_is_one_launch(emulator):
    stack, xs = stacked(*LAYERS), jnp.stack([case.x(2) for case in LAYERS])
    f = jax.jit(jax.vmap(sparse_dense))
    jax.block_until_ready(f(xs, stack))
    before = emulator.command_buffers
    ys = jax.block_until_ready(f(xs, stack))
    assert emulator.command_buffers - before == 1
    for case, x, y in zip(LAYERS, xs, ys, strict=True):
        assert_within_bound(y, product, x, case.levels, case.scales, terms=case.terms)


def test_scan_over_a_stack_with_gradients(emulator):
    stack = stacked(*LAYERS)

    def chain(x):
        return jax.lax.scan(lambda x, i: (sparse_dense(x, stack, index=i), None), x, jnp.arange(3))[0]

    x, ct = LAYERS[0].x(2), LAYERS[0].cotangent(2)
    y, vjp = jax.vjp(jax.jit(chain), x)
    w = [case.weight for case in LAYERS]
    terms = sum(case.terms for case in LAYERS)
    assert_within_bound(y, lambda x, a, b, c: x @ a.T @ b.T @ c.T, x, *w, terms=terms)
    assert_within_bound(vjp(ct)[0], lambda g, a, b, c: g @ c @ b @ a, ct, *w, terms=terms)


@needs("sharding.AxisType")
def test_on_several_devices_under_shard_map(emulator):
    case = CASES[0]
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    replicated = jax.tree.map(lambda _: jax.sharding.PartitionSpec(), case.layer)
    f = jax.jit(jax.shard_map(sparse_dense, mesh=mesh, in_specs=(spec, replicated), out_specs=spec))
    x = case.x(8)
    assert_within_bound(f(x, case.layer), product, x, case.levels, case.scales, terms=case.terms)


def test_several_threads_run_programs_at_once(emulator):
    programs = [jax.jit(lambda x, case=case: sparse_dense(x, case.layer)) for case in LAYERS]

    def work(i):
        case = LAYERS[i % 3]
        with use_backend("emulator"):
            y = programs[i % 3](case.x(2, salt=i))
        assert_within_bound(y, product, case.x(2, salt=i), case.levels, case.scales, terms=case.terms)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(24)))


def test_switching_inside_one_jitted_function(emulator):
    case = CASES[0]

    @jax.jit
    def both(x):
        with use_backend("reference"):
            a = sparse_dense(x, case.layer)
        return a, sparse_dense(x, case.layer)

    before = emulator.command_buffers
    a, b = jax.block_until_ready(both(case.x(2)))
    assert emulator.command_buffers - before == 1
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_program_holds_one_call_with_results_that_begin_as_nan(emulator):
    text = jax.jit(sparse_dense).lower(CASES[0].x(4), CASES[0].layer).as_text()
    assert re.findall(r"custom_call @([\w.]+)\(", text) == ["upg_jax.emulator.products.v1"]
    assert "dense<0x7FC00000>" in text
    assert "output_operand_alias" in text


def test_kernels_are_compiled_with_the_program_and_not_when_it_runs(emulator, monkeypatch):
    case = Case("random", (19, 23), "prime", "bfloat16")
    program = jax.jit(sparse_dense).lower(case.x(4), case.layer).compile()
    monkeypatch.setattr(type(emulator), "_library", lambda *args: pytest.fail("compiled while running"))
    program(case.x(4), case.layer).block_until_ready()


def test_a_result_that_is_not_written_is_not_a_number(emulator, monkeypatch):
    monkeypatch.setattr(type(emulator), "run", lambda self, launches: 0.0)
    assert np.isnan(jax.jit(sparse_dense)(CASES[0].x(4), CASES[0].layer)).all()


def test_an_error_on_the_device_is_an_error_of_the_program(emulator, monkeypatch):
    def fail(self, launches):
        raise upg_jax.UPGError("the device was taken away")

    program = jax.jit(lambda x: sparse_dense(x, CASES[0].layer))
    monkeypatch.setattr(type(emulator), "run", fail)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match="the device was taken away"):
            program(CASES[0].x(4)).block_until_ready()


def test_planes_of_a_mapped_file_are_bound_in_place(emulator, tmp_path, rng):
    path = tmp_path / "layer.safetensors"
    w = rng.standard_normal((300, 1000)).astype(np.float32)
    upg_jax.save(path, {"w": MdCSR.from_dense(w, density=0.5)})
    layer = upg_jax.UPGDecompressor.from_safetensors(path).get_layer("w")
    x = jnp.asarray(rng.standard_normal((2, 1000)), jnp.float32)
    y = jax.jit(sparse_dense)(x, layer)
    with use_backend("reference"):
        np.testing.assert_allclose(y, sparse_dense(x, layer), atol=1e-3)
    address = layer.values.unsafe_buffer_pointer()
    (region,) = [r for r in emulator._buffers.regions if r.begin <= address < r.end]
    assert region.buffer is not None


def test_an_exported_program_names_the_versioned_call(emulator):
    x, layer = CASES[0].x(4), CASES[0].layer
    allowed = [jax.export.DisabledSafetyCheck.custom_call("upg_jax.emulator.products.v1")]
    exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, layer)), disabled_checks=allowed)(x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x), sparse_dense(x, layer))


def test_an_exported_program_runs_in_a_process_that_lowered_nothing(emulator, tmp_path):
    case, path = CASES[0], tmp_path / "program"
    allowed = [jax.export.DisabledSafetyCheck.custom_call("upg_jax.emulator.products.v1")]
    exported = jax.export.export(jax.jit(lambda x: sparse_dense(x, case.layer)), disabled_checks=allowed)
    path.write_bytes(exported(case.x(4)).serialize())
    np.save(tmp_path / "x.npy", case.x(4))
    script = """import sys, jax.export, numpy, upg_jax
program = jax.export.deserialize(open(sys.argv[1] + "/program", "rb").read())
with upg_jax.use_backend("emulator"):
    numpy.save(sys.argv[1] + "/y.npy", program.call(numpy.load(sys.argv[1] + "/x.npy")))
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), sparse_dense(case.x(4), case.layer))


@pytest.mark.parametrize("failure", [KernelError("no such GPU"), TypeError("no such method")])
def test_whatever_fails_when_the_device_is_opened_is_the_reason_not_to_use_it(monkeypatch, failure):
    def fail():
        raise failure

    monkeypatch.setattr(_metal_device, "open_apple_device", fail)
    assert str(failure) in _metal_device._open.__wrapped__("metal")


class TestRefusals:
    """A forced backend that cannot do something says so."""

    def test_another_platform(self, emulator):
        function = jax.jit(lambda x: sparse_dense(x, CASES[0].layer))
        with pytest.raises(BackendError, match="no kernels for the platform"):
            jax.export.export(function, platforms=["cuda"])(CASES[0].x(4))

    def test_symbolic_shapes(self, emulator):
        (n,) = jax.export.symbolic_shape("n")
        with pytest.raises(BackendError, match="'emulator' cannot be used here: shapes are symbolic"):
            jax.export.export(jax.jit(lambda x: sparse_dense(x, CASES[0].layer)))(
                jax.ShapeDtypeStruct((n, 67), jnp.float32)
            )

    @pytest.mark.parametrize("index", ["mask", "dense"])
    def test_packed_layers(self, emulator, index):
        layer = upg_jax.pack(CASES[0].layer, index)
        with pytest.raises(BackendError, match=f"the layer's index is '{index}'"):
            sparse_dense(CASES[0].x(4), layer)

    def test_no_mac(self):
        assert unavailable_reason("metal") == "Metal: this machine is no Mac"
        with pytest.raises(BackendError, match="'metal' cannot be used here: Metal: this machine is no Mac"):
            use_backend("metal").__enter__()


class TestAuto:
    """Backend `auto` on a Mac, played by this machine with the stand-in."""

    @pytest.fixture
    def mac(self, monkeypatch, emulator):
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        monkeypatch.setattr(_metal_device, "_open", lambda backend: emulator)
        monkeypatch.setattr(_metal_lowering, "MIN_WORK", 2 * CASES[0].layer.capacity)
        with use_backend("auto"):
            yield emulator

    def calls(self, function, *args):
        return re.findall(r"custom_call @(upg_jax[\w.]+)\(", jax.jit(function).lower(*args).as_text())

    def test_work_below_the_threshold_stays_with_the_processor(self, mac):
        assert not any("metal" in name for name in self.calls(sparse_dense, CASES[0].x(1), CASES[0].layer))

    def test_work_above_it_goes_to_the_gpu_and_back(self, mac):
        case = CASES[0]
        assert self.calls(sparse_dense, case.x(2), case.layer) == ["upg_jax.metal.products.v1"]
        before = mac.command_buffers
        y, vjp = jax.vjp(lambda x: sparse_dense(x, case.layer), case.x(2))
        assert_within_bound(y, product, case.x(2), case.levels, case.scales, terms=case.terms)
        jax.block_until_ready(vjp(y))
        assert mac.command_buffers - before == 2

    def test_decoding_and_what_metal_cannot_do_stay_with_the_processor(self, mac):
        case = CASES[0]
        assert not any("metal" in name for name in self.calls(lambda layer: layer.to_dense(), case.layer))
        packed = upg_jax.pack(case.layer, "mask")
        assert not any("metal" in name for name in self.calls(sparse_dense, case.x(8), packed))

    def test_products_together_count_together(self, mac):
        case = CASES[0]
        from upg_jax._sparse_dense import sparse_dense_many

        found = self.calls(lambda x, *layers: sparse_dense_many(x, layers), case.x(1), case.layer, case.layer)
        assert found == ["upg_jax.metal.products.v1"]

    def test_a_layer_that_the_gpu_will_read_is_not_packed_for_the_processor(self, mac, monkeypatch):
        layer = MdCSR.from_dense(np.ones((32, 32), np.float32), density=0.5)
        monkeypatch.setattr(_metal_lowering, "MIN_WORK", layer.capacity)
        assert upg_jax.pack(layer).index == "delta8"
        monkeypatch.setattr(_metal_lowering, "MIN_WORK", layer.capacity + 1)
        with use_backend("reference"):
            assert upg_jax.pack(layer).index == "delta8"
        assert upg_jax.pack(layer).index == ("delta8" if unavailable_reason("native") else "mask")

    def test_the_doctor_says_so(self, mac):
        backend, reason = choose_backend("cpu")
        assert backend == "metal"
        assert "emulator" in reason  # the device's name

    def test_a_kernel_that_does_not_compile_leaves_its_work_to_the_processor(self, mac, monkeypatch):
        def refuse(self, source, kernel):
            raise TypeError("something that PyObjC raises")

        monkeypatch.setattr(type(mac), "max_threads", refuse)
        case = Case("random", (29, 67))  # whose plan is not known yet
        with pytest.warns(UserWarning, match=r"the processor computes .*: something that PyObjC raises"):
            found = self.calls(sparse_dense, case.x(5), case.layer)
        assert not any("metal" in name for name in found)
        with use_backend("emulator"), pytest.raises(TypeError, match="something that PyObjC raises"):
            self.calls(sparse_dense, case.x(5), case.layer)

    def test_without_a_device_nothing_changes(self, mac, monkeypatch):
        monkeypatch.setattr(_metal_device, "_open", lambda backend: "no GPU")
        assert not any("metal" in name for name in self.calls(sparse_dense, CASES[0].x(8), CASES[0].layer))
        backend, reason = choose_backend("cpu")
        assert backend in ("native", "reference")
        assert "no GPU" in reason


def test_a_mac_is_not_this_machine():
    assert not _metal_lowering.is_apple_silicon()
    assert not _metal_lowering.gains("auto")
