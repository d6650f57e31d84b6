"""`lowmem-npo sweep`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowmem_npo.commands.arguments import ALIASES, parse_run
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import quiet_libraries

USAGE = """usage: lowmem-npo sweep --seeds 5 --grid gamma=0,1 delta=0,0.5,1 --model NAME_OR_DIR [options of train]

Every combination of the grid with every seed, each a run as `lowmem-npo train` does it, in
OUTPUT-DIR/gamma=0_delta=0.5/seed-42 and so on. Prints mean and standard deviation per configuration, and writes them as
sweep.md, sweep.csv, sweep.json and sweep.png.

  --grid NAME=V,V,... ...   options of train, by their names, and their values; quote values of several words:
                            'lora-targets=q_proj v_proj,all-linear'. An empty value leaves the option out:
                            stop-when=,forget-at-holdout. Without --grid: one configuration, over the seeds
  --seeds N | N,N,...       how many, counted from --seed (42), or which. Default: 5
  --output-dir DIR          of the whole sweep (lowmem-npo-output)
  --resume                  skip the runs that are done, continue the one that is not, try failed ones again; the grid
                            and the seeds may have grown
  --dry-run                 print the runs and stop

The runs share one loaded model: each gets a fresh adapter, which is removed when it ends. They share one stored
reference, too (--reference cached, in OUTPUT-DIR/reference): a row goes through the original model once, in the run
that meets it first. Its values are any run's own within rounding; --reference live runs it in every step, and every run
is then, on a CPU, to the bit what `train` gives. A run that fails does not end the sweep; the exit code is then 1.

`lowmem-npo train --help` explains the options."""


def main(arguments: Sequence[str]) -> None:
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
        return
    rest, grid = _take(list(arguments), "--grid")
    rest, seeds = _take(rest, "--seeds")
    options = ["--reference", "cached", *rest]

    def parse(flags: Sequence[str]):
        return parse_run([*options, *flags], "sweep")

    quiet_libraries()
    from lowmem_npo.commands.sweep.grid import parse_grid, parse_seeds, plan_sweep  # after parsing: see train.py

    config = parse([])
    runs = plan_sweep(parse_grid(grid or [], ALIASES), parse_seeds(seeds or ["5"], config.training.seed), parse)
    if config.output.dry_run:
        print("\n".join(str(run.directory) for run in runs))
        print(f"Dry run: {len(runs)} runs. Nothing was trained or written.")
        return
    from lowmem_npo.commands.sweep.figures import text_table
    from lowmem_npo.commands.sweep.runs import sweep

    root = Path(config.output.output_dir)
    result = sweep(runs, root, resume=config.output.resume)
    print("\n" + text_table(result))
    print(f"\nTable, figures and picture: {root / 'sweep'}.md, .csv, .json, .png")
    if result.failed:
        print(f"{len(result.failed)} of {len(runs)} runs failed; --resume tries those again that did not end:")
        print("\n".join(f"  {run['directory']}: {run['error']}" for run in result.failed))
        raise SystemExit(1)


def _take(arguments: list[str], option: str) -> tuple[list[str], list[str] | None]:
    """`arguments` without `option` and the words up to the next option; those words, None if it is not there."""
    if option not in arguments:
        return arguments, None
    at = arguments.index(option)
    end = next((i for i in range(at + 1, len(arguments)) if arguments[i].startswith("--")), len(arguments))
    if end == at + 1 or option in arguments[end:]:
        raise UserError(f"{option} needs a value, and stands once: lowmem-npo sweep --help shows how.")
    return arguments[:at] + arguments[end:], arguments[at + 1 : end]
