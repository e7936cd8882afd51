"""Models by description: every Auto class of transformers, plain layers, the same weights from the same seed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hypha.errors import ConfigError
from hypha.protocol.job import ModelSpec
from hypha.training import models, tensors
from tests.training.tiny_network import MLP

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}


def llama(**changes):
    return ModelSpec(**{"type": "causal-lm", "config": LLAMA, "seed": 1, **changes})


def test_the_same_seed_gives_the_same_weights_and_another_one_others():
    digests = [tensors.digest(models.parameters_of(models.build(llama(seed=seed)))) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_models_built_at_once_have_the_weights_of_their_seeds():
    alone = tensors.digest(models.parameters_of(models.build(llama(seed=1))))
    with ThreadPoolExecutor(8) as threads:
        built = list(threads.map(lambda seed: models.build(llama(seed=seed)), [1, 2, 3, 4] * 16))
    assert {tensors.digest(models.parameters_of(model)) for model in built[::4]} == {alone}


def test_tied_weights_appear_once():
    tied = models.parameters_of(models.build(llama()))
    loose = models.parameters_of(models.build(llama(config={**LLAMA, "tie_word_embeddings": False})))
    assert set(loose) - set(tied) == {"lm_head.weight"}
    assert list(tied) == sorted(tied)


def test_half_precision_weights_are_trained_in_fp32():
    parameters = models.parameters_of(models.build(llama(config={**LLAMA, "dtype": "bfloat16"})))
    assert {tensor.dtype for tensor in parameters.values()} == {torch.float32}


def test_a_directory_is_loaded_without_the_network_and_without_foreign_code(tmp_path):
    model = models.build(llama())
    model.save_pretrained(tmp_path)
    again = models.build(llama(config=None, path=str(tmp_path)), source=tmp_path)
    assert tensors.digest(models.parameters_of(again)) == tensors.digest(models.parameters_of(model))


def test_pickled_weights_are_not_loaded(tmp_path):
    model = models.build(llama())
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model: "):
        models.build(llama(config=None, path=str(tmp_path)), source=tmp_path)


@pytest.mark.slow
def test_every_auto_class_has_a_task_name():
    import transformers

    known = {name for name in dir(transformers) if name.startswith("AutoModel")}
    # Task heads only: the vision-to-sequence names of older versions are aliases that later ones dropped.
    assert known - set(models.TASKS.values()) == set()
    assert all(models.auto_class(task) for task, name in models.TASKS.items() if name in known)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        (ModelSpec(type="causal-ml", config=LLAMA), "model.type: unknown 'causal-ml'; known: base, "),
        (ModelSpec(config={"vocab_size": 3}), "model.config.model_type: the architecture's name is missing"),
        (ModelSpec(config={"model_type": "lama"}), "model.config: "),
        (ModelSpec(type="torch", path="/x"), "model.config: type 'torch' is built from a config"),
        (ModelSpec(type="torch", config={"layers": []}), r"model.config: .*length >= 1"),
        (ModelSpec(type="torch", config={"layers": [["os.system", 1]]}), "unknown layer 'os.system'; known: "),
        (ModelSpec(type="torch", config={"layers": [[]]}), "unknown layer None"),
        (ModelSpec(type="torch", config={"layers": [["linear", "2", 3]]}), "arguments of 'linear' must be numbers"),
        (ModelSpec(type="torch", config={"layers": [["linear", 2]]}), r"model.config.layers\[0\]: "),
        (ModelSpec(type="torch", config={"layers": [["linear", 2**20, 2**20]]}), "is too large"),
        (ModelSpec(type="torch", config={"layers": [["relu"]], "evil": 1}), "unknown field `evil`"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused_by_key(spec, fault):
    with pytest.raises(ConfigError, match=fault):
        models.build(spec)


def test_plain_layers_compute_a_loss_and_logits():
    model = models.build(ModelSpec(type="torch", config={**MLP, "loss": "mse"}))
    output = model(inputs=torch.zeros(3, 8), labels=torch.zeros(3, 4, dtype=torch.int64))
    assert output["logits"].shape == (3, 4)
    assert output["loss"].ndim == 0
