"""`bench/serving.py` runs, checks its own results on the way, and writes what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvcache

SCRIPT = Path(__file__).parents[1] / "bench" / "serving.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    for package in ("mlx.core", "mlx_lm", "rich"):
        pytest.importorskip(package)
    results = tmp_path_factory.mktemp("serving") / "results.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(results)],
        env={**os.environ, "PYTHONPATH": str(Path(kvcache.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {"printed": done.stdout, **json.loads(results.read_text())}


def test_both_tables_are_printed(found):
    assert "What moves cost beside attention" in found["printed"]
    assert "Beside mlx-lm's own buffers" in found["printed"]


def test_moves_are_told_beside_attention(found):
    (row,) = found["moves"]
    assert (row["keep_free"], row["steps"], row["sampled_steps"]) == (0.1, 40, 2)
    assert 0.5 < row["utilization"] < 1 and row["mean_sequences"] > 1
    assert 0 <= row["moved_over_attended"] < 0.2
    assert row["moved_bytes"] > 0 or row["moves"] == 0
    assert 0 < row["books_ms"] < row["calls_ms"] and row["moves_ms"] == row["calls_ms"] - row["books_ms"]
    for library in ("mlx", "numpy"):
        attention = row[f"{library}_attention_ms"]
        assert attention > 0
        assert row[f"moves_over_{library}_attention"] == pytest.approx(row["moves_ms"] / attention)


def test_the_arena_is_told_beside_buffers_that_grow(found):
    (row,) = found["mlx_lm"]
    assert (row["sequences"], row["layers"]) == (3, 2)
    assert row["theirs_copied_per_token"] == row["theirs_computed_per_token"] > 0
    assert row["ours_copied_per_token"] >= 0 == row["arena_copies"]
    for side in ("ours", "theirs"):
        assert row[f"{side}_peak_bytes"] >= row[f"{side}_live_bytes"] > 0
        assert row[f"{side}_update_steps_per_second"] > row[f"{side}_attend_steps_per_second"] > 0
    assert row["update_ratio"] > 0 and row["attend_ratio"] > 0
