"""Densities by matrix: what is measured against `transformers`, how it is shared out, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers.hf_families import make
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import llama

from upg_jax import CheckpointError, EncodingError, UPGDecompressor
from upg_jax.compress import Calibration, Rule, Settings, _allocation, allocate, compress_checkpoint, plan
from upg_jax.io import open_checkpoint

IDS = np.random.default_rng(3).integers(1, 101, (5, 24)).astype(np.int32)


def wanda(w, squares, density):
    """Row by row the weights with the largest products of magnitude and input norm."""
    scores = np.abs(w) * np.sqrt(squares)
    kept = round(density * w.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :kept]
    mask = np.zeros(w.shape, bool)
    np.put_along_axis(mask, order, True, axis=1)
    return w * mask


def log_probabilities(model, ids):
    import torch

    with torch.no_grad():
        logits = model(torch.tensor(ids, dtype=torch.long), use_cache=False).logits.double()
    return torch.log_softmax(logits, -1).numpy()[:, ::2]


def expected_cost(name, ids, density, chosen):
    """KL of the model from itself with the chosen linear modules pruned, by `transformers` in float32."""
    import torch

    model, squares, hooks = make(name)[0], {}, []
    modules = {key: m for key, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for key, module in modules.items():

        def note(module, args, output, key=key):
            squares[key] = args[0].detach().double().reshape(-1, args[0].shape[-1]).square().sum(0).numpy()

        hooks.append(module.register_forward_hook(note))
    before = log_probabilities(model, ids)
    for hook in hooks:
        hook.remove()
    kept = {key: m.weight.detach().clone() for key, m in modules.items()}
    try:
        with torch.no_grad():
            for key, module in modules.items():
                if chosen(key):
                    pruned = wanda(module.weight.numpy(), squares[key].astype(np.float32), density)
                    module.weight.copy_(torch.tensor(pruned))
        after = log_probabilities(model, ids)
    finally:
        with torch.no_grad():
            for key, module in modules.items():
                module.weight.copy_(kept[key])
    return (np.exp(before) * (before - after)).sum(-1).mean()


@pytest.mark.parametrize("name", ["qwen3", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_costs_are_those_of_transformers(name, monkeypatch):
    monkeypatch.setattr(_allocation, "best_precision", lambda: "float32")
    checkpoint = open_checkpoint(make(name)[1])
    chosen = Settings(density=0.5, method="wanda", embedding="float")
    costs = _allocation.measure(checkpoint, chosen, Calibration(IDS, "random"))
    ids = IDS[[0, 1, 2, 3]]
    assert costs.densities == (0.5, 0.7)
    for block, cost in enumerate(costs.blocks):
        expected = expected_cost(name, ids, 0.5, lambda key, block=block: f".layers.{block}." in key)
        assert cost == pytest.approx(expected, rel=1e-3), block
    for kind, pair in costs.kinds.items():
        for density, cost in zip(costs.densities, pair, strict=True):
            expected = expected_cost(name, ids, density, lambda key, kind=kind: key.endswith(f".{kind}"))
            assert cost == pytest.approx(expected, rel=1e-3), (kind, density)


@st.composite
def measured(draw):
    blocks, kinds = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    cost = st.floats(1e-6, 3.0)
    low = draw(st.floats(0.05, 0.9))
    names = {f"{b}.{k}": (b, str(k)) for b in range(blocks) for k in range(kinds)}
    sizes = [draw(st.integers(1, 10**6)) for _ in range(kinds)]
    return _allocation.Costs(
        (low, low + (1 - low) / 4),
        [draw(cost) for _ in range(blocks)],
        {str(k): (c := draw(cost), c * draw(st.floats(0.01, 0.99))) for k in range(kinds)},
        names,
        {name: sizes[int(kind)] for name, (_, kind) in names.items()},
    )


@given(measured(), st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_shares_keep_the_total_and_gain_the_same_everywhere(costs, density):
    found = _allocation.shares(costs, density)
    d = np.array([found[name] for name in costs.places])
    size = np.array([costs.sizes[name] for name in costs.places], float)
    assert (d * size).sum() / size.sum() == pytest.approx(density, abs=1e-6)
    low, high = costs.densities
    gains = []
    for block, kind in costs.places.values():
        first, second = costs.kinds[kind]
        falls = min(max(np.log(first / second) / (high - low), 1.0), 30.0)
        of_kind = sum(costs.sizes[n] for n, (_, k) in costs.places.items() if k == kind)
        # Derivative of block * first * exp(-falls (d - low)) * s / of_kind with respect to the number of kept weights.
        gains.append(
            np.log(costs.blocks[block] * first * falls / of_kind) + falls * low - falls * d[len(gains)]
        )
    gains, least, most = np.array(gains), density / 2, min(1.0, density + 0.35)
    assert (d >= least - 1e-9).all()
    assert (d <= most + 1e-9).all()
    inside = (d > least + 1e-6) & (d < most - 1e-6)
    if inside.any():
        level = gains[inside].mean()
        np.testing.assert_allclose(gains[inside], level, atol=1e-3)
        assert (gains[d <= least + 1e-6] <= level + 1e-3).all()
        assert (gains[d >= most - 1e-6] >= level - 1e-3).all()


def test_block_that_a_rule_left_one_matrix_is_not_taken_to_be_cheap():
    # Pruning costs as much in both blocks, three times as much in a as in b; a of the first block has a rule.
    places = {"0.b": (0, "b"), "1.a": (1, "a"), "1.b": (1, "b")}
    costs = _allocation.Costs(
        (0.5, 0.7), [1.0, 4.0], {"a": (3.0, 0.6), "b": (2.0, 0.4)}, places, dict.fromkeys(places, 64)
    )
    found = _allocation.shares(costs, 0.5)
    assert found["0.b"] == pytest.approx(found["1.b"])
    assert found["1.a"] > found["1.b"]


CALIBRATION = Calibration(np.random.default_rng(5).integers(0, llama.VOCABULARY, (6, 32)), "random tokens")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return llama.write_hugging_face(
        tmp_path_factory.mktemp("source") / "hf", llama.weights(), dtype=ml_dtypes.bfloat16
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_compressed_model_has_the_densities_found_and_the_same_total(tmp_path, source, method):
    uniform = Settings(density=0.4, method=method, embedding="float")
    found = allocate(source, uniform, CALIBRATION)
    assert found == allocate(source, uniform, CALIBRATION)
    calibration = None if method == "magnitude" else CALIBRATION
    report = compress_checkpoint(source, tmp_path / "out", found, calibration=calibration)
    kept = sum(t.density * t.num_weights for t in report.compressed)
    total = sum(t.num_weights for t in report.compressed)
    # Each row keeps a whole number of weights, and some of those round to 0.
    assert kept / total == pytest.approx(0.4, abs=0.02)
    assert len({t.encoding.density for t in report.compressed}) > 3
    with UPGDecompressor.from_safetensors(tmp_path / "out") as file:
        assert len(file.provenance["settings"]["rules"]) == len(report.compressed)


def test_matrices_that_have_a_rule_keep_it_and_are_left_out(source):
    rules = (Rule.keep_dense(r"layers\.0\."), Rule(r"up_proj", 0.9))
    found = allocate(source, Settings(density=0.4, rules=rules), CALIBRATION)
    assert found.rules[:2] == rules
    planned = {t.name: t for t in plan(open_checkpoint(source), found).tensors}
    others = [planned[r.pattern.strip("^$").replace("\\", "")] for r in found.rules[2:]]
    assert not any("layers.0." in t.name or "up_proj" in t.name for t in others)
    total = sum(t.num_weights for t in others)
    assert sum(t.density * t.num_weights for t in others) / total == pytest.approx(0.4, abs=1e-3)
    assert {t.density for name, t in planned.items() if "up_proj" in name and "layers.0." not in name} == {
        0.9
    }


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_density_that_leaves_nothing_to_share_out_is_refused(source, density):
    with pytest.raises(EncodingError, match=r"density must be above 0 and below 1; got"):
        allocate(source, Settings(density=density), CALIBRATION)


def test_pattern_that_fixes_densities_is_refused(source):
    with pytest.raises(EncodingError, match=r"pattern 2:4 fixes the density of every matrix"):
        allocate(source, Settings(density=0.5, pattern="2:4"), CALIBRATION)


def test_nothing_to_share_out_leaves_the_settings(source):
    chosen = Settings(density=0.5, rules=(Rule(".", 0.3),))
    assert allocate(source, chosen, CALIBRATION) == chosen


def test_experts_cost_what_their_block_and_kind_cost(monkeypatch):
    monkeypatch.setattr(_allocation, "best_precision", lambda: "float32")
    checkpoint, seen = open_checkpoint(make("mixtral")[1]), []
    chosen = Settings(density=0.5, rules=(Rule.keep_dense(r"layers\.0\.|self_attn"),))
    costs = _allocation.measure(checkpoint, chosen, Calibration(IDS, "random"), seen.append)
    # With one block and the kinds of its experts alone free, pruning the block is pruning all of them.
    assert costs.blocks[0] == 0.0
    assert sorted(costs.kinds) == sorted({kind for _, kind in costs.places.values()})
    assert len(costs.places) == 3 * 5
    assert 0 < max(first for first, _ in costs.kinds.values()) < 2 * costs.blocks[1]
    assert all(second < first for first, second in costs.kinds.values())
    assert seen[-1].done == seen[-1].total


def test_progress_counts_every_weight_as_often_as_it_is_used(source):
    seen = []
    allocate(source, Settings(density=0.4), CALIBRATION, progress=seen.append)
    assert {p.stage for p in seen} == {"measure"}
    assert seen[-1].done == seen[-1].total
    runs = [p.name for p in seen]
    # Dense, two densities of seven kinds, and one more for each block pruned so far; then the predictions of them all.
    assert [runs.count(name) for name in ("block 0", "block 1", "head")] == [16, 17, 17]


@pytest.mark.parametrize(("windows", "tokens"), [(1, 1), (9, 200)])
def test_few_and_short_windows_do(source, windows, tokens):
    ids = np.random.default_rng(0).integers(0, llama.VOCABULARY, (windows, tokens))
    found = allocate(source, Settings(density=0.5), Calibration(ids, "random"))
    assert len(found.rules) == 7 * llama.LAYERS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "norms must be finite; .*the model may have weights"),
        ("model.norm.weight", "must be a finite number; got nan; the checkpoint may have weights"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(tmp_path, name, message):
    weights = llama.weights()
    weights[name].reshape(-1)[0] = np.nan
    broken = llama.write_hugging_face(tmp_path / "hf", weights)
    with pytest.raises(EncodingError, match=message):
        allocate(broken, Settings(density=0.5), CALIBRATION)


def test_matrix_that_the_model_never_runs_is_named(tmp_path):
    weights = llama.weights() | {"extra.weight": np.ones((8, 8), np.float32)}
    odd = llama.write_hugging_face(tmp_path / "hf", weights)
    with pytest.raises(EncodingError, match=r"never reaches tensor 'extra\.weight'; keep it dense by a rule"):
        allocate(odd, Settings(density=0.5), CALIBRATION)
    found = allocate(odd, Settings(density=0.5, rules=(Rule.keep_dense("extra"),)), CALIBRATION)
    assert len(found.rules) == 1 + 7 * llama.LAYERS


def test_work_with_other_densities_is_refused_by_naming_one(tmp_path, source):
    def settings(change):
        rules = (Rule("up_proj", 0.5), Rule("q_proj", 0.4 + change), Rule("k_proj", 0.3 + change))
        return Settings(density=0.5, embedding="float", rules=rules)

    def stop(progress):
        if progress.stage == "encode":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(source, tmp_path / "out", settings(0.0), progress=stop)
    with pytest.raises(
        CheckpointError, match=r"rules \['q_proj', 0.4\], now \['q_proj', 0.41\d*\] \(and 1 more\); go"
    ):
        compress_checkpoint(source, tmp_path / "out", settings(0.01))
