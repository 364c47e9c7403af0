"""Nothing lost: a process killed while it writes, a full disk, a training run killed and
resumed.
"""

import os
import random
import resource
import signal
import stat
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import gralora
from gralora import GraloraConfig
from gralora.files.atomic import write_folder

from ..command_line import run
from ..models import mlp, random_config, same_bits
from ..needs import parts

KILLS = {"gralora": 40, "peft": 12, "lora": 12}  # of one of `PARTS`
PARTS = 5


def forked(work):
    """Run `work` in a child of this process; returns its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads; the child uses one
        child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
    finally:
        os._exit(0)


def two_versions(fields):
    """Models of one adapter each, that differ in every value, and here also in their config."""
    models = []
    for value, extra in ((1.0, {}), (2.0, fields)):
        model = gralora.inject(
            mlp(64, 64, bias=False), ["0"], GraloraConfig(r=32, gralora_k=2, **extra)
        )
        with torch.no_grad():
            for parameter in gralora.adapter_parameters(model):
                parameter.fill_(value)
        models.append(model)
    return models


def version_of(path):
    """1 or 2: which of the two the adapter is, whole, values and config alike."""
    loaded = gralora.load_adapter(mlp(64, 64, bias=False), path)
    values = {float(v) for p in gralora.adapter_parameters(loaded) for v in p.unique()}
    values -= {0.0}  # plain LoRA is block-sparse
    assert len(values) == 1
    return values.pop(), loaded[0].gralora_adapters["default"].config.alpha


@pytest.mark.filterwarnings("ignore:.*trained on another base")
@pytest.mark.parametrize("part", parts(PARTS))
@pytest.mark.parametrize("format", KILLS)
def test_a_writer_killed_at_any_moment_leaves_the_old_one_or_the_new_one(format, part, tmp_path):
    models = two_versions({"alpha": 3})
    path, rng = tmp_path / "adapter", random.Random(part)
    gralora.save_adapter(models[0], path, format=format)
    alphas = {1.0: version_of(path)[1]}
    gralora.save_adapter(models[1], path, format=format)
    alphas[2.0] = version_of(path)[1]
    assert alphas[1.0] != alphas[2.0]
    if format != "gralora":
        (path / "notes.txt").write_text("kept")
    seen, interrupted, kills = set(), 0, 0
    told, tell = os.pipe()

    def write():
        while True:
            for model in models:
                gralora.save_adapter(model, path, format=format)
                os.write(tell, b".")

    while (
        kills < KILLS[format] or seen != {1.0, 2.0} or interrupted < 3
    ):  # as many more as a busy machine needs
        child = forked(write)
        os.read(told, 1)  # it has written once, or another that was killed had
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        value, alpha = version_of(path)
        assert alpha == alphas[value]
        seen.add(value)
        interrupted += any(name.endswith(".tmp") for name in os.listdir(tmp_path))
        if format != "gralora":
            assert (path / "notes.txt").read_text() == "kept"
        assert kills < 20 * KILLS[format], "no kill came in the middle of a write"
    os.close(told)
    os.close(tell)


@pytest.mark.filterwarnings("ignore:.*trained on another base")
@pytest.mark.parametrize("format", KILLS)
def test_a_full_disk_is_an_error_and_leaves_the_old_one(format, tmp_path):
    models = two_versions({})
    path = tmp_path / "adapter"
    gralora.save_adapter(models[0], path, format=format)
    before, listed = version_of(path), sorted(os.listdir(tmp_path))
    told, tell = os.pipe()

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            gralora.save_adapter(models[1], path, format=format)
        except BaseException as error:
            os.write(tell, f"{type(error).__name__}: {error}".encode())

    os.waitpid(forked(write), 0)
    os.close(tell)
    with os.fdopen(told) as pipe:
        text = pipe.read()
    assert text.startswith("OSError") and str(path.name) in text
    assert version_of(path) == before
    assert sorted(os.listdir(tmp_path)) == listed


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_keeps_what_else_is_in_it(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr("gralora.files.atomic._exchange", lambda *paths: False)
    folder = tmp_path / "checkpoint [1]*"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "note").write_text("a")
    (folder / "optimizer.pt").write_text("b")
    (folder / "link").symlink_to("optimizer.pt")
    (folder / "adapter_config.json").write_text("old")
    gralora.save_adapter(two_versions({})[0], folder, format="peft")
    assert sorted(os.listdir(folder)) == [
        *(
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "deep",
            "link",
            "optimizer.pt",
        ),
    ]
    assert (folder / "deep" / "note").read_text() == "a" and (folder / "link").read_text() == "b"
    assert os.listdir(tmp_path) == [folder.name]
    assert version_of(folder)[0] == 1.0


def test_a_folder_that_cannot_be_put_in_place_is_left_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old").write_text("old")
    real = os.rename

    def failing(source, target):
        if str(target) == str(folder) and ".old" not in str(source):
            raise OSError("on purpose")
        real(source, target)

    monkeypatch.setattr("gralora.files.atomic._exchange", lambda *paths: False)
    monkeypatch.setattr("gralora.files.atomic.os.rename", failing)
    with pytest.raises(OSError, match="on purpose"):
        write_folder(folder, lambda new: (new / "new").write_text("new"))
    assert os.listdir(folder) == ["old"] and os.listdir(tmp_path) == ["out"]


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def training(folder, steps, *, kill_at=None, losses=None):
    """Train, saving after every step; start from the newest step that was saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    done = [int(each.name) for each in folder.iterdir() if each.name.isdigit()]
    start = max(done, default=0)
    if start:
        gralora.load_adapter(model, folder / str(start) / "adapter.safetensors", trainable=True)
    else:
        gralora.inject(model, "all-linear", random_config())
    optimizer = torch.optim.AdamW(gralora.adapter_parameters(model), lr=1e-2)
    if start:
        optimizer.load_state_dict(torch.load(folder / str(start) / "optimizer.pt"))
    for step in range(start + 1, steps + 1):
        x, target = batch(step)
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if losses is not None:
            losses[step] = loss.item()
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        write_folder(folder / str(step), lambda new: save(model, optimizer, new))
    return model


def save(model, optimizer, folder):
    gralora.save_adapter(model, folder / "adapter.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def test_a_run_killed_at_any_step_goes_on_with_the_same_losses_to_the_last_bit(tmp_path):
    steps, expected = 8, {}
    (tmp_path / "whole").mkdir()
    model = training(tmp_path / "whole", steps, losses=expected)
    assert len(set(expected.values())) == steps
    for kill_at in range(1, steps + 1):
        folder, losses = tmp_path / f"killed at {kill_at}", {}
        folder.mkdir()
        os.waitpid(forked(lambda: training(folder, steps, kill_at=kill_at)), 0)  # noqa: B023
        assert {each.name for each in folder.iterdir()} == {str(step) for step in range(1, kill_at)}
        resumed = training(folder, steps, losses=losses)
        assert losses == {step: expected[step] for step in range(kill_at, steps + 1)}
        for mine, theirs in zip(
            gralora.adapter_parameters(resumed), gralora.adapter_parameters(model), strict=True
        ):
            assert same_bits(mine, theirs)


def test_systems_that_can_neither_exchange_nor_link(tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise OSError("not here")

    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "notes.txt").write_text("kept")
    monkeypatch.setattr("gralora.files.atomic.os.link", missing)
    monkeypatch.setattr("gralora.files.atomic.ctypes.CDLL", missing)
    for model in two_versions({}):
        gralora.save_adapter(model, folder, format="peft")
    assert (folder / "notes.txt").read_text() == "kept" and os.listdir(tmp_path) == ["adapter"]


@pytest.fixture
def umask():
    """Sets it, and puts the old one back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def wrapped():
    return gralora.inject(nn.Sequential(nn.Linear(8, 8)), "0", random_config())


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("format", ["gralora", "peft", "lora"])
def test_files_and_folders_have_the_mode_that_the_umask_gives(format, mask, umask, tmp_path):
    umask(mask)
    path = tmp_path / "adapter"
    gralora.save_adapter(wrapped(), path, format=format)
    torch.save({}, tmp_path / "torch")
    for each in [path, *path.rglob("*")]:
        assert mode(each) == (0o777 & ~mask if each.is_dir() else mode(tmp_path / "torch"))


@pytest.mark.parametrize("format", ["gralora", "peft", "lora"])
def test_what_is_replaced_keeps_the_mode_that_it_had(format, umask, tmp_path):
    path, model = tmp_path / "adapter", wrapped()
    gralora.save_adapter(model, path, format=format)
    for each in [path, *path.rglob("*")]:
        each.chmod(0o750 if each.is_dir() else 0o640)
    gralora.save_adapter(model, path, format=format)
    for each in [path, *path.rglob("*")]:
        assert mode(each) == (0o750 if each.is_dir() else 0o640)


def test_a_merged_checkpoint_has_the_modes_too(umask, tmp_path):
    model, out = wrapped(), tmp_path / "out.safetensors"
    save_file(
        {key: t for key, t in model.state_dict().items() if "gralora_" not in key},
        tmp_path / "base.safetensors",
    )
    gralora.save_adapter(model, tmp_path / "adapter")
    assert run("merge", tmp_path / "base.safetensors", tmp_path / "adapter", out) == 0
    assert mode(out) == 0o644
    out.chmod(0o600)
    assert run("merge", tmp_path / "base.safetensors", tmp_path / "adapter", out, "--force") == 0
    assert mode(out) == 0o600
