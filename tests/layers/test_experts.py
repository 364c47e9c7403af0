"""Fused experts against those with W + ΔW."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gralora
from benchmarks.speed._counting import Kernels
from gralora import GraloraConfig
from gralora.layers.base import gralora_layers

from ..models import (
    TOKENS,
    Experts,
    assert_same,
    fingerprint,
    random_config,
    randomize_,
    relative,
    same_bits,
)


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=32, num_key_value_heads=2, num_local_experts=4, **sizes)
    ).eval()


def qwen():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    experts = {
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 24,
        "num_experts_per_tok": 2,
    }
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(vocab_size=32, num_key_value_heads=2, **sizes, **experts)
    ).eval()


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    config = GptOssConfig(
        vocab_size=32, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes
    )
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss}
PARAMETERS = ["gate_up_proj", "down_proj"]
X = TOKENS % 32


class Reads(nn.Module):
    """Reads the whole weight in its forward."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self):
        return self.experts.up * 1


def reads(experts):
    return Reads(experts)()


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_an_adapter_of_its_own(transposed):
    model = nn.ModuleDict({"moe": Experts(transposed)})
    base, before = copy.deepcopy(model["moe"]), fingerprint(model)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    gralora.inject(model, r"moe\.up", random_config(hybrid_r=1))
    assert [name for name, _ in gralora_layers(model)] == ["moe.up"]
    state = gralora.adapter_state_dict(model)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == {
        "moe.up.gralora_A": (3, 2, 4, 4),
        "moe.up.gralora_B": (3, 2, 4, 6),
        "moe.up.gralora_A_general.weight": (3, 1, 8),
        "moe.up.gralora_B_general.weight": (3, 12, 1),
    }
    assert (
        len({tensor[e].sum().item() for tensor in [state["moe.up.gralora_A"]] for e in range(3)})
        == 3
    )
    y = model["moe"](x)
    assert relative(y, base(x)) > 1e-2
    layer = model["moe"].gralora_up
    expected = F.linear(x, base.up.sum(0).mT if transposed else base.up.sum(0))
    delta = layer.delta_weight()
    assert delta.shape == base.up.shape
    expected = expected + F.linear(x, delta.sum(0).mT if transposed else delta.sum(0)) + base.bias
    torch.testing.assert_close(y, expected)
    inputs, grad = [x, *layer.gralora_adapters.parameters()], torch.randn_like(y)
    for mine, theirs in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    ):
        torch.testing.assert_close(mine, theirs)
    gralora.merge(model)
    torch.testing.assert_close(model["moe"](x), y)
    assert not torch.equal(model["moe"].up, base.up)
    gralora.unload(model)
    assert_same(fingerprint(model), before)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_transformers(name, tmp_path):
    base = MODELS[name]()
    y = base(X).logits
    model = gralora.inject(
        copy.deepcopy(base), r".*\.experts\.(gate_up|down)_proj", random_config(alpha=16)
    )
    names = [layer for layer, _ in gralora_layers(model)]
    assert names == [
        f"model.layers.{i}.mlp.experts.{parameter}" for i in (0, 1) for parameter in PARAMETERS
    ]
    assert {key for key in model.state_dict() if "gralora_" not in key} == set(base.state_dict())
    adapted = model(X).logits
    assert relative(adapted, y) > 1e-3
    layers = dict(gralora_layers(model))
    for alone in layers:  # each has an effect
        for path, layer in layers.items():
            layer.gralora_adapters.active = {"default": 1.0} if path == alone else {}
        assert relative(model(X).logits, y) > 1e-5, alone
    gralora.set_adapter(model, "default")
    with gralora.disable_adapter(model):
        assert same_bits(model(X).logits, y)

    path = tmp_path / "adapter.safetensors"
    gralora.save_adapter(model, path)
    assert same_bits(gralora.load_adapter(copy.deepcopy(base), path)(X).logits, adapted)
    gralora.merge(model)
    assert relative(model(X).logits, adapted) < 1e-4
    gralora.unmerge(model)
    assert same_bits(model(X).logits, adapted)
    merged = gralora.merge_and_unload(copy.deepcopy(model))
    assert type(merged) is type(base) and relative(merged(X).logits, adapted) < 1e-4
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in base.named_modules()
    }
    gralora.unload(model)
    assert same_bits(model(X).logits, y)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_in_which_transformers_runs_experts(implementation):
    model = mixtral()
    base = model(X).logits
    with contextlib.suppress(AttributeError):
        model.set_experts_implementation(implementation)
    gralora.inject(model, PARAMETERS, random_config(alpha=16))
    y = model(X).logits
    assert relative(y, base) > 1e-3
    assert relative(y, gralora.merge_and_unload(model)(X).logits) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(name):
    model = gralora.inject(
        MODELS[name]().train(),
        [*(f"experts.{each}" for each in PARAMETERS), "q_proj"],
        GraloraConfig(r=4, alpha=16),
    )
    before = {key: p.clone() for key, p in model.named_parameters() if "gralora_" not in key}
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=3e-2)
    losses = []
    for _ in range(10):
        loss = model(X, labels=X).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert all(
        torch.equal(p, before[key]) for key, p in model.named_parameters() if "gralora_" not in key
    )
    moved = [
        key
        for key, p in model.named_parameters()
        if "experts" in key and "gralora_" in key and p.grad.abs().max() > 0
    ]
    assert len(moved) == 2 * 2 * 2


def test_targets_of_every_form_name_the_parameter():
    for targets in (
        ["up"],
        ["moe.up"],
        r".*\.up",
        lambda n, m: n == "moe.up",
        {"moe.up": random_config()},
    ):
        model = gralora.inject(nn.ModuleDict({"moe": Experts()}), targets, random_config())
        assert [name for name, _ in gralora_layers(model)] == ["moe.up"], targets
    model = nn.ModuleDict({"moe": Experts(), "fc": nn.Linear(8, 8)})
    gralora.inject(model, "all-linear", random_config())
    assert [name for name, _ in gralora_layers(model)] == ["fc"]


def test_what_does_not_fit_is_refused_by_name():
    model = nn.ModuleDict({"moe": Experts()})
    before = fingerprint(model)
    with pytest.raises(
        ValueError,
        match=(
            r"gralora_k=8 does not divide out_features=12 of 'moe.up' \(r=8\). Legal here: 1, 2, 4"
        ),
    ):
        gralora.inject(model, ["up"], random_config(r=8, gralora_k=8))
    with pytest.raises(ValueError, match="Nearest names: 'moe.up'"):
        gralora.inject(model, ["ups"], random_config())
    assert_same(fingerprint(model), before)


def test_layers_and_experts_of_different_k_in_one_adapter(tmp_path):
    base = mixtral()
    targets = {
        r".*(gate_up|down)_proj": random_config(r=8, gralora_k=4),
        "all-linear": random_config(r=6, gralora_k=2),
    }
    model = gralora.inject(copy.deepcopy(base), targets)
    assert len(list(gralora_layers(model))) == 2 * (2 + 4)
    y = model(X).logits
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    assert same_bits(
        gralora.load_adapter(copy.deepcopy(base), tmp_path / "a.safetensors")(X).logits, y
    )


@pytest.mark.filterwarnings("ignore:the state dict holds nothing of adapter")
def test_several_adapters_weighted_merged_and_swapped():
    model = gralora.inject(
        nn.ModuleDict({"moe": Experts()}), ["up"], random_config(), adapter_name="a"
    )
    gralora.inject(model, ["up"], random_config(r=8, gralora_k=4), adapter_name="b")
    randomize_(model)
    x, layer = torch.randn(5, 8, dtype=torch.float64), model["moe"].gralora_up
    gralora.set_adapter(model, {"a": 0.5, "b": 2.0})
    y = model["moe"](x)
    delta = 0.5 * layer.delta_weight("a") + 2 * layer.delta_weight("b")
    base = copy.deepcopy(model["moe"]._parameters["up"])
    assert model["moe"].up is model["moe"]._parameters["up"]  # outside of any forward
    torch.testing.assert_close(reads(model["moe"]), base + delta)
    gralora.merge(model, "a")
    torch.testing.assert_close(model["moe"](x), y)
    gralora.merge(model)
    torch.testing.assert_close(model["moe"](x), y)
    with pytest.raises(RuntimeError, match="moe.up holds a merged adapter"):
        model.load_state_dict({"moe.up": base, "moe.bias": model["moe"].bias}, strict=False)
    gralora.unmerge(model)
    assert same_bits(model["moe"]._parameters["up"], base)
    gralora.delete_adapter(model, "a")
    torch.testing.assert_close(reads(model["moe"]), base + 2 * layer.delta_weight("b"))


def test_copies_and_pickles():
    model = gralora.inject(nn.ModuleDict({"moe": Experts()}), ["up"], random_config())
    x = torch.randn(5, 8, dtype=torch.float64)
    y = model["moe"](x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(other["moe"](x), y)
        randomize_(other)
        assert not torch.equal(other["moe"](x), y)
    assert same_bits(model["moe"](x), y)


def test_half_precision_and_extract_and_export(tmp_path):
    model = gralora.inject(Experts(dtype=torch.bfloat16), ["up"], random_config())
    assert model.gralora_up.gralora_adapters["default"].A.dtype == torch.float32
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for format, why in (
        ("lora", "PEFT can't name that"),
        ("peft", "'up', of kind 'experts', can't be saved"),
    ):
        with pytest.raises(ValueError, match=why):
            gralora.save_adapter(model, tmp_path / "nowhere", format=format)
    base, errors = Experts(), {}
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.up.add_(torch.randn_like(tuned.up))
    gralora.extract(base, tuned, ["up"], GraloraConfig(r=16, gralora_k=2, alpha=16), errors=errors)
    assert errors["up"] < 1e-12
    torch.testing.assert_close(reads(base), tuned.up)


def test_a_file_for_another_number_of_experts_is_refused(tmp_path):
    model = gralora.inject(Experts(), ["up"], random_config())
    gralora.save_adapter(model, tmp_path / "a.safetensors")
    other = Experts()
    other.up = nn.Parameter(torch.randn(4, 12, 8))
    with pytest.raises(
        gralora.AdapterFileError, match=r"up.gralora_A must have shape \(4, 2, 4, 4\)"
    ):
        gralora.load_adapter(other, tmp_path / "a.safetensors")


def test_compiled_without_a_graph_break():
    model = gralora.inject(Experts(), ["up"], random_config())
    x = torch.randn(5, 8, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


class Stacked(nn.Module):
    """Experts of one's own, used in one of many ways; (experts, out, in), or (experts, in, out) if
    `transposed`.
    """

    def __init__(self, how, transposed):
        super().__init__()
        self.how, self.is_transposed = how, transposed
        self.up = nn.Parameter(torch.randn(4, 8, 12) if transposed else torch.randn(4, 12, 8))
        self.to(torch.float64)

    def forward(self, x, ids):
        """x (t, 8), the expert of each in ids (t) -> (t, 12)."""
        return WAYS[self.how](self, x, ids)

    def matrix(self, weight):
        return weight.mT if self.is_transposed else weight


def one_by_one(self, x, ids):
    out = torch.zeros(len(x), 12, dtype=x.dtype)
    for expert in ids.unique():
        rows = (ids == expert).nonzero()[:, 0]
        out = out.index_add(0, rows, F.linear(x[rows], self.matrix(self.up[expert])))
    return out


def unbound(self, x, ids):
    products = torch.stack([F.linear(x, self.matrix(weight)) for weight in self.up.unbind()])
    return products[ids, torch.arange(len(x))]


def iterated(self, x, ids):
    products = [x @ self.matrix(weight).T for weight in self.up]
    return torch.stack(products)[ids, torch.arange(len(x))]


def grouped(self, x, ids, named=False):
    order = ids.argsort(stable=True)
    offs = ids.bincount(minlength=4).cumsum(0).to(torch.int32)
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    weight = self.up if self.is_transposed else self.up.transpose(-2, -1)
    if named and hasattr(F, "grouped_mm"):
        return grouped_mm(offs=offs, mat_b=weight, mat_a=x[order])[order.argsort()]
    return grouped_mm(x[order], weight, offs=offs)[order.argsort()]


WAYS = {
    "one by one": one_by_one,
    "unbind": unbound,
    "iteration": iterated,
    "batched": lambda self, x, ids: torch.bmm(x[:, None], self.matrix(self.up[ids]).mT)[:, 0],
    "batched, from the left": lambda self, x, ids: (self.matrix(self.up[ids]) @ x[..., None])[
        ..., 0
    ],
    "index_select": lambda self, x, ids: torch.bmm(
        x[:, None], self.matrix(self.up.index_select(0, ids)).mT
    )[:, 0],
    "all of all": lambda self, x, ids: torch.bmm(x.expand(4, -1, -1), self.matrix(self.up).mT)[
        ids, torch.arange(len(x))
    ],
    "grouped": grouped,
    "grouped, by name": lambda self, x, ids: grouped(self, x, ids, named=True),
    "batched, by name": lambda self, x, ids: torch.bmm(
        input=x[:, None], mat2=self.matrix(self.up[ids]).mT
    )[:, 0],
    "permuted": lambda self, x, ids: torch.bmm(
        x[:, None], self.matrix(self.up[ids]).permute(0, 2, 1)
    )[:, 0],
    "broadcast": lambda self, x, ids: (x[None] @ self.matrix(self.up).mT)[
        ids, torch.arange(len(x))
    ],
    "a matrix and a stack": lambda self, x, ids: torch.matmul(x, self.matrix(self.up).mT)[
        ids, torch.arange(len(x))
    ],
    "a stack and a matrix": lambda self, x, ids: (self.matrix(self.up) @ x.mT).mT[
        ids, torch.arange(len(x))
    ],
    "four axes": lambda self, x, ids: (x[None, None] @ self.matrix(self.up).mT)[
        0, ids, torch.arange(len(x))
    ],
    "by a mask": lambda self, x, ids: torch.bmm(
        x.expand(4, -1, -1), self.matrix(self.up[torch.arange(4) >= 0]).mT
    )[ids, torch.arange(len(x))],
    "by a matrix of indices": lambda self, x, ids: torch.bmm(
        x[:, None], self.matrix(self.up[ids[:, None]][:, 0]).mT
    )[:, 0],
    "behind a new axis": lambda self, x, ids: torch.bmm(
        x[:, None], self.matrix(self.up[None][0, ids]).mT
    )[:, 0],
    "along an inner axis": lambda self, x, ids: torch.bmm(
        x[:, None],
        self.matrix(
            torch.stack(self.up.index_select(1, torch.arange(self.up.shape[1])).unbind(2), 2)[ids]
        ).mT,
    )[:, 0],
    "baddbmm, scaled": lambda self, x, ids: (
        torch.baddbmm(x.new_zeros(1), x[:, None], self.matrix(self.up[ids]).mT, alpha=2)[:, 0] / 2
    ),
    "einsum, any number of axes": lambda self, x, ids: torch.einsum(
        "t...i,toi->t...o", x, self.matrix(self.up[ids])
    ),
    "baddbmm": lambda self, x, ids: torch.baddbmm(
        x.new_zeros(1), x[:, None], self.matrix(self.up[ids]).mT
    )[:, 0],
    "einsum": lambda self, x, ids: torch.einsum("ti,toi->to", x, self.matrix(self.up[ids])),
    "einsum of all": lambda self, x, ids: torch.einsum(
        "eti,eoi->teo", x.expand(4, -1, -1), self.matrix(self.up)
    )[torch.arange(len(x)), ids],
    "cut along the experts": lambda self, x, ids: torch.cat(
        [torch.bmm(x.expand(2, -1, -1), self.matrix(up).mT) for up in (self.up[:2], self.up[2:])]
    )[ids, torch.arange(len(x))],
    "computed": lambda self, x, ids: torch.einsum(
        "t i, t o i -> t o", x, self.matrix(self.up * 1)[ids]
    ),
    "checkpointed": lambda self, x, ids: checkpoint(one_by_one, self, x, ids, use_reentrant=False),
}


def of_experts(model, x, ids):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf, ids)
    y.square().sum().backward()
    return y.detach(), leaf.grad


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", WAYS)
def test_however_experts_are_chosen_the_numbers_are_those_of_w_plus_delta_w(
    how, transposed, hybrid_r
):
    dtype = torch.float32 if "grouped" in how else torch.float64  # which PyTorch has for no other
    model = Stacked(how, transposed)
    gralora.inject(model, ["up"], random_config(hybrid_r=hybrid_r))
    plain = Stacked("one by one", transposed)
    with torch.no_grad():
        plain.up.copy_(model.up + model.gralora_up.delta_weight())
    reference = copy.deepcopy(model)
    reference.how = "computed"
    for each in (model, plain, reference):
        each.to(dtype)
    x, ids = torch.randn(16, 8, dtype=dtype), torch.arange(16) * 7 % 4
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    for a, b in zip(of_experts(model, x, ids), of_experts(plain, x, ids), strict=True):
        assert relative(a, b) < tolerance
    of_experts(reference, x, ids)
    for ours, theirs in zip(
        gralora.adapter_parameters(model), gralora.adapter_parameters(reference), strict=True
    ):
        assert relative(ours.grad, theirs.grad) < tolerance
    with torch.no_grad():
        assert relative(model(x, ids), plain(x, ids)) < tolerance


@pytest.mark.parametrize("how", ["one by one", "unbind", "batched", "grouped"])
def test_no_tensor_of_the_weights_size_is_made_and_a_and_b_get_their_gradient_once(how):
    model = Wide(how, transposed=False).float()
    model.up = nn.Parameter(torch.randn(4, 512, 256))
    gralora.inject(model, ["up"], random_config())
    x, ids = torch.randn(8, 256, requires_grad=True), torch.arange(8) % 4
    with Kernels() as counter:
        model(x, ids).sum().backward()
    limit = {"batched": 8 * 512 * 256}.get(
        how, 512 * 256 // 2
    )  # the base's own choice of weights, one for each token
    assert counter.largest <= limit
    assert counter.names.count("stack") <= (
        0 if how in ("batched", "grouped") else 3
    )  # of A, of B, and of the outputs


class Wide(Stacked):
    def forward(self, x, ids):
        return WIDE[self.how](self, x, ids)


WIDE = {
    "one by one": lambda self, x, ids: sum(
        F.linear(x[ids == e], self.up[e]).sum() for e in range(4)
    ),
    "unbind": lambda self, x, ids: sum(F.linear(x, weight).sum() for weight in self.up.unbind()),
    "batched": lambda self, x, ids: torch.bmm(x[:, None], self.up[ids].mT),
    "grouped": lambda self, x, ids: grouped(self, x, ids),
}


def of(name, **fields):
    """A small model of an architecture of transformers, with weights large enough to be seen."""

    def make():
        import transformers

        sizes = {
            "vocab_size": 32,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        config = getattr(transformers, fields.get("config", f"{name}Config"))
        rest = {key: value for key, value in fields.items() if key != "config"}
        model = getattr(transformers, f"{name}ForCausalLM")(
            config(**{**sizes, "num_key_value_heads": 2, **rest})
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
        return model

    return make


FEW = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
GROUPS = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 4,
}
LLAMA4 = {
    "intermediate_size_mlp": 48,
    "interleave_moe_layer_step": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}
MORE = {
    **MODELS,
    "qwen3_moe": of("Qwen3Moe", num_experts=4, head_dim=8, **FEW),
    "deepseek_v3": of("DeepseekV3", **FEW, **LATENT, **GROUPS),
    "granitemoe": of("GraniteMoe", num_local_experts=4, num_experts_per_tok=2),
    "lfm2_moe": of(
        "Lfm2Moe", num_experts=4, num_dense_layers=0, layer_types=["full_attention"] * 2, **FEW
    ),
    "llama4": of(
        "Llama4", config="Llama4TextConfig", num_local_experts=4, num_experts_per_tok=1, **LLAMA4
    ),
}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MORE)
def test_gradients_of_transformers_models_are_those_of_w_plus_delta_w(name, implementation):
    model = MORE[name]()
    if name != "llama4":  # which has one of its own
        model.set_experts_implementation(implementation)
    plain = copy.deepcopy(model)
    gralora.inject(model, [f"experts.{part}" for part in PARAMETERS], random_config())
    for path, layer in gralora_layers(model):
        owner, _, part = path.rpartition(".")
        with torch.no_grad():
            plain.get_submodule(owner)._parameters[part].add_(layer.delta_weight())
    found = []
    for each in (model, plain):
        embedded = each.get_input_embeddings()(X).detach().requires_grad_()
        logits = each(inputs_embeds=embedded).logits
        logits.square().sum().backward()
        found.append((logits.detach(), embedded.grad))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-5
    for path, layer in gralora_layers(model):
        owner, _, part = path.rpartition(".")
        delta = plain.get_submodule(owner)._parameters[part].grad  # and from there to A and B
        adapter = layer.gralora_adapters["default"]
        total = layer.weighted_delta([(adapter, 1.0)])
        for own, wanted in zip(
            adapter.parameters(),
            torch.autograd.grad(total, list(adapter.parameters()), delta),
            strict=True,
        ):
            assert relative(own.grad, wanted) < 1e-4


def test_dropout_falls_on_what_an_expert_gets():
    model = Stacked("one by one", transposed=False)
    gralora.inject(model, ["up"], random_config(gralora_dropout=0.5))
    x, ids = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 4
    assert not torch.allclose(model(x, ids), model(x, ids))
    model.eval()
    assert torch.equal(model(x, ids), model(x, ids))
    model.train()
    torch.manual_seed(0)
    mean = torch.stack([model(x, ids) for _ in range(3000)]).mean(0)
    assert relative(mean, model.eval()(x, ids)) < 0.1


def test_experts_of_half_precision_under_autocast_and_double_backward():
    for how in ("one by one", "batched", "grouped"):
        model = Stacked(how, transposed=False).to(torch.bfloat16)
        gralora.inject(model, ["up"], random_config())
        x, ids = torch.randn(16, 8, dtype=torch.bfloat16), torch.arange(16) % 4
        wanted = Stacked("one by one", transposed=False).float()
        with torch.no_grad():
            wanted.up.copy_(model.up.float() + model.gralora_up.delta_weight())
        y = model(x, ids)
        assert y.dtype is torch.bfloat16 and relative(y.float(), wanted(x.float(), ids)) < 3e-2
    model = gralora.inject(Stacked("one by one", transposed=False), ["up"], random_config())
    leaf = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x, torch.arange(4)), (leaf,))


class Unsaid(nn.Module):
    """Stores (experts, in, out), and does not say so: the roles of A and B are guessed the other
    way round.
    """

    def __init__(self, how, width=8):
        super().__init__()
        self.how, self.up = how, nn.Parameter(torch.randn(4, width, 12))

    def forward(self, x):
        """x (4, t, in), of each expert its own -> (4, t, 12)."""
        return GUESSED[self.how](self, x)


GUESSED = {
    "batched": lambda self, x: torch.bmm(x, self.up),
    "one by one": lambda self, x: torch.stack([each @ self.up[i] for i, each in enumerate(x)]),
    "turned": lambda self, x: torch.stack(
        [F.linear(each, self.up[i].t()) for i, each in enumerate(x)]
    ),
    "chosen": lambda self, x: x @ self.up[torch.tensor([0, 1, 2, 3])],
    "computed": lambda self, x: torch.einsum("e t i, e i o -> e t o", x, self.up),
}


@pytest.mark.parametrize("hybrid_r", [0, 2])
@pytest.mark.parametrize("how", GUESSED)
def test_a_wrong_guess_of_the_layout_only_swaps_the_roles_of_a_and_b(how, hybrid_r):
    model = gralora.inject(Unsaid(how).double(), ["up"], random_config(hybrid_r=hybrid_r))
    x = torch.randn(4, 5, 8, dtype=torch.float64, requires_grad=True)
    y = model(x)
    total = model.up + model.gralora_up.weighted_delta(
        [(model.gralora_up.gralora_adapters["default"], 1.0)]
    )
    wanted = torch.bmm(x, total)
    assert relative(y, wanted) < 1e-12
    inputs, grad = [x, *gralora.adapter_parameters(model)], torch.randn_like(y)
    for a, b in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(wanted, inputs, grad), strict=True
    ):
        assert relative(a, b) < 1e-11


def test_a_wrong_guess_makes_no_tensor_of_the_weights_size_either():
    model = gralora.inject(Unsaid("batched", 512), ["up"], random_config())
    with Kernels() as counter:
        model(torch.randn(4, 5, 512, requires_grad=True)).sum().backward()
    assert counter.largest < 4 * 512 * 12


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_with_adapters_of_their_own(name, implementation):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.config._experts_implementation = implementation
    targets = [*PARAMETERS, "q_proj"]
    for adapter in "ab":
        gralora.inject(model, targets, random_config(), adapter_name=adapter)
    randomize_(model)
    x, rows = (
        torch.randint(32, (4, 6), generator=torch.Generator().manual_seed(1)),
        ["a", None, "b", "a"],
    )

    def alone(row, name):
        if name is None:
            with gralora.disable_adapter(model):
                return model(row[None]).logits[0]
        gralora.set_adapter(model, name)
        return model(row[None]).logits[0]

    expected = torch.stack([alone(row, name) for row, name in zip(x, rows, strict=True)])
    gralora.set_adapter(model, "b", trainable=["a", "b"])
    with gralora.mixed_batch(model, rows, repeat="interleave"):
        mixed = model(x).logits
    assert relative(mixed, expected) < 1e-5
    assert relative(mixed, model(x).logits) > 1e-3
    with gralora.mixed_batch(model, rows), pytest.raises(ValueError, match='repeat="interleave"'):
        model(x)  # whose the tokens are is not said
    with gralora.mixed_batch(model, rows, repeat="interleave"):
        model(x).logits[0].square().sum().backward()  # of a row of a: the gradients are a's
    gradients = {
        n: p.grad for n, p in model.named_parameters() if "gralora_" in n and p.grad is not None
    }
    assert any(".a." in n and g.any() for n, g in gradients.items())
    assert not any(".b." in n and g.any() for n, g in gradients.items())


def test_packed_experts_are_refused_by_name():
    model = Experts()
    model.up = nn.Parameter(torch.zeros(3, 12, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        ValueError,
        match="'up' holds experts of torch.uint8, quantised in a format that its module alone",
    ):
        gralora.inject(model, ["up"], GraloraConfig(r=4))
