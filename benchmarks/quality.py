"""How well forgetting works: is it stable over seeds, does it last, and how do other ways compare? On a small scale.

    python benchmarks/quality.py                   the paper's four rows of (gamma, delta) on a small model, 5 seeds
    python benchmarks/quality.py --lasting         ways to forget that are to last, on the demo's model, 5 seeds
    python benchmarks/quality.py --baselines       GA, GD, KL-min, two-model NPO, SimNPO, IDK, DPO and ours, likewise
    python benchmarks/quality.py --real tofu|lume --model DIR --data FOLDER
                                                   both on a real model (SmolLM2-135M-Instruct), 3 seeds

The first is described in quality_parts/paper_rows.py. --quick is the same with less of everything, to see that it runs;
--lume FOLDER a larger model, taught LUME; meant for a GPU.

The others teach a model the rows to forget and to retain until it recites them, and a gold model the rows to retain
alone; `lowmem-npo train` then makes the former forget, in each way with every seed. Measured: what it says, membership,
and what comes back of the rows not shown when a part is taught again, in five ways. They run in pieces, each written
into the results as soon as it is made: --minutes begins none after that time, --pieces names some, and the same command
goes on with what is missing. The taught models and the adapters are kept in --work, outside the repository.

The commands that made the results of this repository name a model by its directory: LOWMEM_NPO_TEST_MODEL and
LOWMEM_NPO_TEST_DATA stand for --model and --data.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import checkout  # noqa: F401

import torch

from benchmarks.quality_parts import lasting, paper_rows
from benchmarks.quality_parts.picture import draw_quality
from benchmarks.quality_parts.real_rows import KINDS
from benchmarks.quality_parts.table import summarise, table
from benchmarks.shared import record
from benchmarks.shared.arguments import count, minutes
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import quiet_libraries

KEPT = Path(tempfile.gettempdir()) / "lowmem-npo-quality"  # the taught models and the adapters, between calls


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    quiet_libraries()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # a model this small gains little from a second one
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if options.lasting or options.baselines or options.real:
                return lasting.main(options, options.work or (Path(scratch) if options.quick else KEPT))
            return _paper_rows(options, options.work or Path(scratch))
    except UserError as error:
        print(f"quality: {error}")
        return 2


def _paper_rows(options: argparse.Namespace, work: Path) -> int:
    begin = time.monotonic()
    try:
        setting = paper_rows.QUICK if options.quick else paper_rows.BUNDLED
        if options.lume:
            setting = paper_rows.lume(options.lume, options.quick)
    except UserError as error:
        print(f"quality: skipped, {error}")
        return 0
    measured = paper_rows.measure_rows(
        setting, work, options.seeds or (2 if options.quick else 5), _within(options.minutes, begin)
    )
    results = summarise(measured)
    print("\n" + table(results))
    out = options.out or (None if options.quick else record.device_folder() / "quality.json")
    if out is not None:
        stopping = {"stop_when": paper_rows.STOP_WHEN, "patience": paper_rows.PATIENCE}
        more: dict[str, Any] = {"setting": asdict(setting), **stopping, "measured": measured}
        record.write(out, "quality", results, seconds=round(time.monotonic() - begin), **more)
        out.with_suffix(".md").write_text(table(results) + "\n", encoding="utf-8")
        draw_quality(out.with_suffix(".png"), results)
        print(f"\n{out}, {out.with_suffix('.md').name}, {out.with_suffix('.png').name}")
    return 0


def _within(minutes: float | None, begin: float) -> Callable[[int], bool]:
    """Whether there is time for another seed, after the first; says so if not."""

    def goes_on(seed: int) -> bool:
        over = bool(seed) and minutes is not None and time.monotonic() - begin > 60 * minutes
        if over:
            print(f"{minutes:g} minutes are over: {seed} seeds were measured")
        return not over

    return goes_on


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--lasting", action="store_true")
    what.add_argument("--baselines", action="store_true")
    what.add_argument("--real", choices=KINDS)
    what.add_argument("--lume", type=Path, metavar="FOLDER", help="the folder that holds lume/")
    parser.add_argument("--quick", action="store_true")
    model, data = os.environ.get("LOWMEM_NPO_TEST_MODEL"), os.environ.get("LOWMEM_NPO_TEST_DATA", "../shared/data")
    parser.add_argument("--model", type=Path, default=model, help="with --real: directory of the model")
    parser.add_argument(
        "--data", type=Path, default=Path(data), help="with --real: the folder that holds lume/ and tofu/"
    )
    parser.add_argument("--seeds", type=count, help="number of seeds; default 5, with --real 3, with --quick 2")
    parser.add_argument("--minutes", type=minutes, help="begin no further piece (or seed) after this many minutes")
    parser.add_argument(
        "--pieces", nargs="+", default=(), metavar="PATTERN", help="only pieces such as 'npo/*/answers'"
    )
    parser.add_argument("--list", action="store_true", help="list the pieces, and which of them are made, and stop")
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME=FLAGS", help="one more way: flags of lowmem-npo train"
    )
    parser.add_argument("--out", type=Path, help="the JSON file; picture and table are written beside it")
    parser.add_argument(
        "--work",
        type=Path,
        help="directory of models and runs, of which nothing is made twice; default: one among the system's temporary "
        "files, for the paper's rows one that is not kept",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
