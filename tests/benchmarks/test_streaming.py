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


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert streaming.main([]) == 0 and "No GPU here" in capsys.readouterr().out
