"""What a sweep evaluates: after each run, and once of the models that the runs are compared with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_npo.commands.arguments import take_options
from lowmem_npo.commands.evaluate.plan import EvaluationPlan, plan_evaluation
from lowmem_npo.commands.spellings import join_sources
from lowmem_npo.commands.sweep.figures import GOLD, Column
from lowmem_npo.commands.sweep.options import EvaluationSources
from lowmem_npo.config import RunConfig
from lowmem_npo.config.objective import ForgetLevel
from lowmem_npo.console import Say, silent
from lowmem_npo.data.self_written import self_rows
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answer_table import FORGET
from lowmem_npo.evaluation.benchmarks.contract import Benchmark
from lowmem_npo.evaluation.benchmarks.plain import PLAIN
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkOptions
from lowmem_npo.evaluation.benchmarks.tofu import TOFU
from lowmem_npo.evaluation.comparing import check_same_sets
from lowmem_npo.evaluation.directory import COMPARED, THE_SIZE, has_other_judges, is_of_adapter, settings_of
from lowmem_npo.evaluation.earlier import leaks_before
from lowmem_npo.evaluation.leaks.attack import HOLDOUT
from lowmem_npo.evaluation.leaks.beside_before import conclusive
from lowmem_npo.evaluation.leaks.contract import AN_ADAPTER, LeakResult, LeakResults, LeakTest, leak_results
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS, LeakOptions, leak_tests
from lowmem_npo.evaluation.leaks.registry import NAMES as LEAK_NAMES
from lowmem_npo.evaluation.leaks.worst import WORST_ATTACK
from lowmem_npo.evaluation.settings import EvaluationConfig, EvaluationOptions
from lowmem_npo.files import expanded, file_sha256, json_sha256, load_json
from lowmem_npo.records import check_record
from lowmem_npo.run_directory import AdapterFiles, EvaluationFiles, RunFiles
from lowmem_npo.sources import check_file

ALL_LEAKS = "leaks"
# Of each benchmark and leak test; a benchmark with the name of a leak test goes by its group.
NAMES: dict[str, Benchmark] = {(b.group if b.name in LEAK_NAMES else b.name): b for b in BENCHMARKS}
# Options of an evaluation that are not those of the runs.
OWN = (
    "model", "adapter", "any_base", "limit", "seed", "leaks", "forget_level", "before", "output_dir", "resume",
    "batch_size",
)  # fmt: skip
OF_TOKENS = ("exact_", "extraction_", "mia_", "privleak")  # of open-unlearning's figures

SweepEvaluationOptions = make_dataclass(
    "SweepEvaluationOptions", [], bases=(LeakOptions, BenchmarkOptions, EvaluationSources)
)


@dataclass(frozen=True)
class SweepEvaluation:
    """benchmarks, leaks: what is measured. sources: --evaluate-forget and its like. options: those of the benchmarks
    and the leak tests. forget_level: with which half of the holdout leak tests compare, in every run of the sweep."""

    benchmarks: Mapping[str, Benchmark]
    leaks: Sequence[LeakTest]
    sources: EvaluationSources
    options: Mapping[str, Any]
    forget_level: ForgetLevel = "none"

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> tuple[SweepEvaluation, list[str]]:
        """The evaluation that `arguments` describe, and the other arguments.

        Raises:
            UserError: a benchmark or leak test that there is not.
        """
        parsed, rest = take_options(SweepEvaluationOptions, join_sources(arguments), "sweep")
        names = [name.replace("-", "_") for name in parsed.evaluate]
        known = [*NAMES, ALL_LEAKS, *LEAK_NAMES]
        if not names or (unknown := [name for name in names if name not in known]):
            problem = f"there is no '{unknown[0]}'" if names else "name what to evaluate"
            raise UserError(f"--evaluate: {problem}; there are {', '.join(known)}.")
        leaks = LEAK_TESTS if ALL_LEAKS in names else leak_tests([name for name in names if name in LEAK_NAMES])
        sources = EvaluationSources(**{f.name: getattr(parsed, f.name) for f in fields(EvaluationSources)})
        own = {f.name for f in fields(EvaluationSources)}
        options = {f.name: getattr(parsed, f.name) for f in fields(parsed) if f.name not in own}
        check_file("--retained-log", options["retained_log"])
        return cls({name: NAMES[name] for name in NAMES if name in names}, leaks, sources, options), rest

    def beside(self, runs: Sequence[RunConfig]) -> SweepEvaluation:
        """The same for a sweep of these runs: if one of them is judged by half of its holdout, then so are all, and the
        models before and gold, or the lines of a table could not be compared."""
        halved = any(run.objective.forget_level == "holdout" for run in runs)
        return replace(self, forget_level="holdout" if halved else "none")

    @property
    def names(self) -> list[str]:
        return [*self.benchmarks, *(f"leak test {test.name}" for test in self.leaks)]

    def of_run(self, run: RunConfig, before: Path, gold: Path | None) -> EvaluationConfig:
        """What is measured of the run's adapter. before, gold: evaluation.json of the model before, and of the one that
        never saw the forget rows."""
        files = RunFiles(run.output_dir)
        more = {"adapter": str(files.path), "before": str(before)}
        return self._config(run, self.leaks, gold, files, **more)

    def of_before(self, run: RunConfig, files: RunFiles, gold: Path | None) -> EvaluationConfig:
        """The same of the model that the run begins with. files: where."""
        leaks = [test for test in self.leaks if AN_ADAPTER not in test.needs and not test.after_only]
        return self._config(run, leaks, gold, files, adapter=run.adapter.adapter)

    def of_gold(self, run: RunConfig, files: RunFiles) -> EvaluationConfig:
        """The same of the model that never saw the forget rows, with which `run` would begin."""
        return self._config(run, [test for test in self.leaks if AN_ADAPTER not in test.needs], None, files)

    def _config(
        self, run: RunConfig, leaks: Sequence[LeakTest], gold: Path | None, files: RunFiles, **more: Any
    ) -> EvaluationConfig:
        flat = run.flat()
        settings = {f.name: flat[f.name] for f in fields(EvaluationOptions) if f.name in flat and f.name not in OWN}
        if self_rows(flat["retain"]) is not None:
            settings["retain"] = str(files.self_written)
        settings["forget"] = self.sources.evaluate_forget or settings["forget"]
        settings["retain"] = self.sources.evaluate_retain or settings["retain"]
        settings |= self.options
        if gold is not None and (TOFU in self.benchmarks.values() or self.leaks):
            settings["retained_log"] = settings["retained_log"] or str(gold)
        config = EvaluationConfig(
            **settings,
            **more,
            model=run.model.model,
            any_base=True,  # the run's own, wherever it lies by now
            limit=self.sources.evaluate_limit,
            leaks=tuple(test.name for test in leaks),
            forget_level=self.forget_level if leaks and flat["holdout"] is not None else "none",
            batch_size=run.output.eval_batch_size,
            output_dir=str(files.evaluation.path),
            resume=files.evaluation.settings.exists(),
        )
        if flat["forget"] is None and not config.bundled:
            raise UserError("--evaluate: the bundled rows are evaluated without others; name rows with --forget.")
        return config

    def plan(self, config: EvaluationConfig, run: RunConfig, say: Say) -> EvaluationPlan:
        """Reads and checks the rows; no weights.

        Raises:
            UserError: as in `evaluate`, or a benchmark of which there are no rows.
        """
        chosen = {benchmark.name for benchmark in self.benchmarks.values()}
        plan = plan_evaluation(config, say, first=run.data.limit, only=chosen)
        measured = {benchmark.name for benchmark, _, _ in plan.selected}
        for name, benchmark in self.benchmarks.items():
            if benchmark.name not in measured:
                raise UserError(f"--evaluate {name}: no set has its rows: {benchmark.summary}.")
        return plan

    def check(self, run: RunConfig, before: RunFiles) -> list[str]:
        """What will be measured on how many rows, in lines. before: where the model that the run begins with is, or
        will be, measured.

        Raises:
            UserError: what can be known to be wrong, and other rows than that model was measured on.
        """
        config = self.of_before(run, before, None)
        own_texts = self_rows(run.data.retain) is not None and self.sources.evaluate_retain is None
        if own_texts and not before.self_written.exists():
            config = replace(config, retain=None)  # not written yet
        plan = self.plan(config, run, silent)
        check_same_sets(before.evaluation, plan.digests)
        rows: dict[str, list[str]] = {}
        for benchmark, name, selection in plan.selected:
            rows.setdefault(benchmark.title, []).append(f"{len(selection.rows)} {name}")
        for name, selection in plan.leak_rows.items():
            tests = ", ".join(test.name for test in self.leaks)
            rows.setdefault(f"leak tests ({tests})", []).append(f"{len(selection.rows)} {name}")
        return [f"{what}: {', '.join(counts)} rows" for what, counts in rows.items()]

    def is_outdated(self, plan: EvaluationPlan) -> bool:
        """Whether in the directory there is what was measured of an adapter that is gone, a shorter run's, or beside
        another part of the holdout, as before the sweep had its first run with levels."""
        config, files = plan.config, EvaluationFiles(plan.config.path)
        if not files.settings.exists():
            return False
        if config.adapter and not is_of_adapter(files, _weights(config.adapter)):
            return True
        began = settings_of(str(files.result))
        return began is not None and has_other_judges(began, config.leaks, plan.digests)

    def key(self, plan: EvaluationPlan) -> str:
        """A hash of all that the figures depend on: options, rows, model, tokenizer and adapter, and the figures of
        other models that they are compared with; wherever they lie."""
        options = asdict(plan.config)
        told = {"model", "adapter", "forget_level", *EvaluationConfig.sources(), *COMPARED}  # by the digests
        settings = {name: of for name, of in options.items() if name not in told | {"output_dir", "resume"}}
        results = [expanded(path) for name in COMPARED if (path := options[name])]
        beside = [EvaluationFiles(path.parent).rows for path in results]
        compared = [file_sha256(file) for file in [*results, *beside] if file.is_file()]
        digests = {name: of for name, of in plan.digests.items() if name != THE_SIZE}  # the model's tells
        return json_sha256([settings, sorted(self.benchmarks), digests, compared])

    def figures(self, files: EvaluationFiles) -> dict[Column, float | str]:
        """Every figure that is in the directory, and the name of the worst attack."""
        if not files.result.exists():
            return {}
        content = load_json(files.result)
        try:
            return self._figures_in(content, leaks_before(files))
        except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"'{files.result}' is damaged: restore or remove it.") from error

    def _figures_in(self, content: Any, before: LeakResults) -> dict[Column, float | str]:
        """before: what the leak tests gave of the model before it forgot."""
        measured: dict[Column, float | str] = {}
        for name, benchmark in self.benchmarks.items():
            if content.get(benchmark.name):
                measured |= _benchmark_figures(name, benchmark, content[benchmark.name])
        leaks = leak_results(content.get("leaks") or {})
        telling = conclusive(leaks, before)
        for test in self.leaks:
            if test.name in leaks:
                measured |= _leak_figures(test, leaks[test.name], test.name in telling)
        measured |= _worst_figures(content.get(WORST_ATTACK) or {})
        for name, value in _numbers(content.get("open_unlearning", {})):
            shown = name.startswith(OF_TOKENS)  # the others repeat TOFU's: for files only
            group = "under open-unlearning's names" if shown else None
            measured[Column(f"open_unlearning.{name}", name, group=group)] = value
        return measured


def _benchmark_figures(name: str, benchmark: Benchmark, content: Any) -> dict[Column, float]:
    figures = [figure for figure in benchmark.figures(content) if figure.value is not None]
    total = any(figure.set is None for figure in figures)
    measured = {}
    for figure in figures:
        key = ".".join(filter(None, [name, figure.set, figure.key])).replace(", ", "_").replace(" ", "_")
        named = figure.set is None or figure.set in figure.title
        title = figure.title if named else f"{figure.set} {figure.title}"
        if benchmark is PLAIN:  # which train measures, too
            main = False
        elif benchmark.sets:
            main = figure.set == (None if total else FORGET)
        else:
            main = True
        assert figure.value is not None
        measured[Column(key, title, group=benchmark.title, main=main)] = figure.value
    return measured


def _weights(adapter: str) -> Path:
    return AdapterFiles(expanded(adapter)).weights


def _leak_figures(test: LeakTest, result: LeakResult, conclusive: bool) -> dict[Column, float]:
    """The verdict as 1, 0 or, where it is not conclusive, nothing, and the figures; those that are not declared by
    themselves are for files only."""
    group, measured = f"leak test {test.name}", {}
    if conclusive and result.leaks is not None:
        measured[Column(f"leaks.{test.name}.leaks", "traces found", None, group)] = float(result.leaks)
    for name, value in _numbers(result.figures):
        if name.rpartition(".")[2] not in (*test.counts, *test.unlisted):
            shown = name in test.figures and bool(test.figures[name].wish)
            title, of = (test.figures[name].title, group) if shown else (name, None)
            measured[Column(f"leaks.{test.name}.{name}", title, group=of, main=name == test.main)] = value
    return measured


def _worst_figures(content: Mapping[str, Any]) -> dict[Column, float | str]:
    """Which attack is the worst, what it brings back, and what stands beside it, under the name of what was measured: a
    mean over seeds is of one measure, though the attack may be another in each. Raises ValueError where a figure is no
    number, or a name no text."""
    titles = {"value": "brought back", HOLDOUT.strip("_"): "on the holdout", GOLD: "by it from gold"}
    names = {"test": str, "attack": str, "figure": str}
    check_record(content, {**dict.fromkeys(titles, float | None), **names}, optional=[*titles, *names])
    group, measure = "worst attack of all leak tests", content.get("figure", "")
    measured: dict[Column, float | str] = {}
    if test := content.get("test"):
        name = ": ".join(filter(None, [test, content.get("attack")]))
        measured[Column(f"{WORST_ATTACK}.name", "worst attack", group=group)] = name
    for key, title in titles.items():
        if (value := content.get(key)) is not None:
            path = ".".join(filter(None, [WORST_ATTACK, re.sub(r"\W+", "_", measure.lower()), key]))
            shown = f"{measure} {title}".strip()
            measured[Column(path, shown, group=group, main=key == "value")] = value
    return measured


def _numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)
