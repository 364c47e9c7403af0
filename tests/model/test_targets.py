"""Every form of `targets`, and what errors say."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers

from ..models import (
    Block,
    Experts,
    assert_same,
    bert,
    fingerprint,
    gpt2,
    llama,
    mlp,
    random_config,
)


def adapted(model):
    return [name for name, _ in gralora_layers(model)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("q|v", ["q", "v"]),
        (r"mlp\.\d", ["mlp.0", "mlp.2"]),
        (r"mlp\.[02]", ["mlp.0", "mlp.2"]),
        (["q", "mlp.2"], ["q", "mlp.2"]),
        (["2", "k"], ["k", "mlp.2"]),
        (("q",), ["q"]),
        ({"v", "q"}, ["q", "v"]),
        ("all-linear", ["q", "k", "v", "mlp.0", "mlp.2", "head"]),
        (
            lambda name, module: isinstance(module, nn.Linear) and module.out_features == 32,
            ["mlp.0"],
        ),
    ],
)
def test_every_form_of_target(targets, expected):
    model = Block()
    assert adapted(gralora.inject(model, targets, GraloraConfig(r=4))) == expected


def test_a_mapping_gives_each_layer_its_own_config_and_the_first_match_wins():
    small, large = GraloraConfig(r=2, gralora_k=1), GraloraConfig(r=8, gralora_k=4)
    model = gralora.inject(
        Block(),
        {"q|k": small, ("k", "v"): large, "all-linear": None},
        GraloraConfig(r=6, gralora_k=2),
    )
    ranks = {
        name: layer.gralora_adapters["default"].config.r for name, layer in gralora_layers(model)
    }
    assert ranks == {"q": 2, "k": 2, "v": 8, "mlp.0": 6, "mlp.2": 6, "head": 6}


def test_none_falls_back_to_the_config_then_to_the_architecture():
    assert adapted(gralora.inject(Block(), None, GraloraConfig(r=4, target_modules=["k"]))) == ["k"]
    assert (
        adapted(gralora.inject(Block(), config=GraloraConfig(r=4, target_modules="all-linear")))[-1]
        == "head"
    )
    assert all(name.endswith(("query", "value")) for name in adapted(gralora.inject(bert())))
    assert all(name.endswith("c_attn") for name in adapted(gralora.inject(gpt2())))
    with pytest.raises(
        ValueError, match=r"no targets given, and this model has no config\.model_type"
    ):
        gralora.inject(Block())
    other = bert()
    other.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="model_type='unheard-of' has no default"):
        gralora.inject(other)


def test_exclusion_by_regex_and_by_list():
    config = GraloraConfig(r=4, exclude_modules=["head", "k"])
    assert adapted(gralora.inject(Block(), "all-linear", config)) == ["q", "v", "mlp.0", "mlp.2"]
    config = GraloraConfig(r=4, exclude_modules=r"mlp\..*")
    assert adapted(gralora.inject(Block(), "all-linear", config)) == ["q", "k", "v", "head"]


def test_all_linear_leaves_out_the_output_head_tied_or_not():
    for make in (gpt2, llama):
        for tie in (True, False):
            names = adapted(
                gralora.inject(make(tie_word_embeddings=tie), "all-linear", GraloraConfig(r=4))
            )
            assert names and "lm_head" not in names

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm, self.score = llama(), nn.Linear(32, 2)

    names = adapted(gralora.inject(Wrapped(), "all-linear", GraloraConfig(r=2)))
    assert "lm.lm_head" not in names and "score" in names

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body, self.out = (
                nn.Embedding(10, 8),
                nn.Linear(8, 8),
                nn.Linear(8, 10, bias=False),
            )
            self.out.weight = self.embedding.weight

    assert adapted(gralora.inject(Tied(), "all-linear", GraloraConfig(r=2))) == ["body"]


def test_the_root_itself_can_be_the_target():
    for targets in ("", "all-linear", ".*", lambda name, module: True):
        assert adapted(gralora.inject(nn.Linear(8, 8), targets, GraloraConfig(r=2))) == [""]


def test_a_module_reached_by_two_paths_is_adapted_once_whichever_is_named():
    for name in ("a", "b"):
        shared = nn.Linear(8, 8)
        model = nn.ModuleDict({"a": shared, "b": shared})
        gralora.inject(model, name, GraloraConfig(r=2))
        assert model["a"] is model["b"] is shared
        assert adapted(model) == ["a"]
        assert isinstance(shared, gralora.GraloraLinear)


def test_one_error_names_every_offender_and_the_legal_values_of_k():
    model = nn.ModuleDict(
        {
            "a": nn.Linear(100, 36),
            "b": nn.Linear(9, 12),
            "c": nn.LayerNorm(4),
            "d": nn.Linear(12, 12),
        }
    )
    with pytest.raises(ValueError, match="'a'") as error:
        gralora.inject(model, ["a", "b", "c", "d"], GraloraConfig(r=12, gralora_k=3))
    lines = str(error.value).split("\n")
    assert (
        lines[0]
        == "gralora_k=3 does not divide in_features=100 of 'a' (r=12). Legal here: 1, 2, 4."
        " suggest_k gives 2."
    )
    assert lines[1].startswith("'c' is a LayerNorm")
    assert len(lines) == 2
    with pytest.raises(
        ValueError, match=r"in_features=9 and out_features=14 of '' \(r=8\)\. Legal here: 1\."
    ):
        gralora.inject(nn.Linear(9, 14), "", GraloraConfig(r=8, gralora_k=4))


class WithWeight(nn.Module):
    """A container with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.position, self.fc = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)


def test_a_regular_expression_and_a_function_are_filters():
    layers = [nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)]
    for targets in (
        ".*",
        r"layers\.1.*",
        lambda name, module: name.startswith("layers.1"),
        {r"layers\.1.*": None},
    ):
        model = nn.ModuleDict({"layers": nn.ModuleList(copy.deepcopy(layers))})
        gralora.inject(model, targets, GraloraConfig(r=2))
        assert adapted(model)[-2:] == ["layers.1.0", "layers.1.2"]
        assert len(adapted(model)) == (4 if targets == ".*" else 2)


def test_what_a_filter_takes_and_holds_weights_that_cannot_be_adapted_is_named_with_the_ways_out():
    model = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "inner": WithWeight(),
            "rnn": nn.LSTM(4, 4),
        }
    )
    with pytest.raises(ValueError) as error:
        gralora.inject(model, ".*", GraloraConfig(r=2))
    first, second, third = str(error.value).splitlines()
    assert first.startswith("'norm' is a LayerNorm, whose weights can't be adapted")
    assert second.startswith("'inner' is a WithWeight") and third.startswith("'rnn' is a LSTM")
    for line in (first, second, third):
        assert "all-linear" in line and "exclude_modules" in line
    gralora.inject(model, ".*", GraloraConfig(r=2, exclude_modules=["norm", "inner", "rnn"]))
    assert adapted(model) == ["fc", "inner.fc"]


def test_a_filter_that_takes_nothing_adaptable_and_a_list_that_names_it_are_errors():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "act": nn.ReLU()})
    with pytest.raises(
        ValueError,
        match=(
            r"targets='layers\|act' match nothing that can be adapted.*Nearest names: 'layers\.0'"
        ),
    ):
        gralora.inject(model, "layers|act", GraloraConfig(r=2))
    with pytest.raises(
        ValueError, match=r"'act' is a ReLU \(torch.nn.modules.activation.ReLU\); adaptable are"
    ):
        gralora.inject(model, ["layers.0", "act"], GraloraConfig(r=2))


def test_no_match_shows_the_nearest_names():
    with pytest.raises(
        ValueError, match=r"targets='encoder\.querry' match no module.*'encoder\.query'"
    ):
        gralora.inject(
            nn.ModuleDict({"encoder": nn.ModuleDict({"query": nn.Linear(4, 4)})}), "encoder.querry"
        )
    with pytest.raises(ValueError, match="'mlp.0'"):
        gralora.inject(Block(), ["mlp.9"])
    with pytest.raises(ValueError, match="this model has none of nn.Linear"):
        gralora.inject(nn.ReLU(), "all-linear")
    with pytest.raises(ValueError) as error:
        gralora.inject(Block(), lambda name, module: False)
    assert str(error.value).endswith("match no module of this model. Nearest names: 'q', 'k', 'v'.")
    with pytest.raises(ValueError) as error:
        gralora.inject(Block(), {"querry_mlp.9": None, r"heads": None})
    text = str(error.value)
    assert text.startswith(
        "targets=['querry_mlp.9', 'heads'] match no module of this model. Nearest names: "
    )
    assert text.endswith("'head'.") and text.count("; ") == 1


@pytest.mark.parametrize(
    ("targets", "error", "text"),
    [
        (GraloraConfig(), TypeError, r"inject\(model, targets, config\)"),
        (3, TypeError, "targets=3 is a int"),
        ([1, 2], TypeError, r"targets=\[1, 2\]"),
        ("(", ValueError, r"targets='\(' is no regular expression"),
        ({}, ValueError, "empty mapping"),
        ({"q": "r=4"}, TypeError, r"targets\['q'\] is a str: it must be a GraloraConfig"),
    ],
)
def test_targets_of_no_known_form(targets, error, text):
    with pytest.raises(error, match=text):
        gralora.inject(Block(), targets)


def test_names_of_other_architectures_in_a_list_are_passed_over_with_one_warning():
    with pytest.warns(UserWarning, match="passed over: query_proj, value_proj") as record:
        gralora.inject(Block(), ["q", "query_proj", "v", "value_proj"], GraloraConfig(r=4))
    assert len(record) == 1


def test_a_contradicting_fan_in_fan_out_gives_one_warning():
    with pytest.warns(UserWarning, match="fan_in_fan_out contradicts the layout of") as record:
        gralora.inject(gpt2(), ["c_attn", "c_proj"], GraloraConfig(r=4, fan_in_fan_out=False))
    assert len(record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gralora.inject(gpt2(), ["c_attn"], GraloraConfig(r=4, fan_in_fan_out=True))
        gralora.inject(Block(), ["q"], GraloraConfig(r=4, fan_in_fan_out=False))


def test_layers_without_a_shape_or_with_complex_weights_are_refused():
    with pytest.raises(ValueError, match="run one forward pass first"):
        gralora.inject(nn.LazyLinear(4), "")
    with pytest.raises(ValueError, match="complex"):
        gralora.inject(nn.Linear(4, 4, dtype=torch.complex64), "")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_disturbs_only_where_it_is_targeted():
    for targets in (["0"], "0|1", "all-linear"):
        model = nn.Sequential(nn.LazyLinear(16), nn.Linear(16, 8))
        with pytest.raises(ValueError, match=r"'0' has no shape yet .*run one forward pass first"):
            gralora.inject(model, targets, GraloraConfig(r=4))
        assert type(model[0]) is nn.LazyLinear and type(model[1]) is nn.Linear
        assert all(p.requires_grad for p in model.parameters())
    gralora.inject(model, ["1"], random_config())
    assert gralora.count_parameters(model)[1] == 16 * 8 + 8 + 4 * (16 + 8)
    assert len(gralora.summary(model)) == 1
    y = model(torch.randn(2, 5))
    assert type(model[0]) is nn.Linear
    assert not any(p.requires_grad for p in model[0].parameters())
    y.sum().backward()
    gralora.unload(model)
    assert all(p.requires_grad for p in model.parameters())


class Conv1D(nn.Module):
    """Another one than that of transformers, which computes the same."""

    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(shape[-1]))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_another_class_called_conv1d_is_not_taken_for_that_of_transformers():
    before = fingerprint(model := nn.ModuleDict({"a": Conv1D(8, 12), "b": nn.Linear(8, 8)}))
    for targets in (["a"], "a|b"):
        with pytest.raises(
            ValueError,
            match=r"'a' is a .*Conv1D, which is not transformers' Conv1D.*"
            r"gralora\.register\(its class, transposed=True\)",
        ):
            gralora.inject(model, targets, GraloraConfig(r=4))
    assert_same(fingerprint(model), before)
    gralora.inject(model, "all-linear", GraloraConfig(r=4))
    assert adapted(model) == ["b"]

    class Conv1d(nn.Conv1d):
        pass

    Conv1d.__name__ = "Conv1D"
    wrapper = nn.ModuleDict({"c": Conv1d(4, 4, 3)})
    gralora.inject(wrapper, ["c"], GraloraConfig(r=4))
    assert isinstance(wrapper["c"], gralora.GraloraConv)


def test_another_conv1d_can_be_registered(monkeypatch):
    monkeypatch.setattr("gralora.layers.kinds._registered", {})
    gralora.register(Conv1D, transposed=True)
    layer, x = Conv1D(8, 12), torch.randn(3, 8)
    y = layer(x)
    gralora.inject(layer, "", random_config())
    torch.testing.assert_close(layer(x), y + x @ gralora.delta_weight(layer))
    with pytest.raises(
        ValueError, match=r"weight of shape \(3, 4, 5\), where a Conv1D has \(nx, nf\)"
    ):
        gralora.inject(Conv1D(3, 4, 5), "")


class Biased(nn.Module):
    """An attention with a 3-D table, which no expert has to do with."""

    def __init__(self):
        super().__init__()
        self.q, self.table = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        return self.q(x) + self.table.sum()


@pytest.mark.parametrize(
    "targets",
    [["attn"], ["attn", "q"], ["attn", "attn.table"], ".*attn.*", ".*", lambda name, m: True],
)
def test_a_module_that_is_named_does_not_name_its_3d_parameters(targets):
    model = nn.ModuleDict({"attn": Biased()})
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'attn' is a Biased.*only where a target names them"):
        gralora.inject(model, targets, GraloraConfig(r=4))
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["experts.up"], ["experts.up"]),
        (["up", "attn.q"], ["attn.q", "experts.up"]),
        (r".*experts\.up", ["experts.up"]),
        (lambda name, module: name.endswith("up"), ["experts.up"]),
        ("all-linear", ["attn.q"]),
    ],
)
def test_fused_experts_are_adapted_where_the_parameter_is_named(targets, names):
    model = nn.ModuleDict({"attn": Biased(), "experts": Experts()})
    gralora.inject(model, targets, GraloraConfig(r=4))
    assert adapted(model) == names


def test_the_error_for_a_module_of_experts_tells_the_names_of_the_parameters():
    with pytest.raises(ValueError, match=r"'experts' is a Experts.*: 'experts\.up'\."):
        gralora.inject(nn.ModuleDict({"experts": Experts()}), ["experts"], GraloraConfig(r=4))


def test_adapters_are_no_targets():
    model = gralora.inject(mlp(8, 8), "all-linear", GraloraConfig(r=2))
    seen = []
    gralora.inject(
        model,
        lambda name, module: bool(seen.append(name)) or name == "0",
        GraloraConfig(r=2),
        adapter_name="b",
    )
    assert not any("gralora_" in name for name in seen)


def test_errors_say_no_more_and_no_less():
    for arguments, error, text in (
        (({},), ValueError, "targets is an empty mapping: nothing would be adapted."),
        (
            (GraloraConfig(),),
            TypeError,
            (
                "targets is a GraloraConfig: call inject(model, targets, config), or inject(model,"
                " config=config)."
            ),
        ),
    ):
        with pytest.raises(error) as raised:
            gralora.inject(Block(), *arguments)
        assert str(raised.value) == text
    model = nn.ModuleList([nn.ConvTranspose1d(4, 4, 1, groups=2), nn.Linear(6, 6), nn.ReLU()])
    with pytest.raises(ValueError) as raised:
        gralora.inject(model, ["0", "1", "2"], GraloraConfig(r=4, gralora_k=4))
    first, second, third = str(raised.value).split("\n")  # one does not hide the next
    assert (
        first
        == "'0' is a transposed convolution of 2 groups; only those of one group can be adapted."
    )
    assert (
        second
        == "gralora_k=4 does not divide in_features=6 and out_features=6 of '1' (r=4). Legal here:"
        " 1, 2. suggest_k gives 2."
    )
    assert third.startswith(
        "'2' is a ReLU (torch.nn.modules.activation.ReLU); adaptable are nn.Linear, "
    )


def test_the_nearest_names():
    from gralora.model.targets import nearest

    layers = [f"layers.{i}.attn.{part}" for i in range(2) for part in ("q_proj", "k_proj", "o")]
    known = [*layers, "lm_head", "fc", ""]
    assert nearest("layers.0.attn.q_prj", known) == ", ".join(
        map(repr, ["layers.0.attn.q_proj", "layers.1.attn.q_proj", "layers.0.attn.k_proj"])
    )
    assert "'layers.0.attn.q_proj'" in nearest("some.other.way.of.naming.it.q_prj", known)
    assert nearest("fcc", known) == "'fc'"
    assert (
        nearest("@@@", known) == "'layers.0.attn.q_proj', 'layers.0.attn.k_proj', 'layers.0.attn.o'"
    )
    assert nearest("q_poj", ["a.b.q_proj", "c.d.zzz"]) == "'a.b.q_proj'"


def test_warnings_point_at_the_caller_and_name_a_few():
    with pytest.warns(UserWarning, match="passed over: absent, gone$") as record:
        gralora.inject(Block(), ["q", "absent", "gone"], GraloraConfig(r=2))
    assert [each.filename for each in record] == [__file__]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="match no module"):
            gralora.inject(
                Block(), ["absent", "gone"], GraloraConfig(r=2)
            )  # an error needs no warning beside it
    assert not record
    with pytest.warns(
        UserWarning, match="the layout of q, k, v and 3 more; the layout is read"
    ) as record:
        gralora.inject(Block(), "all-linear", GraloraConfig(r=2, fan_in_fan_out=True))
    assert [each.filename for each in record] == [__file__]


def test_defaults_by_a_config_that_is_a_mapping():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "v_proj", "fc")})
    model.config = {"model_type": "llama"}
    gralora.inject(model, config=GraloraConfig(r=2))
    assert [name for name, _ in gralora_layers(model)] == ["q_proj", "v_proj"]
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    model.config = {"model_type": "new"}
    with pytest.raises(ValueError) as error:
        gralora.inject(model, config=GraloraConfig(r=2))
    assert "model_type='new' has no default" in str(
        error.value
    ) and " bart, beit, bert, biogpt, blip-2, " in str(error.value)


def test_long_lists_are_shortened_where_that_is_shorter():
    from gralora.model.targets import shorten

    assert shorten("abcde") == "a, b, c, d, e"
    assert shorten("abcdefg") == "a, b, c, d, e and 2 more"
    assert shorten(iter("abc"), 1) == "a and 2 more"


def test_weights_of_no_use_are_told_apart():
    class Bare(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            del self.weight

    model = nn.ModuleList([nn.Linear(4, 4, dtype=torch.complex64), Bare(), nn.LazyLinear(4)])
    with pytest.raises(ValueError) as error:
        gralora.inject(model, ["0", "1", "2"], GraloraConfig(r=2))
    assert str(error.value).split("\n") == [
        "'0' has a complex weight.",
        "'1' has no weight.",
        "'2' has no shape yet (a lazy module); run one forward pass first.",
    ]
