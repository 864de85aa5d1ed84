"""The methods of the comparison, by name. A new method is one module and one line here."""

from __future__ import annotations

import importlib

from common.config.run import RunConfig
from common.errors import ConfigError
from common.methods.base import Method

_WHERE = {
    "fedhypevae": "common.methods.fedhypevae.server:METHOD",
    "fedavg": "common.methods.heads.fedavg:METHOD",
    "fedprox": "common.methods.heads.fedprox:METHOD",
    "fedlambda": "common.methods.heads.fedlambda:METHOD",
    "dp_fedsgd": "common.methods.heads.dp_fedsgd:METHOD",
    "dp_cvae": "common.methods.generators.dp_cvae:METHOD",
    "dp_cgan": "common.methods.generators.dp_cgan:METHOD",
    "dp_gauss": "common.methods.generators.dp_gauss:METHOD",
    "mh_pfedhn": "common.methods.mh_pfedhn.personal:METHOD",
    "mh_pfedhn_gd": "common.methods.mh_pfedhn.taught:METHOD",
    "mh_pfedhn_gd_dp": "common.methods.mh_pfedhn.taught:METHOD_DP",
}


def method_names() -> tuple[str, ...]:
    """Names that `method = "..."` may take."""
    return tuple(_WHERE)


def get_method(name: str) -> Method:
    """The method of that name; its module is imported on first use.

    Raises:
        ConfigError: "unknown method ..., expected one of ...".
    """
    if name not in _WHERE:
        raise ConfigError(f"unknown method {name!r}, expected one of {', '.join(_WHERE)}")
    module, attribute = _WHERE[name].split(":")
    method: Method = getattr(importlib.import_module(module), attribute)
    return method


def method_of(config: RunConfig) -> Method:
    """The method of a run, which carries out the run's settings.

    Raises:
        ConfigError: there is no such method, or it does not carry them out.
    """
    method = get_method(config.method)
    if config.rivals.own_encoders and not method.makes_site_models:
        raise ConfigError(f"own-encoders needs a method that makes each site its own model: {config.method} does not")
    if method.check is not None:
        method.check(config)
    return method
