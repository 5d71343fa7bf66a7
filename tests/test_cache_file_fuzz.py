"""The reader of cache files is fuzzed for a few seconds here, and for a minute by `.ci/run`."""

import fuzz_cache_file as target
import pytest

SECONDS = 3


@pytest.mark.parametrize("name", target.corpus())
def test_a_file_of_an_earlier_day_still_reads(name):
    assert target.reads_well(target.CORPUS / name)


def test_mutants_are_refused_in_little_memory_and_soon(tmp_path):
    tried, well = target.fuzz(SECONDS, 20, tmp_path)
    assert tried > 50
    assert well < tried / 2


def test_mutants_of_a_seed_are_the_same_everywhere():
    sources = list(target.corpus().values())
    one, two = (target.mutant(sources[1], sources, target.random.Random(7)) for _ in range(2))
    assert one == two != sources[1]


def test_a_reader_that_errs_is_told_with_the_file_kept(tmp_path, monkeypatch):
    def read(path):
        raise KeyError("dtype")

    monkeypatch.setattr(target, "reads_well", read)
    monkeypatch.setattr(target.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(AssertionError, match=r"mutant 0 of seed 3, kept as .*KeyError\('dtype'\)"):
        target.fuzz(5, 3, tmp_path)
    assert (tmp_path / "cache_file_mutant_3_0").exists()
