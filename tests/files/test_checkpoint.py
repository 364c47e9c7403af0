"""Adapters from models into files, and back."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gralora
from gralora import AdapterFileError, GraloraConfig

from ..models import (
    MIXED,
    Block,
    assert_same,
    bert,
    fingerprint,
    gpt2,
    logits,
    mlp,
    pair,
    random_config,
    randomize_,
    same_bits,
)
from ..written import GOOD, write

X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)


@pytest.mark.parametrize(
    ("targets", "config"),
    [
        ("all-linear", random_config()),
        (MIXED, None),
        (["q"], random_config(hybrid_r=2, bias="all", modules_to_save=["head", "norm"])),
        (["q"], random_config(bias="gralora_only")),
    ],
)
def test_save_and_load_give_the_same_model(tmp_path, targets, config):
    one, two = pair()
    gralora.inject(one, targets, config)
    with torch.no_grad():
        for p in gralora.adapter_parameters(one):
            p.add_(torch.randn_like(p) * 0.1)
    gralora.save_adapter(one, tmp_path / "a.safetensors")
    base = two(X)
    assert gralora.load_adapter(two, tmp_path / "a.safetensors") is two
    one.eval(), two.eval()
    assert same_bits(one(X), two(X))
    assert not torch.allclose(two(X), base)
    for name, layer in gralora.layers.base.gralora_layers(one):
        theirs = two.get_submodule(name).gralora_adapters["default"].config
        for field in ("r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout"):
            assert getattr(layer.gralora_adapters["default"].config, field) == getattr(
                theirs, field
            )
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_load_adapter_freezes_unless_told_and_activates_only_the_first(tmp_path):
    one, two = pair()
    gralora.inject(one, ["q"], random_config(modules_to_save=["head"], bias="gralora_only"))
    gralora.save_adapter(one, tmp_path / "a")
    gralora.load_adapter(two, tmp_path / "a")
    assert not any(p.requires_grad for p in two.parameters())
    y = two(X)
    gralora.load_adapter(two, tmp_path / "a", "second")
    assert same_bits(two(X), y)
    gralora.set_adapter(two, "second")
    assert same_bits(two(X), y)
    _, three = pair()
    gralora.load_adapter(three, tmp_path / "a", trainable=True)
    trained = {n for n, p in three.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in one.named_parameters() if p.requires_grad}


def test_loading_under_a_name_in_use_replaces_the_values_in_place(tmp_path):
    one, two = pair()
    for model in (one, two):
        gralora.inject(model, ["q", "v"], random_config())
    gralora.save_adapter(one, tmp_path / "a")
    pointers = [p.data_ptr() for p in gralora.adapter_parameters(two)]
    gralora.load_adapter(two, tmp_path / "a")
    assert [p.data_ptr() for p in gralora.adapter_parameters(two)] == pointers
    assert same_bits(two(X), one(X))
    _, other = pair()
    gralora.inject(other, ["q"], random_config())
    before = fingerprint(other)
    with pytest.raises(
        AdapterFileError, match="in this model already, on other layers than the file's: v"
    ):
        gralora.load_adapter(other, tmp_path / "a")
    assert_same(fingerprint(other), before)
    _, other = pair()
    gralora.inject(other, ["q", "v"], random_config(r=2))
    with pytest.raises(
        AdapterFileError, match=r"\(2, 8, 4\) there and \(2, 8, 2\) here, of another k or larger"
    ):
        gralora.load_adapter(other, tmp_path / "a")


def test_drop_in_layers_save_and_load(tmp_path):
    def make():
        torch.manual_seed(2)
        return nn.Sequential(
            gralora.GraloraLinear(16, 8, config=random_config()), nn.ReLU(), nn.Linear(8, 2)
        )

    one, two = make(), make()
    with torch.no_grad():
        one[0].gralora_adapters["default"].A.add_(1)
    gralora.save_adapter(one, tmp_path / "a")
    assert same_bits(gralora.load_adapter(two, tmp_path / "a")(X), one(X))


def test_the_dtype_of_an_adapter_survives_a_reload(tmp_path):
    one, two = pair()
    gralora.inject(one, ["q"], random_config(), dtype=torch.bfloat16)
    gralora.save_adapter(one, tmp_path / "a")
    gralora.load_adapter(two, tmp_path / "a")
    assert two.q.gralora_adapters["default"].A.dtype == torch.bfloat16
    assert same_bits(one(X), two(X))


def test_loading_touches_no_random_state_and_a_tied_copy_stays_tied(tmp_path):
    one, two = gpt2(), gpt2()
    two.load_state_dict(one.state_dict())
    gralora.inject(one, ["c_attn"], random_config(modules_to_save=["lm_head", "wte"]))
    gralora.save_adapter(one, tmp_path / "a")
    state = torch.get_rng_state()
    gralora.load_adapter(two, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(logits(one), logits(two))
    assert (
        two.lm_head.gralora_saved["default"].weight
        is two.transformer.wte.gralora_saved["default"].weight
    )


def test_saving_refuses_unknown_formats_and_adapters(tmp_path):
    one, _ = pair()
    gralora.inject(one, ["q"], random_config())
    with pytest.raises(
        ValueError, match="format='onnx' is not known; there are: 'gralora', 'peft', 'lora'"
    ):
        gralora.save_adapter(one, tmp_path / "a", format="onnx")
    with pytest.raises(KeyError, match="it has: default"):
        gralora.save_adapter(one, tmp_path / "a", "other")
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    one, _ = pair()
    gralora.inject(one, ["q"], random_config())
    gralora.save_adapter(one, tmp_path / "a")
    old = (tmp_path / "a").read_bytes()

    def fail(*args):
        raise OSError("no space left")

    for where in ("os.replace", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(where, fail)
            with pytest.raises(OSError, match="no space"):
                gralora.save_adapter(one, tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == old
        assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"modules": "{"}, "no valid JSON"),
        ({"modules": '{"q": 1, "q": 2}'}, "a key stands twice"),
        ({"modules": '{"q": NaN}'}, "NaN is not JSON"),
        ({"modules": "[" * 100_000}, "no valid JSON"),
        ({"modules": "[]"}, "no JSON object"),
        ({"modules": {"q": []}}, "must hold exactly"),
        ({"modules": {"zzz": GOOD}, "tensors": {}}, "without a 3-D gralora_A"),
        ({"modules": {}}, "does not fit this model"),
        ({"format": "other"}, "no gralora adapter"),
        ({"format_version": "2"}, "format version '2'"),
        ({"biases": '"q.bias"'}, "no JSON list of names"),
        ({"biases": '["q.weight"]'}, "is not a bias of this model"),
        ({"biases": '["q.bias"]'}, "missing: q.bias"),
        ({"biases": '["../x.bias"]'}, "which this model lacks"),
        ({"modules_to_save": '["mlp"]'}, "missing: mlp.0.weight"),
        ({"modules_to_save": '["head"]'}, "missing: head.weight"),
        ({"modules_to_save": '["heda"]'}, "Nearest: 'head'"),
        ({"modules_to_save": '["q"]'}, "adapted or saved"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_the_model_is_untouched(tmp_path, options, text):
    _, two = pair()
    before = fingerprint(two)
    with pytest.raises(ValueError, match=text):
        gralora.load_adapter(two, write(tmp_path / "a", **options))
    assert_same(fingerprint(two), before)


def test_layers_that_the_model_lacks_or_has_otherwise_are_named(tmp_path):
    for name, text in [
        ("qq", "adapts 'qq', which this model lacks. Nearest: 'q'"),
        ("norm", "'norm', which in this model"),
    ]:
        tensors = {
            f"{name}.gralora_A": torch.randn(2, 8, 4),
            f"{name}.gralora_B": torch.randn(2, 4, 8),
        }
        with pytest.raises(AdapterFileError, match=text):
            gralora.load_adapter(Block(), write(tmp_path / "a", {name: GOOD}, tensors))
    with pytest.raises(
        AdapterFileError, match=r"q.gralora_A must have shape \(2, 4, 4\).*has shape \(2, 8, 4\)"
    ):
        gralora.load_adapter(Block(8), write(tmp_path / "a"))


def test_what_is_no_adapter_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("no tensors here")
    (tmp_path / "empty").write_bytes(b"")
    save_file({"x": torch.ones(1)}, tmp_path / "other")
    for name in ("text", "empty", "other"):
        with pytest.raises(AdapterFileError):
            gralora.load_adapter(mlp(4, 4), tmp_path / name)
    with pytest.raises(FileNotFoundError):
        gralora.load_adapter(mlp(4, 4), tmp_path / "absent")
    with pytest.raises(
        AdapterFileError, match="no folder of an adapter: it lacks adapter_config.json"
    ):
        gralora.load_adapter(mlp(4, 4), tmp_path)


def test_loading_the_root_and_a_shared_module(tmp_path):
    layer = gralora.inject(nn.Linear(16, 8), "", GraloraConfig(r=4, init_weights=False))
    assert set(gralora.adapter_state_dict(layer)) == {"gralora_A", "gralora_B"}
    gralora.save_adapter(layer, tmp_path / "a")
    twin = nn.Linear(16, 8)
    twin.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert same_bits(gralora.load_adapter(twin, tmp_path / "a")(X), layer(X))


def test_new_values_for_a_merged_adapter_are_refused(tmp_path):
    one, two = pair()
    for model in (one, two):
        gralora.inject(model, ["q"], random_config())
    gralora.save_adapter(one, tmp_path / "a")
    gralora.merge(two)
    before = fingerprint(two)
    with pytest.raises(ValueError, match="adapter 'default' is merged"):
        gralora.load_adapter_state_dict(two, gralora.adapter_state_dict(one))
    with pytest.raises(AdapterFileError, match="adapter 'default' is merged"):
        gralora.load_adapter(two, tmp_path / "a")
    assert_same(fingerprint(two), before)
    gralora.unmerge(two)
    gralora.load_adapter(two, tmp_path / "a")
    assert same_bits(two(X), one(X))


def test_hot_swap_keeps_every_parameter_in_place_and_compiled_code_valid(tmp_path):
    from torch._dynamo.testing import CompileCounter

    model = gralora.inject(mlp(16, 24, 8), "all-linear", random_config())
    model.add_module("conv", gralora.inject(nn.Conv1d(8, 8, 1), "", random_config()))
    run = lambda m, x: m.conv(m[2](m[1](m[0](x))).mT).mT  # noqa: E731
    files, outputs = [], []
    x = torch.randn(2, 5, 16)
    for index in range(3):
        randomize_(model)
        files.append(tmp_path / f"{index}.safetensors")
        gralora.save_adapter(model, files[-1])
        outputs.append(run(model, x))
    counter = CompileCounter()
    compiled = torch.compile(lambda x: run(model, x), backend=counter, fullgraph=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    compiled(x)
    compiles = counter.frame_count
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    for file, y in zip(files, outputs, strict=True):
        gralora.load_adapter(model, file)
        torch.testing.assert_close(compiled(x), y)
        assert same_bits(run(model, x), y)
    gralora.load_adapter_state_dict(
        model, {k: v + 1 for k, v in gralora.adapter_state_dict(model).items()}
    )
    assert not torch.allclose(compiled(x), y)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert counter.frame_count == compiles == 1


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
@pytest.mark.parametrize(
    ("fields", "there"), [({"r": 8}, "(2, 8, 8)"), ({"gralora_k": 4}, "(4, 4, 4)")]
)
def test_hot_swap_of_another_shape_is_refused_with_both_shapes(tmp_path, fields, there):
    other = gralora.inject(mlp(16, 16), ["0"], random_config(**fields))
    gralora.save_adapter(other, tmp_path / "other.safetensors")
    model = gralora.inject(mlp(16, 16), ["0"], random_config())
    model[0].load_state_dict({"weight": other[0].weight, "bias": other[0].bias})
    before = fingerprint(model)
    with pytest.raises(gralora.AdapterFileError) as raised:
        gralora.load_adapter(model, tmp_path / "other.safetensors")
    assert "(2, 8, 4)" in str(raised.value) and there in str(raised.value)
    assert_same(fingerprint(model), before)


def test_reloaded_under_another_name_beside_the_first_and_in_its_own_dtype(tmp_path):
    model = gralora.inject(
        mlp(16, 8), ["0"], random_config(), adapter_name="half", dtype=torch.bfloat16
    )
    gralora.inject(model, ["0"], random_config(r=8), adapter_name="full")
    x = torch.randn(2, 16)
    for name, dtype in (("half", torch.bfloat16), ("full", torch.float32)):
        gralora.set_adapter(model, name)
        with torch.autocast("cpu", torch.bfloat16):
            model(x).sum().backward()
        y = model(x)
        gralora.save_adapter(model, tmp_path / name, name)
        gralora.load_adapter(model, tmp_path / name, f"{name}_again")
        gralora.set_adapter(model, f"{name}_again")
        assert same_bits(model(x), y)
        for each in (name, f"{name}_again"):
            assert model[0].gralora_adapters[each].A.dtype == dtype
            assert {p.dtype for p in gralora.adapter_parameters(model, each)} == {dtype}


def test_a_path_that_is_neither_file_nor_folder(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(gralora.AdapterFileError, match="no adapter of a known format"):
        gralora.load_adapter(mlp(16, 8), tmp_path / "pipe")


def test_a_k_that_cuts_the_kernel_and_not_the_channels_is_refused(tmp_path):
    model = gralora.inject(nn.Conv1d(6, 6, 2), "", random_config(r=6, gralora_k=3))
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    other = nn.Conv1d(4, 6, 3)  # of as many inputs as a matrix
    with pytest.raises(
        gralora.AdapterFileError, match=r"gralora_k=3 divides not both sizes of '', \(4, 6\)"
    ):
        gralora.load_adapter(other, tmp_path / "a.safetensors")


def test_a_swap_takes_over_alpha_and_dropout(tmp_path):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    other = gralora.inject(
        copy.deepcopy(gralora.unload(copy.deepcopy(model))),
        ["0"],
        random_config(alpha=3, gralora_dropout=0.1),
    )
    gralora.save_adapter(other, tmp_path / "a.safetensors")
    gralora.load_adapter(model, tmp_path / "a.safetensors")
    config = model[0].gralora_adapters["default"].config
    assert (config.alpha, config.gralora_dropout) == (3, 0.1)
    x = torch.randn(2, 16)
    assert same_bits(model.eval()(x), other.eval()(x))


def test_what_of_the_file_does_not_fit_is_told_in_full(tmp_path):
    model = gralora.inject(nn.ModuleDict({"fc": nn.Linear(16, 8)}), ["fc"], random_config())
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    for other, text in (
        ({"fc": nn.ReLU()}, "the file adapts 'fc', which in this model is a ReLU."),
        (
            {"fcc": nn.Linear(16, 8)},
            "the file adapts 'fc', which this model lacks. Nearest: 'fcc'.",
        ),
    ):
        with pytest.raises(gralora.AdapterFileError) as error:
            gralora.load_adapter(nn.ModuleDict(other), tmp_path / "a.safetensors")
        assert str(error.value) == text


@pytest.mark.filterwarnings("ignore:.*trained on another base")
def test_a_swap_is_trained_or_not_as_it_says(tmp_path):
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    for trainable in (False, True):
        gralora.load_adapter(model, tmp_path / "a.safetensors", trainable=trainable)
        assert {p.requires_grad for p in gralora.adapter_parameters(model)} == {trainable}
    other = gralora.inject(mlp(16, 8, 8), ["2"], random_config())
    with pytest.raises(gralora.AdapterFileError) as error:
        gralora.load_adapter(other, tmp_path / "a.safetensors")
    assert str(error.value).endswith("Delete it first, or load under another name.")


def test_the_warning_of_another_base_points_at_the_caller(tmp_path):
    gralora.save_adapter(
        gralora.inject(mlp(16, 8), ["0"], random_config()), tmp_path / "a.safetensors"
    )
    with pytest.warns(UserWarning, match="was trained on another base") as record:
        gralora.load_adapter(mlp(16, 8), tmp_path / "a.safetensors")
    assert [each.filename for each in record] == [__file__]


def test_a_folder_says_which_model_it_is_for(tmp_path):

    model = bert()
    model.config._name_or_path = "somebody/some-bert"
    gralora.save_adapter(
        gralora.inject(model, ["query"], random_config()), tmp_path / "a", format="peft"
    )
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "somebody/some-bert"
    )


def test_errors_and_ranks_of_what_is_written(tmp_path):
    model = gralora.inject(mlp(16, 24, 8), "all-linear", random_config(r=8, gralora_k=4))
    errors, again = {}, {}
    gralora.save_adapter(model, tmp_path / "a", format="lora", rank=4, errors=errors)
    pairs = gralora.to_lora(model, rank=4, errors=again)
    assert (
        errors == again
        and set(errors) == {"0", "2"}
        and all(0.01 < error < 1 for error in errors.values())
    )
    assert {tuple(pairs[f"{name}.lora_A.weight"].shape) for name in errors} == {(4, 16), (4, 24)}
    for name, error in errors.items():
        delta = gralora.delta_weight(model[int(name)]).detach()
        off = pairs[f"{name}.lora_B.weight"] @ pairs[f"{name}.lora_A.weight"] - delta
        assert float(off.norm() / delta.norm()) == pytest.approx(error, rel=1e-3)
    gralora.save_adapter(model, tmp_path / "b", errors=errors)
    assert errors == {"0": 0.0, "2": 0.0}
    with pytest.raises(ValueError) as error:
        gralora.save_adapter(model, tmp_path / "c", rank=4)
    assert (
        str(error.value)
        == 'rank=4 is for plain LoRA, such as format="lora"; the rank of GraLoRA is its r.'
    )
