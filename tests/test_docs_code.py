"""Runs the code of README.md and docs/: what a reader copies works.

The ``python`` blocks of a page run in order, in one namespace a page; those with ``>>>`` are doctests, and
their output is compared. In ``console`` blocks the lines that begin with ``$ kvcache`` are run and have to
succeed. Any other fence (``text``, ``json``) is not code. A block that cannot run here says why in the line
above it: ``<!-- not run: needs a model from the hub -->``.
"""

import doctest
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import kvcache

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONAL = ("mlx_lm", "mlx", "ml_dtypes", "rich", "prometheus_client", "opentelemetry", "matplotlib")
NEEDED = {"demo": ("mlx_lm",), "plan": ("rich",), "replay": ("joblib", "matplotlib", "rich")}  # by a command
FENCE = re.compile(
    r"^(?P<lead> *(?:(?:[-*+]|\d+\.) +)?)(?P<ticks>```+) *(?:\{[\w-]+\} *)?(?P<language>[\w-]*)"
)
NOT_RUN = re.compile(r"^\s*<!-- not run: \S.* -->\s*$")
COMMAND_SECONDS = 300


@dataclass
class Block:
    language: str
    line: int  # number of its first line in the page
    text: str
    runs: bool


def blocks_of(text):
    lines = text.splitlines()
    number, found = 0, []
    while number < len(lines):
        fence = FENCE.match(lines[number])
        number += 1
        if not fence:
            continue
        closing = re.compile(rf"^ *{fence['ticks']}`* *$")
        end = next((n for n in range(number, len(lines)) if closing.match(lines[n])), len(lines))
        body = [line.removeprefix(" " * len(fence["lead"])) for line in lines[number:end]]
        runs = number < 2 or not NOT_RUN.match(lines[number - 2])
        found.append(Block(fence["language"], number + 1, "\n".join(body) + "\n", runs))
        number = end + 1
    return found


def run_page(blocks, page):
    """Runs the Python blocks in one namespace; tracebacks name the page's own lines."""
    names = {"__name__": "__main__"}
    for block in blocks:
        if not block.runs or block.language not in ("python", "pycon"):
            continue
        if ">>> " in block.text:
            run_examples(block, page, names)
        else:
            exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)


def run_examples(block, page, names):
    test = doctest.DocTestParser().get_doctest(block.text, {}, str(page), str(page), block.line - 1)
    test.globs = names
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=report.append, clear_globs=False)
    if runner.failures:
        raise AssertionError("".join(report))


def commands():
    """Each command of the console blocks once, with where it stands."""
    found = {}
    for page in PAGES:
        for block in blocks_of(page.read_text()) if page.exists() else ():
            if block.language == "console" and block.runs:
                for line in block.text.replace("\\\n", " ").splitlines():
                    if line.startswith("$ kvcache"):
                        found.setdefault(line[2:], f"{page.relative_to(ROOT)}:{block.line}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    blocks = blocks_of(page.read_text())
    code = "\n".join(block.text for block in blocks if block.runs)
    for name in OPTIONAL:
        if re.search(
            rf"^ *(>>> )?(import|from) {name}\b", code, re.MULTILINE
        ) and not importlib.util.find_spec(name):
            pytest.skip(f"the page needs {name}")
    monkeypatch.chdir(tmp_path)
    run_page(blocks, page)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_succeeds(command, tmp_path):
    for name in NEEDED.get(command.split()[1], ()):
        pytest.importorskip(name)
    script = "import sys; from kvcache.cli import main; sys.argv[0] = 'kvcache'; sys.exit(main())"
    place = str(Path(kvcache.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, *shlex.split(command)[1:]],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": place}, capture_output=True, text=True,
        timeout=COMMAND_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{commands()[command]}: {command}\n{done.stdout}\n{done.stderr}"


def test_the_readme_begins_with_code_that_runs():
    assert any(block.language == "python" and block.runs for block in blocks_of(PAGES[0].read_text()))


PAGE = """
```python
x = 1
```
Text.
<!-- not run: only an example -->
```python
x = y
```
* ```{code-block} python
  z = x + 1
  ```
```text
not code
```
  ```python
  assert (x, z) == (1, 2)
  ```
````console
$ kvcache demo \\
    --requests 2
$ pip install kvcache
````
"""


def test_blocks_are_read_with_their_lines_and_indents():
    kinds = [(block.language, block.line, block.runs) for block in blocks_of(PAGE)]
    assert kinds == [
        ("python", 3, True),
        ("python", 8, False),
        ("python", 11, True),
        ("text", 14, True),
        ("python", 17, True),
        ("console", 20, True),
    ]
    run_page(blocks_of(PAGE), "page.md")


def test_an_error_in_a_page_is_reported_with_the_pages_line():
    with pytest.raises(AssertionError) as caught:
        run_page(blocks_of("Text.\n\n```python\nx = 1\nassert x == 2\n```\n"), "page.md")
    last = caught.traceback[-1]
    assert (last.frame.code.raw.co_filename, last.lineno + 1) == ("page.md", 5)


def test_the_output_of_examples_is_compared():
    run_page(blocks_of("```python\nx = 2\n```\n```pycon\n>>> x + 1\n3\n```\n"), "page.md")
    with pytest.raises(AssertionError, match=r"Expected:\s+4\s+Got:\s+3"):
        run_page(blocks_of("```pycon\n>>> 1 + 2\n4\n```\n"), "page.md")
