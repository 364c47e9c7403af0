"""What a `with` block switches, and for whom."""

import copy
import threading

import torch
from torch import nn

import gralora

from ..models import mlp, random_config, same_bits

ROWS = ["a", "b", None, "a", "c", None, "b", "b"]


def adapted(model, targets="all-linear"):
    """a and b on all layers, c of another r and k on some, d active and in no row."""
    gralora.inject(model, targets, random_config(alpha=16), adapter_name="a")
    gralora.inject(model, targets, random_config(r=8, gralora_k=4, hybrid_r=2), adapter_name="b")
    some = [name for name, _ in gralora.layers.base.gralora_layers(model)][::2]
    gralora.inject(model, some, random_config(gralora_k=1), adapter_name="c")
    gralora.inject(model, some, random_config(), adapter_name="d")
    gralora.set_adapter(model, "d")
    return model


def test_other_threads_are_not_affected_and_mix_in_their_own_way():
    model = adapted(mlp(16, 24, 8))
    x, rows = torch.randn(8, 16), [ROWS, [None] * 8, ["b"] * 8, None]
    expected = []
    for names in rows:
        if names is None:
            expected.append(model(x))
        else:
            with gralora.mixed_batch(model, names):
                expected.append(model(x))
    found, barrier = {}, threading.Barrier(4)

    def work(i):
        barrier.wait()
        for _ in range(20):
            if rows[i] is None:
                found[i] = model(x)
            else:
                with gralora.mixed_batch(model, rows[i]):
                    found[i] = model(x)
            assert same_bits(found[i], expected[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same_bits(found[i], expected[i]) for i in range(4))


def test_a_copy_made_inside_is_not_inside():
    import copy

    model = adapted(mlp(16, 24, 8))
    x = torch.randn(3, 16)
    y = model(x)
    with gralora.mixed_batch(model, ROWS), gralora.disable_adapter(model):
        other = copy.deepcopy(model)
    assert same_bits(other(x), y)


def test_disable_adapter_stays_in_its_thread():
    model = gralora.inject(mlp(16, 8), ["0"], random_config())
    x = torch.randn(3, 16)
    y, elsewhere = model(x), []
    with gralora.disable_adapter(model):
        assert not torch.equal(model(x), y)
        thread = threading.Thread(target=lambda: elsewhere.append(model(x)))
        thread.start()
        thread.join()
    assert same_bits(elsewhere[0], y)


def test_disabling_one_model_leaves_another_alone():
    one, two = (gralora.inject(mlp(16, 8), ["0"], random_config()) for _ in range(2))
    x = torch.randn(3, 16)
    y = two(x)
    with gralora.disable_adapter(one):
        assert same_bits(two(x), y)


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


def encoder(layers=2, **kwargs):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0, **kwargs)
    return nn.TransformerEncoder(layer, layers).eval()


def test_the_fused_path_of_the_encoder_layer_is_off_whether_or_not_its_owner_is_seen():
    layer = encoder().layers[0].eval()
    with torch.no_grad():
        base = layer(X)
        gralora.inject(layer.linear1, "", random_config(alpha=32))  # the parent is not in sight
        assert not torch.allclose(layer(X), base)
        gralora.unload(layer.linear1)
        assert same_bits(layer(X), base)


def test_the_fused_path_stays_off_in_copies_and_drop_in_layers():
    model = gralora.inject(encoder(), "all-linear", random_config(alpha=32))
    with torch.no_grad():
        y = model(X)
        assert same_bits(copy.deepcopy(model)(X), y)
        layer = encoder().layers[0].eval()
        base = layer(X)
        layer.linear2 = gralora.GraloraLinear.from_linear(layer.linear2, random_config(alpha=32))
        assert not torch.allclose(layer(X), base)
