"""`modules_to_save` and `bias`: what is trained with an adapter and is no adapter."""

import copy
import pickle

import pytest
import torch
from torch import nn

import gralora
from gralora import GraloraConfig

from ..models import Block, assert_same, fingerprint, gpt2, random_config, same_bits, ten_losses

X = torch.linspace(-1, 1, 160).reshape(2, 5, 16)


def train_a_step(model, lr=0.1):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(X).pow(2).sum().backward()
    optimizer.step()
    model.zero_grad()


def test_a_saved_module_is_trained_in_a_copy_of_its_own():
    model = Block()
    y, head = model(X), copy.deepcopy(model.head)
    gralora.inject(model, ["q"], GraloraConfig(r=4, modules_to_save=["head"]))
    assert isinstance(model.head, nn.Linear)
    assert same_bits(model(X), y)
    train_a_step(model)
    assert not torch.equal(model(X), y)
    assert not torch.equal(model.head.weight, head.weight)  # whoever reads it gets what acts
    state = gralora.adapter_state_dict(model)
    assert set(state) == {"q.gralora_A", "q.gralora_B", "head.weight", "head.bias"}
    assert not torch.equal(state["head.weight"], head.weight)
    with gralora.disable_adapter(model):
        assert same_bits(model(X), y)
        assert same_bits(model.head.weight, head.weight)
    assert same_bits(gralora.unload(model)(X), y)


def test_each_adapter_has_a_copy_and_set_adapter_switches():
    model = Block()
    gralora.inject(model, ["q"], random_config(modules_to_save=["head"]), adapter_name="a")
    train_a_step(model)
    of_a = model(X)
    gralora.inject(model, ["q"], random_config(modules_to_save=["head"]), adapter_name="b")
    assert same_bits(model(X), of_a)
    with gralora.disable_adapter(model):  # from the base, not from a
        assert same_bits(gralora.adapter_state_dict(model, "b")["head.weight"], model.head.weight)
    gralora.set_adapter(model, "b")
    train_a_step(model)
    of_b = model(X)
    assert not torch.equal(of_a, of_b)
    gralora.set_adapter(model, "a")
    assert same_bits(model(X), of_a)
    gralora.delete_adapter(model, "a")
    gralora.set_adapter(model, "b")
    assert same_bits(model(X), of_b)


@pytest.mark.parametrize("options", [{"modules_to_save": ["head"]}, {"bias": "all"}])
def test_two_adapters_that_train_the_same_thing_cannot_both_be_active(options):
    model = gralora.inject(Block(), ["q"], random_config(**options), adapter_name="a")
    gralora.inject(model, ["q"], random_config(**options), adapter_name="b")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="adapters 'a' and 'b' both train a copy of"):
        gralora.set_adapter(model, ["a", "b"])
    assert_same(fingerprint(model), before)


class Heads(nn.Module):
    """Saved modules used in every way but a call: iterated, indexed, through a Sequential, with
    buffers.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 4) for _ in range(2))
        self.tail = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.body(x)
        x = self.tail(torch.cat([head(x) for head in self.heads], -1).flatten(0, -2))[None]
        return self.attention(x, x, x, need_weights=False)[0]


def test_saved_containers_act_however_they_are_used():
    for name in ("heads", "tail", "attention"):
        model = Heads()
        model.eval()
        before, y = fingerprint(model), model(X)
        gralora.inject(model, ["body"], GraloraConfig(r=4, modules_to_save=[name]))
        assert same_bits(model(X), y)
        train_a_step(model)
        gralora.set_adapter(model, "default")
        for parameter in model.body.gralora_adapters.parameters():
            parameter.data.zero_()
        assert not torch.allclose(model(X), y), name
        assert same_bits(gralora.unload(model)(X), y)
        assert_same(fingerprint(model), before)


def test_buffers_of_a_saved_module_are_saved_with_it():
    model = gralora.inject(Heads(), ["body"], GraloraConfig(r=4, modules_to_save=["tail"]))
    model(X)
    state = gralora.adapter_state_dict(model)
    assert state["tail.2.num_batches_tracked"] == 1
    with gralora.disable_adapter(model):
        assert model.tail[2].num_batches_tracked == 0


def test_an_encoder_layer_that_is_saved_acts_in_eval():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2
    ).eval()
    model = nn.Sequential(nn.Linear(16, 16), encoder).eval()
    gralora.inject(model, ["0"], GraloraConfig(r=4, modules_to_save=["1.layers.0"]))
    state = gralora.adapter_state_dict(model)
    with torch.no_grad():
        for key in ("linear1.weight", "linear2.weight", "norm2.weight", "self_attn.in_proj_weight"):
            y = model(X)
            state[f"1.layers.0.{key}"].add_(torch.randn_like(state[f"1.layers.0.{key}"]))
            assert not torch.allclose(model(X), y), key


def test_hooks_of_a_saved_module_fire_once():
    model, hits = Block(), []
    model.head.register_forward_hook(lambda *_: hits.append(1))
    gralora.inject(model, ["q"], GraloraConfig(r=4, modules_to_save=["head"]))
    model(X)
    assert hits == [1]


def test_saved_modules_survive_deepcopy_and_pickle():
    model = gralora.inject(Block(), ["q"], random_config(modules_to_save=["head"], bias="all"))
    train_a_step(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(twin(X), model(X))
        assert type(gralora.unload(twin).head) is nn.Linear


def test_a_tie_is_kept_or_the_error_says_why_not():
    model = gpt2()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="tied to"):
        gralora.inject(model, ["c_attn"], GraloraConfig(r=4, modules_to_save=["lm_head"]))
    assert_same(fingerprint(model), before)
    gralora.inject(model, ["c_attn"], GraloraConfig(r=4, modules_to_save=["lm_head", "wte"]))
    copies = [
        model.lm_head.gralora_saved["default"],
        model.transformer.wte.gralora_saved["default"],
    ]
    assert copies[0].weight is copies[1].weight
    assert copies[0].weight is model.lm_head.weight is not model.lm_head._parameters["weight"]


def test_a_layer_is_adapted_or_saved_not_both():
    model = gralora.inject(Block(), "all-linear", random_config(modules_to_save=["head"]))
    assert not isinstance(model.head, gralora.GraloraLayer)
    with pytest.raises(ValueError, match="modules_to_save names 'q', which is adapted"):
        gralora.inject(model, ["v"], random_config(modules_to_save=["q"]), adapter_name="b")
    with pytest.raises(ValueError, match="'head' is in another adapter's modules_to_save"):
        gralora.inject(model, ["head"], random_config(), adapter_name="b")


def test_a_saved_module_that_is_not_there_is_an_error():
    with pytest.raises(
        ValueError, match=r"modules_to_save names 'heda', which this model lacks. Nearest: 'head'"
    ):
        gralora.inject(Block(), ["q"], GraloraConfig(r=4, modules_to_save=["heda"]))


@pytest.mark.parametrize(
    ("bias", "names"),
    [
        ("none", set()),
        ("gralora_only", {"q.bias", "v.bias"}),
        (
            "all",
            {"q.bias", "k.bias", "v.bias", "mlp.0.bias", "mlp.2.bias", "norm.bias", "head.bias"},
        ),
    ],
)
def test_biases_that_are_trained(bias, names):
    model = Block()
    y = model(X)
    values = {name: p.clone() for name, p in model.named_parameters()}
    gralora.inject(model, ["q", "v"], GraloraConfig(r=4, bias=bias))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert len(trained) == len(names) and all("gralora_" in name for name in trained)
    assert {n for n in gralora.adapter_state_dict(model) if "gralora_" not in n} == names
    train_a_step(model)
    for name in names - {"k.bias"}:  # softmax does not see the bias of the keys
        assert not torch.equal(gralora.adapter_state_dict(model)[name], values[name]), name
    with gralora.disable_adapter(model):
        assert same_bits(model(X), y)
    gralora.unload(model)
    assert all(same_bits(p, values[n]) for n, p in model.named_parameters())


def test_biases_switch_with_their_adapter():
    model = Block()
    y = model(X)
    gralora.inject(model, ["q"], GraloraConfig(r=4, bias="all"), adapter_name="a")
    train_a_step(model)
    of_a = model(X)
    gralora.inject(model, ["q"], GraloraConfig(r=4, bias="gralora_only"), adapter_name="b")
    gralora.set_adapter(model, "b")
    assert same_bits(model(X), y)
    gralora.set_adapter(model, "a")
    assert same_bits(model(X), of_a)
    gralora.set_adapter(model, "b")
    gralora.delete_adapter(model, "a")
    assert same_bits(model(X), y)


def test_a_bias_shared_by_two_layers_stays_shared():
    model = Block()
    model.k.bias = model.q.bias
    gralora.inject(model, ["q", "k"], GraloraConfig(r=4, bias="gralora_only"))
    assert model.k.bias is model.q.bias
    train_a_step(model)
    assert model.k.bias is model.q.bias


class ReadsBias(nn.Module):
    """Reads weight and bias of a layer that it never calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.fc.weight, self.fc.bias)


class ReadsAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.MultiheadAttention(16, 2)

    def forward(self, x):
        a = self.map
        return nn.functional.multi_head_attention_forward(
            *(x, x, x, 16, 2, a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0),
            *(a.out_proj.weight, a.out_proj.bias),
            need_weights=False,
        )[0]


class BiasedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 16))
        self.up_bias = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        parts = zip(self.up, self.up_bias, strict=True)
        return sum(nn.functional.linear(x, w, b).tanh() for w, b in parts)


READS = {
    "linear": (ReadsBias, ["fc"]),
    "attention": (ReadsAttention, ["q_proj", "v_proj", "out_proj"]),
    "experts": (BiasedExperts, ["up"]),
    "called": (lambda: nn.Sequential(nn.Linear(16, 8)), ["0"]),
    "own forward": (lambda: nn.Sequential(Scaled(16, 8)), ["0"]),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(2, 8, 3)), ["0"]),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 8, 3)), ["0"]),
}


class Scaled(nn.Linear):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


@pytest.mark.parametrize("name", READS)
def test_a_trained_bias_is_that_of_the_merged_model_however_it_is_used(name):
    make, targets = READS[name]
    model = make()
    x = torch.randn(2, 2, 16)
    base = model(x)
    for adapter in ("a", "b"):
        config = random_config(bias="gralora_only")
        gralora.inject(model, targets, config, adapter_name=adapter)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".a.bias", ".b.bias")):
                parameter.normal_()
    gralora.set_adapter(model, {"a": 0.5, "b": -2.0})
    y = model(x)
    merged = gralora.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(y, merged(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, torch.compile(model, backend="eager")(x), rtol=1e-4, atol=1e-4)
    with gralora.disable_adapter(model):
        assert same_bits(model(x), base)
    gralora.merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    assert same_bits(gralora.unload(model)(x), base)


def test_losses_with_a_saved_head_are_those_of_peft():
    from ..peft_reference import copy_to_peft, peft_model

    config = random_config(modules_to_save=["head"])
    base = Block()
    theirs = peft_model(base, config, ["q", "v"])
    ours = gralora.inject(base, ["q", "v"], config)
    copy_to_peft(ours, theirs)
    target = torch.randn(2, 5, 4)
    losses = [ten_losses(model, X, target) for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


class Tied(nn.Module):
    """An embedding whose weight the model reads for its output, without a call: what a router of
    calls would miss.
    """

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, tokens):
        return self.fc(self.embed(tokens)) @ self.embed.weight.T


def test_an_embedding_is_trained_and_saved_whole_also_where_its_weight_is_read(tmp_path):
    model, tokens = Tied(), torch.arange(12)[None]
    base, y = copy.deepcopy(model), model(tokens)
    gralora.inject(model, ["fc"], GraloraConfig(r=4, modules_to_save=["embed"]))
    assert same_bits(model(tokens), y)
    optimizer = torch.optim.SGD(gralora.adapter_parameters(model), lr=0.5)
    logits = model(tokens)
    (gradient,) = torch.autograd.grad(
        logits.square().sum(), [model.embed.weight], retain_graph=True
    )
    plain = copy.deepcopy(base)
    (expected,) = torch.autograd.grad(plain(tokens).square().sum(), [plain.embed.weight])
    torch.testing.assert_close(gradient, expected)  # through the lookup and through the read
    logits.square().mean().backward()
    optimizer.step()
    trained = model(tokens)
    assert not torch.allclose(trained, y)
    assert torch.equal(model.embed._parameters["weight"], base.embed.weight)
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    assert same_bits(
        gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(tokens), trained
    )
    with gralora.disable_adapter(model):
        assert same_bits(model(tokens), y)
    merged = gralora.merge_and_unload(copy.deepcopy(model))(tokens)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
    assert same_bits(gralora.unload(model)(tokens), y)


@pytest.mark.parametrize("names", [["wte"], ["lm_head"], ["wte", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads_of_a_language_model(names, tied, tmp_path):
    base = gpt2(tie_word_embeddings=tied)
    model, config = copy.deepcopy(base), GraloraConfig(r=4, modules_to_save=names)
    if tied and len(names) == 1:
        with pytest.raises(ValueError, match="whose weight is tied to .*Name both, or neither"):
            gralora.inject(model, ["c_attn"], config)
        return
    gralora.inject(model, ["c_attn"], config)
    optimizer = torch.optim.SGD(gralora.adapter_parameters(model), lr=0.5)
    tokens = torch.arange(12)[None]
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    y = model(tokens).logits
    assert not torch.allclose(y, base(tokens).logits)
    if len(names) == 2:
        assert (model.lm_head.weight is model.transformer.wte.weight) == tied
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors", trainable=True)
    assert same_bits(loaded(tokens).logits, y)
    if len(names) == 2:
        assert (loaded.lm_head.weight is loaded.transformer.wte.weight) == tied
    merged = gralora.merge_and_unload(model)
    torch.testing.assert_close(merged(tokens).logits, y)
    if tied:
        assert merged.lm_head.weight is merged.transformer.wte.weight
