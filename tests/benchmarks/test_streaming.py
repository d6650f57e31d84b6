"""benchmarks/streaming.py runs, and says so where it cannot measure."""

import json

import torch

from benchmarks import streaming


def test_the_same_loss_resident_and_streamed(tmp_path, capsys):
    out = tmp_path / "streaming.json"
    assert streaming.main(["--quick", "--steps", "1", "--out", str(out)]) == 0
    results = {result["configuration"]: result for result in json.loads(out.read_text())["results"]}
    assert results.keys() == streaming.CONFIGURATIONS.keys()
    assert len({result["first_loss"] for result in results.values()}) == 1


def test_losses_are_compared_where_the_other_switches_are_the_same():
    """A tiled MLP multiplies in other shapes, which round otherwise on a GPU."""
    losses = {"resident": 1.0, "streamed": 1.0, "resident, all switches": 1.5, "streamed, all switches": 1.5}
    results = [{"configuration": label, "first_loss": loss} for label, loss in losses.items()]
    assert streaming.all_alike(results)
    assert not streaming.all_alike([*results, {"configuration": "streamed from files", "first_loss": 1.5}])
    assert not streaming.all_alike([*results, {"configuration": "streamed from files", "missing": "no memory"}])


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert streaming.main([]) == 0 and "No GPU here" in capsys.readouterr().out
