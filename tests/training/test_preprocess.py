"""Processors between slices and model: text in U8 rows to tokens, labels passed on, clear errors."""

import pytest
import torch

from hypha.errors import ConfigError, JobFailed
from hypha.protocol.job import PreprocessorSpec
from hypha.training.preprocess import Preprocessor, texts


def rows(*lines, width=16):
    return torch.tensor([list(line.encode().ljust(width, b"\0")) for line in lines])


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "good": 2, "bad": 3, "film": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    return tmp_path


def spec(directory, **changes):
    return PreprocessorSpec(**{"type": "tokenizer", "path": str(directory), "inputs": {"text": "review"}, **changes})


def test_without_a_processor_batches_pass():
    batch = {"input_ids": torch.zeros(2, 3)}
    assert Preprocessor(None, None)(batch) is batch


def test_text_is_its_own_target_where_the_task_is_to_go_on_with_it():
    made = Preprocessor(None, None, own_target=True)({"input_ids": torch.ones(2, 3)})
    assert torch.equal(made["labels"], torch.ones(2, 3))
    labelled = {"input_ids": torch.ones(2, 3), "labels": torch.zeros(2, 3)}
    assert Preprocessor(None, None, own_target=True)(labelled)["labels"] is labelled["labels"]


def test_text_becomes_padded_tokens_and_labels_pass(tokenizer):
    batch = {"review": rows("good film", "bad"), "labels": torch.tensor([1, 0])}
    made = Preprocessor(spec(tokenizer), tokenizer)(batch)
    assert made["input_ids"].tolist() == [[2, 4], [3, 0]]
    assert made["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert made["labels"] is batch["labels"]
    assert "review" not in made


def test_a_tensor_that_is_missing_is_named(tokenizer):
    with pytest.raises(JobFailed, match=r"the dataset has no tensor 'review', only \['labels'\]"):
        Preprocessor(spec(tokenizer), tokenizer)({"labels": torch.zeros(1)})


def test_bytes_that_are_no_text_are_replaced():
    assert texts(torch.tensor([[0xFF, 0x61, 0]])) == ["\ufffda"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"type": "sound"}, "preprocessor.type: unknown 'sound'; known: auto, tokenizer, image, feature"),
        ({"inputs": {}}, "preprocessor.inputs: name the tensor for each argument"),
        ({}, "preprocessor: "),
    ],
)
def test_a_processor_that_makes_no_sense_is_refused_by_key(tmp_path, changes, fault):
    with pytest.raises(ConfigError, match=fault):
        Preprocessor(spec(tmp_path, **changes), tmp_path)
