"""Library chatter that tells a user nothing they can act on is switched off; what they can act on stays."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Call before a command does its work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise a warning for every forked data loader
    # PEFT still asks transformers by its former name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()  # its retries; the last failure is told in one sentence

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
