"""Which tensors a round synchronises: layers strided over fragments, each round one of them."""

import msgspec
import pytest

from hypha.errors import ConfigError
from hypha.protocol.fragments import Fragments, Streaming, layer_of, split
from hypha.scheduler.config import JobConfig


def llama(layers):
    inner = ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")
    names = [f"model.layers.{n}.{part}.weight" for n in range(layers) for part in inner]
    return ["model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight"]


def layers_in(part):
    return sorted({layer_of(name)[1] for name in part if layer_of(name) is not None})


def test_layers_are_strided_over_the_fragments_as_in_the_paper():
    parts = split(llama(12), 3)
    assert [layers_in(part) for part in parts] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_embeddings_go_with_the_first_layer_and_the_head_with_the_last():
    parts = split(llama(5), 3)
    assert "model.embed_tokens.weight" in parts[0]
    assert {"model.norm.weight", "lm_head.weight"} < parts[1]
    assert "model.layers.4.mlp.up_proj.weight" in parts[1]


@pytest.mark.parametrize("fragments", [1, 2, 3, 4])
def test_every_tensor_is_in_one_fragment_whatever_the_order_of_names(fragments):
    names = llama(4)
    parts = split(names, fragments)
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(parts)
    assert split(reversed(names), fragments) == parts


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.11.attn.c_attn.weight", ("transformer.h", 11)),
        ("model.layers.3.mlp.experts.7.w1.weight", ("model.layers", 3)),
        ("layers.0.bias", ("layers", 0)),
        ("lm_head.weight", None),
        ("wte.weight", None),
    ],
)
def test_a_layer_is_where_the_first_number_stands(name, layer):
    assert layer_of(name) == layer


def test_ten_comes_after_two_and_stacks_follow_one_another():
    names = [f"decoder.block.{n}.w" for n in (10, 2)] + [f"encoder.block.{n}.w" for n in (0, 1)]
    assert split(names, 4) == tuple(frozenset({name}) for name in ["decoder.block.2.w", *names[:1], *names[2:]])


@pytest.mark.parametrize(("names", "fragments", "layers"), [(llama(4), 5, 4), (["weight", "bias"], 2, 0)])
def test_more_fragments_than_layers_are_refused(names, fragments, layers):
    with pytest.raises(ConfigError, match=f"streaming.fragments {fragments} exceeds the {layers} layers of this model"):
        split(names, fragments)


def test_a_model_without_layers_is_one_fragment():
    assert split(["weight", "bias"], 1) == (frozenset({"weight", "bias"}),)


def test_rounds_take_the_fragments_in_turn():
    fragments = Fragments(llama(4), Streaming(fragments=3))
    assert [fragments.of(round_) for round_ in (1, 2, 3, 4, 7)] == [fragments.parts[n] for n in (0, 1, 2, 0, 0)]
    assert sorted(fragments.among(dict.fromkeys(llama(4), 0), 2)) == sorted(fragments.parts[1])
    assert fragments.say(5) == "round 5 synchronises fragment 2 of 3: "
    assert Fragments(llama(4), Streaming(fragments=2)).say(5) == "round 5 synchronises fragment 1 of 2: "
    assert Fragments(llama(4), Streaming()).say(5) == ""


def test_only_a_job_that_says_nothing_else_is_plain():
    assert Streaming().plain
    others = (Streaming(fragments=2), Streaming(overlap_steps=1), Streaming(mixing=0.5))
    assert not any(one.plain for one in others)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"mixing": 0.0}, "Expected `float` > 0.0 - at `\\$.mixing`"),
        ({"mixing": 1.5}, "Expected `float` <= 1.0 - at `\\$.mixing`"),
        ({"fragments": 0}, "Expected `int` >= 1 - at `\\$.fragments`"),
        ({"overlap_steps": -1}, "Expected `int` >= 0 - at `\\$.overlap_steps`"),
        ({"overlap": 1}, "unknown field `overlap`"),
    ],
)
def test_nonsense_is_refused_with_its_key(table, reason):
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(table, Streaming)


def job(overlap_steps, workers=2):
    return {
        "model": {"config": {"layers": []}, "type": "torch"},
        "dataset": "points",
        "rounds": {"updates": 1, "samples_between_updates": 640, "max_batch_size": 16},
        "resources": {"workers": workers},
        "streaming": {"overlap_steps": overlap_steps},
    }


def test_an_overlap_reaches_to_the_next_synchronisation_at_most():
    assert msgspec.convert(job(20), JobConfig).streaming.overlap_steps == 20
    with pytest.raises(msgspec.ValidationError, match=r"overlap_steps 21 exceeds the 20 inner steps of a round"):
        msgspec.convert(job(21), JobConfig)
    with pytest.raises(msgspec.ValidationError, match=r"exceeds the 10 inner steps"):
        msgspec.convert(job(11, workers=4), JobConfig)
