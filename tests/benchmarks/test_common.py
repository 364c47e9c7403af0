"""What every benchmark shares."""

import importlib

import pytest
import torch

from benchmarks import common

from .quick import names


@pytest.mark.parametrize("folder", ["jobs", "evidence", "speed"])
def test_every_benchmark_takes_a_device_and_refuses_one_that_is_not_there(folder, capsys):
    for name in names(folder):
        with pytest.raises(SystemExit):
            importlib.import_module(f"benchmarks.{folder}.{name}").main(["--device", "nowhere"])
        assert "'nowhere' is not on this machine, which has cpu" in capsys.readouterr().err, name


def test_what_is_placed_lies_where_new_tensors_do():
    one = torch.ones(2)
    assert common.placed(one) is one
    with torch.device("meta"):
        assert (
            common.placed(one).is_meta
            and common.placed(torch.nn.Linear(2, 2, device="cpu")).weight.is_meta
        )


def test_a_measured_call_gives_its_seconds_and_its_result():
    seconds, result = common.timed(lambda a, b: a + b, 1, 2)
    assert seconds >= 0 and result == 3


def test_what_an_earlier_call_has_written_is_read_again_and_nothing_where_there_is_none(tmp_path):
    assert common.written(tmp_path, "one") == {}
    common.write(tmp_path, "one", {"runs": {"a": 1}}, common.Figure(), quiet=True)
    assert common.written(tmp_path, "one")["runs"] == {"a": 1}
