"""README.md beside the adapter: the model card that the hub and users of PEFT expect, without text of any row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import lowmem_npo
from lowmem_npo.config import PREFERRING_TERMS, REFUSING_TERMS
from lowmem_npo.data.reading import described
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.answer_table import markdown_table
from lowmem_npo.files import expanded, file_sha256, name_of
from lowmem_npo.idle_options import idle_options
from lowmem_npo.report.audit import recorded_adapter
from lowmem_npo.report.content import EVIDENCE, Content, read_content
from lowmem_npo.report.leak_tests import leak_sections
from lowmem_npo.report.page import audit_lines, base_model
from lowmem_npo.report.plain_words import ORIGINAL, limits
from lowmem_npo.report.verdict import Verdict
from lowmem_npo.run_directory import RunFiles, from_here, run_of_adapter
from lowmem_npo.sources import data_names

TAGS = ("unlearning", "machine-unlearning", "npo", "lora", "lowmem-npo")
METHOD = ("recipe", "forget_term", "beta", "simnpo_margin", "wga_beta", "satimp_beta1", "satimp_beta2",
          "alternative_column", "alternatives", "gamma", "delta", "normalization", "kl_direction", "forget_level",
          "layered", "layered_weight", "group_column", "adversary", "adversary_steps", "sam", "lora_r", "lora_alpha",
          "lora_targets", "lora_layers", "use_rslora", "use_dora", "modules_to_save", "batch_size", "retain_batch_size",
          "epochs", "max_steps", "lr", "seed", "max_length", "qlora", "dtype")  # fmt: skip
SHORTENED = ("adversary_steps",)  # of which run.yaml has what was asked for, and the audit record what was used
RECORD = ("Revision", "Commit", "Weights", "Went on from", "Adapter", "Optimiser steps", "Started, ended",
          "Processors", "Versions", "Duration")  # fmt: skip


class Measurements(NamedTuple):
    """What was measured of merged weights: a table, how many rows of each set, and what it says."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    counts: str
    sentences: Sequence[str]


def model_card(content: Content) -> str:
    """The card's Markdown with its YAML header.

    A base model in a local directory is named only in the text, without its path: the header takes names on the hub.
    """
    settings, audit = content.settings, content.audit
    recorded = audit["configuration"] if audit else {}
    used = settings | {name: value for name, value in recorded.items() if name in SHORTENED}
    base, local, idle = *base_model(content), idle_options(used)
    data = ModelCardData(
        base_model=None if local else base, library_name="peft", pipeline_tag="text-generation", tags=list(TAGS)
    )
    return _rendered(
        "model_card.md.jinja",
        card_data=data.to_yaml(),
        base=code(base),
        base_to_load=f"path/to/{base}" if local else base,
        local=local,
        revision=None if local else settings.get("revision"),
        verdict=content.verdict,
        evidence=EVIDENCE,
        forget_term=settings.get("forget_term"),
        aim=_aim(settings),
        settings=[(name, code(used[name])) for name in METHOD if name not in idle and used.get(name) is not None],
        data=_data(content),
        table=markdown_table(content.stages).rstrip() if content.stages else "",
        leaks={test.name: test.meaning for test in leak_sections(content.leaks) if "after" in test.verdicts},
        limits=[ORIGINAL, *limits(content)],
        notes=content.notes,
        audit=[
            (what, code(value) if digest is None else f"{value} {code(digest)}")
            for what, value, digest in (audit_lines(audit) if audit else ())
            if what in RECORD
        ],
        version=lowmem_npo.__version__,
    )


def _aim(settings: Mapping[str, Any]) -> str:
    """What the objective asked for, of both sets."""
    term, kept = settings.get("forget_term"), []
    if settings.get("gamma", 1):
        kept.append("their cross-entropy")
    if settings.get("delta", 1):
        kept.append("the KL to the original over the whole vocabulary")
    if term in REFUSING_TERMS:
        forget = "teaches it a refusal in the place of chosen answers (forget)"
    elif term in PREFERRING_TERMS:
        forget = "makes chosen answers (forget) less likely beside others, measured against the original model"
    else:
        forget = "makes chosen answers (forget) less likely than they were to the original model"
    if not kept:
        return f"{forget}. Nothing was trained to keep others"
    return f"{forget}, and keeps others (retain) with {' and '.join(kept)}, weighted as below"


def merged_card(
    adapter: Path,
    base: str,
    revision: str | None,
    weights: str,
    findings: Sequence[str],
    other: str | None = None,
    measurements: Measurements | None = None,
) -> str:
    """The card of a merged model: what it was made of, and what the run that trained the adapter found.

    weights: their type. findings: what leak tests know of forgotten text returning. other: why the run's figures are
    not of this adapter, where they are not. measurements: of these weights.
    """
    verdict = other or _verdict(adapter)
    local = expanded(base).is_dir()
    data = ModelCardData(
        base_model=None if local else base, library_name="transformers", pipeline_tag="text-generation",
        tags=[tag for tag in TAGS if tag != "lora"],
    )  # fmt: skip
    provenance = [
        ("Base", code(name_of(base) if local else base)),
        ("Revision", code(revision or "the default")),
        ("Adapter, SHA-256", code(file_sha256(RunFiles(adapter).weights))),
        ("Weights", weights),
        ("Merged by", f"lowmem-npo {lowmem_npo.__version__}"),
    ]
    return _rendered(
        "merged_card.md.jinja",
        card_data=data.to_yaml(),
        base=provenance[0][1],
        verdict=None if isinstance(verdict, str) else verdict,
        unknown=verdict,
        evidence=EVIDENCE,
        findings=findings,
        measurements=measurements,
        provenance=provenance,
    )


def _verdict(adapter: Path) -> Verdict | str:
    """What the run that trained the adapter found of it, or why that is not known."""
    run = run_of_adapter(adapter)
    if not run.run_yaml.is_file():
        return "It is not in the directory of a run of `lowmem-npo train`."
    try:
        if run.path != adapter.resolve() and recorded_adapter(run.path) != file_sha256(RunFiles(adapter).weights):
            return "It is a checkpoint of a run of `lowmem-npo train`, and not the adapter that the run measured."
        return read_content(run.path).verdict
    except UserError:  # which names a place on this machine
        return "The files of the run that trained it are damaged and cannot be reported on."


def _rendered(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # Markdown, not HTML: text from outside passes through `code`
    card = environment.get_template(template).render(values)
    return str(ModelCard(card))  # refuses a header that the hub would refuse


def code(value: Any) -> str:
    """`value` as Markdown code, whatever characters it has, also in a table."""
    text = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "`" + " ".join(text.replace("`", "'").replace("|", "/").split()) + "`"


def _data(content: Content) -> list[tuple[str, str, int, str]]:
    """(part, name, rows, SHA-256 of the file or, without a file, of the tokenised rows). Files and folders are named
    without their places."""
    lines, run = [], RunFiles(content.directory)
    for part, record in (content.audit["data"] if content.audit else {}).items():
        places = {name: expanded(from_here(run, content.settings, name)) for name in data_names(record["source"])}
        names = ",".join(
            place.name if place.is_absolute() or place.exists() else name for name, place in places.items()
        )
        name = Path(record["source"]).name if record["sha256"] else described(names)
        lines.append((part, code(name), record["rows"], code(record["sha256"] or record["tokenised"])))
    return lines
