"""What leak tests have found of exactly the adapter that is merged: whether forgotten text returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_npo.commands.lasting import ATTACKING_MERGED, made_last_by, testing_command, without_place
from lowmem_npo.commands.merge.options import DEQUANTIZED
from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.directory import OTHER_ROWS, base_of, compared_with, is_of_adapter
from lowmem_npo.evaluation.leaks.contract import LeakResult, groups_in
from lowmem_npo.evaluation.leaks.measure import read_leaks
from lowmem_npo.evaluation.leaks.quantization import MERGED, QUANTIZATION
from lowmem_npo.evaluation.leaks.relearning import RELEARNING
from lowmem_npo.files import expanded, file_sha256, load_json
from lowmem_npo.model.names import Base
from lowmem_npo.model.saved_adapter import settings_of_run
from lowmem_npo.records import check_record
from lowmem_npo.report.as_audited import base_of_run
from lowmem_npo.report.audit import recorded_adapter
from lowmem_npo.report.run_leaks import AFTER, Tested, standing
from lowmem_npo.run_directory import RunFiles, run_of_adapter

# Test -> when it is that forgotten text may return.
RETURNING = {
    QUANTIZATION.name: "when the adapter is rounded with the weights",
    RELEARNING.name: "after a little fine-tuning on a part of it",
}

ATTACK_MERGED = f"`--leaks {' '.join(ATTACKING_MERGED)}`, in one evaluation, attacks merged weights as well."


class Finding(NamedTuple):
    """A result of a leak test. of_other: what else it is of than the adapter as it is now on the base that it is merged
    into, if it is. file: that holds it. settings: with which it was measured. evaluation: by which, if not the run."""

    result: LeakResult
    of_other: str | None
    file: Path
    settings: Mapping[str, Any]
    evaluation: str | None = None


class Said(NamedTuple):
    """What there is to say of a leak test. advised: whether the command that runs it belongs beside it."""

    text: str
    advised: bool = False


ANSWERS_ALONE = Said(
    "Of weights rounded to 4 bits the answers above were checked, not what they hold and do not say.", advised=True
)


def findings(
    adapter: str, base_weights: str, onto: Base, *, lasts: bool = True, rounded: bool = False, base: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """A sentence per test that looks for forgotten text returning: what it found, or that it was not run and what runs
    it, with all others that were not.

    Rounding can undo an update that is small beside the weights (Zhang et al. 2025, "Catastrophic failure of LLM
    unlearning via quantization"), and fine-tuning one that only hides (Hu et al. 2024).

    base_weights: that the adapter is merged into; onto: of which model. lasts: whether it is the one that its run
    wrote, and has what that made last. rounded: whether answers of the merged weights in 4 bits were measured. base:
    the options that named its base. Returned twice: as they are said here, and for a card that others read, without
    where on this machine the adapter and its base are.
    """
    known = {test: list(_known(test, adapter, onto)) for test in RETURNING}
    in_merged = _repeated_in_merged(known[QUANTIZATION.name], RELEARNING.name)
    lasting = list(_lasting(adapter)) if lasts else []

    def sentences(with_place: bool) -> list[str]:
        said = {test: _said(test, of, adapter, base_weights, in_merged, with_place) for test, of in known.items()}
        if rounded and not known[QUANTIZATION.name]:
            said[QUANTIZATION.name] = ANSWERS_ALONE
        advised = [test for test, of in said.items() if of.advised]
        how, both = testing_command(adapter, advised, base, with_place), "both" if len(advised) > 1 else "it"
        texts = [f"{of.text} {how} checks {both}." if [test] == advised[-1:] else of.text for test, of in said.items()]
        return [*texts, *lasting]

    return sentences(with_place=True), sentences(with_place=False)


def _lasting(adapter: str) -> Iterator[str]:
    """Of what was made to last, by the adapter's run or by one that it went on from: where it does."""
    how = dict.fromkeys(option for run in _runs(adapter) for option in made_last_by(run))
    if how:
        yield (
            f"What {' and '.join(how)} made last is a property of these merged weights: publish them, and not the "
            "adapter, which is undone beside its base by switching it off."
        )


def _runs(adapter: str) -> Iterator[dict[str, Any]]:
    """The settings of the run that left `adapter`, and of those whose adapters it holds as well, the latest first."""
    folder: Any = adapter
    seen: set[Path] = set()  # a run may stand by now where the one that it went on from stood
    while isinstance(folder, str) and (place := expanded(folder).resolve()) not in seen:
        seen.add(place)
        yield (run := settings_of_run(folder))
        folder = run.get("adapter")


def _said(
    test: str, known: Sequence[Finding], adapter: str, base_weights: str, in_merged: bool, with_place: bool
) -> Said:
    """in_merged: whether relearning was tried on the merged weights as well."""
    folder = expanded(adapter).resolve()
    current = [finding for finding in known if finding.of_other is None]
    if not known:
        return Said(f"Not checked: whether forgotten text returns {RETURNING[test]}.", advised=True)
    if not current:
        run, file = run_of_adapter(folder).path, known[0].file
        shown = file if with_place else Path(run.name) / file.relative_to(run)
        return Said(f"Not checked: the {test} test in '{shown}' is of {known[0].of_other}.", advised=True)
    tested = [Tested(of.settings, {AFTER: {test: of.result}}, of.evaluation) for of in current]
    result = standing(test, tested).after[test]
    meaning = result.meaning if with_place else result.meaning.replace(str(folder), without_place(folder))
    if not result.figures:
        return Said(f"Not checked, {test} test: {meaning}")
    if test == QUANTIZATION.name and MERGED not in result.figures:
        return Said(f"Not checked: the {test} test measured no merged weights.", advised=True)
    if test == QUANTIZATION.name and base_weights == DEQUANTIZED:
        return Said(
            f"Not checked: the {test} test is of this adapter merged into whole weights, and these are dequantised "
            "ones. --quantize-check measures them."
        )
    of, more = f"{test} test", ""
    if test == RELEARNING.name:  # which attacks the adapter; in merged weights `QUANTIZATION` repeats it
        of += " of the adapter beside its base, not of these weights"
        more = "" if base_weights == DEQUANTIZED or in_merged else f" {ATTACK_MERGED}"
    return Said(f"{'WARNING' if result.leaks else 'Checked'}, {of}: {result.verdict.words}. {meaning}{more}")


def _repeated_in_merged(known: Sequence[Finding], test: str) -> bool:
    """Whether the attacks of `test` were tried on the merged weights as well."""
    tried = (groups_in(finding.result.figures).get(MERGED, {}) for finding in known if finding.of_other is None)
    return any(name.startswith(test) for figures in tried for name in figures)


def _known(test: str, adapter: str, onto: Base) -> Iterator[Finding]:
    """The results that the run and its evaluations have, where their files can be read; the latest one's last."""
    folder = expanded(adapter).resolve()
    weights, run, settings = RunFiles(folder).weights, run_of_adapter(folder), settings_of_run(adapter)
    try:
        of_other = _of_other(recorded_adapter(run.path) == file_sha256(weights), base_of_run(run.path), onto)
        yield Finding(read_leaks(run.leaks)[AFTER][test], of_other, run.leaks, settings)
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    for evaluation in RunFiles(folder).evaluations():
        try:
            content = load_json(evaluation.result)["leaks"][test]
            settings = compared_with(evaluation)
            check_record(settings, {"leaks": list[str]}, optional=["leaks"])
            if not settings.get(OTHER_ROWS):
                of_other = _of_other(is_of_adapter(evaluation, weights), base_of(evaluation), onto)
                result, name = LeakResult.from_json(content), evaluation.path.name
                yield Finding(result, of_other, evaluation.result, settings, name)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError):
            pass


def _of_other(of_this_state: bool, measured: Base, onto: Base) -> str | None:
    if not of_this_state:
        return "another state of this adapter"
    return "this adapter on another base model" if measured.is_other_than(onto) else None
