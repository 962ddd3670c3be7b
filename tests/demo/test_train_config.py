"""The YAML of `train`: every one in configs/ loads, and what cannot be meant is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from channel_metrics.demo.config import ProbeSection, load_config
from channel_metrics.errors import ConfigError

# `swift.yaml` is a file of ms-swift, and has a test beside its trainer.
FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "swift.yaml")


def write(folder: Path, **changes: Any) -> Path:
    raw = {"sources": {"bbu": {"path": "bbu.jsonl"}}, "model": {"tiny": {}}} | changes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_its_files_exist(path: Path) -> None:
    config = load_config(path)
    assert len(config.sources) >= 4
    for source in config.sources:
        for data in (source.path, source.val_path):
            assert data is None or data.is_file()


def test_sources_as_list_and_as_mapping_are_the_same(tmp_path: Path) -> None:
    mapping = load_config(write(tmp_path, sources={"a": {"path": "a.jsonl", "ratio": "0.5"}}))
    listed = load_config(write(tmp_path, sources=[{"name": "a", "path": "a.jsonl", "ratio": 0.5}]))
    assert mapping == listed
    assert mapping.sources[0].path == (tmp_path / "a.jsonl").resolve()


def test_model_and_tokenizer_beside_the_config_become_absolute(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    config = load_config(write(tmp_path, model="weights", tokenizer="org/on-the-hub"))
    assert config.model.name == str((tmp_path / "weights").resolve())
    assert config.tokenizer == "org/on-the-hub"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modle": "x"}, ["'modle'", "'model'"]),
        ({"sources": {"bbu": {"path": "x", "ratoi": 1}}}, ["'ratoi'", "'ratio'", "bbu"]),
        ({"model": {"tiny": {"hiden_size": 4}}}, ["'hiden_size'", "'hidden_size'", "model.tiny"]),
        ({"training": {"learning_rat": 1}}, ["'learning_rat'", "'learning_rate'", "training"]),
        ({"metrics": {"feilds": ["a"]}}, ["'feilds'", "'fields'", "metrics"]),
        ({"metrics": {"metrics": ["los"]}}, ["'los'", "'loss'"]),
        ({"probe": {"sources": {"x": "x.jsonl"}, "evry": 2}}, ["'evry'", "'every'", "probe"]),
    ],
)
def test_typos_are_refused_with_the_nearest(
    tmp_path: Path, changes: dict[str, Any], named: list[str]
) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    for part in [*named, str(path)]:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": None}, "must be a list or a mapping"),
        ({"sources": {}}, "at least one source"),
        ({"sources": {"a": "a.jsonl"}}, "expected keys and values"),
        ({"sources": {"a": {}}}, "path belongs to kind jsonl"),
        ({"sources": {"a": {"kind": "python_corpus"}}}, "part belongs"),
        ({"sources": {"a": {"path": "x", "ratio": 0}}}, "ratio must be above 0"),
        ({"sources": {"a": {"path": "x", "domain": "both"}}}, "'target' or 'source'"),
        ({"sources": {"a": {"path": "x", "val_path": "y", "val_samples": 1}}}, "not both"),
        ({"sources": [{"name": "a", "path": "x"}] * 2}, "a name of its own"),
        ({"sources": [{"path": "x"}]}, "required"),
        ({"model": {"name": "x", "tiny": {}}}, "exactly one"),
        ({"model": None}, "expected keys and values"),
        ({"max_length": "long"}, "max_length"),
        ({"max_length": 1}, "at least 2"),
        ({"metrics": {"key_format": "{channel}"}}, "{metric}"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(write(tmp_path, **changes))
    assert message in str(raised.value)


def test_objects_are_not_constructed(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    marker = tmp_path / "made"
    path.write_text(f"sources: {{}}\nmodel: !!python/object/apply:os.mkdir ['{marker}']\n")
    with pytest.raises(ConfigError, match=r"evil\.yaml:2: expected plain YAML"):
        load_config(path)
    assert not marker.exists()


@pytest.mark.parametrize("text", ["a: [1", "- 1\n", "", "\tx: 1"])
def test_what_is_no_mapping_is_refused_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_probe_section(tmp_path: Path) -> None:
    probe = {"every": 5, "max_overhead": None, "sources": {"canary": "canary.jsonl"}}
    found = load_config(write(tmp_path, probe=probe)).probe
    path = (tmp_path / "canary.jsonl").resolve()
    assert found == ProbeSection(every=5, max_overhead=None, sources={"canary": path})
    assert load_config(write(tmp_path)).probe is None


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"sources": {}}, "sources of the probe must name at least one JSONL file"),
        ({"every": 5}, "probe.sources: Field required"),
        ({"sources": {"x": "x.jsonl"}, "every": 0}, "every must be a whole number"),
        ({"sources": {"a b": "x.jsonl", "a_b": "y.jsonl"}}, "'a b' and 'a_b'"),
        ("canary.jsonl", "probe: expected keys and values"),
    ],
)
def test_probe_sections_that_cannot_be(tmp_path: Path, probe: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, probe=probe))
