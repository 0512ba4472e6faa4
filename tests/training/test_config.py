from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truenorm import InputError, TrainConfig, recipe
from truenorm.training.config import config_help

CLASSIC = {
    "epochs": 20, "batch_size": 64, "optimizer": "adam", "lr": 1e-3, "schedule": "constant",
    "patience": 3, "min_delta": 1e-3, "weight_decay": 0.0, "label_smoothing": 0.0, "amp": "off",
}  # fmt: skip


@pytest.mark.parametrize("model", ["mlp", "convnet", "resnet", "transformer"])
def test_the_classic_recipe_is_the_textbook_protocol_for_every_model(model):
    config = dataclasses.asdict(recipe("classic", model, 150))
    assert {k: config[k] for k in CLASSIC} == CLASSIC


def test_what_the_caller_says_wins_over_the_recipe():
    config = recipe("default", "mlp", 48000, epochs=3, lr=0.5, seed=9)
    assert (config.epochs, config.lr, config.seed) == (3, 0.5, 9)


@given(st.integers(2, 10**7), st.sampled_from(["mlp", "convnet", "resnet", "transformer"]))
def test_the_default_recipe_always_has_enough_steps_to_learn(examples, model):
    config = recipe("default", model, examples)
    batches = max(1, -(-examples // config.batch_size))
    assert config.epochs * batches >= 900
    assert 16 <= config.batch_size <= 256


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("epochs", 0, "must be an integer of at least 1"),
        ("epochs", 2.0, "must be an integer of at least 1"),
        ("batch_size", -4, "must be an integer of at least 1"),
        ("patience", True, "must be an integer of at least 1"),
        ("accumulate", 0, "must be an integer of at least 1"),
        ("threads", 0, "must be at least 1"),
        ("seed", -1, "must be an integer of at least 0"),
        ("lr", float("nan"), "must be a finite number above 0"),
        ("lr", 0, "must be a finite number above 0"),
        ("min_delta", -1e-9, "must be a finite number of at least 0"),
        ("weight_decay", float("inf"), "must be a finite number of at least 0"),
        ("label_smoothing", 1.0, r"must lie in \[0, 1\)"),
        ("clip_norm", 0.0, "must be above 0"),
        ("schedule", "linear", "choose one of constant, cosine, onecycle"),
        ("optimizer", "lion", "choose one of adam, adamw, sgd"),
        ("amp", "fp8", "choose one of auto, off, bf16"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_rule_and_value(name, value, rule):
    with pytest.raises(InputError, match=f"{name}.*{rule}|{name} '{value}'; {rule}"):
        TrainConfig(**{name: value})


def test_an_unknown_recipe_is_refused():
    with pytest.raises(InputError, match="unknown recipe 'best'; choose one of default, classic"):
        recipe("best", "mlp", 100)


def test_every_field_has_its_line_of_help():
    assert all(config_help().values())
    assert config_help().keys() == {f.name for f in dataclasses.fields(TrainConfig)}
