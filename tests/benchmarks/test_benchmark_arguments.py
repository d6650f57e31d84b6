"""What the benchmarks' command lines cannot mean is refused before anything is measured."""

from __future__ import annotations

import pytest

from benchmarks import memory, speed, streaming


@pytest.mark.parametrize("benchmark", [memory, speed, streaming])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--model", "allenai/OLMo-7B-h"), "not 'allenai/OLMo-7B-h'; did you mean allenai/OLMo-7B-hf?"),
        (("--model", "nothing like it"), "it must be one of Qwen/"),
        (("--tokens", "0"), "0 is not at least 1"),
        (("--steps", "0"), "0 is not at least 1"),
    ],
)
def test_a_mistake_is_a_sentence(benchmark, option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(option)
    assert message in capsys.readouterr().err
