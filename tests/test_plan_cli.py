"""`kvcache plan`: options, what goes where, and errors that say what to do next."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from configs import DEEPSEEK, GEMMA3, LLAMA, QWEN3_NEXT, TINY, without, written

from kvcache import KVCacheSpec, cli_plan

PAGE = Path(__file__).parents[1] / "docs" / "planning.md"
GIVEN = ("--memory", "40GiB", "--weights", "16GiB", "--activations", "4GiB")


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def quick(capsys, tmp_path):
    """Plans for Llama 3.1 8B, or for the config that is given."""

    def plan(*options, config=LLAMA):
        return run(capsys, "plan", written(tmp_path, config), *options)

    return plan


def test_help_names_every_option(capsys):
    code, out, _ = run(capsys, "plan", "--help")
    assert code == 0
    told = re.sub(r"\s+", " ", out)
    for option in (
        *("CONFIG", "--memory", "--device", "--weights", "--activations", "--dtype", "--state-dtype"),
        *("--context", "--concurrency", "--block-size", "--json", "--python"),
    ):
        assert option in told


def test_help_imports_nothing_that_is_heavy():
    script = (
        "import sys; from kvcache.cli import main\n"
        "try: main(['plan', '--help'])\n"
        "except SystemExit: print([name for name in ('rich', 'mlx', 'kvcache.planning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_a_plan_prints_costs_budget_and_advice(quick):
    code, out, err = quick(*GIVEN, "--concurrency", "9")
    assert (code, err) == (0, "")
    assert "(llama): 32 layers, K and V in bfloat16" in out
    assert re.search(r"a token +131,072 B +without bound", out)
    assert re.search(r"8,192 tokens +1.00 GiB +a sequence", out)
    assert re.search(r"weights +16.00 GiB +40.0 %", out)
    assert re.search(r"remains +8.00 GiB +20.0 %", out)
    assert re.search(r"fits +18 of 8,192 tokens at a time", out)
    assert re.search(r"max_total_tokens +81,920 ", out)


@pytest.mark.parametrize(
    "config", [LLAMA, DEEPSEEK, GEMMA3, QWEN3_NEXT], ids=lambda config: config["model_type"]
)
@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal_nor_is_a_table_wrapped(quick, config, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = quick("--memory", "2TiB", "--concurrency", "16", "--context", "4096", config=config)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    tables = out.split("note:")[0].splitlines()
    assert [
        line for line in tables if re.match(r" {14}", line) and "+" not in line and "arena" not in line
    ] == []


@pytest.mark.parametrize("argument", [["--json"], ["--json", "-"]])
def test_json_is_all_that_goes_to_standard_output(quick, argument):
    code, out, err = quick(*GIVEN, *argument, "--context", "4096")
    record = json.loads(out)
    assert code == 0
    assert "a sequence" in err
    assert (record["bytes_per_token"], record["windows"], record["state_bytes"]) == (131072, [], 0)
    assert record["sequence_bytes"] == 4096 * 131072
    assert record["budget"] == {
        "memory": 40 << 30,
        "weights": 16 << 30,
        "weights_from": "given",
        "activations": 4 << 30,
        "activations_from": "given",
        "overhead": 2 << 30,
        "state": 0,
        "arena": 18 << 30,
        "remaining": 0,
    }
    assert record["fits"] == {"tokens": 147456, "sequences": 36}
    assert (record["block_size"], record["max_total_tokens"], record["memory_from"]) == (16, 147456, "given")


def test_json_goes_to_a_file_and_never_over_the_config(quick, tmp_path):
    code, out, _ = quick("--json", str(tmp_path / "plan.json"), config=GEMMA3)
    record = json.loads((tmp_path / "plan.json").read_text())
    assert (code, record["budget"], record["fits"]) == (0, None, None)
    assert record["windows"] == [{"bytes_per_token": 327680, "window": 1024}]
    assert "a sequence" in out
    code, out, err = quick("--json", str(tmp_path / "config.json"))
    assert (code, out) == (2, "")
    assert "would overwrite the config" in err
    assert json.loads((tmp_path / "config.json").read_text()) == LLAMA


def test_a_folder_will_do(quick, capsys, tmp_path):
    assert quick("--json")[1] == run(capsys, "plan", str(tmp_path), "--json")[1]


def test_options_change_what_they_name(quick):
    def record(*options):
        return json.loads(quick(*options, "--json", config=QWEN3_NEXT)[1])

    assert record("--dtype", "float32")["bytes_per_token"] == 2 * 24576
    assert record("--state-dtype", "bfloat16")["state_bytes"] == 39518208
    assert record("--state-dtype", "bfloat16")["layers"][0]["state_bytes"] == 39518208
    assert record("--context", "20000")["block_size"] == 32
    assert record("--block-size", "8")["block_size"] == 8
    assert record("--concurrency", "9", "--context", "8192")["max_total_tokens"] == 81920


def test_the_constructor_call_is_printed_and_runs(quick):
    code, out, err = quick("--python", "--concurrency", "2", "--context", "32", config=TINY)
    assert (code, err) == (0, "")
    names = {}
    exec(out, names)
    assert names["spec"] == KVCacheSpec.from_model(TINY, 80)
    with names["cache"] as cache:
        assert cache.allocate_for("r", 32)
        cache.check()


def test_warnings_of_a_printed_call_go_to_standard_error(quick):
    code, out, err = quick("--python", "--concurrency", "1", "--context", "5000", config=TINY)
    assert (code, err) == (
        0, "kvcache: a context of 5,000 tokens is more than the 4,096 that the model is made for\n",
    )  # fmt: skip
    compile(out, "printed", "exec")


# --- the memory of this machine


def test_the_memory_of_the_device_is_divided(quick):
    code, out, _ = quick("--device", "--json", config=TINY)
    record = json.loads(out)
    assert code == 0
    assert record["memory_from"] in ("the system", "MLX")
    assert 2**26 < record["budget"]["memory"] < 2**45


def test_without_mlx_the_system_is_asked(quick, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlx" else find(name))
    monkeypatch.setattr("kvcache.memory.available_memory", lambda: 3 << 30)
    record = json.loads(quick("--device", "--json", config=TINY)[1])
    assert (record["budget"]["memory"], record["memory_from"]) == (3 << 30, "the system")


# --- sizes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0B", 0),
        ("24GiB", 24 << 30),
        ("24 GiB", 24 << 30),
        ("40GB", 40 * 10**9),
        ("0.1GB", 10**8),
        ("1.5TiB", 3 << 39),
        ("512MiB", 512 << 20),
        ("1kB", 1000),
        ("1KiB", 1024),
    ],
)
def test_a_size_is_a_number_and_a_unit(text, count):
    assert cli_plan._size(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "24",
        "GiB",
        "24gib",
        "24G",
        "-1GiB",
        "1e3GiB",
        "1,5GiB",
        "nanGiB",
        "infGB",
        "24GiB ",
        "",
        "0x1GB",
        "1.GB",
    ],
)
def test_anything_else_is_no_size(quick, text):
    code, out, err = quick(f"--memory={text}")
    assert (code, out) == (2, "")
    assert f"{text!r} is no size: a number and one of B, kB" in err


# --- errors that help


@pytest.mark.parametrize(
    ("options", "config", "complaint"),
    [
        (["--memory", "10GiB"], LLAMA, "10.00 GiB of memory do not hold weights of 14.96 GiB"),
        (["--memory", "10GiB"], LLAMA, "give more --memory, or the --weights and --activations"),
        (["--memory", "1GiB", "--weights", "2GiB"], TINY, "weights of 2.00 GiB"),
        (["--memory", "1GiB", "--device"], LLAMA, "not allowed with argument"),
        (["--memory", "40GiB"], without(LLAMA, "vocab_size"), "give --weights and --activations"),
        (["--memory", "40GiB"], without(LLAMA, "vocab_size"), "vocab_size is missing"),
        ([], without(LLAMA, "num_hidden_layers"), "num_hidden_layers is missing"),
        ([], LLAMA | {"num_key_value_heads": -8}, "num_key_value_heads is -8, expected at least 1"),
        ([], LLAMA | {"model_type": "titan", "num_memory_heads": 3}, "num_memory_heads"),
        (["--python"], LLAMA, "give --memory, --device or --concurrency"),
        (["--python", "--json"], LLAMA, "both print to standard output"),
        (["--context", "0"], LLAMA, "argument --context: 0 is less than 1"),
        (["--concurrency", "many"], LLAMA, "invalid count value"),
        (["--dtype", "int8"], LLAMA, "invalid choice: 'int8'"),
        (["--json", "/no/such/folder/plan.json"], LLAMA, "there is no such folder"),
        (["--block-size", "4294967296", "--concurrency", "1"], LLAMA, "--block-size"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(quick, options, config, complaint):
    code, out, err = quick(*options, config=config)
    assert (code, out) == (2, "")
    assert complaint in err
    assert "Traceback" not in err


def test_a_model_without_k_and_v_has_no_constructor_call(quick):
    config = {
        "model_type": "mamba",
        "hidden_size": 64,
        "state_size": 16,
        "conv_kernel": 4,
        "num_hidden_layers": 2,
    }
    code, out, err = quick("--python", "--concurrency", "1", config=config)
    assert (code, out) == (2, "")
    assert "no layer of this model keeps K and V" in err
    code, out, _ = quick(config=config)
    assert code == 0
    assert "an arena would be empty" in out


@pytest.mark.parametrize("name", ["nothing.json", "no/such/folder"])
def test_a_missing_file_is_an_error_that_helps(capsys, tmp_path, name):
    code, out, err = run(capsys, "plan", str(tmp_path / name))
    assert (code, out) == (2, "")
    assert f"{tmp_path / name}: there is no such file: give the config.json of a model, or the folder" in err


def test_a_folder_without_a_config_is_an_error_that_helps(capsys, tmp_path):
    code, _, err = run(capsys, "plan", str(tmp_path))
    assert code == 2
    assert f"{tmp_path / 'config.json'}: there is no such file" in err


def test_a_file_that_is_not_json_is_an_error_that_helps(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{model_type: llama}")
    code, out, err = run(capsys, "plan", str(tmp_path))
    assert (code, out) == (2, "")
    assert "config.json is not JSON" in err


def test_a_missing_library_is_named_with_the_extra_and_not_needed_for_python(quick, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    assert quick() == (2, "", "kvcache: a plan needs rich: pip install 'kvcache[plan]'\n")
    assert quick("--python", "--concurrency", "1")[0] == 0


# --- the manual


def test_the_manual_shows_what_is_printed(capsys, tmp_path, monkeypatch):
    from test_docs_code import blocks_of, run_page

    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(PAGE.read_text())
    run_page(blocks, PAGE)
    shown = [block.text for block in blocks if block.language == "console"]
    assert len(shown) >= 3
    for text in shown:
        command, _, output = text.partition("\n")
        code, out, err = run(capsys, *command.removeprefix("$ kvcache ").split())
        assert (code, err) == (0, "")
        assert [line.rstrip() for line in out.splitlines()] == output.splitlines()
