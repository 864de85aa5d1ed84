"""The methods of the comparison, by name. A new method is one module and one line here."""

from __future__ import annotations

import importlib

from common.errors import ConfigError
from common.methods.base import Method

_MODULES = {
    "fedhypevae": "common.methods.fedhypevae.server",
    "fedavg": "common.methods.heads.fedavg",
    "fedprox": "common.methods.heads.fedprox",
    "fedlambda": "common.methods.heads.fedlambda",
    "dp_fedsgd": "common.methods.heads.dp_fedsgd",
    "dp_cvae": "common.methods.generators.dp_cvae",
    "dp_cgan": "common.methods.generators.dp_cgan",
    "dp_gauss": "common.methods.generators.dp_gauss",
    "mh_pfedhn": "common.methods.mh_pfedhn.personal",
    "mh_pfedhn_dp": "common.methods.mh_pfedhn.personal",
    "mh_pfedhn_gd": "common.methods.mh_pfedhn.taught",
    "mh_pfedhn_gd_dp": "common.methods.mh_pfedhn.taught",
}


def method_names() -> tuple[str, ...]:
    """Names that `method = "..."` may take."""
    return tuple(_MODULES)


def get_method(name: str) -> Method:
    """The method of that name; its module is imported on first use.

    Raises:
        ConfigError: "unknown method ..., expected one of ...".
    """
    if name not in _MODULES:
        raise ConfigError(f"unknown method {name!r}, expected one of {', '.join(_MODULES)}")
    method: Method = getattr(importlib.import_module(_MODULES[name]), "METHOD_DP" if name.endswith("_dp") else "METHOD")
    return method
