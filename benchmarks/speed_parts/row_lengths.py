"""How long real rows are: the tokens of LUME's and TOFU's, without their texts, for machines that have no data.

    python -m benchmarks.speed_parts.row_lengths DATA TOKENIZER

writes row_lengths.json beside this file: of each part of each dataset SAMPLED rows, drawn by seed 0, each as [tokens,
answer tokens], in the form in which a base model is trained on them. TOKENIZER is OLMo's tokenizer.json.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from lowmem_kernels import IGNORE_INDEX
from transformers import PreTrainedTokenizerFast

from benchmarks.speed_parts.side_by_side import FILES
from lowmem_npo.data import TokenizedRow, read_rows, to_examples, tokenize
from lowmem_npo.estimate.rows import row_size

FILE = Path(__file__).with_suffix(".json")
SAMPLED = 64
Rows = list[TokenizedRow]


def real_rows(data: str, count: int) -> tuple[Rows, Rows]:
    """`count` rows to forget and `count` to retain, of random tokens, as long as those of `data` ("lume" or "tofu")."""
    parts, ids = json.loads(FILE.read_text())[data], random.Random(1)
    forget, retain = ([_random_row(ids, *size) for size in parts[part][:count]] for part in ("forget", "retain"))
    return forget, retain


def _random_row(ids: random.Random, length: int, answers: int) -> TokenizedRow:
    row = [ids.randrange(3, 500) for _ in range(length)]
    prompt = length - answers
    return {"input_ids": row, "labels": [IGNORE_INDEX] * prompt + row[prompt:], "prompt_length": prompt}


def main(data: str, tokenizer: str) -> None:
    own = PreTrainedTokenizerFast(tokenizer_file=tokenizer, eos_token="<|endoftext|>")
    lengths: dict[str, dict[str, list]] = {}
    for name, files in FILES.items():
        rows = (tokenize(to_examples(read_rows(str(Path(data) / file))), own) for file in files)
        samples = [random.Random(0).sample([row_size(row) for row in part], SAMPLED) for part in rows]
        lengths[name] = dict(zip(("forget", "retain"), samples, strict=True))
    FILE.write_text(json.dumps(lengths) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
