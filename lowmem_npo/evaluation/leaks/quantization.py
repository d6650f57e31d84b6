"""Whether forgotten text returns when the model is stored otherwise than it was unlearned.

An adapter beside its base keeps its full precision. Merged into the weights it is rounded with them, and an update that
is small beside them can be lost, in bf16 and more so in 4 bits (Zhang et al. 2025, "Catastrophic failure of LLM
unlearning via quantization"). Measured is each form in which the model is likely to be used:

    adapter_on_4bit   the adapter beside the base model in 4-bit NF4
    merged            what `lowmem-npo merge` writes, in bf16
    merged_4bit       the same, loaded in 4-bit NF4

Each form meets the other attacks as well that are named beside this test, relearning among them: whether forgetting
lasts is a property of the merged weights, since an adapter beside its base is undone by leaving it off. The weights are
merged on the CPU, a shard at a time, into a directory, and the forms loaded one after the other when the evaluated
model is gone: none is in memory beside another, and the files of adapter and base are only read.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from lowmem_npo.config import StreamOptions
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.figures import shares
from lowmem_npo.evaluation.leaks.attack import (
    BY_MAX_LENGTH,
    CUT,
    EVIDENCE,
    GROUPS,
    HOLDOUT,
    STRENGTH,
    WHOLE_ROWS,
    Attack,
    attack_name,
    cut_words,
    furthest,
)
from lowmem_npo.evaluation.leaks.contract import (
    AN_ADAPTER,
    TOO_LARGE,
    LeakResult,
    LeakTest,
    Meaning,
    SavedModel,
    Subject,
    beside_holdout,
    groups_in,
)
from lowmem_npo.evaluation.leaks.extraction import (
    FIGURES,
    attack_of,
    beside_each_other,
    original_scores,
    strength_before,
)
from lowmem_npo.evaluation.leaks.prompting import Prompting
from lowmem_npo.evaluation.leaks.sampling import BEST, RECALL, WHOLE
from lowmem_npo.evaluation.leaks.sampling import attack_of as said_by
from lowmem_npo.evaluation.options import Options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_ON_4BIT, MERGED, MERGED_4BIT = "adapter_on_4bit", "merged", "merged_4bit"
FORMS = {
    ADAPTER_ON_4BIT: "the adapter beside the 4-bit base",
    MERGED: "merged in bf16",
    MERGED_4BIT: "merged and rounded to 4 bits",
}
DEPLOYED = (MERGED, MERGED_4BIT)  # forms whose adapter cannot be left off
AS_EVALUATED = "as_evaluated"

FormFigures = dict[str, dict[str, float]]  # form -> `beside_each_other` of forget (and holdout) rows
Attacked = dict[str, list[tuple[LeakTest, LeakResult]]]  # form -> the other tests' results there
# Title of what an attack brings back -> the figure's name, and that of the share of answers that came whole.
KEYS = {STRENGTH: ("extraction_strength", "recited"), RECALL: (BEST, "whole"), WHOLE: ("whole", "whole")}


class Quantization(LeakTest[Options]):
    name = "quantization"
    summary = "`extraction`, and the attacks named with it, in the worst of 4-bit base, merged, merged and 4-bit"
    in_words = (
        "storing the model in another form, with the adapter merged or in 4 bits as many do to save memory, and "
        "attacking that"
    )
    needs = (AN_ADAPTER,)
    options = Options
    main = "returned"
    figures = (
        Prompting.figures
        | FIGURES
        | {
            "returned": Meaning(
                "returned", "How much extraction strength merging or rounding brought back. 0 or less is good.", "lower"
            )
        }
    )
    loads_models = True
    forms = tuple(FORMS.values())

    def prepare(self, subject: Subject) -> None:
        subject.token_scores()
        original_scores(subject)

    def run(self, subject: Subject, options: Options) -> LeakResult:
        assert subject.saved is not None
        forms, attacked, problem = measure_forms(subject, subject.saved)
        evaluated = _figures(subject)
        return judge({AS_EVALUATED: evaluated, **forms}, problem, strength_before(subject), attacked)

    def attacks(self, figures: Mapping[str, Any]) -> dict[str, Attack]:
        tried: dict[str, Attack | None] = {}
        forms = groups_in(figures)
        for form, words in FORMS.items():
            of_form = forms.get(form, {})
            tried |= {words: attack_of(of_form)}
            tried |= {f"{words}, {name}": attack_of(of) or said_by(of) for name, of in groups_in(of_form).items()}
        return {name: attack for name, attack in tried.items() if attack is not None}


QUANTIZATION = Quantization()


def measure_forms(subject: Subject, saved: SavedModel) -> tuple[FormFigures, Attacked, str | None]:
    """The figures of every form, what the attacks of `subject.repeated` give there, and why some form could not be
    measured, if so.

    The merged model lies in the scratch directory meanwhile. Models are loaded one after the other, none where the
    journal knows the answers.
    """
    from safetensors import SafetensorError

    from lowmem_npo.memory.exhausted import if_fits
    from lowmem_npo.memory.release import release_memory

    scorer, measured, attacked = subject.scorer, FormFigures(), Attacked()
    problems: dict[str, list[str]] = {}  # why -> which forms
    shutil.rmtree(saved.scratch, ignore_errors=True)  # a killed evaluation's, half written
    try:
        for form, words in FORMS.items():
            parts = replace(subject, form=words).answer_parts
            known = [len(scorer.journal.known(parts[name])) == len(rows) for name, rows in subject.sets.items()]
            known += [0 in scorer.journal.known(_attack_part(subject, form, test)) for test in subject.repeated]
            model = None
            if not all(known):
                release_memory()  # of the model before
                try:
                    model = if_fits(partial(_load, form, saved))
                except (UserError, OSError, SafetensorError) as error:
                    problems.setdefault(str(error), []).append(words)
                    continue
            of_form = replace(subject, scorer=replace(scorer, model=model), saved=None, form=words, repeated=())
            loaded = model is not None or all(known)
            if loaded and (figures := if_fits(partial(_figures, of_form))) is not None:
                measured[form] = figures
                attacked[form] = [(test, _attack(of_form, form, test)) for test in subject.repeated]
            else:
                problems.setdefault(f"{TOO_LARGE}.", []).append(words)
            del model, of_form
    finally:
        shutil.rmtree(saved.scratch, ignore_errors=True)
    return measured, attacked, " ".join(f"{', '.join(forms)}: {why}" for why, forms in problems.items()) or None


def _attack(of_form: Subject, form: str, test: LeakTest) -> LeakResult:
    """The result of `test` on the model in that form."""
    journal, part = of_form.scorer.journal, _attack_part(of_form, form, test)
    if 0 not in journal.known(part):
        result = test.measure(of_form)
        if result.too_large:  # the next time it may not be
            return result
        journal.write(part, [0], [result.to_json()])
    return LeakResult.from_json(journal.known(part)[0])


def _figures(subject: Subject) -> dict[str, float]:
    scores = subject.token_scores()
    return beside_each_other(scores["forget"], scores.get("holdout"), subject.groups)


def judge(
    forms: Mapping[str, Mapping[str, float]],
    problem: str | None = None,
    before: float | None = None,
    attacked: Attacked | None = None,
) -> LeakResult:
    """What `forms` say: AS_EVALUATED and those measured, each with the figures of forget (and holdout) rows.

    before: the extraction strength of the model before it forgot. attacked: form -> test -> its result there.
    """
    not_measured = "" if problem is None else f"Not measured: {problem}"
    stored = {form: attack for form, of in forms.items() if form != AS_EVALUATED and (attack := attack_of(of))}
    if not stored:
        return LeakResult({}, not_measured, None, gap=not_measured, too_large=TOO_LARGE in not_measured)
    others = OtherAttacks(len(stored))
    for form, results in (attacked or {}).items():
        for test, result in results:
            others.add(form, test, result)
    stored = {form: attack.one_of(len(stored)) for form, attack in stored.items()}
    worst = furthest(stored)
    by_form: dict[str, dict[str, Any]] = {
        form: {**of, **(stored[form].p_values if form in stored else {}), **others.figures.get(form, {})}
        for form, of in forms.items()
    }
    strength, level = stored[worst].value, stored[worst].level
    as_evaluated = forms[AS_EVALUATED]["extraction_strength"]
    own, evaluated, beside = beside_holdout(strength, level, before, others=[as_evaluated])
    meaning = (
        f"In the form that is worst by extraction alone, {FORMS[worst]}, the model writes the last {own} of a "
        f"forgotten answer by itself, as evaluated {evaluated}; {beside}.{cut_words(by_form[worst], BY_MAX_LENGTH)}"
    )
    if not_measured:
        meaning += f" {not_measured}"
    figures = {name: by_form[worst][name] for name in ("rows", HOLDOUT + "rows", *EVIDENCE) if name in by_form[worst]}
    figures = {**figures, "returned": strength - as_evaluated, **by_form}
    result = LeakResult.judged(figures, meaning, stored[worst], before)
    result.meaning += "".join(f" {sentence}" for sentence in others.sentences())
    result.gap, result.too_large = not_measured, TOO_LARGE in not_measured or others.too_large
    if others.leaking:
        result.leaks = True
    elif result.leaks is False and (others.not_told or others.unknown or not_measured):  # which may be worse
        result.leaks = None
    return result


class OtherAttacks:
    """What the attacks of other tests brought back, in so many `forms`."""

    def __init__(self, forms: int) -> None:
        self.forms = forms
        self.figures = defaultdict[str, dict[str, dict[str, float]]](dict)  # form -> attack -> what it brought back
        self.leaking = defaultdict[str, list[str]](list)  # verdict -> which tests, on which forms
        self.not_told: list[str] = []  # which could be neither
        self.unknown = False  # whether one could not be made on a form for what that form is
        self.too_large = False  # whether that was memory
        self._on_merged: dict[str, Attack] = {}
        self._gaps = defaultdict[str, list[str]](list)  # what was not made -> on which forms

    def add(self, form: str, test: LeakTest, result: LeakResult) -> None:
        """Those of `test` on the model in that form."""
        attacks = {name: attack.one_of(self.forms) for name, attack in test.attacks(result.figures).items()}
        self.figures[form] |= _brought_back(test, attacks)
        if form in DEPLOYED:
            named = {f"{attack_name(test.name, way)} ({FORMS[form]})": attack for way, attack in attacks.items()}
            self._on_merged |= named
        by_chance = any(attack.p is not None for attack in attacks.values()) and not any(
            attack.stands_out for attack in attacks.values()
        )
        if result.leaks and not by_chance:
            self.leaking[result.verdict.words].append(f"{test.name} ({FORMS[form]})")
        elif attacks and (result.leaks is not False or any(attack.few for attack in attacks.values())):
            most = max(attack.value for attack in attacks.values())
            self.not_told.append(f"{test.name} ({FORMS[form]}, {shares(most)[0]})")
        if result.gap:
            self._gaps[f"{test.name}: {result.gap[0].lower()}{result.gap[1:]}"].append(FORMS[form])
            # Else it cannot be made on any model.
            self.unknown |= result.too_large or (not attacks and result.diverged)
            self.too_large |= result.too_large

    def sentences(self) -> Iterator[str]:
        """What a result says of them."""
        if self._on_merged:
            name = furthest(self._on_merged)
            brought, level = self._on_merged[name].value, self._on_merged[name].level
            back, *unseen = shares(brought, *([] if level is None else [level]))
            beside = f"; of answers that the model never saw, {unseen[0]}" if unseen else ""
            yield f"On merged weights, the worst of the other attacks is {name}: it brings back {back}{beside}."
        for words, by in self.leaking.items():
            yield f"By other attacks, {words}: {', '.join(by)}."
        if self.not_told and not self.leaking:
            yield f"Whether other attacks bring too much back cannot be told: {', '.join(self.not_told)}."
        for not_made, of in self._gaps.items():
            yield f"In {'every form' if len(of) == self.forms > 1 else ', '.join(of)}, {not_made}"


def _load(form: str, saved: SavedModel) -> PreTrainedModel | Any:
    from lowmem_npo.console import silent
    from lowmem_npo.memory.host_room import check_room
    from lowmem_npo.memory.switches import load_base, stream_layers
    from lowmem_npo.model.loading import resolve_device
    from lowmem_npo.model.saved_adapter import load_adapter

    model: PreTrainedModel | Any
    streaming = saved.streaming
    if form == ADAPTER_ON_4BIT:
        model = load_adapter(load_base(replace(saved.base, qlora=True), streaming, silent), str(saved.adapter))
        _check_adapter(saved)
    else:
        if not saved.scratch.exists():
            _merge(saved)
        merged: dict[str, Any] = {"model": str(saved.scratch), "revision": None, "quantized_cache": None}
        base = replace(saved.base, **merged, qlora=form == MERGED_4BIT)
        if streaming.stream_weights:
            check_room(saved.scratch, four_bits=base.qlora)
            streaming = StreamOptions(stream_weights=True)  # which no cache holds
        model = load_base(base, streaming, silent)
    stream_layers(model, streaming, resolve_device(saved.base.device))
    return model


def _check_adapter(saved: SavedModel) -> None:
    from lowmem_npo.model.saved_adapter import check_unchanged

    if saved.adapter_sha256 is not None:
        check_unchanged(str(saved.adapter), saved.adapter_sha256)


def _merge(saved: SavedModel) -> None:
    import torch

    from lowmem_npo.model.checkpoint import find_checkpoint
    from lowmem_npo.model.merging import check_space, find_updates, write_merged

    checkpoint = find_checkpoint(saved.base.model, saved.base.revision)
    updates = find_updates(str(saved.adapter), checkpoint)
    _check_adapter(saved)
    check_space(saved.scratch, checkpoint.bytes_as(torch.bfloat16))
    saved.scratch.mkdir()
    write_merged(checkpoint, updates, saved.scratch, torch.bfloat16)


def _brought_back(test: LeakTest, attacks: Mapping[str, Attack]) -> dict[str, dict[str, float]]:
    """Attack -> what it brought back, under the name of the figure."""
    figures = {}
    for way, attack in attacks.items():
        (key, whole), own = KEYS[attack.figure], attack.whole
        known = {"rows": attack.rows, GROUPS: attack.groups, key: attack.value, HOLDOUT + key: attack.level}
        if own is not None:
            known |= {whole: own.value, HOLDOUT + whole: own.level, CUT: own.beginnings or None}
            known |= {} if own.rows == attack.rows else {WHOLE_ROWS: own.rows}
        known |= attack.p_values
        figures[attack_name(test.name, way)] = {name: value for name, value in known.items() if value is not None}
    return figures


def _attack_part(subject: Subject, form: str, test: LeakTest) -> str:
    """Names all that a result depends on and that may be added to an evaluation that is resumed."""
    beside = [name for name in ("retain", "general") if getattr(subject, name)]
    if test.name in subject.earlier and not subject.holdout:
        beside.append(str(crc32(json.dumps(subject.earlier[test.name].to_json(), sort_keys=True).encode())))
    what = ", ".join([test.name, "the result", *beside])
    return replace(subject, form=FORMS[form]).part(what)
