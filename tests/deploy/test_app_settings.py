"""The app's own settings: Flower refuses a run that sets any other, and they must not hide a new default."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from common.config.presets import resolve_listed
from common.config.run import RunConfig
from common.errors import ConfigError
from deploy.machine.app_contents import read_files
from deploy.machine.app_package import build_package, staged_app

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = ROOT / "pyproject.toml"
PAGE = ROOT / "docs" / "settings.md"


def listed() -> dict[str, Any]:
    return dict(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])


def test_listed_settings_are_the_codes_defaults() -> None:
    settings, defaults = listed(), RunConfig().to_flat()
    assert len(settings) <= 32
    assert (settings.pop("preset"), settings.pop("expert")) == ("table", "")
    assert settings == {key: defaults[key] for key in settings}
    assert {key: type(value) for key, value in settings.items()} == {key: type(defaults[key]) for key in settings}
    assert resolve_listed(listed()) == RunConfig()


def test_page_has_every_listed_setting_and_no_other() -> None:
    assert keys_of_table(PAGE, "# Settings") == sorted(listed())


def test_page_has_every_expert_setting_with_its_default() -> None:
    others = {key: value for key, value in RunConfig().to_flat().items() if key not in listed()}
    assert keys_of_table(PAGE, "## Expert settings") == sorted(others)
    for key, value in others.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        assert f"| `{key}` | {f'`{text}`' if text else 'empty'} |" in PAGE.read_text(encoding="utf-8")


def keys_of_table(page: Path, heading: str) -> list[str]:
    """Keys in the first cells of the first table below a heading."""
    below = page.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    rows = re.search(r"^\|.*?(?=\n\n|\Z)", below, re.MULTILINE | re.DOTALL)
    assert rows is not None
    return sorted(key for row in rows[0].splitlines()[2:] for key in re.findall(r"`([^`]+)`", row.split("|")[1]))


def test_app_package_is_small_and_holds_code_alone() -> None:
    package = build_package(PYPROJECT.parent)
    names = set(read_files(package))
    assert len(package) < 1 << 20  # it travels to every site, with every run
    assert {"server_app/app.py", "client_app/app.py", "common/config/run.py"} <= names
    assert {Path(name).suffix for name in names if not name.startswith(".info/")} <= {".py", ".json", ".toml"}
    assert {name.split("/")[0] for name in names if "/" in name} == {
        ".info", "common", "server_app", "client_app", "embeddings"
    }  # fmt: skip


def test_app_package_holds_no_module_that_no_app_runs() -> None:
    packed = {name: name.removesuffix(".py").removesuffix("/__init__") for name in read_files(build_package(ROOT))}
    modules = {path.replace("/", "."): name for name, path in packed.items() if name.endswith(".py")}
    reached: set[str] = set()

    def reach(module: str) -> None:
        if module not in modules or module in reached:
            return
        reached.add(module)
        reach(module.rpartition(".")[0])
        source = (ROOT / modules[module]).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                wanted = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:  # methods are imported by name
                wanted = [str(node.value).partition(":")[0]] if isinstance(node, ast.Constant) else []
            for name in wanted:
                reach(name)

    for app in ("server_app.app", "client_app.app"):
        reach(app)
    assert sorted(modules.keys() - reached) == []


@pytest.mark.parametrize("pattern", ["code/**/*.py", "**/*.py"])
def test_app_package_is_what_flower_packs_byte_for_byte(tmp_path: Path, pattern: str) -> None:
    head = '[project]\nname = "small"\nversion = "0.1.0"\nlicense = "Apache-2.0"\n[tool.flwr.app]\npublisher = "us"\n'
    parts = '[tool.flwr.app.components]\nserverapp = "code.a:app"\nclientapp = "code.a:app"\n'
    for name, text in {
        "pyproject.toml": f'{head}fab-include = ["{pattern}"]\n{parts}',
        ".gitignore": "hidden.py\n",
        "code/a.py": "app = 1\n",
        "code/deep/b.py": "x = 2\n",
        "code/hidden.py": "no\n",
        "code/__pycache__/c.py": "no\n",
        "other/d.py": "x = 3\n",
    }.items():
        (tmp_path / "app" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "app" / name).write_text(text)
    (tmp_path / "app" / "code" / "link.py").symlink_to(tmp_path / "app" / "other" / "d.py")
    wanted = build_fab_from_disk(tmp_path / "app")
    assert build_package(tmp_path / "app") == wanted
    assert ("other/d.py" in read_files(wanted)) == (pattern == "**/*.py")
    with staged_app(tmp_path / "app") as staged:
        assert build_fab_from_disk(staged) == wanted
    assert not staged.exists()


def test_folder_without_an_app_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no Flower app"):
        build_package(tmp_path)
