"""Arrows point one way: who may import whom (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
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


def test_app_package_holds_no_data() -> None:
    """The patterns of what Flower ships name code alone."""
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"]
    assert patterns
    assert all(pattern.endswith(".py") or pattern == "common/**/*.json" for pattern in patterns)
    assert [path.name for path in (ROOT / "common").rglob("*.json")] == ["privacy_statement.schema.json"]
