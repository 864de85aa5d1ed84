"""Settings of operation: what a run may change when it goes on, and no part of what makes it this run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config.base import Concern, Text


class OperationConfig(Concern):
    """Who is asked, folders, patience, devices and the run's name.

    `sites` names the registered sites that a run asks, with commas; empty: all that are connected.

    `device` is where the sites compute: `auto` takes a GPU where there is one; a site may choose another for itself.
    `tracking` keeps curves of a run in files below its output folder; nothing of them is sent anywhere.
    """

    sites: Text = ""
    min_sites: int = Field(2, ge=1, le=100_000)
    round_timeout: float = Field(600.0, ge=1e-3, le=1e7)
    output_dir: Text = "outputs/run"
    resume: bool = False
    run_name: str = Field("", max_length=200)
    tracking: Literal["tensorboard", "mlflow", "off"] = "tensorboard"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")

    @property
    def chosen_sites(self) -> frozenset[str]:
        """The names in `sites`."""
        return frozenset(name.strip() for name in self.sites.split(",") if name.strip())


OPERATION = frozenset(field.replace("_", "-") for field in OperationConfig.model_fields)
"""Keys of the settings that a run may change when it goes on."""
