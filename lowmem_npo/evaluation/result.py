"""What an evaluation found, in memory and as the content of its files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lowmem_npo.evaluation.answers import AnswerRecord, AnswerSummary
from lowmem_npo.evaluation.benchmarks.documents import MembershipScore
from lowmem_npo.evaluation.benchmarks.lume import LumeAnswer, LumeScores
from lowmem_npo.evaluation.benchmarks.tofu import TofuAnswer, TofuSet
from lowmem_npo.evaluation.leaks.measure import LeakFindings


@dataclass
class Evaluation:
    """Everything that was measured. A figure that is None was not, and `notes` say why where it was expected."""

    rows: dict[str, dict[str, int]] = field(default_factory=dict)  # set -> {"scored", "in_set"}
    answers: dict[str, list[AnswerRecord]] = field(default_factory=dict)
    summaries: dict[str, AnswerSummary] = field(default_factory=dict)
    lume_answers: dict[str, list[LumeAnswer]] = field(default_factory=dict)
    lume: LumeScores | None = None
    membership: MembershipScore | None = None
    tofu_answers: dict[str, list[TofuAnswer]] = field(default_factory=dict)
    tofu: dict[str, TofuSet] = field(default_factory=dict)
    model_utility: float | None = None
    forget_quality: float | None = None
    leaks: LeakFindings = field(default_factory=LeakFindings)
    lm_eval: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """evaluation.json: every figure, no text of any row."""
        tofu = {
            "sets": {name: asdict(scores) for name, scores in self.tofu.items()},
            "model_utility": self.model_utility,
            "forget_quality": self.forget_quality,
        }
        return {
            "rows": self.rows,
            "answers": {name: asdict(summary) for name, summary in self.summaries.items()},
            "lume": self.lume and self.lume.official(),
            "membership": self.membership and asdict(self.membership),
            "tofu": tofu if self.tofu else None,
            "leaks": self.leaks.tests,
            "lm_eval": self.lm_eval,
            "notes": self.notes,
        }

    def rows_to_json(self) -> list[dict[str, Any]]:
        """rows.jsonl: what each row asked, what came, how it scored."""
        lines: list[dict[str, Any]] = []
        for name, answers in self.lume_answers.items():
            lines += [{"set": name, **asdict(a.row), "generation": a.generation, "score": a.score} for a in answers]
        for name, answers in self.tofu_answers.items():
            for a in answers:
                one = {"question": a.row.example.prompt, "answer": a.row.example.answer, "generation": a.generation}
                nll = {"nll": a.nll, "paraphrased_nll": a.paraphrased_nll, "perturbed_nll": a.perturbed_nll}
                lines.append({"set": name, **one, **nll, "truth_ratio": a.truth_ratio})
        for name, records in self.answers.items():
            lines += [{"set": name, **asdict(record)} for record in records]
        for name, scores in self.leaks.rows.items():
            lines += [{"set": name, "row": row, "leaks": found} for row, found in scores.items()]
        return lines
