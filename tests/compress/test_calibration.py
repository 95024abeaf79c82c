"""Where calibration tokens come from."""

from __future__ import annotations

import json

import numpy as np
import pytest

from upg_jax import CheckpointError
from upg_jax.cli._demo import demo_text
from upg_jax.compress import Calibration, default_texts, read_texts


def codepoints(text):
    return [ord(c) for c in text]


def test_windows_are_pieces_of_the_text_without_overlap():
    text = "".join(chr(i) for i in range(1000))
    got = Calibration.from_texts([text[:333], text[333:]], codepoints, windows=10, tokens=40, seed=3)
    assert got.ids.shape == (10, 40)
    assert got.ids.dtype == np.int32
    np.testing.assert_array_equal(np.diff(got.ids, axis=1), 1)
    assert len(set(got.ids[:, 0])) == 10
    assert not (got.ids[:, 0] % 40).any()


def test_choice_depends_on_the_seed_alone():
    def chosen(seed):
        return Calibration.from_texts(["abcdefghij" * 100], codepoints, windows=5, tokens=7, seed=seed)

    assert chosen(1).to_json() == chosen(1).to_json()
    assert chosen(1).to_json()["sha256"] != chosen(2).to_json()["sha256"]


def test_short_text_gives_the_windows_it_has_and_none_is_an_error():
    assert Calibration.from_texts(["abcdefgh"], codepoints, windows=64, tokens=3).ids.shape == (2, 3)
    with pytest.raises(ValueError, match="at least 9 tokens; got 8"):
        Calibration.from_texts(["abcdefgh"], codepoints, windows=64, tokens=9)


@pytest.mark.parametrize("asked", [{"windows": 0}, {"windows": -1}, {"tokens": 0}, {"tokens": -4}])
def test_a_calibration_of_no_tokens_is_refused_by_name(asked):
    ((name, value),) = asked.items()
    with pytest.raises(ValueError, match=f"calibration: {name} must be at least 1; got {value}"):
        Calibration.from_texts(["abcdefgh"], codepoints, **{"tokens": 4, **asked})


def test_long_corpus_is_not_read_to_its_end():
    read = []

    def texts():
        for i in range(1000):
            read.append(i)
            yield "x" * 100

    Calibration.from_texts(texts(), codepoints, windows=2, tokens=10)
    assert len(read) == 16 * 2 * 10 // 100 + 1


@pytest.mark.parametrize("ids", [np.zeros(3, int), np.zeros((0, 4), int), np.zeros((2, 2))])
def test_other_than_windows_of_integers_is_refused(ids):
    with pytest.raises(ValueError, match=r"must be integers \(windows, tokens\)"):
        Calibration(ids, "test")


def test_file_and_directory_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.txt").write_text("first ☃", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no")
    assert list(read_texts(tmp_path)) == ["first ☃", "second"]
    assert list(read_texts(tmp_path / "b.txt")) == ["second"]


def test_what_has_no_text_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="must be a text file, a directory"):
        list(read_texts(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CheckpointError, match=r"latin\.txt must be UTF-8"):
        list(read_texts(tmp_path))


@pytest.mark.parametrize("kind", ["saved", "saved splits", "jsonl", "parquet"])
def test_hugging_face_data_set_on_disk_is_read(tmp_path, kind, monkeypatch):
    datasets = pytest.importorskip("datasets", reason='pip install "upg-jax[data]"')
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "n": [1, 2, 3]})
    path = tmp_path / "data"
    if kind == "jsonl":
        path.mkdir()
        rows = [json.dumps({"body": text, "n": 0}) for text in made["body"]]
        (path / "train.jsonl").write_text("\n".join(rows))
    elif kind == "parquet":
        path.mkdir()
        made.to_parquet(path / "train.parquet")
    elif kind == "saved":
        made.select([2, 0, 1]).save_to_disk(path)
    else:
        datasets.DatasetDict(train=made).save_to_disk(path)
    expected = ["three", "one", "two"] if kind == "saved" else ["one", "two", "three"]
    assert list(read_texts(path, column="body")) == expected
    with pytest.raises(CheckpointError, match="no column 'text'; it has 'body', 'n'"):
        list(read_texts(path))


def test_default_text_fills_its_windows_and_shares_none_with_the_demo():
    (text,) = default_texts()
    # A token of this English prose has about 4.2 characters.
    assert len(text) > 64 * 512 * 4.2
    demo = demo_text()
    assert not any(paragraph in demo for paragraph in text.strip().split("\n\n"))
