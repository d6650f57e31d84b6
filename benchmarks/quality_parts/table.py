"""The table of `quality.py`, from the measurements of every adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lowmem_npo.commands.sweep.figures import Spread

COLLAPSED = 0.5  # share of retain answers still given word for word; below it the model has collapsed
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("forget_nll", "forget NLL", 2),
    ("gold_distance", "from gold", 2),
    ("membership_auc", "membership AUC", 2),
    ("retain_nll", "retain NLL", 3),
    ("retain_exact_match", "retain exact", 3),
)


def summarise(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{"before" and "gold": figures; "rows": per (gamma, delta) and length, every figure as mean, sd, values}."""
    before, gold, *after = measured
    pairs = list(dict.fromkeys((entry["gamma"], entry["delta"]) for entry in after))
    rows = []
    for when in dict.fromkeys(entry["when"] for entry in after):
        for gamma, delta in pairs:
            seeds = [e for e in after if (e["when"], e["gamma"], e["delta"]) == (when, gamma, delta)]
            distances = [abs(entry["forget_nll"] - gold["forget_nll"]) for entry in seeds]
            figures = {"gold_distance": asdict(Spread.of(distances))}
            for key in seeds[0]:
                if key not in ("when", "gamma", "delta", "seed", "stopped"):
                    figures[key] = asdict(Spread.of([entry[key] for entry in seeds]))
            rows.append(
                {
                    "when": when,
                    "gamma": gamma,
                    "delta": delta,
                    "seeds": [entry["seed"] for entry in seeds],
                    "collapsed": sum(entry["retain_exact_match"] < COLLAPSED for entry in seeds),
                    "figures": figures,
                }
            )
    return {"before": before, "gold": gold, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """Markdown: the original model, the gold standard, and every row as mean ± standard deviation over the seeds."""
    header = ["γ", "δ", "trained", *(title for _, title, _ in COLUMNS), "collapsed"]
    lines = [header, ["---:"] * 2 + ["---"] + ["---:"] * (len(header) - 3)]
    gold = results["gold"]["forget_nll"]
    for name in ("before", "gold"):
        figures = results[name] | {"gold_distance": abs(results[name]["forget_nll"] - gold)}
        cells = [f"{figures[key]:.{digits}f}" if key in figures else "–" for key, _, digits in COLUMNS]
        lines.append(["–", "–", "gold standard" if name == "gold" else name, *cells, "–"])
    for row in results["rows"]:
        spreads = {key: Spread(**figure) for key, figure in row["figures"].items()}
        cells = [spreads[key].text(digits) if key in spreads else "–" for key, _, digits in COLUMNS]
        share = f"{row['collapsed']} of {len(row['seeds'])}"
        trained = f"stopped, {spreads['epochs'].text(1)} epochs" if row["when"] == "stopped" else row["when"]
        lines.append([f"{row['gamma']:g}", f"{row['delta']:g}", trained, *cells, share])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
