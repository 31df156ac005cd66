"""The documents name what exists, and what they name exists."""

import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import gazeguard
from gazeguard.bench.bases import BASES
from gazeguard.bench.defences import DEFENCES
from gazeguard.bench.suite import load_plugins, shipped
from gazeguard.cli.main import VERBS, cli
from gazeguard.data.read import FORMATS
from gazeguard.lab import tiny
from gazeguard.lab.attacks import ATTACKS
from gazeguard.methods.bye.detector import RULES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
DOCS = {p.relative_to(ROOT): p.read_text("utf-8") for p in (ROOT / "docs").rglob("*.md")}


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_is_in_the_readme_and_has_help(verb):
    assert re.search(rf"gazeguard {verb}|make {verb}", README), f"README does not show {verb}"
    shown = CliRunner().invoke(cli, [verb, "--help"])
    assert shown.exit_code == 0
    assert len(shown.output) > 80


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_a_section(rule):
    assert f'rule="{rule}"' in DOCS[Path("docs/methods/bye.md")]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_has_a_section(name):
    assert f"`{name}`" in DOCS[Path("docs/formats.md")]


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_every_tested_family_is_in_the_readme(family):
    assert family in README


@pytest.mark.parametrize("name", sorted(set(gazeguard.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name):
    assert getattr(gazeguard, name).__doc__
    assert any(f"gazeguard.{name}" in text for text in [README, *DOCS.values()]), name


@pytest.mark.parametrize("name", shipped())
def test_every_suite_has_a_line(name):
    assert f"`{name}`" in DOCS[Path("docs/suites.md")]


def test_the_plugin_of_the_docs_runs(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", DOCS[Path("docs/suites.md")], re.DOTALL)
    registries = (ATTACKS, BASES, DEFENCES)
    before = [dict(registry) for registry in registries]
    (tmp_path / "docs_plugin.py").write_text(code)
    try:
        load_plugins([tmp_path / "docs_plugin.py"])
        found = [set(registry) for registry in registries]
        for name, names in zip(("red", "mine", "red-eye"), found, strict=True):
            assert name in names
    finally:
        sys.modules.pop("gazeguard_plugin_docs_plugin", None)
        for registry, known in zip(registries, before, strict=True):
            registry.clear()
            registry.update(known)


def test_links_lead_somewhere():
    for name, text in {Path("README.md"): README, **DOCS}.items():
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            if not link.startswith("http"):
                assert (ROOT / name.parent / link).exists(), f"{name} links to {link}"


def test_figures_of_the_readme_are_in_the_benchmark():
    figures = re.findall(r"\d\.\d+ ± \d\.\d+", README)
    assert len(figures) >= 10
    assert not [f for f in figures if f not in DOCS[Path("docs/benchmark.md")]]


def test_lab_commands_of_the_readme_parse():
    options = set(re.findall(r"(?:lab \w+|clean).*?(--[a-z-]+)", README.replace("\\\n", " ")))
    help_text = "".join(
        CliRunner().invoke(cli, [*verb, "--help"]).output
        for verb in (
            ["clean"],
            ["lab", "poison"],
            ["lab", "finetune"],
            ["lab", "base"],
            ["lab", "zoo"],
        )
    )
    assert options
    for option in options:
        assert option in help_text, f"{option} is in the README and in no command"
