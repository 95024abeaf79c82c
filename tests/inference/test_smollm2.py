"""The real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

import numpy as np
import pytest
from small_models import smollm2

from upg_jax import UPGDecompressor, UPGModel
from upg_jax.compress import Settings, compress_checkpoint
from upg_jax.inference import perplexity

pytestmark = pytest.mark.slow

TEXT = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
    "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889. Locally nicknamed "
    '"La dame de fer", it was constructed as the centerpiece of the 1889 World\'s Fair.'
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def dense():
    return UPGModel.from_file(smollm2.path())


@pytest.mark.filterwarnings("default")
def test_a_packed_model_with_int8_rows_equals_transformers_on_the_decoded_weights(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle: pip install transformers torch")
    transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers torch")
    path = smollm2.path()
    compress_checkpoint(path, tmp_path / "half", Settings(density=0.5))
    model = UPGModel.from_file(tmp_path / "half", pack=True)
    assert model.params["embed_tokens"].index == "dense"
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with UPGDecompressor.from_safetensors(tmp_path / "half") as file, torch.no_grad():
        for name, parameter in reference.named_parameters():
            if file.info(name).kind == "mdcsr":
                layer = file.get_layer(name, device=False)
                parameter.copy_(torch.tensor(np.asarray(layer.to_dense("float32"))))
    ids = np.array([model.tokenizer.encode(TEXT)[:64]])
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    assert np.abs(model.forward(ids)[0] - expected).max() < 1e-3
    _, cache = model.forward(ids[:, :60])
    for t in range(60, 64):
        step, cache = model.forward(ids[:, t : t + 1], cache)
        assert np.abs(step[:, 0] - expected[:, t]).max() < 1e-3


@pytest.mark.filterwarnings("default")
def test_forward_equals_transformers_on_64_tokens(dense):
    torch = pytest.importorskip("torch", reason="the oracle: pip install transformers torch")
    transformers = pytest.importorskip("transformers", reason="the oracle: pip install transformers torch")
    path = smollm2.path()
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = np.array([dense.tokenizer.encode(TEXT)[:64]])
    assert ids.shape == (1, 64)
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).logits.numpy()
    logits, cache = dense.forward(ids)
    assert np.abs(logits - expected).max() < 1e-3
    # Step by step equals at once.
    _, cache = dense.forward(ids[:, :60])
    for t in range(60, 64):
        step, cache = dense.forward(ids[:, t : t + 1], cache)
        assert np.abs(step[:, 0] - expected[:, t]).max() < 1e-3
    assert perplexity(dense, ids[0]).perplexity == pytest.approx(
        np.exp(
            torch.nn.functional.cross_entropy(torch.tensor(expected[0, :-1]), torch.tensor(ids[0, 1:])).item()
        ),
        rel=1e-3,
    )


def test_it_knows_the_capital_of_france(dense):
    assert dense.generate("The capital of France is", max_new_tokens=1).text == " Paris"
    chat = dense.tokenizer.encode_chat(QUESTION)
    answer = dense.generate(chat, max_new_tokens=30)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"
    assert "".join(token.text for token in dense.stream(chat, max_new_tokens=30)) == answer.text


def test_a_ragged_batch_answers_as_each_prompt_alone(dense):
    prompts = ["The capital of France is", "Once upon a time there was", "Water"]
    together = dense.generate(prompts, max_new_tokens=16)
    assert together == [dense.generate(prompt, max_new_tokens=16) for prompt in prompts]


def test_the_prime_manifold_at_density_one_answers_token_for_token(dense, tmp_path):
    compress_checkpoint(smollm2.path(), tmp_path / "prime", Settings(density=1.0, manifold="prime"))
    prime = UPGModel.from_file(tmp_path / "prime")
    chat = dense.tokenizer.encode_chat(QUESTION)
    assert prime.generate(chat, max_new_tokens=16) == dense.generate(chat, max_new_tokens=16)
