"""How a run can be watched: a status file, and tracking files that a tool draws curves from.

Only what the server knows anyway and what may leave: ε charged at each site, who answered, seconds and bytes. No loss,
no score: there are none. Everything is written to local files. A tracker that fails is reported once and left out: a
run does not end for want of a curve.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from common.durable import keep_private, make_private
from common.errors import ConfigError
from common.names import STATUS
from server_app.progress import RoundPrinter, RoundRecord, finite_or_none
from server_app.results import write_json

Tracking = Literal["tensorboard", "mlflow", "off"]


class Tracker(Protocol):
    """Something that keeps one number per name and round."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Keep the values of a round."""
        ...

    def close(self) -> None:
        """Put everything on the disk."""
        ...


class TensorBoardTracker:
    """Event files for `tensorboard --logdir`; imports tensorboard, but no torch and no TensorFlow."""

    def __init__(self, folder: Path) -> None:
        """Start a file below `folder`/tensorboard; a resumed run adds another."""
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._folder = folder / "tensorboard"
        make_private(self._folder)  # before the writer makes it for everybody
        self._writer = EventFileWriter(str(self._folder))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One event a round."""
        found = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=found)))
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
        keep_private(self._folder)


class MlflowTracker:
    """MLflow's files below `folder`/mlflow; nothing is sent to a server, its telemetry is off."""

    def __init__(self, folder: Path, run_name: str) -> None:
        """Make the run's experiment, or add a run to it."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # a database would need more packages
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=(folder / "mlflow").resolve().as_uri())
        known = self._client.get_experiment_by_name("fedhypevae")
        experiment = self._client.create_experiment("fedhypevae") if known is None else known.experiment_id
        self._run = self._client.create_run(experiment, run_name=run_name).info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One batch a round."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [self._metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


class RunWatch:
    """Tells of a run while it goes on: lines, the status file, and a tracker that is made at the first round."""

    def __init__(self, folder: Path, printer: RoundPrinter, tracking: Tracking, facts: Mapping[str, Any]) -> None:
        """Start the status file.

        Args:
            folder: the run's output folder.
            printer: prints the lines.
            tracking: which tracker.
            facts: what the status says throughout: run, method, rounds, sites.

        Raises:
            ConfigError: MLflow is asked for and not installed.
        """
        check_tracking(tracking)
        self._folder, self._printer, self._tracking = folder, printer, tracking
        self._facts = {"status": "running", **facts}
        self._tracker: Tracker | None = None
        self._write()

    def say(self, text: str) -> None:
        """Print one line."""
        self._printer.say(text)

    def round(self, record: RoundRecord, seconds: float) -> None:
        """Tell of a finished round; `seconds` is the run's time so far."""
        self._printer.say(record.line)
        self._facts |= {
            "round": record.number,
            "sites_answered": record.answered,
            "missing": dict(record.missing),
            "epsilon_spent": finite_or_none(record.spent),
            "seconds": round(seconds, 1),
            "seconds_left": round(record.seconds_left, 1),
            "line": record.line,
        }
        self._write()
        self._track(lambda tracker: tracker.log(_values(record), record.number))

    def close(self, status: str) -> None:
        """The run's last word, once everything else is written."""
        self._track(lambda tracker: tracker.close())
        self._facts |= {"status": status, "seconds_left": 0.0}
        self._write()

    def _track(self, act: Callable[[Tracker], None]) -> None:
        if self._tracking == "off":
            return
        try:
            if self._tracker is None:
                name = str(self._facts["run"])
                mlflow = self._tracking == "mlflow"
                self._tracker = MlflowTracker(self._folder, name) if mlflow else TensorBoardTracker(self._folder)
            act(self._tracker)
        except Exception as error:  # a full disk, a broken package: the run is worth more than its curves
            self._printer.say(f"{self._tracking} can't keep the curves ({type(error).__name__}): they end here")
            self._tracking = "off"

    def _write(self) -> None:
        write_json(self._folder / STATUS, {**self._facts, "updated": now()})


def check_tracking(tracking: Tracking) -> None:
    """Refuse a tracker that is not installed (ConfigError)."""
    if tracking == "mlflow" and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "tracking is mlflow, which is not installed: pip install '.[tracking]' in the project's folder, or another"
        )


def now() -> str:
    """The time, as the status file writes it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _values(record: RoundRecord) -> dict[str, float]:
    values = {f"epsilon/{site}": value for site, value in record.epsilon.items()}
    if values:
        values["epsilon/limit of the run"] = record.epsilon_target
    return values | {
        "rounds/sites answered": record.answered,
        "rounds/seconds": record.seconds,
        "bytes/received": record.bytes_up,
        "bytes/sent": record.bytes_down,
    }
