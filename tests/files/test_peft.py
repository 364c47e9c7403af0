"""PEFT's folders, both ways, against the real PEFT."""

import copy
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gralora
from gralora import AdapterFileError

from ..models import (
    Block,
    assert_same,
    bert,
    fingerprint,
    gpt2,
    llama,
    logits,
    opt,
    random_config,
    relative,
    same_bits,
    t5,
    vit,
)
from ..peft_reference import in_peft, peft_config, quietly

X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)

ARCHITECTURES = {
    "opt": (opt, ["q_proj", "v_proj", "fc1"], ["lm_head", "embed_tokens"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"], ["ln_f"]),
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], ["norm"]),
    "bert": (bert, ["query", "dense"], ["word_embeddings"]),
    "t5": (t5, ["q", "v", "wi"], ["final_layer_norm"]),
    "vit": (vit, ["q_proj", "fc1"], ["classifier"]),
}
CONFIGS = {
    "plain": {},
    "k=4": {"r": 8, "gralora_k": 4, "alpha": 3.5},
    "hybrid": {"hybrid_r": 3, "gralora_dropout": 0.1},
    "biases": {"bias": "all"},
    "own biases": {"bias": "gralora_only", "hybrid_r": 1},
    "saved": {"modules_to_save": True},
    "all": {"hybrid_r": 2, "bias": "all", "modules_to_save": True},
}


def shake_(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)


def adapted(architecture, fields):
    """(base model, the same with an adapter of ours that acts, targets)"""
    make, targets, saved = ARCHITECTURES[architecture]
    config = random_config(
        **{**fields, **({"modules_to_save": saved} if "modules_to_save" in fields else {})}
    )
    base = make()
    model = gralora.inject(copy.deepcopy(base), targets, config).eval()
    shake_(gralora.adapter_parameters(model))
    assert relative(logits(model), logits(base)) > 1e-3
    return base, model, config, targets


@pytest.mark.filterwarnings("ignore:.*looks as if nobody had trained it")
@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestPeft:
    def test_what_is_saved_here_loads_there(self, tmp_path, architecture, fields):
        base, model, _, _ = adapted(architecture, fields)
        gralora.save_adapter(model, tmp_path / "a", format="peft")
        assert (
            relative(logits(in_peft(base, tmp_path / "a").base_model.model), logits(model)) < 1e-6
        )
        again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()
        assert same_bits(logits(again), logits(model))

    def test_what_peft_saved_loads_here(self, tmp_path, architecture, fields):
        base, _, config, targets = adapted(architecture, fields)
        theirs = quietly(
            peft.get_peft_model, copy.deepcopy(base), peft_config(config, targets)
        ).eval()
        shake_(p for p in theirs.parameters() if p.requires_grad)
        quietly(theirs.save_pretrained, tmp_path / "a")
        ours = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()
        expected = logits(theirs.base_model.model)
        assert relative(logits(ours), expected) < 1e-6
        assert relative(logits(base), expected) > 1e-3

    def test_plain_lora_is_the_same_function_there_and_here(self, tmp_path, architecture, fields):
        base, model, config, _ = adapted(architecture, fields)
        gralora.save_adapter(model, tmp_path / "a", format="lora")
        there = in_peft(base, tmp_path / "a")
        assert there.peft_config["default"].r == config.r * config.gralora_k + config.hybrid_r
        assert relative(logits(there.base_model.model), logits(model)) < 1e-5
        here = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a").eval()
        assert relative(logits(here), logits(model)) < 1e-5


class Twins(nn.Module):
    """A layer "q", and another whose name ends in ".q"."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.inner = nn.ModuleDict({"q": nn.Linear(16, 16)})

    def forward(self, x):
        return self.inner["q"](torch.tanh(self.q(x)))


@pytest.mark.parametrize("format", ["peft", "lora"])
def test_a_name_that_ends_another_takes_only_its_own_layer(tmp_path, format):
    base = Twins()
    both = {"q": random_config(alpha=5), "inner.q": random_config()}
    for name, rules in {"one": {"q": random_config()}, "both": both}.items():
        model = gralora.inject(copy.deepcopy(base), rules)
        if name == "one" or format == "lora":
            gralora.save_adapter(model, tmp_path / name, format=format)
            assert relative(in_peft(base, tmp_path / name)(X), model(X)) < 1e-6
            assert (
                relative(gralora.load_adapter(copy.deepcopy(base), tmp_path / name)(X), model(X))
                < 1e-6
            )
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["target_modules"] == "q"  # a regular expression, where a list would match both


def lora_folder(tmp_path, base, **fields):
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q", "v"], "init_lora_weights": "gaussian", **fields}
    )
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    shake_(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "a")
    return model, tmp_path / "a"


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 7, "lora_dropout": 0.1},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"^q": 2}, "alpha_pattern": {"v": 5, "q": 9}},
        {"alpha_pattern": {"q": 2, "^v": 3, "v": 7, r"[qv]": 5}},
        {"alpha_pattern": {r"[qv]": 5, "q": 2, "^v": 3}},
        {"alpha_pattern": {r"(q|v)": 5}, "bias": "lora_only"},
        {"alpha_pattern": {r"[qx]\w*": 5, "v$": 3}, "bias": "all", "modules_to_save": ["head"]},
    ],
)
def test_lora_of_peft_is_gralora_of_k_1(tmp_path, fields):
    base = Block()
    _, folder = lora_folder(tmp_path, base, **fields)
    theirs = in_peft(
        base, folder
    )  # reloaded, since PEFT sorts the patterns on saving and the first match counts
    ours = gralora.load_adapter(copy.deepcopy(base), folder).eval()
    assert relative(ours(X), theirs(X)) < 1e-6
    assert relative(base(X), theirs(X)) > 1e-3
    assert ours.q.gralora_adapters["default"].config.gralora_k == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not known"),
        ({"peft_type": None}, "peft_type=None"),
        ({"r": 4, "lora_alpha": True}, "alpha=True"),
        ({"lora_alpha": -1}, "alpha=-1"),
        ({"use_rslora": True, "lora_alpha": True}, "alpha=True"),
        ({"use_rslora": True, "lora_alpha": 10**400}, "no finite float"),
        ({"use_rslora": True, "lora_alpha": 1.7e308}, "at most 1e.30"),
        ({"lora_dropout": -1}, "gralora_dropout=-1"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": [1]}, "no JSON object"),
        ({"alpha_pattern": {"(a+)+": 1}}, "too complex"),
        ({"alpha_pattern": {"[": 1}}, "illegal expression"),
        ({"alpha_pattern": {".*": 1, "[": 1}}, "illegal expression"),
        ({"peft_type": []}, r"peft_type=\[\] is not known"),
    ],
)
def test_variants_and_nonsense_are_refused_by_name(tmp_path, fields, text):
    base = Block()
    _, folder = lora_folder(tmp_path, base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    before = fingerprint(base)
    if text is None:
        gralora.load_adapter(base, folder)
        return
    with pytest.raises(AdapterFileError, match=text):
        gralora.load_adapter(base, folder)
    assert_same(fingerprint(base), before)


def test_folders_that_are_broken_or_dangerous_are_refused(tmp_path):
    base = Block()
    _, folder = lora_folder(tmp_path, base)
    tensors = load_file(folder / "adapter_model.safetensors")
    config = (folder / "adapter_config.json").read_text()
    before = fingerprint(base)

    def refused(text):
        with pytest.raises(AdapterFileError, match=text):
            gralora.load_adapter(base, folder)
        assert_same(fingerprint(base), before)

    (folder / "adapter_model.bin").write_bytes(b"never opened")
    refused("adapter_model.bin, a pickle")
    (folder / "adapter_model.bin").unlink()
    for text, message in [
        ("{", "no valid JSON"),
        ("[]", "no JSON object"),
        ("[" * 10**5, "no valid JSON"),
        ("\xff", "is no text"),
    ]:
        (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
        refused(message)
    (folder / "adapter_config.json").write_text(config)
    key = "base_model.model.q.lora_A.weight"
    for change, message in [
        ({key: torch.ones(3, 16)}, "no pair of matrices"),
        ({key: torch.ones(4, 8)}, "must have shape"),
        ({"base_model.model.q.lora_magnitude_vector": torch.ones(16)}, "variant of LoRA"),
        ({"base_model.model.z.lora_A.weight": torch.ones(4, 16)}, "without 'z.lora_B.weight'"),
    ]:
        save_file({**tensors, **change}, folder / "adapter_model.safetensors")
        refused(message)
    (folder / "adapter_model.safetensors").unlink()
    refused("lacks adapter_model.safetensors")


def test_what_peft_cannot_name_is_refused(tmp_path):
    layer = gralora.inject(nn.Linear(16, 16), "", random_config())
    with pytest.raises(ValueError, match="the model itself is the adapted layer"):
        gralora.save_adapter(layer, tmp_path / "a", format="peft")
    model = nn.ModuleDict(
        {"a": nn.Linear(4, 4), "head": nn.Linear(4, 4), "forehead": nn.Linear(4, 4)}
    )
    gralora.inject(model, ["a"], random_config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="'forehead' as well"):
        gralora.save_adapter(model, tmp_path / "a", format="peft")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_keeps_its_other_files(tmp_path):
    model = gralora.inject(Block(), ["q"], random_config())
    (tmp_path / "notes").write_text("mine")
    gralora.save_adapter(model, tmp_path, format="peft")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    with pytest.raises(AdapterFileError, match="give the folder"):
        gralora.load_adapter(Block(), tmp_path / "adapter_model.safetensors")


def test_another_base_is_noticed_and_named(tmp_path):
    one = Block()
    model = gralora.inject(copy.deepcopy(one), ["q", "v"], random_config())
    gralora.save_adapter(model, tmp_path / "a")
    gralora.merge(model)
    gralora.save_adapter(model, tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            gralora.load_adapter(copy.deepcopy(one).to(dtype), tmp_path / "a")
        gralora.load_adapter(copy.deepcopy(one), tmp_path / "merged")
    with pytest.raises(AdapterFileError, match="First to_empty, then load"):
        gralora.load_adapter(copy.deepcopy(one).to("meta"), tmp_path / "a")
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.v.weight.mul_(1.1)
    with pytest.warns(UserWarning, match="another base: the weights differ in v, 1 of 2 layers"):
        gralora.load_adapter(other, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"v \(float32 there, float64 here\)"):
        gralora.load_adapter(gralora.unload(other).double(), tmp_path / "a")
    with pytest.raises(AdapterFileError, match="must have shape"):
        gralora.load_adapter(Block(8), tmp_path / "a")


def test_a_base_in_the_other_layout_is_the_same_base(tmp_path):
    conv = gralora.layers.linear.Conv1D(16, 16)
    linear = nn.Linear(16, 16)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    gralora.save_adapter(gralora.inject(conv, "", random_config()), tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gralora.load_adapter(linear, tmp_path / "a")
    assert same_bits(gralora.delta_weight(linear), gralora.delta_weight(conv).t().contiguous())


@pytest.mark.parametrize("fields", [{"gralora_k": 1}, {"r": 8, "gralora_k": 4}, {"hybrid_r": 3}])
@pytest.mark.parametrize("format", ["peft", "lora"])
def test_rslora_s_scale_goes_out_by_an_equal_alpha(tmp_path, format, fields):
    model = gralora.inject(
        bert().double(), ["query", "dense"], random_config(use_rslora=True, alpha=3, **fields)
    )
    base = logits(gralora.unload(copy.deepcopy(model)))
    gralora.save_adapter(model, tmp_path / "out", format=format)
    theirs = in_peft(gralora.unload(copy.deepcopy(model)), tmp_path / "out")
    assert relative(logits(model), base) > 1e-3
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-10, atol=1e-10)
    again = gralora.load_adapter(gralora.unload(copy.deepcopy(model)), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-12, atol=1e-12)


def test_with_k_1_rslora_s_scale_is_that_of_peft_s_lora():
    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj"])
    theirs = quietly(peft.get_peft_model, llama(), config)
    ours = gralora.inject(llama(), ["q_proj"], random_config(gralora_k=1, alpha=3, use_rslora=True))
    scales = {
        m.scaling["default"] for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert (
        scales
        == {config.scaling for config in gralora.adapter_status(ours).configs.values()}
        == {3 / 4**0.5}
    )
