"""Tables of `quality.py --lasting`, `--baselines` and `--real`: a line per method, means over seeds; what is not yet
measured is shown as such."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.quality_parts.measure import ATTACKS
from benchmarks.quality_parts.subjects import GOLD, TAUGHT
from lowmem_npo.commands.sweep.figures import Spread
from lowmem_npo.evaluation.figures import at

Figures = dict[str, Any]
MISSING = "not yet"
ANSWERS, SCORES = "answers", "scores"
MEMBERSHIP = {"loss": "LOSS", "min_k": "Min-K%", "min_k_pp": "Min-K%++", "zlib": "zlib"}
OFFICIAL: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {  # where a score is in evaluation.json, and its title
    "tofu": (
        (("tofu", "forget_quality"), "TOFU forget quality"),
        (("tofu", "model_utility"), "model utility"),
        (("open_unlearning", "privleak"), "privleak"),
        (("leaks", "sampling", "best_rouge_l_recall"), "best of 8 samples"),
        (("fluency", "forget", "nll"), "NLL of what it says"),
    ),
    "lume": (
        (("lume", "harmonic-mean-task-aggregate"), "LUME task aggregate"),
        (("lume", "mia_final_score"), "membership score"),
        (("open_unlearning", "privleak"), "privleak"),
        (("leaks", "sampling", "best_rouge_l_recall"), "best of 8 samples"),
        (("fluency", "forget", "nll"), "NLL of what it says"),
    ),
}
FLUENCY = "fluency/forget/nll"  # of what is said, to the original model, which both of these are
NEVER = {  # what is not measured of a model, since it would say nothing
    TAUGHT: {*(attack.part for attack in ATTACKS), "worst_attack", FLUENCY},
    GOLD: {"tofu/forget_quality", FLUENCY},  # the former compares with gold
}


def summarise(pieces: Mapping[str, Figures]) -> dict[str, dict[str, Figures]]:
    """Method -> figure -> its mean, standard deviation and values over the seeds in which it was measured."""
    by_method: dict[str, dict[str, dict[int, Figures]]] = {}
    for name, figures in pieces.items():
        method, seed, part = name.split("/")
        by_method.setdefault(method, {}).setdefault(part, {})[int(seed.removeprefix("seed-"))] = figures
    return {method: _of_method(parts) for method, parts in by_method.items()}


def _of_method(parts: Mapping[str, Mapping[int, Figures]]) -> dict[str, Figures]:
    values: dict[str, dict[int, float]] = {}

    def add(key: str, part: str, of: Callable[[Figures], float | None]) -> None:
        known = {seed: of(figures) for seed, figures in sorted(parts.get(part, {}).items())}
        if numbers := {seed: value for seed, value in known.items() if value is not None}:
            values[key] = numbers

    for of_set in ("forget", "retain"):
        for figure in ("nll", "exact_match", "rouge_l_recall", "extraction_strength"):
            add(f"{of_set}_{figure}", ANSWERS, lambda figures: at(figures, of_set, figure))  # noqa: B023
    for score in MEMBERSHIP:
        add(f"auc_{score}", ANSWERS, lambda figures: at(figures, "membership", score))  # noqa: B023
    add("general_nll", ANSWERS, lambda figures: figures.get("general_nll"))
    for attack in ATTACKS:
        add(attack.part, attack.part, lambda figures: figures["extraction_strength"])
    measured = [values.get(attack.part, {}) for attack in ATTACKS]
    if whole := sorted(set.intersection(*map(set, measured))):
        values["worst_attack"] = {seed: max(of[seed] for of in measured) for seed in whole}
    for kind in OFFICIAL.values():
        for path, _ in kind:
            add("/".join(path), SCORES, lambda figures: at(figures, *path))  # noqa: B023
    spreads = {key: Spread.of(list(of.values())) for key, of in values.items()}
    return {
        key: {"mean": spread.mean, "sd": spread.sd, "values": spread.values, "seeds": list(values[key])}
        for key, spread in spreads.items()
    }


def attack_table(results: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str]) -> str:
    """Extraction strength of the rows that were not shown, attack by attack."""
    columns = [("forget_extraction_strength", "before"), *((attack.part, attack.title) for attack in ATTACKS)]
    return _table(results, titles, [*columns, ("worst_attack", "worst")], 2)


def answer_table(results: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str]) -> str:
    """What the model says and finds likely, and what betrays the rows."""
    columns = [("forget_nll", "forget NLL"), ("forget_rouge_l_recall", "forget ROUGE-L")]
    columns += [(f"auc_{score}", title) for score, title in MEMBERSHIP.items()]
    columns += [("retain_nll", "retain NLL"), ("retain_exact_match", "retain exact")]
    return _table(results, titles, columns, 2, {"retain_nll": 3, "retain_exact_match": 3})


def official_table(results: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str], kind: str) -> str:
    """The benchmark's own scores, and the NLL of general rows."""
    columns = [("/".join(path), title) for path, title in OFFICIAL[kind]]
    return _table(results, titles, [("general_nll", "general NLL"), *columns], 2, {"general_nll": 3})


def _table(
    results: Mapping[str, Mapping[str, Figures]],
    titles: Mapping[str, str],
    columns: Sequence[tuple[str, str]],
    digits: int,
    own_digits: Mapping[str, int] = {},
) -> str:
    lines = [["method", "seeds", *(title for _, title in columns)], ["---"] + ["---:"] * (len(columns) + 1)]
    for method, title in titles.items():
        of_method = results.get(method, {})
        if not any(key in of_method for key, _ in columns):
            continue
        most = max(len(of_method[key]["seeds"]) for key, _ in columns if key in of_method)
        never = NEVER.get(method, set())
        cells = ["–" if k in never else cell(of_method.get(k), own_digits.get(k, digits), most) for k, _ in columns]
        lines.append([title, str(most), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if len(lines) > 2 else ""


def unmeasured(results: Mapping[str, Mapping[str, Figures]], titles: Mapping[str, str]) -> str:
    """Names what no table has a line for; "" where there is nothing."""
    left = [title for method, title in titles.items() if method not in results]
    return f"Not yet measured: {'; '.join(left)}." if left else ""


def cell(figure: Figures | None, digits: int, most: int = 0) -> str:
    """The mean, with its standard deviation where there are several seeds, and their number where it is below `most`:
    such a figure stands beside others of more seeds, which may be above or below."""
    if figure is None:
        return MISSING
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}"
    fewer = f" ({len(figure['seeds'])} of {most})" if len(figure["seeds"]) < most else ""
    return f"{figure['mean']:.{digits}f}{spread}{fewer}"
