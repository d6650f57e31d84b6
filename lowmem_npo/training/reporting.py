"""The loggers of --report-to: whether they can start, before there is anything to log.

transformers starts them when training begins, with the weights loaded and the first measurements made. By default none
is used; those that are log where their own settings say, and may ask the network for that.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from urllib.parse import urlsplit

from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from lowmem_npo.errors import UserError, one_line

OF_THAT_NAME = "tensorboard", "wandb", "mlflow", "trackio"  # loggers whose package is called as they are


def check_reporting(names: Sequence[str]) -> None:
    """Raises UserError for a logger of `names` that is not installed, or cannot start as it is set up."""
    if not names:
        return
    available = get_available_reporting_integrations()
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
            raise UserError(f"--report-to {name}: there is no such logger; {meant}")
        if name not in available:
            how = f": pip install {name}" if name in OF_THAT_NAME else ""
            raise UserError(f"--report-to {name}: its package is not installed{how}.")
        if name == "wandb":
            _check_wandb()
        elif name == "mlflow":
            _check_mlflow()


def _check_wandb() -> None:
    """Logs in, as its start would: at a terminal it may ask for the key, elsewhere there must be one."""
    import wandb

    try:
        wandb.login()
    except Exception as error:  # its own classes differ between versions
        raise UserError(
            f"--report-to wandb: {_sentence(error)} Log in with `wandb login`, or set WANDB_MODE=offline."
        ) from error


def _check_mlflow() -> None:
    """Looks whether it can write to a place of the kind that it is to write to."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it reports its use to its makers
    import mlflow

    kind = urlsplit(mlflow.get_tracking_uri()).scheme
    try:
        if kind in ("", "file"):
            with tempfile.TemporaryDirectory() as place:
                mlflow.MlflowClient(tracking_uri=place)
        elif kind.startswith("sqlite") and importlib.util.find_spec("sqlalchemy") is None:
            raise UserError(
                "--report-to mlflow: mlflow-skinny has no database to log to; pip install mlflow, or set "
                "MLFLOW_TRACKING_URI to a server."
            )
    except mlflow.MlflowException as error:
        raise UserError(
            f"--report-to mlflow: {_sentence(error)} Set MLFLOW_TRACKING_URI, as to sqlite:///mlflow.db or a server."
        ) from error


def _sentence(error: Exception) -> str:
    """The first sentence of what a library says."""
    return re.split(r"(?<=[.!])\s", one_line(error))[0].rstrip(".") + "."
