"""Tokens trained whole, against PEFT's and against rows put in by hand."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from gralora import GraloraConfig
from gralora.__main__ import main
from gralora.model.tokens import TokenRows

from ..models import TOKENS, gpt2, llama, random_config, relative, same_bits
from ..peft_reference import in_peft, quietly

NEW = [5, 1, 17]


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


def trained(base, tokens=NEW, name="default", **config):
    model = gralora.inject(
        base, ["q_proj"], random_config(trainable_token_indices=tokens, **config), adapter_name=name
    )
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(f".{name}.trainable_tokens"):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                )
    return model.eval()


def rows(model, name="default"):
    return next(
        p for key, p in model.named_parameters() if key.endswith(f"{name}.trainable_tokens")
    )


def by_hand(base, model, tied):
    plain = copy.deepcopy(base)
    gralora.load_adapter_state_dict(
        gralora.inject(plain, ["q_proj"], random_config()),
        {k: v for k, v in gralora.adapter_state_dict(model).items() if "token" not in k},
    )
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    with torch.no_grad():
        if not tied:
            head.weight = nn.Parameter(head.weight.clone())
        embedding.weight[NEW] = rows(model).detach()
    return plain.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_the_rows_are_trained_whole_and_a_tied_head_follows(tied):
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=tied)
    model = trained(copy.deepcopy(base))
    assert relative(logits(model), logits(by_hand(base, model, tied))) < 1e-5
    assert relative(logits(model), logits(base)) > 1e-2
    assert rows(model).shape == (3, 32)
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad and p.shape == (3, 32)) == 96
    )
    model.train()(TOKENS).logits.square().sum().backward()
    assert rows(model).grad.abs().amax(1).all() and model.get_input_embeddings().weight.grad is None
    with gralora.disable_adapter(model):
        assert same_bits(logits(model.eval()), logits(base))
    assert same_bits(logits(gralora.unload(model)), logits(base))


def test_the_gradients_are_those_of_the_dense_weight():
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True).double()
    model = trained(copy.deepcopy(base))
    plain = by_hand(base, model, True)
    weight = plain.get_input_embeddings().weight.requires_grad_()
    for each in (model, plain):
        each(TOKENS).logits.square().sum().backward()
    assert relative(rows(model).grad, weight.grad[NEW]) < 1e-10


@pytest.mark.parametrize("tied", [False, True])
def test_peft_computes_the_same_and_reads_our_folder(tied, tmp_path):
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=tied)
    model = trained(copy.deepcopy(base))
    gralora.save_adapter(model, tmp_path / "lora", format="lora")
    assert relative(logits(in_peft(base, tmp_path / "lora")), logits(model)) < 1e-5
    assert (
        relative(
            logits(gralora.load_adapter(copy.deepcopy(base), tmp_path / "lora")), logits(model)
        )
        < 1e-5
    )
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=NEW, init_lora_weights=False
    )
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert (
        relative(logits(ours), logits(theirs)) < 1e-5
        and relative(logits(ours), logits(base)) > 1e-2
    )


def test_the_own_file_holds_these_rows_alone(tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    model = trained(copy.deepcopy(base), {"embed_tokens": NEW})
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["model.embed_tokens.trainable_tokens"].shape == (3, 32)
    assert tensors["model.embed_tokens.token_indices"].tolist() == NEW
    assert not any("lm_head" in key for key in tensors)
    again = gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert same_bits(logits(again), logits(model))
    gralora.load_adapter(again, tmp_path / "a.safetensors")  # a hot swap
    base.save_pretrained(tmp_path / "base")
    base.model.embed_tokens = nn.Embedding(16, 32)
    with pytest.raises(
        gralora.AdapterFileError,
        match=r"token 17 is out of range: 'model.embed_tokens' has tokens 0 to 15",
    ):
        gralora.load_adapter(base, tmp_path / "a.safetensors")
    assert (
        main(
            [
                "merge",
                str(tmp_path / "base"),
                str(tmp_path / "a.safetensors"),
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert relative(logits(merged), logits(model)) < 1e-5
    in_memory = gralora.merge_and_unload(copy.deepcopy(model))
    assert same_bits(logits(in_memory), logits(merged))
    assert in_memory.lm_head.weight is in_memory.model.embed_tokens.weight


def test_after_resizing_with_new_tokens():
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True)
    quietly(model.resize_token_embeddings, 70)
    base = copy.deepcopy(model)
    gralora.inject(
        model, ["q_proj"], GraloraConfig(r=4, trainable_token_indices=list(range(64, 70)))
    )
    tokens = torch.arange(60, 70)[None]
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=0.1, weight_decay=0.1)
    first = None
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    assert len(optimizer.state) == len(gralora.adapter_parameters(model))
    assert (
        sum(s["exp_avg"].numel() for s in optimizer.state.values() if s["exp_avg"].shape == (6, 32))
        == 6 * 32
    )
    weight = model.get_input_embeddings()._parameters["weight"]
    assert torch.equal(weight, base.get_input_embeddings().weight)


def test_several_adapters_rows_of_a_batch_copies_and_pickles():
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True)
    model = trained(copy.deepcopy(base), name="a")
    trained(model, [2, 5], name="b")
    each = {}
    for name in "ab":
        gralora.set_adapter(model, name)
        each[name] = logits(model)
    with gralora.mixed_batch(model, ["b", "a"]):
        mixed = logits(model)
    assert relative(mixed[0], each["b"][0]) < 1e-5 and relative(mixed[1], each["a"][1]) < 1e-5
    assert relative(each["a"], each["b"]) > 1e-2
    gralora.set_adapter(model, "a")
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        gralora.shared_copy(model),
    ):
        with torch.no_grad():
            rows(other, "a").add_(1.0)
        assert relative(logits(other), each["a"]) > 1e-2
        assert same_bits(logits(model), each["a"])
    gralora.combine(model, ["a"], [1.0], "c")
    gralora.set_adapter(model, "c")
    assert relative(logits(model), each["a"]) < 1e-5
    gralora.delete_adapter(model, "a")
    gralora.delete_adapter(model, "c")
    assert "lm_head (saved)" in str(gralora.summary(model))


def test_a_base_loaded_later_is_followed_by_rows_that_nobody_trained():
    torch.manual_seed(0)
    model, other = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    gralora.inject(model, ["q_proj"], GraloraConfig(r=4, trainable_token_indices=NEW))
    model.load_state_dict(other.state_dict())
    assert torch.equal(rows(model), other.get_input_embeddings().weight[NEW])
    assert relative(logits(model), logits(other)) < 1e-6


class Scaled(nn.Embedding):
    def forward(self, x):
        return super().forward(x) * 3.0


class Reader(nn.Module):
    """A head that reads the weight of a scaled embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mid = Scaled(12, 8, padding_idx=2), nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(self.mid(self.embedding(x)), self.embedding.weight)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own look
@pytest.mark.parametrize("compiled", [False, True])
def test_an_embedding_with_a_forward_of_its_own_and_whoever_reads_its_weight(compiled):
    torch.manual_seed(0)
    base = Reader().double()
    config = GraloraConfig(r=4, trainable_token_indices=[3, 2])
    model = gralora.inject(copy.deepcopy(base), ["mid"], config)
    with torch.no_grad():
        rows(model).add_(1.0)
        base.embedding.weight[[3, 2]] += 1.0
    x = torch.tensor([[3, 2, 5], [1, 3, 3]])
    run = torch.compile(model, backend="aot_eager") if compiled else model
    assert relative(run(x), base(x)) < 1e-12
    run(x).square().sum().backward()
    base(x).square().sum().backward()
    head_only = torch.autograd.grad(
        F.linear(base.mid(base.embedding(x)).detach(), base.embedding.weight).square().sum(),
        base.embedding.weight,
    )[0]
    assert relative(rows(model).grad[0], base.embedding.weight.grad[3]) < 1e-12
    assert (
        relative(rows(model).grad[1], head_only[2]) < 1e-12
    )  # padding is trained by the head alone
    with gralora.mixed_batch(model, [None, "default"]):
        rows_of_two = model.embedding(x[:2])
        with pytest.raises(
            ValueError, match="'weight' of a Scaled that adapters train is read by another module"
        ):
            model(x)
    untrained = Scaled(12, 8).double()
    untrained.load_state_dict({"weight": model.embedding._parameters["weight"]})
    assert torch.equal(rows_of_two[0], untrained(x[0])) and torch.equal(
        rows_of_two[1], model.embedding(x[1])
    )
    assert relative(rows_of_two[1], untrained(x[1])) > 1e-2
    assert model.embedding.weight is model.embedding._parameters["weight"]  # outside of any forward


def test_bad_input_is_refused_by_name():
    for tokens, error, why in (
        ([64], ValueError, "token 64 is out of range: 'model.embed_tokens' has tokens 0 to 63"),
        ([1, 1], ValueError, "names a token twice"),
        ([], TypeError, "not legal: it must be a list of token indices"),
        ([-1], TypeError, "from 0 on"),
        ("5", TypeError, "not legal"),
        (
            {"lm_head": [1]},
            ValueError,
            "names 'lm_head', a Linear. Legal are embeddings .'model.embed_tokens'.; a head",
        ),
        (
            {"wte": [1]},
            ValueError,
            "names 'wte', which this model lacks. Its embeddings: 'model.embed_tokens'",
        ),
    ):
        model = llama()
        with pytest.raises(error, match=why):
            gralora.inject(model, ["q_proj"], GraloraConfig(r=4, trainable_token_indices=tokens))
        assert not any("gralora" in name for name, _ in model.named_parameters())
    both = GraloraConfig(r=4, trainable_token_indices=[1])
    for targets, more in (
        (["embed_tokens"], {}),
        (["q_proj"], {"modules_to_save": ["embed_tokens"]}),
    ):
        with pytest.raises(ValueError, match="adapted or in modules_to_save as well: one of them"):
            gralora.inject(
                llama(), targets, GraloraConfig(r=4, trainable_token_indices=[1], **more)
            )
    with pytest.raises(
        ValueError, match="which embedding it means can't be known; there are: '0', '1'"
    ):
        gralora.inject(
            nn.Sequential(nn.Embedding(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4)), ["2"], both
        )
    assert gpt2().get_input_embeddings().num_embeddings == 64
    model = gralora.inject(gpt2(), ["c_attn"], both)
    assert isinstance(model.transformer.wte.gralora_saved["default"], TokenRows)


def test_embeddings_whose_rows_cannot_be_trained_are_refused():
    quantised = nn.Embedding(8, 4)
    quantised.weight = nn.Parameter(torch.ones(8, 4, dtype=torch.int8), requires_grad=False)
    for embedding, why in (
        (nn.Embedding(8, 4, max_norm=1.0), "'0' has max_norm=1.0: its forward rewrites"),
        (quantised, "the weight of '0' is quantised"),
    ):
        model = nn.Sequential(embedding, nn.Linear(4, 4))
        with pytest.raises(ValueError, match=why):
            gralora.inject(model, ["1"], GraloraConfig(r=2, trainable_token_indices={"0": [1]}))
        assert type(model[1]) is nn.Linear


class CalledAndRead(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding, self.q_proj = embedding, nn.Linear(8, 8)

    def forward(self, x):
        hidden = self.q_proj(self.embedding(x))
        return F.linear(hidden, self.embedding.weight) + hidden @ self.embedding.weight.t()


ENGINES = {
    "compile": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("embedding", [nn.Embedding, Scaled])
def test_every_engine_looks_up_and_reads_the_trained_rows(embedding, engine):
    base, x = CalledAndRead(embedding(20, 8)), TOKENS % 20
    model = trained(copy.deepcopy(base))
    wanted = model(x)
    assert relative(ENGINES[engine](model, x), wanted) < 1e-5
    assert relative(base(x), wanted) > 1e-2
