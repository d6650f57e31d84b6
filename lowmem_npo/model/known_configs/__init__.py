"""Configurations of models that people unlearn with, so that their memory is estimated without a network.

Each file is a configuration as the hub has it, without what does not shape the model (token defaults for generation,
versions). Models that differ from one of them by training only (instruct and base versions) share its file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

FOLDER = Path(__file__).parent
SAME_ARCHITECTURE = re.compile(r"-(Instruct|SFT|DPO|Base)(?=-|$)")


def known_names() -> list[str]:
    """Hub names of the bundled configurations."""
    return sorted(file.stem.replace("--", "/") for file in FOLDER.glob("*.json"))


def known_config(name: str) -> PretrainedConfig | None:
    """The bundled configuration of the model that the hub calls `name`, or None."""
    bundled = {known.lower(): known for known in known_names()}
    known = bundled.get(name.lower()) or bundled.get(SAME_ARCHITECTURE.sub("", name).lower())
    if known is None:
        return None
    settings = json.loads((FOLDER / f"{known.replace('/', '--')}.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(**settings)
