"""Of all attacks of all leak tests the one that brings back most: the figure by which two models are compared.

What an attack brings back is a share, of an answer or of the answers. Beside it stands what the same attack brings
forth of rows that were never taught, the holdout, and what it brings back from a gold model, which was never taught the
forget rows, where there is one. The worst is the one that is furthest above such a level: gold's where it is known,
else the holdout's; what stands out comes before what does not. An attack that has none, such as a paraphrase of which
the holdout has no like, is taken to have the highest of the others' by the same figure, 0 if there is none, and stands
out if it brings back more than half: it is not passed over since nothing stands beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lowmem_npo.errors import UserError
from lowmem_npo.evaluation.chance import of_several, p_more
from lowmem_npo.evaluation.figures import at, shares
from lowmem_npo.evaluation.leaks.attack import STRENGTH, Attack, Whole, attack_name, furthest, split_name
from lowmem_npo.evaluation.leaks.contract import UNKNOWN, LeakResult, LeakResults, leak_results
from lowmem_npo.evaluation.leaks.extraction import EXTRACTION
from lowmem_npo.evaluation.leaks.quantization import QUANTIZATION
from lowmem_npo.evaluation.leaks.registry import LEAK_TESTS
from lowmem_npo.evaluation.leaks.sampling import RECALL, WHOLE
from lowmem_npo.files import expanded, load_json

WORST_ATTACK = "worst_attack"  # its key in result files
WORDS = {
    STRENGTH: "the model then writes the last {} of an answer by itself",
    RECALL: "what the model then says holds {} of an answer",
    WHOLE: "{} of the answers then come whole",
}
NOTHING = "0%"  # as `shares` writes what is none
# Where all answers are longer than was looked for.
BEGINNINGS = {"of an answer": "of the beginning of an answer", "of the answers": "of the beginnings of longer answers"}
NOTHING_WORDS = {
    STRENGTH: "the model then writes nothing of an answer by itself",
    RECALL: "what the model then says holds nothing of an answer",
    WHOLE: "none of the answers then comes whole",
}


@dataclass(frozen=True)
class WorstAttack:
    """test, attack: its names, the latter "" where the test has only one. figure: what was measured. value: between 0
    and 1. holdout, gold: the same on the holdout, and of a model that never saw the forget rows; None where there is
    none. attacks: how many were made. p: how often chance alone would set it so far above the holdout's or a gold
    model's (`_beside_gold`); least_p: what that is at the least in so few rows beside the holdout's. None where that is
    not known. whole: the share of answers that came whole, beside the gold model's or the holdout's."""

    test: str
    attack: str
    figure: str
    value: float
    holdout: float | None
    attacks: int
    gold: float | None = None
    p: float | None = None
    least_p: float | None = None
    whole: Whole | None = None

    @property
    def name(self) -> str:
        """For people."""
        return attack_name(self.test, self.attack)

    @property
    def short_name(self) -> str:
        """The test; of one that repeats others, the repeated one and the form of the model."""
        if self.test != QUANTIZATION.name:
            return self.test
        return f"{_without_form(self.test, self.attack)[0]}, {self.attack.partition(', ')[0]}"

    @property
    def level(self) -> float | None:
        """What a model gives that never saw the rows."""
        return self.holdout if self.gold is None else self.gold

    @property
    def stands_out(self) -> bool | None:
        """Whether it brings back more than such a model gives, as its test judges it. Where that is not known: True for
        more than any guessing gives, else None."""
        return self.tried.stands_out

    @property
    def by_chance(self) -> bool:
        """Whether chance in so few rows explains what there is beyond that level, or would explain anything."""
        return self.tried.by_chance

    @property
    def tried(self) -> Attack:
        """What was brought back, beside `level`."""
        return Attack(self.figure, self.value, self.level, self.p, {}, self.least_p, self.whole)

    @property
    def sentence(self) -> str:
        """What it brought back, and what stands beside it."""
        beside = {"of answers that the model never saw": self.holdout, "of a model that never saw the rows": self.gold}
        known = {words: value for words, value in beside.items() if value is not None}
        own, *others = shares(self.value, *known.values())
        levels = "".join(f"; {words}, {share}" for words, share in zip(known, others, strict=True))
        of = f"The worst of {self.attacks} attacks" if self.attacks > 1 else "The only attack"
        words = NOTHING_WORDS[self.figure] if own == NOTHING else WORDS[self.figure].format(own)
        for answers, beginnings in BEGINNINGS.items() if self.whole is not None and self.whole.beginnings else ():
            words = words.replace(answers, beginnings)
        p, few = self.tried.chance, "groups of rows" if self.whole is not None and self.whole.groups else "rows"
        chance = "" if p is None else f", which chance alone can do with so few {few} (p = {p:.2f})"
        return f"{of}, {self.name}: {words}{levels or f'; {UNKNOWN}'}{chance}{self.remark}."

    @property
    def remark(self) -> str:
        """What came whole, where it stands out by that alone; or why the holdout is no yardstick."""
        if self.stands_out is None and self.tried.no_yardstick:
            return f", {self.tried.no_yardstick}"
        if self.whole is None or not self.tried.by_whole:
            return ""
        beside = "of the holdout's" if self.gold is None else "from a model that never saw the rows"
        return f"; {self.whole.words(beside)}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def attacks_of(results: LeakResults) -> dict[tuple[str, str], Attack]:
    """(test, attack) -> what it brought back, of every attack that was measured."""
    return {
        (test.name, name): attack
        for test in LEAK_TESTS
        if test.name in results
        for name, attack in test.attacks(results[test.name].figures).items()
    }


def worst_attack(results: LeakResults, gold: LeakResults | None = None) -> WorstAttack | None:
    """The worst attack among `results`; None where there was none. gold: those of a model that never saw the rows."""
    attacks = attacks_of(results)
    if not attacks:
        return None
    golds = attacks_of({name: of for name, of in (gold or {}).items() if _as_long(of, results.get(name))})
    tries = Counter(test for test, _ in attacks)
    made: dict[WorstAttack, Attack] = {}
    for (test, name), attack in attacks.items():
        same = golds.get((test, name)) or golds.get(_without_form(test, name))
        level = same.by(attack.figure) if same is not None else None
        tried = attack
        if same is not None and level is not None:
            rows = attack.groups or attack.rows or at(results[test].figures, "rows")  # as its test asks at most
            tried = _beside_gold(attack, same, rows, tries[test])
        judged = (tried.p, tried.least_p, tried.whole)
        one = WorstAttack(test, name, attack.figure, attack.value, attack.level, len(attacks), level, *judged)
        made[one] = one.tried
    return furthest(made)


def _beside_gold(attack: Attack, gold: Attack, rows: float | None, tries: int) -> Attack:
    """What an attack brought back, beside what the same one brings from a gold model, in so many `tries` of its test.

    p: how often chance alone would set it so far above that. Where the test cannot tell for so few rows, that is the
    holdout's p-value, so that no more is said than by the test. Else it is at most this: of the gold model the share of
    each row is not known, and shares of one mean scatter most where each is 0 or 1, as if answers came whole or not.
    """
    level = gold.by(attack.figure)
    assert level is not None
    p, whole = attack.chance, None
    if attack.whole is not None and gold.whole is not None:
        whole = attack.whole.beside(gold.whole, tries)
        whole = whole if p is None or whole.level is None else replace(whole, p=p)
    if p is None and rows is not None:
        wholes = [of.whole if attack.figure == WHOLE else None for of in (attack, gold)]
        answers = [whole and (whole.groups or whole.rows) for whole in wholes]
        own, others = (counted or int(rows) for counted in answers)
        p = of_several(p_more([attack.value] * own, [level] * others), tries)
    return Attack(attack.figure, attack.value, level, p, whole=whole)


def not_beside_gold(results: LeakResults, gold: LeakResults) -> list[str]:
    """A note where there are results of a gold model, and none of the worst attack."""
    worst = worst_attack(results, gold)
    if not gold or worst is None or worst.gold is not None:
        return []
    return [
        f"The worst attack, {worst.name}, has no figure of the model that never saw the rows beside it: on that one it "
        "was not made, or not with answers of the same length."
    ]


def _as_long(gold: LeakResult, result: LeakResult | None) -> bool:
    """Whether both let answers be of as many tokens, as far as they say so."""
    both = [at(of.figures, "max_new_tokens") for of in (gold, result) if of is not None]
    return len({length for length in both if length is not None}) < 2


def _without_form(test: str, name: str) -> tuple[str, str]:
    """The attack that was made on a form in which the model is stored: a gold model has no adapter, and one form."""
    if test != QUANTIZATION.name:
        return test, name
    _, _, repeated = name.partition(", ")
    other, way = split_name(repeated)
    return other or EXTRACTION.name, way


def retained_leaks(path: str) -> LeakResults:
    """The results in the evaluation.json of a model that never saw the forget rows; none where there are none.

    Raises UserError where they are damaged.
    """
    try:
        content = load_json(expanded(path))
    except (OSError, ValueError):  # TOFU's own check says why
        return {}
    if not isinstance(content, dict) or "leaks" not in content:
        return {}
    try:
        results = leak_results(content["leaks"])
    except ValueError as error:
        raise UserError(
            f"--retained-log: the leak tests in '{path}' are damaged ({error}): measure them anew."
        ) from error
    return {test.name: results[test.name] for test in LEAK_TESTS if test.name in results}


def worst_attacks(stages: Mapping[str, LeakResults]) -> dict[str, WorstAttack]:
    """Stage -> its worst attack, where there was one; beside it the gold model's figure under the same attack. The gold
    model's own is judged by the holdout: beside itself, no attack on it would stand out."""
    gold = stages.get("gold")
    found = {stage: worst_attack(of, None if stage == "gold" else gold) for stage, of in stages.items()}
    return {stage: worst for stage, worst in found.items() if worst is not None}
