"""How prompt and answer are joined into the text that the model sees.

The default template belongs to the schema, because the rows of a schema were made for it:

- `question/answer` (TOFU and the bundled biographies): "Question: {prompt}\\nAnswer:", as TOFU's authors wrote the rows
  for the base model they fine-tuned (Phi-1.5).
- everything else: the bare prompt. LUME's official evaluation feeds the raw `input`, and many of its rows are passages
  cut in two, which any template would spoil.

A model fine-tuned in another form needs that form: `--prompt-template "[INST] {prompt} [/INST]"`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowmem_npo.data.schemas import Example
from lowmem_npo.errors import UserError

BARE = "{prompt}"
DEFAULTS = {"question/answer": "Question: {prompt}\nAnswer:"}

# Chinese and Japanese writing, full-width punctuation included, puts no space between sentences.
UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")


@dataclass(frozen=True)
class Template:
    r"""The text around the prompt. `text` holds {prompt} once; None takes the default of each example's schema.

    stops: further ids at which generation stops, as the model's own configuration has them.

    The two characters \n mean a line break and \t a tab, so that a shell can pass them.
    """

    text: str | None = None
    stops: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.text is not None and self.text.count("{prompt}") != 1:
            raise UserError(
                f"The prompt template {self.text!r} must hold {{prompt}} exactly once, "
                'as in "Question: {prompt}\\nAnswer:"; the answer is appended to it.'
            )

    def for_schema(self, schema: str) -> str:
        """The template that examples of `schema` are written in, line breaks resolved."""
        if self.text is None:
            return DEFAULTS.get(schema, BARE)
        return self.text.replace("\\n", "\n").replace("\\t", "\t")

    def render(self, example: Example) -> tuple[str, str]:
        """(prompt text, answer text) of an example with a prompt; their concatenation is the text the model sees.

        The space between the two belongs to the answer, since byte-pair tokenisers write " Paris" as one token: a
        prompt never ends in spaces. Where neither side brings whitespace one space is inserted, except after a line
        break and between Chinese or Japanese characters; where both do, the answer's is kept. `prompt/completion`
        without a template is joined exactly as it is, as TRL does.
        """
        assert example.prompt is not None
        prompt = self.for_schema(example.schema).replace("{prompt}", example.prompt)
        bare = prompt.rstrip(" \t")
        brought = prompt[len(bare) :]
        if example.schema == "prompt/completion" and self.text is None:
            return bare, brought + example.answer
        if example.answer[0].isspace():
            return bare, example.answer
        if brought or bare.endswith("\n") or (UNSPACED.match(bare[-1]) and UNSPACED.match(example.answer[0])):
            return bare, brought + example.answer
        return bare, " " + example.answer
