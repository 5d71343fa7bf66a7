"""The command line: exit codes, where output goes, and errors that say what to do next."""

import functools
import importlib.util
import json
import subprocess
import sys

import pytest
from commands import run

import kvcache
from kvcache import cli_demo


@pytest.fixture
def quick(capsys):
    """Runs small demonstrations."""
    pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm")
    pytest.importorskip("rich")
    return functools.partial(run, capsys, "demo", "--requests", "4", "--arena-tokens", "256")


def test_the_version_is_told(capsys):
    assert run(capsys, "--version") == (0, f"kvcache {kvcache.__version__}\n", "")


def test_it_runs_as_a_process():
    command = [sys.executable, "-m", "kvcache.cli", "--version"]
    assert subprocess.run(command, capture_output=True, check=True).stdout.decode().startswith("kvcache ")


def test_without_a_command_the_usage_is_shown(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert "COMMAND" in err


def test_help_names_every_option_and_its_default(capsys):
    code, out, _ = run(capsys, "demo", "--help")
    assert code == 0
    for option in (
        "--model",
        "--requests",
        "--arena-tokens",
        "--block-size",
        "--placement",
        "--turns",
        "--no-prefix-cache",
        "--seed",
        "--json",
    ):
        assert option in out
    assert "default: 48" in out


def test_the_demo_says_that_all_tokens_are_the_same(quick):
    code, out, err = quick()
    assert code == 0
    assert "serving from one arena: 4 requests" in out
    assert "are the same as alone" in out
    assert err == ""


@pytest.mark.parametrize("argument", [["--json"], ["--json", "-"]])
def test_json_is_all_that_goes_to_standard_output(quick, argument):
    code, out, err = quick(*argument)
    values = json.loads(out)
    assert code == 0
    assert "are the same as alone" in err
    assert (values["requests"], values["equal"], values["difference"]) == (4, True, None)
    assert values["tokens"] > 0
    assert values["tokens_per_second"] > 0
    assert values["mlx_lm_tokens_per_second"] > 0
    assert {"moves", "moved_tokens", "arena_copies", "seed", "placement", "block_size"} <= set(values)


def test_turns_of_a_conversation_are_told(quick):
    code, out, err = quick("--turns", "3", "--json")
    values = json.loads(out)
    assert (code, values["equal"], values["requests"], values["turns"]) == (0, True, 12, 3)
    assert [(turn["turn"], turn["requests"]) for turn in values["by_turn"]] == [(1, 4), (2, 4), (3, 4)]
    assert values["skipped_tokens"] == sum(turn["skipped_tokens"] for turn in values["by_turn"]) > 0
    ways = ("revived_tokens", "copied_tokens", "shared_tokens")
    assert values["skipped_tokens"] == sum(values[way] for way in ways)
    assert f"{values['skipped_tokens']:,} of {values['prompt_tokens']:,} tokens skipped" in err
    assert "4 conversations of 3 turns" in err


def test_without_a_prefix_cache_nothing_is_skipped(quick):
    values = json.loads(quick("--turns", "3", "--no-prefix-cache", "--json")[1])
    assert (values["equal"], values["prefix_cache"], values["skipped_tokens"]) == (True, False, 0)


def test_json_goes_to_a_file(quick, tmp_path):
    code, out, _ = quick("--json", str(tmp_path / "demo.json"), "--placement", "paged", "--block-size", "4")
    values = json.loads((tmp_path / "demo.json").read_text())
    assert code == 0
    assert "are the same as alone" in out
    assert (values["placement"], values["block_size"], values["arena_tokens"]) == ("paged", 4, 256)


def test_a_seed_repeats_a_run(quick):
    values = [json.loads(quick("--json", "--seed", seed)[1]) for seed in ("3", "3", "4")]
    told = [
        (each["tokens"], each["prompt_tokens"], each["moves"], each["smallest_margin"]) for each in values
    ]
    assert told[0] == told[1] != told[2]


def test_a_difference_is_exit_code_1_and_named(quick, monkeypatch):
    write = kvcache.DecodeBatch.write
    monkeypatch.setattr(
        kvcache.DecodeBatch, "write", lambda batch, layer, k, v: write(batch, layer, k, 0 * v)
    )
    code, out, err = quick("--json")
    difference = json.loads(out)["difference"]
    assert code == 1
    assert difference["got"] != difference["expected"]
    assert f"request {difference['request_id']} differs at decoded token {difference['position']}" in err


def test_a_model_from_a_folder_is_served(quick, tmp_path):
    from tiny_models import word_tokenizer

    from kvcache import mlx_lm

    save(mlx_lm.random_llama(vocab_size=128), tmp_path, word_tokenizer())
    code, out, _ = quick("--model", str(tmp_path), "--json")
    values = json.loads(out)
    assert (code, values["equal"], values["model"]) == (0, True, str(tmp_path))


def save(model, folder, tokenizer):
    """As the Hugging Face hub has it, in half precision."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model.set_dtype(mx.float16)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {name: value for name, value in vars(model.args).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)


def test_a_model_that_is_not_there_is_an_error_that_helps(quick, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, out, err = quick("--model", str(tmp_path))
    assert (code, out) == (2, "")
    assert f"{tmp_path} does not load" in err
    assert "--model takes a folder" in err


def test_a_model_that_cannot_be_batched_is_an_error_that_helps(quick, monkeypatch):
    from tiny_models import tiny

    from kvcache import mlx_lm

    monkeypatch.setattr(mlx_lm, "random_llama", lambda seed: tiny("mamba"))
    code, _, err = quick()
    assert code == 2
    assert "mamba model keeps a ArraysCache" in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arena-tokens", "64"], "give --arena-tokens at least 128"),
        (["--block-size", "64"], "256 tokens are 4 blocks of 64: give --block-size at most 32"),
        (["--turns", "7"], "give --turns at most 6"),
        (["--turns", "0"], "argument --turns: 0 is less than 1"),
        (["--seed", "-1"], "--seed is -1, expected at least 0"),
        (["--json", "/no/such/folder/demo.json"], "there is no such folder"),
        (["--requests", "0"], "argument --requests: 0 is less than 1"),
        (["--requests", "many"], "argument --requests: invalid count value: 'many'"),
        (["--placement", "anywhere"], "invalid choice: 'anywhere'"),
        (["--arena-tokens", "1000000000"], "bytes"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(quick, arguments, complaint):
    code, out, err = quick(*arguments)
    assert (code, out) == (2, "")
    assert complaint in err


def test_a_missing_library_is_named_with_the_extra(capsys, monkeypatch):
    find = importlib.util.find_spec
    absent = ("mlx_lm", "rich")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    code, out, err = run(capsys, "demo")
    assert (code, out) == (2, "")
    assert err.endswith("the demo needs mlx-lm, rich: pip install 'kvcache[demo]'\n") or "mlx, " in err


def test_an_interrupted_run_says_so(quick, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_demo.demo, "run", interrupt)
    code, _, err = quick()
    assert code == 130
    assert err == "kvcache: interrupted\n"


def test_a_file_that_cannot_be_written_is_an_error_that_helps(quick, tmp_path):
    code, _, err = quick("--json", str(tmp_path))
    assert code == 2
    assert f"--json {tmp_path}: Is a directory" in err
