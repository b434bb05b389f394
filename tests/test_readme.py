"""What the README says must be what the records and the code say."""

import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from sparse_attention_decoder import AttentionConfig
from sparse_attention_decoder.measure.report import write
from sparse_attention_decoder.tables import POLICIES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tables_are_those_made_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import readme_table

    assert readme_table.with_table(README) == README
    assert README.count("| **sketch, the default** |") >= 3
    monkeypatch.delitem(sys.modules, "readme_table")


def test_the_committed_report_is_the_one_made_from_the_records(tmp_path: Path) -> None:
    write(sorted((ROOT / "benchmarks" / "models").glob("*.jsonl")), tmp_path)
    kept = ROOT / "benchmarks" / "report"
    assert (tmp_path / "report.md").read_text() == (kept / "report.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept.iterdir()}


def test_every_setting_and_policy_is_named() -> None:
    for name in [*(field.name for field in fields(AttentionConfig)), *POLICIES]:
        assert f"`{name}`" in README, name


def test_the_defaults_it_names_are_the_defaults() -> None:
    said = re.search(r"above (\S+) of the attention and at least (\d+), with a window of (\d+) and (\d+) sinks", README)
    assert said is not None
    threshold, top_k, window, sinks = said.groups()
    assert AttentionConfig(int(top_k), float(threshold), int(window), int(sinks)) == AttentionConfig()


def test_every_file_it_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_it_names_exist_and_may_be_run() -> None:
    for script in ("demo", "test", "check"):
        path = ROOT / "scripts" / script
        assert path.stat().st_mode & 0o111
        assert path.read_text().startswith("#!/usr/bin/env bash")
