"""What a config takes, and what it refuses."""

import dataclasses

import pytest

from gralora import GraloraConfig


def test_defaults_are_those_of_peft():
    import peft

    theirs = peft.GraloraConfig()
    for field in dataclasses.fields(GraloraConfig):
        if field.name not in (
            "fan_in_fan_out",
            "exclude_modules",
        ):  # read off the layer here; not in PEFT's
            source = (
                theirs if hasattr(theirs, field.name) else peft.LoraConfig()
            )  # what its GraLoRA lacks
            assert getattr(GraloraConfig(), field.name) == getattr(source, field.name), field.name


def test_scaling_is_alpha_over_the_sum_of_ranks():
    assert GraloraConfig(r=24, hybrid_r=8, alpha=64).scaling == 2.0


def test_with_rslora_it_is_alpha_over_the_root_of_the_sum_and_has_an_equal_plain_alpha():
    config = GraloraConfig(r=24, hybrid_r=12, alpha=3, use_rslora=True)
    assert (config.scaling, config.plain_alpha) == (0.5, 18)
    assert GraloraConfig(r=24, hybrid_r=12, alpha=config.plain_alpha).scaling == config.scaling
    plain = config.scaled(2.0)
    assert (plain.scaling, plain.use_rslora, plain.r, plain.hybrid_r) == (2.0, False, 24, 12)
    assert GraloraConfig(alpha=5).plain_alpha == 5


def test_what_is_recommended_is_a_config_whose_fields_can_be_replaced():
    config = GraloraConfig.recommended(64, modules_to_save=["head"])
    assert config == GraloraConfig(64, alpha=32, gralora_k=2, modules_to_save=["head"])
    assert config.scaling == 0.5 and 1e-4 < GraloraConfig.RECOMMENDED_RATE < 1e-2
    assert (
        GraloraConfig.recommended(9).gralora_k == 1
        and GraloraConfig.recommended(8, gralora_k=4).gralora_k == 4
    )
    assert "RECOMMENDED_RATE" not in {field.name for field in dataclasses.fields(GraloraConfig)}
    with pytest.raises(TypeError, match="r='8' is a str"):
        GraloraConfig.recommended("8")


def test_peft_s_lora_config_is_answered_with_its_scale():
    import peft

    from gralora.config import as_config

    with pytest.raises(
        TypeError, match=r"GraloraConfig\(r=16, alpha=4, .* gralora_k=1, use_rslora=True"
    ):
        as_config(peft.LoraConfig(r=16, lora_alpha=4, use_rslora=True))


def test_is_frozen_and_hashable():
    config = GraloraConfig(target_modules=["q", "v"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 3
    assert hash(config) == hash(GraloraConfig(target_modules=("q", "v")))
    assert GraloraConfig(target_modules={"v", "q"}).target_modules == ("q", "v")


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"r": 0}, ValueError, r"r=0 .* at least 1"),
        ({"r": -4}, ValueError, "r=-4"),
        ({"r": 2.0}, TypeError, r"r=2.0 is a float: it must be an integer"),
        ({"r": True}, TypeError, "r=True is a bool"),
        ({"r": "8"}, TypeError, "r='8' is a str"),
        ({"r": 2**40}, ValueError, "at most"),
        ({"hybrid_r": -1}, ValueError, "hybrid_r=-1"),
        ({"hybrid_r": 1.5}, TypeError, "hybrid_r=1.5"),
        ({"gralora_k": 0}, ValueError, "gralora_k=0"),
        ({"gralora_k": False}, TypeError, "gralora_k=False"),
        (
            {"r": 6, "gralora_k": 4},
            ValueError,
            r"gralora_k=4 does not divide r=6\. Legal for this r: 1, 2, 3, 6\.",
        ),
        ({"alpha": 0}, ValueError, "alpha=0 .* finite number above 0"),
        ({"alpha": -1.0}, ValueError, "alpha=-1.0"),
        ({"alpha": float("nan")}, ValueError, "alpha=nan"),
        ({"alpha": float("inf")}, ValueError, "alpha=inf"),
        ({"alpha": 10**400}, ValueError, "no finite float"),
        ({"alpha": "64"}, TypeError, "alpha='64'"),
        ({"alpha": True}, TypeError, "alpha=True"),
        ({"gralora_dropout": 1.0}, ValueError, "gralora_dropout=1.0 .* below 1"),
        ({"gralora_dropout": -0.1}, ValueError, "gralora_dropout=-0.1"),
        ({"gralora_dropout": float("nan")}, ValueError, "gralora_dropout=nan"),
        ({"gralora_dropout": None}, TypeError, "gralora_dropout=None"),
        ({"bias": "lora_only"}, ValueError, "bias='lora_only' .* 'none', 'all', 'gralora_only'"),
        ({"fan_in_fan_out": "no"}, TypeError, "fan_in_fan_out='no'"),
        ({"init_weights": 1}, TypeError, "init_weights=1"),
        (
            {"init_weights": "gaussian"},
            ValueError,
            "init_weights='gaussian' .* True, False, 'orthogonal', 'loftq'",
        ),
        ({"init_weights": "gradient"}, ValueError, r"Starts from data are for initialize\(\)"),
        ({"use_rslora": 1}, TypeError, "use_rslora=1"),
        ({"target_modules": 3}, TypeError, "target_modules=3"),
        ({"target_modules": [1]}, TypeError, r"target_modules=\[1\]"),
        ({"exclude_modules": {"a": 1}}, TypeError, "exclude_modules"),
        ({"modules_to_save": "head"}, TypeError, "modules_to_save='head' .* list of names"),
    ],
)
def test_every_illegal_field_is_named_with_its_value_and_rule(fields, error, text):
    with pytest.raises(error, match=text):
        GraloraConfig(**fields)


@pytest.mark.parametrize("alpha", [1, 1e-8, 64.5, 1e30])
def test_every_positive_finite_alpha_is_legal(alpha):
    assert GraloraConfig(alpha=alpha).alpha == alpha
