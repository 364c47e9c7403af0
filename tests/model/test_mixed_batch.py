"""Each row of a batch through its own adapter, held to running the rows one by one."""

import pytest
import torch
from torch import nn

import gralora

from ..models import (
    ROWS,
    Block,
    assert_same,
    bert,
    fingerprint,
    four_adapters,
    gpt2,
    llama,
    mlp,
    random_config,
    relative,
    same_bits,
    t5,
)


@pytest.fixture(autouse=True)
def _gradients_on_again():
    yield
    torch.set_grad_enabled(True)


def one_by_one(model, run, inputs, rows=ROWS):
    results = []
    for i, name in enumerate(rows):
        gralora.set_adapter(model, [] if name is None else name)
        results.append(run(model, inputs[i : i + 1]))
    gralora.set_adapter(model, "d")
    return torch.cat(results)


TRANSFORMERS = {"bert": bert, "gpt2": gpt2, "llama": llama}


@pytest.mark.parametrize("gradients", [True, False])  # two paths
@pytest.mark.parametrize("name", ["mlp", "block", "encoder", *TRANSFORMERS])
def test_equals_the_rows_one_by_one(name, gradients):
    torch.set_grad_enabled(gradients)
    if name in TRANSFORMERS:
        model, inputs = TRANSFORMERS[name](), torch.randint(0, 64, (8, 12))
        run = lambda m, x: m(x)[0]  # noqa: E731
    else:
        encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        model = {
            "mlp": mlp(16, 24, 8),
            "block": Block(),
            "encoder": nn.TransformerEncoder(encoder, 2),
        }[name].eval()
        inputs = torch.randn(8, 16) if name == "mlp" else torch.randn(8, 5, 16)
        run = lambda m, x: m(x)  # noqa: E731
    before = run(model, inputs)
    four_adapters(model)
    expected = one_by_one(model, run, inputs)
    print_before = fingerprint(model)
    with gralora.mixed_batch(model, ROWS):
        y = run(model, inputs)
    assert_same(fingerprint(model), print_before)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for i, row in enumerate(ROWS):
        assert torch.allclose(y[i], before[i], rtol=1e-5, atol=1e-6) == (row is None)
    with gralora.mixed_batch(model, [None] * 8):
        torch.testing.assert_close(run(model, inputs), before, rtol=1e-5, atol=1e-6)


def test_gradients_equal_those_of_the_rows_one_by_one():
    model = four_adapters(Block().double())
    x = torch.randn(8, 5, 16, dtype=torch.float64)
    gralora.set_adapter(model, ["a", "b", "c"])
    parameters = gralora.adapter_parameters(model, "a") + gralora.adapter_parameters(model, "b")
    with gralora.mixed_batch(model.train(), ROWS):
        found = torch.autograd.grad(model(x).square().sum(), parameters)
    total = [torch.zeros_like(p) for p in parameters]
    for i, name in enumerate(ROWS):
        if name in ("a", "b"):
            gralora.set_adapter(model, name)
            for parameter in parameters:
                parameter.requires_grad_()
            own = torch.autograd.grad(
                model(x[i : i + 1]).square().sum(), parameters, allow_unused=True
            )
            total = [t if g is None else t + g for t, g in zip(total, own, strict=True)]
    for mine, theirs in zip(found, total, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("make", [gpt2, llama, t5])
def test_generate_with_a_cache_and_beams(make, beams):
    names = {
        gpt2: ["c_attn", "c_proj"],
        llama: ["q_proj", "v_proj", "up_proj"],
        t5: ["q", "v", "wi", "wo"],
    }
    model = four_adapters(make(), names[make])
    inputs = torch.randint(1, 64, (8, 6))
    options = {
        "max_new_tokens": 5,
        "num_beams": beams,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    run = lambda m, x: m.generate(x, attention_mask=torch.ones_like(x), **options)  # noqa: E731
    expected = one_by_one(model, run, inputs)
    with gralora.mixed_batch(model, ROWS, repeat="interleave" if beams > 1 else None):
        tokens = run(model, inputs)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, run(model, inputs))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_sequence_first(batch_first):
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=batch_first).eval()
    four_adapters(model)
    source, target = torch.randn(8, 5, 16), torch.randn(8, 4, 16)

    def run(m, x):
        pair = (
            (x, target[: len(x)])
            if len(x) == 8
            else (x, target[[(source == x).all((1, 2)).nonzero().item()]])
        )
        return (
            m(*pair) if batch_first else m(*(each.transpose(0, 1) for each in pair)).transpose(0, 1)
        )

    expected = one_by_one(model, run, source)
    with gralora.mixed_batch(model, ROWS, dim=0 if batch_first else 1):
        torch.testing.assert_close(run(model, source), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_and_saved_heads():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "head": nn.Linear(8, 4)})
    config = random_config(modules_to_save=["head"])
    for name in "ab":
        gralora.inject(model, ["conv"], config, adapter_name=name)
        with torch.no_grad():
            model["head"].gralora_saved[name].weight.normal_()
    gralora.inject(model, ["conv"], random_config(), adapter_name="d")
    run = lambda m, x: m["head"](m["conv"](x).mean((2, 3)))  # noqa: E731
    rows, x = ["b", None, "d", "a"], torch.randn(4, 4, 6, 6)
    expected = one_by_one(model, run, x, rows)
    with gralora.mixed_batch(model, rows):
        torch.testing.assert_close(run(model, x), expected)


def test_inside_it_disable_adapter_wins_and_it_is_undone_after_an_exception():
    model = four_adapters(mlp(16, 24, 8))
    x = torch.randn(8, 16)
    y, before = model(x), fingerprint(model)
    with gralora.mixed_batch(model, ROWS):
        mixed = model(x)
        with gralora.disable_adapter(model):
            base = model(x)
        assert same_bits(model(x), mixed)
        with gralora.mixed_batch(model, [None] * 8):
            torch.testing.assert_close(model(x), base)
        assert same_bits(model(x), mixed)
    assert relative(mixed, base) > 1e-2
    with pytest.raises(RuntimeError, match="on purpose"), gralora.mixed_batch(model, ROWS):
        raise RuntimeError("on purpose")
    assert same_bits(model(x), y)
    assert_same(fingerprint(model), before)


@pytest.mark.slow
def test_compiled():
    model = four_adapters(mlp(16, 24, 8))
    x = torch.randn(8, 16)
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(x)
    for rows in (ROWS, ["b"] * 8):
        with gralora.mixed_batch(model, rows):
            torch.testing.assert_close(compiled(x), model(x))
    assert same_bits(compiled(x), y)


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (["a", "x"], KeyError, "no adapter 'x' in this model; it has: a, b, c, d"),
        ([], ValueError, "must hold one name, or None, for every row"),
        ("ab", ValueError, "must hold one name"),
    ],
)
def test_wrong_names_are_refused(rows, error, text):
    model = four_adapters(mlp(16, 24, 8))
    with pytest.raises(error) as raised, gralora.mixed_batch(model, rows):
        pass
    assert text in str(raised.value)


def test_a_batch_that_does_not_fit_is_refused():
    model = four_adapters(mlp(16, 24, 8))
    names = ["a", "b", None]
    for repeat, sizes in ((None, (1, 2, 4, 6)), ("interleave", (1, 2, 4)), ("tile", (1, 2, 4))):
        for size in sizes:
            with (
                gralora.mixed_batch(model, names, repeat=repeat),
                pytest.raises(
                    ValueError,
                    match=rf"got 3 names, but a layer got an input of shape \({size}, 16\)",
                ),
            ):
                model(torch.randn(size, 16))
    with pytest.raises(
        ValueError, match=r'repeat=.beams. is not legal: it must be "interleave", "tile" or None'
    ):
        gralora.mixed_batch(model, names, repeat="beams").__enter__()


def test_rows_that_repeat_are_told_how():
    model = four_adapters(mlp(16, 24, 8))
    x = torch.randn(8, 16)
    with gralora.mixed_batch(model, ROWS):
        y = model(x)
    with gralora.mixed_batch(model, ROWS, repeat="tile"):  # classifier-free guidance
        torch.testing.assert_close(model(torch.cat([x] * 2)), torch.cat([y] * 2))
        torch.testing.assert_close(model(x), y)
    with gralora.mixed_batch(model, ROWS, repeat="interleave"):  # beams
        torch.testing.assert_close(model(x.repeat_interleave(3, 0)), y.repeat_interleave(3, 0))
    with gralora.mixed_batch(model, ROWS * 2):
        torch.testing.assert_close(model(torch.cat([x] * 2)), torch.cat([y] * 2))


def test_images_cut_into_patches_and_packed_sequences_are_refused_unless_told():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):  # (b, patches, 16) as one long batch
            return self.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)

    model, x = four_adapters(Patches()), torch.randn(8, 4, 16)
    with (
        gralora.mixed_batch(model, ROWS),
        pytest.raises(ValueError, match="does not have as many rows as names"),
    ):
        model(x)
    with gralora.mixed_batch(model, ROWS, repeat="interleave"):
        y = model(x)
    torch.testing.assert_close(y, one_by_one(model, lambda m, x: m(x), x))


def test_what_cannot_be_mixed_is_refused_by_name():
    from ..models import Experts

    model = four_adapters(mlp(16, 24, 8))
    gralora.merge(model)
    with pytest.raises(
        ValueError, match="'0' has an adapter merged into it, for every row alike: unmerge"
    ):
        gralora.mixed_batch(model, ["a"]).__enter__()
    model = gralora.inject(Experts(), ["up"], random_config(), adapter_name="a")
    with (
        gralora.mixed_batch(model, ["a", None]),
        pytest.raises(ValueError, match="can't tell the rows apart in Experts"),
    ):
        model(torch.randn(2, 8, dtype=torch.float64))


@pytest.mark.parametrize("bias", ["gralora_only", "all"])
def test_every_row_has_the_biases_of_its_adapter(bias):
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 8))
    x = torch.randn(4, 16)
    gralora.inject(model, ["0"], random_config(bias=bias), adapter_name="biased")
    gralora.inject(model, ["0"], random_config(), adapter_name="a")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("biased.bias"):
                parameter.add_(5)
    with gralora.mixed_batch(model, ["biased", None, "a", "biased"]):
        mixed = model(x)
    for index, name in enumerate(["biased", [], "a", "biased"]):
        gralora.set_adapter(model, name)
        torch.testing.assert_close(mixed[index], model(x)[index])
    assert relative(mixed[0], mixed[2]) > 0.1


def test_tokens_laid_out_row_by_row_keep_their_rows():
    model = four_adapters(mlp(16, 24, 8))
    x = torch.randn(8, 5, 16)
    with gralora.mixed_batch(model, ROWS, repeat="interleave"):
        torch.testing.assert_close(model(x.flatten(0, 1)).unflatten(0, (8, 5)), model(x))


def test_half_precision_and_autocast():
    model = four_adapters(mlp(16, 24, 8, dtype=torch.bfloat16))
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    expected = one_by_one(model, lambda m, x: m(x), x)
    with gralora.mixed_batch(model, ROWS):
        y = model(x)
    assert y.dtype == torch.bfloat16 and relative(y.float(), expected.float()) < 0.05
    model = four_adapters(mlp(16, 24, 8))
    with torch.autocast("cpu", torch.bfloat16), gralora.mixed_batch(model, ROWS):
        assert model(x.float()).dtype == torch.bfloat16


def test_a_saved_module_that_takes_more_than_one_tensor_says_so():
    class Head(nn.Bilinear):
        pass

    model = nn.ModuleDict({"fc": nn.Linear(8, 8), "head": Head(8, 8, 2)})
    gralora.inject(model, ["fc"], random_config(modules_to_save=["head"]), adapter_name="a")
    x = torch.randn(2, 8)
    with (
        gralora.mixed_batch(model, ["a", None]),
        pytest.raises(TypeError, match="take apart the rows of what Head gets"),
    ):
        model["head"](x, x)
