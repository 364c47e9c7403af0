"""What a person meets in the first hour, and what tools do to a model that holds adapters."""

import abc
import copy
import pickle
import typing

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import gralora
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers

from .models import Block, Experts, gpt2, llama, mlp, random_config, relative, same_bits
from .needs import needs

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
T = typing.TypeVar("T")


class Abstract(abc.ABC, nn.Linear):
    pass


class Generic(typing.Generic[T], nn.Linear):
    pass


class Fine(nn.Linear, abc.ABC):
    pass


# class layouts


@pytest.mark.parametrize("cls", [Abstract, Generic, Fine])
def test_a_class_whose_first_base_is_no_module_is_adapted(cls, tmp_path):
    base = nn.Sequential(cls(16, 16), nn.ReLU())
    model = gralora.inject(copy.deepcopy(base), ["0"], random_config())
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain[0].weight.add_(gralora.delta_weight(model[0]))
    y = model(X)
    assert relative(y, plain(X)) < 1e-5 and relative(y, base(X)) > 1e-2
    assert isinstance(model[0], cls) and isinstance(model[0], gralora.GraloraLinear)
    gralora.check_effect(model, X)
    for other in (
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        gralora.shared_copy(model),
    ):
        assert same_bits(other(X), y) and type(other[0]) is type(model[0])
    gralora.save_adapter(model, tmp_path / "a")
    assert same_bits(gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")(X), y)
    assert relative(torch.compile(model, backend="eager")(X), y) < 1e-5
    gralora.unload(model)
    assert type(model[0]) is cls and same_bits(model(X), base(X))


@pytest.mark.filterwarnings("ignore")  # theirs
def test_quantos_layers_are_adapted(tmp_path):
    quanto = needs("optimum.quanto")

    def base():
        torch.manual_seed(0)
        model = mlp(64, 64)
        quanto.quantize(
            model, weights=quanto.qint8
        )  # qint4 builds an extension first, with a compiler
        quanto.freeze(model)
        return model

    x = torch.randn(4, 64)
    model, y = gralora.inject(base(), ["0"], random_config()), base()(x)
    wanted = y + x @ gralora.delta_weight(model[0]).T
    assert relative(model(x), wanted) < 1e-5 and relative(model(x), y) > 1e-2
    gralora.check_effect(model, x)
    with gralora.disable_adapter(model):
        assert same_bits(model(x), y)
    gralora.save_adapter(model, tmp_path / "a")
    assert same_bits(gralora.load_adapter(base(), tmp_path / "a")(x), model(x))
    with pytest.raises(TypeError, match="the weight of '0' is a WeightQ"):
        gralora.merge(model)
    merged = gralora.merge_and_unload(model, dequantize=torch.float32)
    assert type(merged[0]) is nn.Linear and relative(merged(x), wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:Failed to load|.*is deprecated")
def test_layers_that_quanto_or_resizing_rebuilt_are_missed(tmp_path):
    quanto = needs("optimum.quanto")
    model = gralora.inject(llama(), ["lm_head", "q_proj"], random_config())
    model.resize_token_embeddings(70)
    quanto.quantize(model, weights=quanto.qint8, include="*q_proj")
    with pytest.raises(
        ValueError, match=r"are there no more: (?=.*lm_head)(?=.*layers.0.self_attn.q_proj)"
    ):
        gralora.save_adapter(model, tmp_path / "a")


# tools


def test_torch_fx_traces_adapted_layers_as_one_node_and_extracts_features():
    model = gralora.inject(Block(), {"q|k|v": random_config(), r"mlp\.0": random_config()}).eval()
    for each in (
        model,
        gralora.inject(nn.Sequential(nn.Conv1d(4, 4, 1), nn.ConvTranspose1d(4, 4, 1)), ["0", "1"]),
    ):
        x = torch.randn(2, 5, 16) if each is model else torch.randn(2, 4, 6)
        graph = torch.fx.symbolic_trace(each)
        assert same_bits(graph(x), each(x))
        called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        assert set(called) >= {name for name, _ in gralora_layers(each)}
        with torch.no_grad():
            for parameter in gralora.adapter_parameters(each):
                parameter.normal_()
        assert same_bits(graph(x), each(x))  # the layers themselves, not what they held


def test_a_traced_embedding_and_a_saved_head():
    model = gralora.inject(
        nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 4)),
        ["0"],
        random_config(modules_to_save=["1"]),
    )
    tokens = torch.tensor([[1, 2]])
    assert same_bits(torch.fx.symbolic_trace(model)(tokens), model(tokens))


def test_experts_are_one_node():
    model = gralora.inject(nn.Sequential(Experts(dtype=torch.float32)), ["0.up"], random_config())
    x = torch.randn(5, 8)
    graph = torch.fx.symbolic_trace(model)
    assert same_bits(graph(x), model(x)) and [
        n.target for n in graph.graph.nodes if n.op == "call_module"
    ] == ["0"]


def test_the_flop_counter_sees_the_adapter():
    model = gralora.inject(
        nn.Sequential(nn.Linear(64, 64, bias=False)), ["0"], GraloraConfig(r=8, gralora_k=2)
    )
    with FlopCounterMode(display=False) as counter:
        y = model(torch.randn(4, 64))
    assert counter.get_total_flops() == 2 * 4 * 64 * 64 + 2 * 4 * 8 * 128
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() >= 2 * 4 * 8 * 128 * 1.5


# names


NAMES = [
    "merged",
    "active",
    "acting",
    "latest",
    "scopes",
    "training",
    "base bias",
    "base bias ",
    "in_place",
    "forward",
    "names",
]


@pytest.mark.parametrize(
    "name", [*NAMES, "_modules", "A", "parameter", "blocks", "layouts", "fresh", "given", "weight"]
)
def test_any_name_without_a_dot_is_an_adapters(name, tmp_path):
    torch.manual_seed(0)
    base = mlp(16, 16, 4)
    config = random_config(bias="gralora_only", modules_to_save=["2"])
    model = gralora.inject(copy.deepcopy(base), ["0"], config, adapter_name=name)
    gralora.inject(model, ["0"], random_config(bias="gralora_only"), adapter_name="base bias  ")
    gralora.set_adapter(model, name)
    with torch.no_grad():
        for parameter in gralora.adapter_parameters(model, name):
            parameter.add_(1.0)
    y = model(X)
    with gralora.disable_adapter(model):
        assert same_bits(model(X), base(X))
    gralora.save_adapter(model, tmp_path / "a", name)
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a", name)
    assert same_bits(again(X), y) and relative(y, base(X)) > 0.1
    for other in (copy.deepcopy(model), gralora.shared_copy(model)):
        assert same_bits(other(X), y)
    other = gralora.inject(copy.deepcopy(base), ["0"], config, adapter_name=name)
    gralora.inject(other, ["0"], random_config(bias="gralora_only"), adapter_name="base bias  ")
    other.load_state_dict(model.state_dict())
    gralora.set_adapter(other, name)
    assert same_bits(other(X), y)
    gralora.merge(model, name)
    gralora.unmerge(model)
    gralora.delete_adapter(model, "base bias  ")
    assert same_bits(gralora.unload(model)(X), base(X))


# saved modules


def test_a_parameter_of_a_saved_module_may_be_taken_out_and_put_back():
    model = gralora.inject(mlp(16, 16, 4), ["0"], random_config(modules_to_save=["2"]))
    y, head = model(X), model[2]
    weight = head._parameters["weight"]
    del head.weight
    head.weight = weight
    head.register_buffer("seen", torch.zeros(1))
    del head.seen
    head.seen = torch.ones(1)
    assert head._parameters["weight"] is weight and same_bits(model(X), y)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.gru = nn.Linear(16, 16), nn.GRU(16, 16, batch_first=True)

    def forward(self, x):
        return self.gru(self.inner(x))[0]


def test_a_saved_module_with_a_tuple_for_output_says_so_in_mixed_batch():
    model = gralora.inject(
        Recurrent(), ["inner"], random_config(modules_to_save=["gru"]), adapter_name="a"
    )
    with (
        gralora.mixed_batch(model, ["a", None]),
        pytest.raises(TypeError, match="a GRU in modules_to_save returns, a tuple"),
    ):
        model(torch.randn(2, 3, 16))


def test_conv1d_has_the_sizes_that_linear_has():
    assert (gralora.GraloraConv1D(8, 4).in_features, gralora.GraloraConv1D(8, 4).out_features) == (
        4,
        8,
    )


def test_of_blocks_within_blocks_the_innermost_counts():
    model = gralora.inject(mlp(16, 8), ["0"], random_config(), adapter_name="a")
    gralora.inject(model, ["0"], random_config(gralora_k=4), adapter_name="b")
    each = {}
    for name in "ab":
        gralora.set_adapter(model, name)
        each[name] = model(X)
    with gralora.disable_adapter(model):
        base = model(X)
        with gralora.mixed_batch(model, ["a", None, "b"]):
            assert relative(model(X), torch.stack([each["a"][0], base[1], each["b"][2]])) < 1e-6
        gralora.set_adapter(model, "a")
        assert same_bits(model(X), base) and gralora.active_adapters(model) == {}
    assert same_bits(model(X), each["a"]) and gralora.active_adapters(model) == {"a": 1.0}
    with gralora.mixed_batch(model, ["b"] * 3):
        with gralora.disable_adapter(model):
            assert same_bits(model(X), base)
        gralora.set_adapter(model, {"a": 0.5})
        assert relative(model(X), each["b"]) < 1e-6
    assert gralora.active_adapters(model) == {"a": 0.5}


# what a user of PEFT asks


def test_the_state_of_an_adapter():
    model = gralora.inject(
        mlp(16, 16, 8), ["0"], random_config(modules_to_save=["2"]), adapter_name="a"
    )
    gralora.inject(model, ["0"], random_config(r=8), adapter_name="b")
    status = gralora.adapter_status(model, "a")
    assert (status.active, status.merged, status.trained, status.missing) == (1.0, None, True, [])
    assert status.configs["0"].r == 4 and gralora.adapter_status(model, "b").active is None
    gralora.set_adapter(model, {"b": 0.5}, trainable=False)
    assert (
        gralora.active_adapters(model) == {"b": 0.5}
        and not gralora.adapter_status(model, "b").trained
    )
    gralora.merge(model)
    assert gralora.adapter_status(model, "b").merged == 0.5
    with pytest.raises(KeyError, match="no adapter 'c'"):
        gralora.adapter_status(model, "c")


def test_merge_and_unload_takes_names():
    base = mlp(16, 8)
    model = gralora.inject(copy.deepcopy(base), ["0"], random_config(), adapter_name="a")
    gralora.inject(model, ["0"], random_config(gralora_k=4), adapter_name="b")
    gralora.set_adapter(model, {"b": 2.0})
    wanted = model(X)
    gralora.set_adapter(model, "a")
    assert (
        relative(
            gralora.merge_and_unload(copy.deepcopy(model), adapter_names={"b": 2.0})(X), wanted
        )
        < 1e-5
    )
    assert relative(model(X), wanted) > 1e-2


@pytest.mark.filterwarnings("ignore")  # transformers', about a name that PEFT reads
@pytest.mark.parametrize("layers", [1, [0, 2], [1]])
@pytest.mark.parametrize("pattern", [None, "layers", ["h", "layers"]])
def test_layers_to_transform_is_pefts(layers, pattern):
    model = _deep()
    config = peft.LoraConfig(
        target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    wanted = [
        n.removeprefix("base_model.model.")
        for n, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    ]
    ours = gralora.inject(
        model, ["q_proj"], GraloraConfig(r=4, layers_to_transform=layers, layers_pattern=pattern)
    )
    assert [n for n, _ in gralora_layers(ours)] == wanted and wanted


def _deep():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))


# people who come from elsewhere


def test_pefts_own_config_and_a_dict_are_taken():
    config = peft.GraloraConfig(
        r=8, gralora_k=4, alpha=3, target_modules=["q"], bias="gralora_only"
    )
    model = gralora.inject(Block(), config=config)
    own = model.q.gralora_adapters["default"].config
    assert (own.r, own.gralora_k, own.alpha, own.bias) == (8, 4, 3, "gralora_only")
    model = gralora.inject(Block(), {"q": {"r": 2}, "k": peft.GraloraConfig(r=6)}, {"r": 4})
    assert [layer.gralora_adapters["default"].config.r for _, layer in gralora_layers(model)] == [
        2,
        6,
    ]
    for config, why in (
        (
            peft.LoraConfig(r=4, lora_alpha=6),
            r"config is PEFT's LoraConfig. LoRA is GraLoRA with k = 1: GraloraConfig\(r=4, alpha=6",
        ),
        ({"rank": 3}, "config holds 'rank'; fields are: alpha"),
        (3, "config is a int: it must be a GraloraConfig"),
    ):
        with pytest.raises(TypeError, match=why):
            gralora.inject(Block(), ["q"], config)
    with pytest.raises(TypeError, match="targets is a GraloraConfig"):
        gralora.inject(Block(), peft.GraloraConfig(r=4))


def test_all_linear_leaves_out_what_k_does_not_divide_and_says_so():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(3, 1))
    with pytest.warns(
        UserWarning,
        match=r'"all-linear" leaves out 1, 2: k=2 divides not both of their sizes. A head',
    ):
        gralora.inject(model, "all-linear", GraloraConfig(r=4))
    assert [n for n, _ in gralora_layers(model)] == ["0"] and "left out by all-linear: 1, 2" in str(
        gralora.summary(model)
    )
    with pytest.raises(ValueError, match="does not divide out_features=3 of '1'"):
        gralora.inject(
            nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3)), ["0", "1"], GraloraConfig(r=4)
        )
    with pytest.raises(ValueError, match="does not divide out_features=3 of '0'"):
        gralora.inject(nn.Sequential(nn.Linear(16, 3)), "all-linear", GraloraConfig(r=4))
    quiet = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    gralora.inject(
        quiet, "all-linear", GraloraConfig(r=4, modules_to_save=["1"])
    )  # no warning: it is saved


def test_a_plain_name_as_a_string_is_told_what_it_should_have_been():
    with pytest.raises(ValueError) as error:
        gralora.inject(llama(), "q_proj", GraloraConfig(r=4))
    assert "['q_proj'] takes 2 layers, and so does r'.*\\.q_proj'" in str(error.value)


def test_saving_makes_the_folders_that_lack(tmp_path):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    gralora.save_adapter(model, tmp_path / "a" / "b" / "adapter.safetensors")
    gralora.save_adapter(model, tmp_path / "c" / "d", format="lora")
    assert (tmp_path / "a" / "b" / "adapter.safetensors").exists() and (
        tmp_path / "c" / "d"
    ).is_dir()


def test_pefts_layers_and_ours():
    theirs = peft.get_peft_model(mlp(16, 8), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="holds PEFT's own layers .'base_model.model.0'.*unload"):
        gralora.inject(theirs, ["0"], GraloraConfig(r=4))
    ours = gralora.inject(mlp(16, 8), ["0"], random_config())
    y = ours(X)
    over = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["0"]))
    assert same_bits(over(X), y)  # ours acts on, as part of their base, and is frozen by them
    assert [n for n, p in over.named_parameters() if p.requires_grad] == [
        f"base_model.model.0.lora_{letter}.default.weight" for letter in "AB"
    ]


class OwnLinear(nn.Module):
    """As torch_geometric's: no nn.Linear, other names for its sizes."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def test_a_linear_layer_of_somebody_elses_is_registered(tmp_path):
    model = nn.Sequential(OwnLinear(16, 8))
    base = copy.deepcopy(model)
    with pytest.raises(
        ValueError,
        match=r"is a OwnLinear \(tests.test_first_steps.OwnLinear\).*gralora.register\(its class\)",
    ):
        gralora.inject(model, ["0"], random_config())
    gralora.register(OwnLinear)
    gralora.inject(model, ["0"], random_config())
    plain = copy.deepcopy(base)
    with torch.no_grad():
        plain[0].weight.add_(gralora.delta_weight(model[0]))
    assert relative(model(X), plain(X)) < 1e-5 and relative(model(X), base(X)) > 1e-2
    gralora.save_adapter(model, tmp_path / "a")
    assert same_bits(gralora.load_adapter(copy.deepcopy(base), tmp_path / "a")(X), model(X))
    assert same_bits(pickle.loads(pickle.dumps(model))(X), model(X)) and "active=default" in repr(
        model
    )
    assert (
        relative(gralora.merge_and_unload(model)(X), plain(X)) < 1e-5
        and type(model[0]) is OwnLinear
    )
    with pytest.raises(TypeError, match="register takes a class of modules"):
        gralora.register(3)


# layers that a framework rebuilds


def test_everything_that_uses_adapters_warns_about_replaced_layers():
    model = gralora.inject(mlp(16, 16, 8), ["0", "2"], random_config())
    model[0] = nn.Linear(16, 16)
    for call in (lambda: gralora.set_adapter(model, "default"), lambda: gralora.merge(model)):
        with pytest.warns(UserWarning, match="0: adapted by inject and no longer in the model"):
            call()
    gralora.unmerge(model)
    assert "adapted by inject and no longer in the model: 0" in str(gralora.summary(model))
    assert gralora.adapter_status(model).missing == ["0"]
    with pytest.raises(ValueError, match="0: adapted by inject and no longer in the model"):
        gralora.check_effect(model, X)
    with pytest.warns(UserWarning, match="0: adapted by inject"):
        gralora.merge_and_unload(model)


# a head that was tied


def test_a_merged_head_that_was_tied_is_told_of(tmp_path):
    model = gralora.inject(gpt2(tie_word_embeddings=True), ["lm_head"], random_config())
    with pytest.warns(
        UserWarning, match="config.tie_word_embeddings still says that they are tied"
    ):
        gralora.merge_and_unload(model)
    model = gralora.inject(gpt2(tie_word_embeddings=True), ["c_attn"], random_config())
    gralora.merge_and_unload(model)  # no warning


# names under DDP by itself


def test_names_under_ddp_are_the_plain_models(tmp_path):
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
    try:
        base = mlp(16, 8)
        model = gralora.inject(copy.deepcopy(base), ["0"], random_config())
        wrapped = nn.parallel.DistributedDataParallel(model)
        gralora.save_adapter(wrapped, tmp_path / "a")
        assert [name for name, _ in gralora_layers(wrapped)] == ["0"]
        assert same_bits(gralora.load_adapter(base, tmp_path / "a")(X), model(X))
        assert list(gralora.adapter_state_dict(wrapped)) == ["0.gralora_A", "0.gralora_B"]
    finally:
        dist.destroy_process_group()
