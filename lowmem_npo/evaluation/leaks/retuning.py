"""Whether what was forgotten comes back when the model is taught something else.

Fine-tuning that shows none of the forgotten rows, and is not meant to bring them back, can undo unlearning all the
same: on rows that were to be kept (retain-only), since those lie near, or on harmless text (Łucki et al. 2024, "An
adversarial perspective on machine unlearning for AI safety"; Qi et al. 2024 for safety training). Each is tried for
some steps, and all forget rows are asked for, and the holdout's.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowmem_npo.evaluation.leaks import tuned
from lowmem_npo.evaluation.leaks.contract import LeakResult, Need, Subject
from lowmem_npo.evaluation.leaks.tuned import Tuned, Tuning, TuningTest
from lowmem_npo.evaluation.options import Options
from lowmem_npo.ranges import Count, Positive

OTHER_ROWS = Need(
    lambda subject: not subject.retain and not subject.general,
    "there are neither rows to keep (--retain names some) nor general texts to fine-tune on",
)
NO_RETAIN = "On rows to keep it was not tried: there are none (--retain names some)."
ALL_FORGOTTEN = "On rows to keep it was not tried: all of them are forget rows as well."


@dataclass
class RetuningOptions(Options):
    retune_steps: Count = 100
    """Fine-tuning steps of --leaks retuning on the retain rows, and as many on general texts, each on four rows."""
    retune_lr: Positive = 1e-3
    """Learning rate of --leaks retuning."""


class Retuning(TuningTest[RetuningOptions]):
    name = "retuning"
    summary = "`extraction` after fine-tuning on the retain rows, and on general texts, by the worse of the two"
    in_words = "teaching the model other things that have nothing to do with the examples, and letting it complete them"
    needs = (OTHER_ROWS,)
    options = RetuningOptions

    def run(self, subject: Subject, options: RetuningOptions) -> LeakResult:
        from lowmem_npo.evaluation.leaks.fine_tuning import tune

        tunings = self.tunings(subject, options)
        outcomes = {name: tune(subject, tuning) for name, tuning in tunings.items()}
        made = [name for name, of in outcomes.items() if options.retune_steps in of.after]

        def told(name: str, worst: Tuned, own: str) -> str:
            which = ", the worse of 2 attacks" if len(made) > 1 else ""
            answers = "forgotten answer" if (rows := worst.after["rows"]) == 1 else f"{rows} forgotten answers"
            return f"After {name}{which}, the model writes the last {own} of the {answers}"

        steps = dict.fromkeys(outcomes, options.retune_steps)
        result = tuned.judge_made(lambda attacks: tuned.judge(attacks, told), steps, outcomes)
        if not subject.retain:
            result.add(NO_RETAIN if subject.retain is None else ALL_FORGOTTEN)  # which is so of any model
        return result

    def tunings(self, subject: Subject, options: RetuningOptions) -> dict[str, Tuning]:
        """Attack -> what is taught."""
        steps, lr = options.retune_steps, options.retune_lr
        taught = {"the retain rows": subject.retain, "general texts": subject.general}
        return {
            f"{steps} steps on {words}, lr {lr:g}": Tuning(
                f"retuning, {words}", rows, subject.forget, [steps], lr, subject.groups["forget"]
            )
            for words, rows in taught.items()
            if rows
        }


RETUNING = Retuning()
