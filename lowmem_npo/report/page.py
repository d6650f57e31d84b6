"""report.html: a single file with its pictures inside, which loads and runs nothing."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import lowmem_npo
from lowmem_npo.config import PREFERRING_TERMS, REFUSING_TERMS
from lowmem_npo.data.reading import described
from lowmem_npo.evaluation.answer_table import scope
from lowmem_npo.evaluation.answers import AnswerSummary, part_of
from lowmem_npo.evaluation.benchmarks.registry import BENCHMARKS
from lowmem_npo.evaluation.figures import side_by_side
from lowmem_npo.files import expanded, name_of
from lowmem_npo.idle_options import idle_options
from lowmem_npo.report.audit import seconds
from lowmem_npo.report.content import EVIDENCE, Content
from lowmem_npo.report.figures import ANSWERS
from lowmem_npo.report.glossary import GLOSSARY, anchor, linked
from lowmem_npo.report.inline_svg import bar_legend, bar_pictures, curve_pictures
from lowmem_npo.report.leak_tests import leak_sections, shown_beside, words
from lowmem_npo.report.plain_words import first_page
from lowmem_npo.report.verdict import form_words, said_count
from lowmem_npo.report.verdict_rules import RULES
from lowmem_npo.run_directory import RunFiles, from_here

LONGEST = 600  # characters of a text that an example shows
TONES = {"good": "as intended", "mixed": "with reservations", "bad": "not as intended", "unknown": "inconclusive"}


@dataclass(frozen=True)
class Tile:
    """A main figure: its title, its course ("60 → 0"), and its scale and the gold standard's value."""

    title: str
    course: str
    note: str


def render_page(content: Content, examples: int) -> str:
    """The page. examples: rows of each set whose text it contains; 0 for none."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"side_by_side": side_by_side, "text": shortened, "by_set": by_set}
    environment.filters |= {"part_of": part_of, "set_title": set_title, "linked": linked, "anchor": anchor}
    environment.filters["quoted"] = lambda path: shlex.quote(str(path))
    settings, (model, _) = content.settings, base_model(content)
    refuses = settings.get("forget_term") in REFUSING_TERMS
    idle = idle_options(settings)
    given = {name: value for name, value in settings.items() if value is not None and name not in idle}
    return environment.get_template("report.html.jinja").render(
        c=content,
        cost=cost(content),
        run=RunFiles(content.directory),
        model_name=model,
        first_page=first_page(content, model),
        teaches_refusal=refuses,
        teaches_others=settings.get("forget_term") in (*REFUSING_TERMS, *PREFERRING_TERMS),
        tone=TONES[content.verdict.tone],
        evidence=EVIDENCE,
        rules=RULES,
        tiles=list(_tiles(content.stages)),
        answers=[figure for figure in content.figures if figure.group == ANSWERS],
        scope=scope(content.stages) if content.stages else "",
        legend=bar_legend(content.stages) if content.stages else [],
        bars=bar_pictures(content.stages),
        curves=curve_pictures(content.metrics, content.stages, refuses),
        examples=content.examples(examples),
        leak_tests=[(test, words(test.name)) for test in leak_sections(content.leaks)],
        worst={stage: (attack, *shown_beside(attack)) for stage, attack in content.worst_attacks.items()},
        groups=list(_groups(content)),
        glossary=GLOSSARY,
        audit_lines=list(audit_lines(content.audit)) if content.audit else [],
        configuration=yaml.safe_dump(given, sort_keys=False, allow_unicode=True).rstrip(),
        version=lowmem_npo.__version__,
    )


def audit_lines(audit: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    """(what it is, the record in words, a hash or None); of the rows' hashes, one hash over all of them."""
    model, adapter, rows = audit["model"], audit["adapter"], audit["forget_rows"]
    loaded = f", loaded as {model['loaded']}" if model["loaded"] != model["name"] else ""
    yield "Base model", f"{model['name']}{loaded} ({model['class']}, {model['weights']})", None
    if model["revision"]:
        yield "Revision", model["revision"], None
    if model["commit"]:
        yield "Commit", "of the repository on the hub", model["commit"]
    yield "Weights", model["weights_fingerprint_is"], model["weights_fingerprint"]
    if continued := model["adapter"]:
        yield "Went on from", f"the adapter in {continued['name']}; SHA-256:", continued["sha256"]
    if adapter:
        yield "Adapter", f"{adapter['file']}, {adapter['bytes']:,} bytes; SHA-256:", adapter["sha256"]
    for part, data in audit["data"].items():
        what = "SHA-256 of the file:" if data["sha256"] else "SHA-256 of the rows as tokenised:"
        source = f"{described(data['source'])}, {data['rows']:,} rows; {what}"
        yield f"{part.capitalize()} data", source, data["sha256"] or data["tokenised"]
    over_all = hashlib.sha256("".join(rows["sha256"]).encode()).hexdigest()
    yield "Forget rows", f"{len(rows['sha256']):,} salted hashes in audit.json; SHA-256 over all of them:", over_all
    yield "Salt", "of the rows' hashes", rows["salt"]
    yield "Seed", str(audit["seed"]), None
    yield "Optimiser steps", str(audit["optimizer_steps"] or "not finished"), None
    for session in audit["sessions"]:
        yield "Started, ended", f"{session['started']}, {session['ended'] or 'was cut off'}", None
        yield "Processors", "; ".join(session["processors"]), None
        yield "Versions", ", ".join(f"{name} {version}" for name, version in session["versions"].items()), None
    if (duration := seconds(audit["sessions"])) is not None:
        yield "Duration", f"{duration:.0f} seconds, measuring included", None


def cost(content: Content) -> str | None:
    """What a step took beside what was predicted of it, in the last session that trained; None where that was not
    recorded."""
    sessions = [session.get("training") or {} for session in content.audit["sessions"]] if content.audit else []
    took = next((one for one in reversed(sessions) if one.get("seconds_per_step")), None)
    if took is None:
        return None
    parts = [f"{took['seconds_per_step']:.3g} s" + _predicted(took.get("predicted_seconds_per_step"), "{:.3g} s")]
    if took.get("peak_bytes"):
        peak, predicted = took["peak_bytes"] / 2**30, took.get("predicted_peak_bytes")
        parts.append(f"{peak:.2f} GiB" + _predicted(predicted and predicted / 2**30, "{:.2f} GiB"))
    divided = took.get("micro_batch_parts") or 1
    ran_out = f" Memory ran out, so each micro-batch went through the model in {divided} parts." if divided > 1 else ""
    return f"A step took {' and '.join(parts)}.{ran_out}"


def _predicted(value: float | None, form: str) -> str:
    return f" (predicted: {form.format(value)})" if value else ""


def base_model(content: Content) -> tuple[str, bool]:
    """The base model's name, without the path where it is a local directory, and whether it is one."""
    if content.audit:
        directory, name = content.audit["model"]["directory"], content.audit["model"]["loaded"]
    else:
        name = str(content.settings["model"])
        place = from_here(RunFiles(content.directory), content.settings, name)
        directory = name_of(place) if expanded(place).is_dir() else None
    return directory or name, directory is not None


def shortened(text: str) -> str:
    """`text` for a page: without control characters, and truncated if it is very long."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n")).strip()
    if len(text) > LONGEST:
        return f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
    return text or "(nothing)"


def set_title(name: str) -> str:
    """The heading over the figures or examples of a set."""
    part = part_of(name)
    return part.capitalize() if name == part else f"{part.capitalize()}, asked {form_words(name)}"


def by_set(items: Sequence[Any]) -> list[tuple[str | None, list[Any]]]:
    """Figures or examples, grouped by their set, in the order of the sets."""
    sets = dict.fromkeys(item.set for item in items)
    return [(name, [item for item in items if item.set == name]) for name in sets]


def _tiles(stages: Mapping[str, Mapping[str, AnswerSummary]]) -> Iterator[Tile]:
    if not {"before", "after"} <= set(stages):
        return
    for part, summary in stages["after"].items():
        if part_of(part) != part or part not in stages["before"]:
            continue
        gold = stages.get("gold", {}).get(part)
        measured = [stages["before"][part], summary, *([gold] if gold else [])]
        for title, values, scale in (
            ("that the model says", [str(said_count(s)) for s in measured], f"of {summary.rows} answers"),
            ("NLL per token", side_by_side([s.nll for s in measured], decimals=2), "nats; 0 is certainty"),
        ):
            note = scale + (f"; gold standard: {values[2]}" if gold else "")
            yield Tile(
                f"{part.capitalize()} answers{'' if title[0] == 't' else ','} {title}", " → ".join(values[:2]), note
            )


def _groups(content: Content) -> Iterator[dict[str, Any]]:
    for benchmark in BENCHMARKS:
        if figures := [figure for figure in content.figures if figure.group == benchmark.group]:
            stages = list(dict.fromkeys(stage for figure in figures for stage in figure.values))
            yield {"title": benchmark.title, "note": benchmark.note, "figures": figures, "stages": stages}
