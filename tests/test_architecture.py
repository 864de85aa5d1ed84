"""Arrows point one way: who may import whom (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("common", "server_app", "client_app", "embeddings", "deploy")
ALLOWED = {
    "common": {"common"},
    "embeddings": {"common", "embeddings"},
    "server_app": {"common", "server_app"},
    "client_app": {"common", "client_app", "embeddings"},
    "deploy": set(OURS) | {"benchmarks"},
}
FORBIDDEN_LIBRARIES = {
    "common": {"flwr", "transformers"},
    "embeddings": {"flwr"},
    "server_app": {"transformers"},
    "client_app": {"transformers"},
    "deploy": set(),
}

# Floors of `common/`, from the ground up: each module needs only its own floor and those below. Single modules of
# `common/` that are not named here are the ground.
FLOORS = (
    "ground",
    "evaluation",
    "privacy",
    "secagg",
    "config",
    "generator",
    "methods",
    "wire",
    "loop",
    "assurance",
    "publishing",
)


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a module's source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", OURS)
def test_package_imports_only_what_arrows_allow(package: str) -> None:
    broken = []
    for path in sorted((ROOT / package).rglob("*.py")):
        packages = imported_packages(path.read_text(encoding="utf-8"))
        wrong = ((packages & set(OURS)) - ALLOWED[package]) | (packages & FORBIDDEN_LIBRARIES[package])
        broken += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(wrong)]
    assert not broken


def test_imported_packages_sees_imports_inside_functions() -> None:
    assert imported_packages("def f():\n    from flwr.app import Message\n    import deploy.cli\n") == {
        "flwr",
        "deploy",
    }


def imports_of(root: Path, packages: Sequence[str]) -> dict[str, set[str]]:
    """Which modules of these packages each of their modules imports, anywhere in it: dotted name -> dotted names.

    Importing a name out of a folder is importing the module of that name, or else the folder's `__init__.py`.
    """
    paths = {path for package in packages for path in (root / package).rglob("*.py")}
    modules = {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    imports: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names |= {
                    dotted if (dotted := f"{node.module}.{alias.name}") in modules else node.module
                    for alias in node.names
                }
        imports[module] = (names & set(modules)) - {module}
    return imports


def floor_of(module: str) -> int:
    """The floor of a module of `common/`, from 0."""
    part = module.split(".")[1] if "." in module else "ground"
    return FLOORS.index(part) if part in FLOORS else 0


def arrows_up(imports: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports among modules of `common/` that lead to a higher floor."""
    return sorted(
        f"{module} imports {other}"
        for module, others in imports.items()
        for other in others
        if module.startswith("common") and other.startswith("common") and floor_of(other) > floor_of(module)
    )


def circle(imports: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """One circle of modules that import each other; empty where there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return tuple(error.args[1])
    return ()


def test_each_floor_of_common_needs_only_those_below() -> None:
    imports = imports_of(ROOT, ["common"])
    assert {floor_of(module) for module in imports} == set(range(len(FLOORS)))
    assert not arrows_up(imports)


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert not circle(imports_of(ROOT, OURS))


def test_reversed_arrow_is_seen_on_the_floors_and_in_the_circle() -> None:
    imports = imports_of(ROOT, OURS)
    assert "common.privacy.clipping" in imports["common.methods.fedhypevae.site"]
    imports["common.privacy.clipping"].add("common.methods.fedhypevae.site")
    assert arrows_up(imports) == ["common.privacy.clipping imports common.methods.fedhypevae.site"]
    assert {"common.privacy.clipping", "common.methods.fedhypevae.site"} <= set(circle(imports))


def test_imports_of_sees_imports_inside_functions_and_of_whole_modules(tmp_path: Path) -> None:
    (tmp_path / "common" / "privacy").mkdir(parents=True)
    (tmp_path / "common" / "privacy" / "noise.py").write_text("def f():\n    from common import errors\n")
    (tmp_path / "common" / "errors.py").write_text("import common.privacy.noise\n")
    imports = imports_of(tmp_path, ["common"])
    assert imports["common.privacy.noise"] == {"common.errors"}
    assert imports["common.errors"] == {"common.privacy.noise"}


# Parts of the papers that gain nothing by the project's own record, and the step without a guarantee: the setting that
# asks for each.
RARE = {
    "common.generator.mmd": "mmd=per-example",
    "common.generator.lipschitz": "lipschitz-penalty=0.1",
    "common.generator.code_mixture": "num-codes=2",
    "common.generator.printed_rows": "printed-rows=true",
    "common.methods.fedhypevae.as_printed": "encoder-training=unprotected",
}
RUN = """
import sys, torch
from common.config.presets import resolve
from common.loop import run_loop
from common.methods.published import draw_published
from common.records import SiteData
sites = [SiteData(torch.eye(6), torch.arange(6) % 3)] * 2
settings = "num-sites=2 num-rounds=1 noise=test meta-steps=2 synthetic-rows=9 "
run = run_loop(resolve({"expert": settings + sys.argv[1]}), sites, ("a", "b", "c"))
draw_published(run.context, run.artifact)
print(*sys.modules)
"""


def test_no_module_names_a_rare_part_at_its_top() -> None:
    for path in (ROOT / "common").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert names.isdisjoint(RARE), path


@pytest.mark.parametrize("settings", ["", *RARE.values()])
def test_a_rare_part_is_imported_only_where_a_run_asks_for_it(settings: str) -> None:
    command = [sys.executable, "-c", RUN, settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(RARE) & set(done.stdout.split()) == {name for name, asked in RARE.items() if asked == settings}


def test_app_package_holds_no_data() -> None:
    """The patterns of what Flower ships name code alone."""
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"]
    assert patterns
    assert all(pattern.endswith(".py") or pattern == "common/**/*.json" for pattern in patterns)
    assert [path.name for path in (ROOT / "common").rglob("*.json")] == ["privacy_statement.schema.json"]
