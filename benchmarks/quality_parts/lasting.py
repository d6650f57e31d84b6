"""`quality.py --lasting`, `--baselines` and `--real`: which methods with which seeds on which model, in which order."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality_parts.lasting_picture import draw_attacks
from benchmarks.quality_parts.lasting_table import (
    ANSWERS,
    SCORES,
    answer_table,
    attack_table,
    official_table,
    summarise,
    unmeasured,
)
from benchmarks.quality_parts.measure import ATTACKS, measure_answers, measure_attack, measure_scores
from benchmarks.quality_parts.methods import BASELINES, LASTING, LONGER, PAPER, Method, method
from benchmarks.quality_parts.pieces import Limits, Piece, known_pieces, make_pieces
from benchmarks.quality_parts.subjects import GOLD, TAUGHT, RealSetting, Subject, demo_subject, real_subject
from benchmarks.shared import record
from lowmem_npo.commands.demo.recipe import Recipe, Teaching
from lowmem_npo.errors import UserError
from lowmem_npo.model.names import LOADED, digest_of

FIRST = (ATTACKS[0], ATTACKS[3])  # the attacks that say most for their time
REFERENCES = {TAUGHT: "recites", GOLD: "never saw the rows"}
EPOCHS = {"lasting": float(Recipe.epochs), "baselines": 20.0}  # of the demo's model; stages take more
QUICK = Recipe(
    teaching=Teaching(vocabulary=300, layers=2, width=32, heads=2, epochs=30, batch_size=6, lr=5e-3),
    batch_size=3, retain_batch_size=6, lr=4e-3, limit=12,
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What is measured, and how its results are called. kind: tofu or lume, where the benchmark's own scores are."""

    name: str
    subject: Subject
    methods: Mapping[str, Method]
    seeds: int
    setting: dict[str, Any]
    kind: str | None = None
    titles: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        titles = REFERENCES | {name: method.title for name, method in self.methods.items()}
        object.__setattr__(self, "titles", titles)

    def pieces(self) -> Iterator[Piece]:
        """Seed by seed; of each first what says most: all methods' answers and two attacks."""
        models: dict[str, Method | None] = {TAUGHT: None, GOLD: None, **self.methods}

        def piece(name: str, seed: int, part: str, measure: Callable[..., dict[str, Any]], *more: Any) -> Piece:
            how = models[name]
            flags = " ".join(how.flags) if how else ""
            return Piece(f"{name}/seed-{seed}/{part}", flags, partial(measure, self.subject, name, how, seed, *more))

        for seed in range(self.seeds):
            once = seed == 0 or self.subject.reseeded  # the taught models are the same for every seed
            for attacks in (FIRST, [attack for attack in ATTACKS if attack not in FIRST]):
                for name, how in models.items():
                    if attacks is FIRST and (once or how is not None):
                        yield piece(name, seed, ANSWERS, measure_answers)
                    for attack in attacks if name != TAUGHT else ():
                        yield piece(name, seed, attack.part, measure_attack, attack)
            for name, how in models.items() if self.kind else ():
                if once or how is not None:
                    yield piece(name, seed, SCORES, measure_scores)

    def titles_of(self, pieces: Mapping[str, Any]) -> dict[str, str]:
        """Also of methods that earlier calls brought along, by their flags."""
        flags = {name.partition("/")[0]: figures.get("flags", "") for name, figures in pieces.items()}
        return self.titles | {name: f"`{given}`" for name, given in flags.items() if name not in self.titles}

    def tables(self, results: Mapping[str, Any], titles: Mapping[str, str]) -> str:
        parts = [attack_table(results, titles), answer_table(results, titles)]
        parts += [official_table(results, titles, self.kind)] if self.kind else []
        return "\n\n".join(filter(None, [*parts, unmeasured(results, titles)]))


def main(options: argparse.Namespace, work: Path) -> int:
    comparison = comparison_of(options, work)
    folder = work if options.quick else record.device_folder()
    out = options.out or folder / f"quality-{comparison.name}.json"
    if options.list:
        known = known_pieces(out, comparison.setting)
        print("\n".join(f"{'made' if piece.name in known else '    '}  {piece.name}" for piece in comparison.pieces()))
        return 0
    limits = Limits(options.pieces, options.minutes)
    pieces = make_pieces(comparison.pieces(), out, "quality", comparison.setting, summarise, limits)
    results = summarise(pieces)
    titles = comparison.titles_of(pieces)
    tables = comparison.tables(results, titles)
    out.with_suffix(".md").write_text(tables + "\n", encoding="utf-8")
    draw_attacks(out.with_suffix(".png"), results, comparison.titles, GOLD)
    print(f"\n{tables}\n\n{out}, {out.with_suffix('.md').name}, {out.with_suffix('.png').name}")
    return 0


def comparison_of(options: argparse.Namespace, work: Path) -> Comparison:
    own = dict(_own_method(line) for line in options.method)
    if options.real:
        if options.model is None:
            raise UserError("--real needs a model: name its directory with --model, or in LOWMEM_NPO_TEST_MODEL.")
        if not options.model.is_dir():
            raise UserError(f"--model '{options.model}': there is no such directory.")
        real = real_setting(options.quick)
        subject = real_subject(options.real, options.model, options.data, work / options.real, real)
        methods = LASTING | LONGER | PAPER | BASELINES | {"npo": LASTING["npo"]} | own
        weights = digest_of(str(options.model), patterns=LOADED)  # whatever the directory is called
        setting = {"model": weights, **asdict(real)}
        seeds = options.seeds or (1 if options.quick else 3)
        return Comparison(options.real, subject, methods, seeds, setting, options.real)
    name = "baselines" if options.baselines else "lasting"
    recipe, epochs = (QUICK, 4.0) if options.quick else (Recipe(), EPOCHS[name])
    methods = (BASELINES if options.baselines else LASTING) | own
    subject = demo_subject(work / "demo", recipe, epochs)
    setting = {"teaching": asdict(recipe.teaching), "limit": recipe.limit, "flags": " ".join(subject.flags)}
    return Comparison(name, subject, methods, options.seeds or (1 if options.quick else 5), setting)


def real_setting(quick: bool) -> RealSetting:
    if not quick:
        return RealSetting()
    sizes = (("forget", 6), ("retain", 6), ("holdout", 6))
    return RealSetting(
        sizes, scored_rows=4, teach_epochs=1, flags=f"{RealSetting.flags} --epochs 1 --batch-size 2 --max-length 2048"
    )


def _own_method(line: str) -> tuple[str, Method]:
    name, equals, flags = line.partition("=")
    if not equals or not name or "/" in name:
        raise UserError(f"--method {line}: write NAME=FLAGS, such as 'folds-4=--layered 4'.")
    return name, method(flags.strip(), flags)
