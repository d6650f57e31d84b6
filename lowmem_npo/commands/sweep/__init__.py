"""`lowmem-npo sweep`."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from itertools import chain

from lowmem_npo.commands.arguments import check_inputs, check_names, parse_run, take_options
from lowmem_npo.commands.help_texts import flags_of
from lowmem_npo.commands.small_tables import check_small_tables
from lowmem_npo.commands.spellings import ALIASES
from lowmem_npo.commands.sweep.grid import first_config, parse_grid, parse_seeds, plan_sweep
from lowmem_npo.commands.sweep.options import EvaluationSources, GridOptions, TeachingOptions
from lowmem_npo.config import RunConfig
from lowmem_npo.errors import UserError
from lowmem_npo.libraries import quiet_libraries
from lowmem_npo.sizes import counted, first_of

USAGE = """usage: lowmem-npo sweep --seeds 5 --grid gamma=0,1 delta=0,0.5,1 --model NAME_OR_DIR [options of train]

Trains with every combination of the grid and every seed, each run as `lowmem-npo train` makes it, in
OUTPUT-DIR/gamma=0_delta=0.5/seed-42 and so on. Prints each configuration's mean and standard deviation, and writes them
as sweep.md, sweep.csv (a line per run), sweep_means.csv, sweep.json and sweep.png.

  --grid NAME=V,V,... ...   options of train and their values; quote values of several words:
                            'lora-targets=q_proj v_proj,all-linear'. An empty value leaves the option out:
                            stop-when=,forget-at-holdout. Without --grid: one configuration, over the seeds
  --seeds N | N,N,...       the number of seeds, counted from --seed (42), or the seeds themselves. Default: 5
  --output-dir DIR          directory of the whole sweep. Default: lowmem-npo-output
  --resume                  skip finished runs, continue an interrupted one, retry failed ones; the grid and the seeds
                            may have grown
  --dry-run                 print the runs, their rows and steps, what would be taught and evaluated, and stop

  --teach full|lora         first fine-tune the model on the forget and retain rows, with all weights or with a LoRA of
                            rank 64 that is merged, and a gold model on the retain rows alone; once per sweep, with
                            --seed, in OUTPUT-DIR/taught and gold. The runs forget from the taught model
  --teach-epochs N          passes over the rows taught. Default: 5
  --teach-lr LR             peak of the learning rate. Default: 1e-5 (full), 1e-4 (lora)
  --teach-batch-size N      rows of a step. Default: 32; --micro-batch-size of them at once

  --evaluate NAME,NAME,...  after each run, and once of the model before and of the gold model: lume, tofu, muse,
                            documents, lm_eval, answers; leaks, or leak tests by their names (extraction, sampling,
                            membership, rewording, jailbreak, relearning, retuning, quantization). The options of
                            `lowmem-npo evaluate` that benchmarks and leak tests have are taken, too (--real-authors,
                            --world-facts, --members, --lm-eval ...)
  --evaluate-forget FILE, --evaluate-retain FILE
                            the rows evaluated, where they are not those trained on
  --evaluate-limit N        N rows of each set, the same ones for every run
                            Where any run has --forget-level holdout, the leak tests of all compare with the half of the
                            holdout that judges it

The runs share one loaded model: each gets a fresh adapter, which is removed when it ends. They also share one cached
reference (--reference cached, in OUTPUT-DIR/reference): a row goes through the original model once, in the first run
that needs it, and the results are those of a single run but for rounding. With --reference live it goes through in
every step, and on a CPU each run is then bit for bit that of `train`. A failed run does not end the sweep; the exit
code is then 1.

`lowmem-npo train --help-all` explains the options."""

OWN_FLAGS = [flag for kind in (GridOptions, TeachingOptions, EvaluationSources) for flag in flags_of(kind)]


def main(arguments: Sequence[str]) -> None:
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
        return
    swept, rest = take_options(GridOptions, arguments, "sweep")
    teaching, rest = take_options(TeachingOptions, rest, "sweep")
    evaluation = None
    if any(a.split("=")[0] == "--evaluate" for a in rest):
        quiet_libraries()
        from lowmem_npo.commands.sweep.evaluation import SweepEvaluation  # late: it loads transformers

        evaluation, rest = SweepEvaluation.parse(rest)
    elif alone := next((a for a in rest if a.startswith("--evaluate")), None):
        raise UserError(f"{alone} says how --evaluate measures: give both, or none.")
    options = ["--reference", "cached", *rest]

    def parse(flags: Sequence[str]) -> RunConfig:
        return parse_run([*options, *flags], "sweep", more_flags=OWN_FLAGS)

    points = parse_grid([*chain(*swept.grid)], ALIASES)
    config = first_config(points, parse)
    data = (config.data.forget, config.data.retain, config.data.holdout)
    check_names(config.model.model, *data)
    check_small_tables(config.data)
    runs = plan_sweep(points, parse_seeds([*chain(*swept.seeds)] or ["5"], config.training.seed), parse, print)
    check_inputs(config.model.model, *data, revision=config.model.revision)
    evaluation = evaluation and evaluation.beside([run.config for run in runs])
    root, taught = config.output_dir, teaching if teaching.teach else None
    if config.output.dry_run:
        print("\n".join(str(run.directory) for run in runs))
        quiet_libraries()
        from lowmem_npo.commands.sweep.runs import check_more

        for line in check_more(runs, root, taught, evaluation, {}):
            print(line)
        print(f"Dry run: {counted(len(runs), 'run')}. Nothing was trained or written.")
        return
    quiet_libraries()
    from lowmem_npo.commands.sweep.figures import text_tables  # late: --help need not load transformers
    from lowmem_npo.commands.sweep.runs import sweep

    result = sweep(runs, root, resume=config.output.resume, teaching=taught, evaluation=evaluation)
    print("\n" + text_tables(result, shutil.get_terminal_size((120, 24)).columns))
    print(f"\nTables, figures and picture: {root / 'sweep'}.md, .csv, _means.csv, .json, .png")
    if done := [str(root / run["directory"]) for run in result.runs if run["status"] == "done"]:
        print(f"Runs, each with its report.html and log.txt: {first_of(done, separator=', ')}")
        merge = shlex.join(["lowmem-npo", "merge", "--adapter", done[0], "--output-dir", f"{done[0]}-merged"])
        print(f"No run is chosen: evaluate, ask and merge take the one that you choose, such as `{merge}`.")
    if result.failed:
        print(f"{len(result.failed)} of {len(runs)} runs failed; --resume retries those that did not finish:")
        print("\n".join(f"  {run['directory']}: {run['error']}" for run in result.failed))
        raise SystemExit(1)
