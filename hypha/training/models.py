"""Models from a job's `model` section: from scratch, from a repository, or a plain module; always fp32.

    type = "causal-lm", …   transformers' Auto class of that task (TASKS)
           config           AutoConfig.for_model(**config), initial weights from `seed`
           repository/path  the directory that the worker fetched; local files only, safetensors only
    type = "torch"          {"layers": [["linear", 8, 16], ["relu"], ["linear", 16, 4]], "loss": "cross-entropy"}

Nothing here runs code named by a peer: task names and layers are looked up in the tables below, and
`trust_remote_code` is never set. What is averaged are a model's parameters, each under its first name where several
share it (tied weights); buffers, such as running statistics, stay with the process that computed them.
"""

import importlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
import torch
from msgspec import Meta, Struct
from torch import nn

from hypha.errors import ConfigError
from hypha.protocol.job import ModelSpec

TORCH = "torch"
TASKS = {
    "base": "AutoModel",
    "audio-classification": "AutoModelForAudioClassification",
    "audio-frame-classification": "AutoModelForAudioFrameClassification",
    "audio-tokenization": "AutoModelForAudioTokenization",
    "audio-xvector": "AutoModelForAudioXVector",
    "causal-lm": "AutoModelForCausalLM",
    "ctc": "AutoModelForCTC",
    "decision": "AutoModelForDecision",
    "depth-estimation": "AutoModelForDepthEstimation",
    "document-question-answering": "AutoModelForDocumentQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "image-matting": "AutoModelForImageMatting",
    "image-segmentation": "AutoModelForImageSegmentation",
    "image-text-to-text": "AutoModelForImageTextToText",
    "image-to-image": "AutoModelForImageToImage",
    "instance-segmentation": "AutoModelForInstanceSegmentation",
    "keypoint-detection": "AutoModelForKeypointDetection",
    "keypoint-matching": "AutoModelForKeypointMatching",
    "mask-generation": "AutoModelForMaskGeneration",
    "masked-image-modeling": "AutoModelForMaskedImageModeling",
    "masked-lm": "AutoModelForMaskedLM",
    "multimodal-lm": "AutoModelForMultimodalLM",
    "multiple-choice": "AutoModelForMultipleChoice",
    "next-sentence-prediction": "AutoModelForNextSentencePrediction",
    "normal-estimation": "AutoModelForNormalEstimation",
    "object-detection": "AutoModelForObjectDetection",
    "pointmap-estimation": "AutoModelForPointmapEstimation",
    "pose-estimation": "AutoModelForPoseEstimation",
    "pretraining": "AutoModelForPreTraining",
    "question-answering": "AutoModelForQuestionAnswering",
    "rnnt": "AutoModelForRNNT",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "table-question-answering": "AutoModelForTableQuestionAnswering",
    "table-recognition": "AutoModelForTableRecognition",
    "tdt": "AutoModelForTDT",
    "text-encoding": "AutoModelForTextEncoding",
    "text-recognition": "AutoModelForTextRecognition",
    "text-to-spectrogram": "AutoModelForTextToSpectrogram",
    "text-to-waveform": "AutoModelForTextToWaveform",
    "time-series-prediction": "AutoModelForTimeSeriesPrediction",
    "token-classification": "AutoModelForTokenClassification",
    "universal-segmentation": "AutoModelForUniversalSegmentation",
    "video-classification": "AutoModelForVideoClassification",
    "visual-question-answering": "AutoModelForVisualQuestionAnswering",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "zero-shot-object-detection": "AutoModelForZeroShotObjectDetection",
}

# Tasks whose models predict each token from those before it: without labels the text is its own target.
NEXT_TOKEN_TASKS = {"causal-lm", "image-text-to-text", "multimodal-lm"}

LAYERS: dict[str, type[nn.Module]] = {
    "batch-norm": nn.BatchNorm1d,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "dropout": nn.Dropout,
    "embedding": nn.Embedding,
    "flatten": nn.Flatten,
    "gelu": nn.GELU,
    "layer-norm": nn.LayerNorm,
    "linear": nn.Linear,
    "max-pool2d": nn.MaxPool2d,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
# A description this long is a mistake; real models come from transformers.
LAYERS_MAX = 256
# One layer of a plain module: numbers in a description may ask for no more than this (16 GiB of fp32).
LAYER_ELEMENTS_MAX = 1 << 32


class TorchConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """A plain module: layers in a row, each `[name, arguments…]`; tensor `inputs` goes in, `labels` is compared."""

    layers: Annotated[list[list[str | int | float]], Meta(min_length=1, max_length=LAYERS_MAX)]
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"


class Plain(nn.Module):
    """Layers in a row with a loss: `forward(inputs, labels)` returns {"loss", "logits"}."""

    def __init__(self, config: TorchConfig) -> None:
        super().__init__()
        named = [(str(index), _layer(index, *layer)) for index, layer in enumerate(config.layers)]
        self.layers = nn.Sequential(OrderedDict(named))
        self.criterion = nn.CrossEntropyLoss() if config.loss == "cross-entropy" else nn.MSELoss()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Inputs of any integer dtype where the first layer is an embedding, else made fp32."""
        first = next(iter(self.layers))
        logits = self.layers(inputs if isinstance(first, nn.Embedding) else inputs.float())
        if labels is None:
            return {"logits": logits}
        labels = labels.float() if isinstance(self.criterion, nn.MSELoss) else labels
        return {"logits": logits, "loss": self.criterion(logits, labels)}


def _layer(index: int, name: object = None, *arguments: Any) -> nn.Module:  # noqa: ANN401 - numbers of a layer
    kind = LAYERS.get(str(name))
    if kind is None:
        raise ConfigError(f"model.config.layers[{index}]: unknown layer {name!r}; known: {', '.join(LAYERS)}")
    if any(isinstance(argument, str) for argument in arguments):
        raise ConfigError(f"model.config.layers[{index}]: arguments of {name!r} must be numbers")
    if math.prod(max(1, abs(int(argument))) for argument in arguments) > LAYER_ELEMENTS_MAX:
        raise ConfigError(f"model.config.layers[{index}]: {name!r} of {arguments} is too large")
    try:
        return kind(*arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model.config.layers[{index}]: {error}") from error


# torch has one generator for the process: two models built at once, one of them to evaluate with, would share it.
_building = threading.Lock()


def build(spec: ModelSpec, *, source: Path | None = None) -> nn.Module:
    """Return the model with its initial weights, fp32 on the CPU; `source` is the fetched directory where there is one.

    Raises ConfigError naming the key.
    """
    with _building:
        torch.manual_seed(spec.seed)
        if spec.type == TORCH:
            model: nn.Module = _plain(spec)
        elif spec.config is not None:
            model = _from_scratch(spec, spec.config)
        else:
            model = _from_directory(spec, source)
    return model.float()


def without_cache(model: nn.Module) -> nn.Module:
    """The same model, told not to keep keys and values of past tokens, which only generation needs."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.use_cache = False
    return model


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The canonical set of tensors: every parameter once, sorted by name; they share memory with the model."""
    return dict(sorted((name, parameter.data) for name, parameter in model.named_parameters()))


def _plain(spec: ModelSpec) -> Plain:
    if spec.config is None:
        raise ConfigError("model.config: type 'torch' is built from a config, not from a repository")
    try:
        return Plain(msgspec.convert(spec.config, TorchConfig))
    except msgspec.ValidationError as error:
        raise ConfigError(f"model.config: {error}") from error


def _from_scratch(spec: ModelSpec, config: Mapping[str, Any]) -> nn.Module:
    values = dict(config)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str):
        raise ConfigError("model.config.model_type: the architecture's name is missing, for example 'llama'")
    try:
        made = _transformers().AutoConfig.for_model(kind, **values)
        return cast(nn.Module, auto_class(spec.type).from_config(made))
    except (TypeError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model.config: {error}") from error


def _from_directory(spec: ModelSpec, source: Path | None) -> nn.Module:
    if source is None:
        raise ConfigError("model: its repository has not been fetched")
    try:
        model = auto_class(spec.type).from_pretrained(str(source), local_files_only=True, use_safetensors=True)
    except (OSError, TypeError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model: {spec.repository or spec.path}: {error}") from error
    return cast(nn.Module, model)


def from_configuration(spec: ModelSpec, source: Path) -> nn.Module:
    """Return the model that a directory's configuration describes, its weights unread. Raises ConfigError."""
    try:
        made = _transformers().AutoConfig.from_pretrained(str(source), local_files_only=True)
        return cast(nn.Module, auto_class(spec.type).from_config(made))
    except (OSError, TypeError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"model: {source}: {error}") from error


def auto_class(task: str) -> Any:  # noqa: ANN401 - transformers is untyped
    """Return transformers' Auto class for a task name. Raises ConfigError naming the known ones."""
    name = TASKS.get(task)
    if name is None:
        raise ConfigError(f"model.type: unknown {task!r}; known: {', '.join([*TASKS, TORCH])}")
    found = getattr(_transformers(), name, None)
    if found is None:
        raise ConfigError(f"model.type: {task!r} needs a transformers that has {name}")
    return found


def _transformers() -> Any:  # noqa: ANN401 - transformers is untyped
    """Import transformers only where it is needed (it takes as long as torch), without progress bars in the log."""
    transformers = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers
