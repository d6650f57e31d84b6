"""--report-to: the run's own quantities arrive under their names, in the packages where they are installed and in
stand-ins that record; what cannot start is a sentence before the weights are loaded; nothing is sent by default."""

from __future__ import annotations

import importlib
import json
import socketserver
import sys
import threading
from pathlib import Path

import pytest

from lowmem_npo.cli import main

OPTIONS = "--device cpu --dtype float32 --limit 4 --max-steps 2 --eval-rows 0 --batch-size 4"
OURS = {"loss", "forget_loss", "forget_nll", "forget_log_ratio", "retain_nll", "retain_kl"}
STAND_INS = {
    "wandb": """
run, config, LOGGED = None, None, []
class Config(dict):
    def update(self, content, allow_val_change=False): super().update(content)
class Run:
    summary, id, name = {}, "1", "one"
    def _label(self, code): pass
def login(): pass
def init(project, **options):
    global run, config
    run, config = Run(), Config()
def define_metric(*names, **options): pass
def log(content): LOGGED.append((content["train/global_step"], content))
""",
    "mlflow": """
from types import SimpleNamespace
__version__ = "3.0.0"
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100))
LOGGED, REFUSED, runs = [], [], []
class MlflowException(Exception): pass
class MlflowClient:
    def __init__(self, tracking_uri):
        for message in REFUSED: raise MlflowException(message)
def is_tracking_uri_set(): return True
def get_tracking_uri(): return "file:///nowhere/mlruns"
def active_run(): return runs[-1] if runs else None
def start_run(**options): runs.append(SimpleNamespace(info=SimpleNamespace(run_id="1")))
def end_run(): runs.pop()
def log_params(params, synchronous=True): pass
def log_metrics(metrics, step, synchronous=True): LOGGED.append((step, metrics))
""",
    "trackio": """
from types import SimpleNamespace
__version__ = "1.0.0"
LOGGED = []
class Config(dict):
    def update(self, content, allow_val_change=False): super().update(content)
config = Config()
context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))
def init(project, **options): assert options["space_id"] is None
def log(content): LOGGED.append((content["train/global_step"], content))
def finish(): pass
""",
}


def train(model, folder, *more):
    return main(["train", "--model", str(model), *OPTIONS.split(), "--output-dir", str(folder), *more])


def metrics(folder):
    """Step -> what the run itself has written of it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and set(lines[0]) >= OURS
    return {line["step"]: line for line in lines}


def same(logged, folder, prefix="train/"):
    """Whether each of our quantities was logged at each step with its value."""
    written = metrics(folder)
    for step, line in written.items():
        at_step = {name: value for at, content in logged if at == step for name, value in content.items()}
        for name in OURS:
            assert at_step[prefix + name] == pytest.approx(line[name], rel=1e-6), (step, name)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a package that records what is logged to it importable in place of the real one."""

    def made(name):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        package = tmp_path / "packages" / name
        (package / "sdk" / "lib").mkdir(parents=True)
        (package / "__init__.py").write_text(STAND_INS[name])
        for folder in ("sdk", "sdk/lib"):
            (package / folder / "__init__.py").write_text("")
        (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass\n")
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        imported = importlib.import_module(name)
        assert Path(imported.__file__).parent == package
        return imported

    yield made
    for module in [module for module in sys.modules if module.partition(".")[0] in STAND_INS]:
        del sys.modules[module]


@pytest.fixture
def requests(monkeypatch, tmp_path):
    """What is asked of the network, by whatever heeds the settings of a proxy."""
    seen: list[str] = []

    class Recorder(socketserver.StreamRequestHandler):
        def handle(self):
            seen.append(self.rfile.readline().decode("latin-1"))
            self.wfile.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Recorder)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        for spelled in (name, name.lower()):
            monkeypatch.setenv(spelled, f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield seen
    server.shutdown()


def test_by_default_there_is_no_logger_and_no_request(byte_model, tmp_path, requests):
    assert train(byte_model, tmp_path / "run") == 0
    assert metrics(tmp_path / "run") and not requests
    assert not (tmp_path / "run" / "runs").exists()


def test_tensorboard(byte_model, tmp_path, requests):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(byte_model, tmp_path / "run", "--report-to", "tensorboard") == 0
    (folder,) = (tmp_path / "run" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    same([(e.step, {name: e.value}) for name, of in scalars.items() for e in of], tmp_path / "run")
    assert not requests


@pytest.mark.parametrize("name, prefix", [("wandb", "train/"), ("mlflow", ""), ("trackio", "train/")])
def test_to_what_records(name, prefix, byte_model, tmp_path, stand_in, requests):
    package = stand_in(name)
    assert train(byte_model, tmp_path / "run", "--report-to", name) == 0
    same(package.LOGGED, tmp_path / "run", prefix)
    assert not requests


def test_wandb_itself_offline(byte_model, tmp_path, requests, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train(byte_model, tmp_path / "run", "--report-to", "wandb") == 0
    wandb.finish()  # which otherwise the end of the process does
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = record.read_bytes()
    assert all(f"train/{name}".encode() in content for name in OURS) and not requests


def test_mlflow_itself_in_files(byte_model, tmp_path, requests, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    assert train(byte_model, tmp_path / "run", "--report-to", "mlflow") == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    logged = [(m.step, {name: m.value}) for name in OURS for m in client.get_metric_history(run.info.run_id, name)]
    same(logged, tmp_path / "run", prefix="")
    assert not requests


def test_trackio_itself(byte_model, tmp_path, requests, monkeypatch):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    assert train(byte_model, tmp_path / "run", "--report-to", "trackio", "--project", "p", "--run-name", "r") == 0
    same([(line["train/global_step"], line) for line in SQLiteStorage.get_logs("p", "r")], tmp_path / "run")
    assert not requests


def refused(capsys, code, *messages):
    out, err = capsys.readouterr()
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert all(message in err for message in messages), err


def test_a_logger_that_is_not_there(byte_model, tmp_path, capsys):
    code = train(byte_model, tmp_path / "run", "--report-to", "clearml", "--dry-run")
    refused(capsys, code, "--report-to clearml: its package is not installed")
    code = train(byte_model, tmp_path / "run", "--report-to", "tensorbord", "--dry-run")
    refused(capsys, code, "not 'tensorbord'; did you mean tensorboard?")
    code = train(byte_model, tmp_path / "run", "--report-to", "paper", "--dry-run")
    refused(capsys, code, "--report-to must be one of none, all, azure_ml, ", "mlflow, ", "not 'paper'")


def test_wandb_without_a_key(byte_model, tmp_path, capsys, stand_in):
    package = stand_in("wandb")

    def login():
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    package.login = login
    code = train(byte_model, tmp_path / "run", "--report-to", "wandb")
    refused(capsys, code, "No API key configured. Log in with `wandb login`, or set WANDB_MODE=offline.")
    assert not (tmp_path / "run").exists()


def test_mlflow_where_it_cannot_log(byte_model, tmp_path, capsys, stand_in, monkeypatch):
    package = stand_in("mlflow")
    package.REFUSED.append("The filesystem backend is in maintenance mode. Please migrate, see https://mlflow.org.")
    code = train(byte_model, tmp_path / "run", "--report-to", "mlflow", "--dry-run")
    refused(capsys, code, "is in maintenance mode. Set MLFLOW_TRACKING_URI, as to sqlite:///mlflow.db or a server.")
    package.get_tracking_uri = lambda: "sqlite:///mlflow.db"
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    monkeypatch.setattr("importlib.util.find_spec", without(importlib.util.find_spec, "sqlalchemy"))
    code = train(byte_model, tmp_path / "run", "--report-to", "mlflow", "--dry-run")
    refused(capsys, code, "--report-to mlflow: mlflow-skinny has no database to log to")


def without(find_spec, missing):
    return lambda name, *package: None if name == missing else find_spec(name, *package)
