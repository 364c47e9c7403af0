"""Embeddings: a linear map of one-hot rows, against E + ΔE put in by hand."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gralora
from benchmarks.speed._counting import Kernels
from gralora import GraloraConfig, GraloraEmbedding

from ..models import TOKENS, gpt2, llama, random_config, randomize_, relative

X = torch.randint(24, (3, 5), generator=torch.Generator().manual_seed(0))


class Scaled(nn.Embedding):
    """As Gemma has it."""

    def forward(self, x):
        return super().forward(x) * 3.0


class Head(nn.Module):
    """A head that reads the embedding's weight, as GPT-2's first code did."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, x):
        return F.linear(self.embedding(x), self.embedding.weight)


def adapted(cls=nn.Embedding, head=False, dtype=torch.float64, **config):
    torch.manual_seed(0)
    embedding = cls(24, 16, dtype=dtype)
    model = Head(embedding) if head else nn.Sequential(embedding)
    return gralora.inject(model, ["embedding" if head else "0"], random_config(**config))


def by_hand(model):
    plain = copy.deepcopy(model)
    layer = next(m for m in model.modules() if isinstance(m, GraloraEmbedding))
    weight = layer.weight.detach() + gralora.delta_weight(layer).detach()
    gralora.unload(plain)
    next(m for m in plain.modules() if isinstance(m, nn.Embedding)).weight.data.copy_(weight)
    return plain


@pytest.mark.parametrize("hybrid_r", [0, 3])
@pytest.mark.parametrize("cls", [nn.Embedding, Scaled])
@pytest.mark.parametrize("head", [False, True])
def test_the_numbers_and_gradients_are_those_of_w_plus_delta_w(cls, head, hybrid_r):
    model = adapted(cls, head, hybrid_r=hybrid_r, gralora_k=4)
    plain, base = by_hand(model), copy.deepcopy(model)
    gralora.unload(base)
    assert relative(model(X), plain(X)) < 1e-12 and relative(model(X), base(X)) > 0.05
    assert torch.autograd.gradcheck(lambda *_: model(X[:1]), gralora.adapter_parameters(model))
    # B and A get what the chain rule makes of the dense gradient
    model(X).square().sum().backward()
    layer = next(m for m in model.modules() if isinstance(m, GraloraEmbedding))
    adapter = layer.gralora_adapters["default"]
    dense = next(m for m in plain.modules() if isinstance(m, nn.Embedding)).weight.requires_grad_()
    plain(X).square().sum().backward()
    found = torch.autograd.grad(adapter.delta_weight(), list(adapter.parameters()), dense.grad)
    for parameter, wanted in zip(adapter.parameters(), found, strict=True):
        assert relative(parameter.grad, wanted) < 1e-11
    gralora.merge(model)
    assert relative(model(X), plain(X)) < 1e-12
    gralora.unmerge(model)
    assert torch.equal(gralora.unload(model)(X), base(X))


def test_a_look_up_makes_no_tensor_of_the_weights_size():
    model = gralora.inject(nn.Sequential(nn.Embedding(4096, 64)), ["0"], random_config())
    with Kernels() as counter:
        model(X)
    assert counter.largest < 4096 * 64 // 16


def test_the_row_of_padding_is_not_trained():
    model = gralora.inject(
        nn.Sequential(nn.Embedding(24, 16, padding_idx=3)), ["0"], GraloraConfig(r=4, hybrid_r=2)
    )
    randomize_(model)
    tokens = torch.tensor([[3, 4, 3]])
    model(tokens).square().sum().backward()
    adapter = model[0].gralora_adapters["default"]
    assert not adapter.B.grad[0, :, 3].any() and adapter.B.grad[0, :, 4].any()
    assert not adapter.B_general.grad[3].any() and adapter.B_general.grad[4].any()


def test_dropout_falls_on_whole_tokens_and_is_off_in_eval():
    model = adapted(gralora_dropout=0.5)
    base = copy.deepcopy(model)
    gralora.unload(base)
    torch.manual_seed(0)
    update = (model(X) - base(X)).abs().amax(-1)
    whole = (model.eval()(X) - base(X)).abs().amax(-1)
    dropped = update == 0
    assert 0 < dropped.sum() < dropped.numel()
    torch.testing.assert_close(update[~dropped], 2 * whole[~dropped])


def test_rows_of_a_batch_and_several_adapters():
    for cls, head in ((nn.Embedding, False), (Scaled, False), (nn.Embedding, True)):
        model = adapted(cls, head)
        gralora.inject(
            model, ["embedding" if head else "0"], random_config(gralora_k=4), adapter_name="other"
        )
        each = {}
        for name in ("default", "other"):
            gralora.set_adapter(model, name)
            each[name] = model(X).detach()
        with gralora.disable_adapter(model):
            base = model(X)
        with gralora.mixed_batch(model, ["other", None, "default"]):
            mixed = model(X)
        for row, wanted in enumerate((each["other"], base, each["default"])):
            assert relative(mixed[row], wanted[row]) < 1e-12
        if not head:
            gralora.set_adapter(model, {"default": 0.5, "other": 2.0})
            wanted = base + 0.5 * (each["default"] - base) + 2 * (each["other"] - base)
            assert relative(model(X), wanted) < 1e-12
        assert relative(each["default"], each["other"]) > 0.1


@pytest.mark.parametrize("build", [gpt2, llama])
def test_an_embedding_and_the_head_that_is_tied_to_it(build):
    tied = build(tie_word_embeddings=True)
    embedding = "wte" if build is gpt2 else "embed_tokens"
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight

    def logits(model):
        with torch.no_grad():
            return model(TOKENS).logits

    def by_hand(delta_in, delta_out):
        plain = build(tie_word_embeddings=False)
        plain.load_state_dict(
            {**tied.state_dict(), "lm_head.weight": tied.get_output_embeddings().weight}
        )
        with torch.no_grad():
            plain.get_input_embeddings().weight.add_(delta_in)
            plain.get_output_embeddings().weight.add_(delta_out)
        return logits(plain)

    for targets in ([embedding], ["lm_head"], [embedding, "lm_head"]):
        for together in (False, True):
            model = gralora.inject(
                copy.deepcopy(tied), targets, random_config(ensure_weight_tying=together)
            )
            parts = (model.get_input_embeddings(), model.get_output_embeddings())
            deltas = [
                gralora.delta_weight(p) if hasattr(p, "gralora_adapters") else 0 for p in parts
            ]
            assert relative(logits(model), by_hand(*deltas)) < 1e-5
            assert relative(logits(model), logits(tied)) > 1e-3
            if len(targets) == 2:
                assert torch.equal(*deltas) == together
                count = len(gralora.adapter_parameters(model))
                assert count == (2 if together else 4)
                with (
                    contextlib.nullcontext()
                    if together
                    else pytest.warns(UserWarning, match="set it to False first")
                ):
                    merged = gralora.merge_and_unload(copy.deepcopy(model))
                assert relative(logits(merged), logits(model)) < 1e-5
                assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == together
    model.train()
    model(TOKENS).logits.square().mean().backward()
    assert all(p.grad is not None for p in gralora.adapter_parameters(model))


def test_scaled_embeddings_of_gemma():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    base = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **sizes)
    ).eval()
    model = gralora.inject(copy.deepcopy(base), ["embed_tokens"], random_config())
    plain = copy.deepcopy(base)
    embedding = model.get_input_embeddings()
    weight = nn.Parameter(embedding.weight.detach() + gralora.delta_weight(embedding).detach())
    plain.get_input_embeddings().weight = weight  # the head keeps the base's
    tokens = TOKENS + 1
    assert relative(model(tokens).logits, plain(tokens).logits) < 1e-5
    assert relative(model(tokens).logits, base(tokens).logits) > 1e-3
    assert gralora.check_effect(model, tokens)


def test_half_precision_sparse_and_compiled():
    model = adapted(dtype=torch.bfloat16)
    assert (
        model[0].gralora_adapters["default"].A.dtype == torch.float32
        and model(X).dtype == torch.bfloat16
    )
    sparse = gralora.inject(
        nn.Sequential(nn.Embedding(24, 16, sparse=True)), ["0"], random_config()
    )
    sparse(X).sum().backward()  # the base is frozen, so nothing of it is sparse
    assert (
        sparse[0].weight.grad is None
        and sparse[0].gralora_adapters["default"].B.grad.layout is torch.strided
    )
    for cls in (nn.Embedding, Scaled):
        model = adapted(cls)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative(compiled(X), model(X)) < 1e-12


def test_what_does_not_fit_is_refused_by_name():
    for layer, why in (
        (
            nn.Embedding(24, 16, max_norm=1.0),
            "'0' has max_norm=1.0: its forward rewrites the weight",
        ),
        (nn.Embedding(24, 16, scale_grad_by_freq=True), "'0' has scale_grad_by_freq=True"),
        (
            nn.EmbeddingBag(24, 16),
            "'0' is a EmbeddingBag, which can't be adapted: its bags are summed in C",
        ),
        (
            nn.Embedding(25, 16),
            r"gralora_k=2 does not divide out_features=25 of '0' \(r=4\). Legal here: 1",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            gralora.inject(nn.Sequential(layer), ["0"], GraloraConfig(r=4))
    model = adapted()
    model[0].num_embeddings = 30
    model[0].weight = nn.Parameter(torch.randn(30, 16, dtype=torch.float64))
    with pytest.raises(
        ValueError, match="has 30 tokens, and its adapter is for 24: it has been resized"
    ):
        model(X)
    assert isinstance(
        GraloraEmbedding.from_embedding(nn.Embedding(24, 16), GraloraConfig(r=4)), nn.Embedding
    )


def test_files_of_every_format_that_holds_them(tmp_path):
    from ..peft_reference import in_peft

    torch.manual_seed(0)
    base = llama()
    model = gralora.inject(
        copy.deepcopy(base), ["embed_tokens", "q_proj"], random_config(hybrid_r=2)
    ).eval()
    for format in ("gralora", "lora"):
        gralora.save_adapter(model, tmp_path / format, format=format)
        again = gralora.load_adapter(copy.deepcopy(base), tmp_path / format).eval()
        assert relative(again(TOKENS).logits, model(TOKENS).logits) < 1e-5
    assert relative(in_peft(base, tmp_path / "lora")(TOKENS).logits, model(TOKENS).logits) < 1e-5
    assert relative(base(TOKENS).logits, model(TOKENS).logits) > 1e-3
    with pytest.raises(
        ValueError, match="'model.embed_tokens', of kind 'embedding', can't be saved with format"
    ):
        gralora.save_adapter(model, tmp_path / "peft", format="peft")


def test_what_peft_has_trained_is_read(tmp_path):
    import peft

    from ..peft_reference import quietly

    torch.manual_seed(0)
    base = llama()
    config = peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False
    )
    theirs = quietly(peft.get_peft_model, copy.deepcopy(base), config).eval()
    quietly(theirs.save_pretrained, tmp_path)  # with the base's own embedding beside, as PEFT does
    ours = gralora.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert relative(ours(TOKENS).logits, theirs(TOKENS).logits) < 1e-5
    other = llama()
    with pytest.warns(
        UserWarning, match="was trained on another base: the weights differ in model.embed_tokens"
    ):
        gralora.load_adapter(other, tmp_path)
