"""What README, docs and docstrings name exists: links, files, commands and options, names; and their code runs."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from opd_env.cli.main import COMMANDS, main
from opd_env.episode.env import ToolEnv
from opd_env.tasks import registry as task_registry
from opd_env.tools import catalogue as tool_catalogue
from opd_env.tools import get_tool
from opd_env.trainer import advantage

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
CODE = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("opd_env", "benchmarks", "examples", "scripts", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not path.is_relative_to(ROOT / "benchmarks/grader_audit/.packages")
}
DOCSTRINGS = {name: "\n".join(_docstrings) for name, text in CODE.items() if (_docstrings := [
    ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
])}  # fmt: skip
TEXTS = PAGES | DOCSTRINGS
PLACEHOLDERS = {"configs/mine.yaml", "opd_env/formats/NAME.py"}
OF_OTHERS = {"tasks/gsm8k/gsm8k.yaml"}
"""In the repository of lm-evaluation-harness."""
every_page = pytest.mark.parametrize("page", PAGES)


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """Every ``opd-env …`` of a text, as words, without what follows an ellipsis or a comment."""
    for found in re.findall(r"(?:^|[`$( ])opd-env ([a-z]+(?: [^`\n]*)?)", text.replace("\\\n", " "), re.MULTILINE):
        yield re.split(r"\s#|…", found)[0].split()


@functools.cache
def help_of(command: str) -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main([command, "--help-all" if command in ("train", "eval", "rollout") else "--help"])
    return output.getvalue()


@every_page
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        name, _, part = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if part else []
        assert not part or part in map(anchor, headings), target


def test_every_file_that_is_named_is_there() -> None:
    folders = r"(?:opd_env|tools|tasks|trainer|tests|benchmarks|docs|configs|examples|scripts)"
    missing = [
        f"{where}: {path}"
        for where, text in TEXTS.items()
        if where != "CHANGELOG.md"  # tells of files that were
        for path in re.findall(rf"(?<![\w/.]){folders}/[\w./]+\.(?:py|md|yaml|jinja)\b", text)
        if not (ROOT / path).exists() and path not in PLACEHOLDERS | OF_OTHERS
    ]
    assert not missing


def test_every_command_and_its_options_exist() -> None:
    unknown = []
    for where, text in PAGES.items():
        for name, *words in commands(text):
            if name not in COMMANDS:
                unknown.append(f"{where}: opd-env {name}")
                continue
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                free = rf"{option.rpartition('.')[0]} {{KEY"  # a mapping of keys that its user chooses
                known = any(re.search(pattern, help_of(name)) for pattern in (rf"{option}\b", free))
                unknown += [] if known else [f"{where}: {name} {option}"]
    assert not unknown


def test_every_name_of_the_package_exists() -> None:
    missing = []
    for where, text in TEXTS.items():
        for name in sorted(set(re.findall(r"(?<![\w/.`\"'-])`{1,2}(opd_env(?:\.\w+)+)`", text))):
            if name in ("opd_env.plugins.verl.VerlTool", "opd_env.plugins.deepspeed"):  # where these are installed
                continue
            value: Any = None
            for part in name.split("."):
                path = part if value is None else f"{value.__name__}.{part}"
                try:
                    value = getattr(value, part) if hasattr(value, part) else importlib.import_module(path)
                except (AttributeError, ImportError):
                    missing.append(f"{where}: {name}")
                    break
    assert not missing


def test_every_import_of_an_example_works() -> None:
    lines = {
        (where, line.strip())
        for where, text in TEXTS.items()
        if not where.startswith("tests")
        for line in re.findall(r"^ *(from opd_env\S* import [\w, ]+)$", text, re.MULTILINE)
    }
    assert len(lines) > 10
    for where, line in sorted(lines):
        try:
            exec(line, {})
        except ImportError as error:
            raise AssertionError(f"{where}: {line}") from error


def modules_of_the_package() -> Iterator[Any]:
    for path in map(Path, CODE):
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        ours = path.parts[0] in ("opd_env", "tools", "tasks", "trainer")
        if ours and path.stem != "__main__" and "guest" not in path.parts:
            with contextlib.suppress(ImportError):  # of an extra that is not installed
                yield importlib.import_module(name if path.parts[0] == "opd_env" else f"opd_env.{name}")


def fits(call: ast.Call, function: Any) -> bool:
    try:
        inspect.signature(function).bind(*call.args, **{word.arg: 0 for word in call.keywords if word.arg})
    except TypeError:
        return False
    return True


def test_every_call_of_an_example_in_a_module_fits_its_signature() -> None:
    modules = list(modules_of_the_package())
    homes: dict[str, list[Any]] = {}
    for module in modules:
        for name, value in vars(module).items():
            if inspect.isroutine(value) or (inspect.isclass(value) and not issubclass(value, BaseException)):
                homes.setdefault(name, []).append(value)
    seen, wrong = 0, []
    for module in modules:
        for block in re.findall(r"::\n\n((?: {4}.*\n|\n)+)", f"{inspect.getdoc(module)}\n"):
            with contextlib.suppress(SyntaxError):  # a conversation, or YAML
                for node in ast.walk(ast.parse(textwrap.dedent(block))):
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in homes:
                        seen += 1
                        if not any(fits(node, function) for function in homes[node.func.id]):
                            wrong.append(f"{module.__name__}: {ast.unparse(node)}")
    assert seen > 150
    assert not wrong


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an example registers is gone afterwards."""
    monkeypatch.setattr(tool_catalogue, "_registered", dict(tool_catalogue._registered))
    monkeypatch.setattr(task_registry, "_registered", dict(task_registry._registered))


def test_the_tool_and_the_task_of_the_readme_work_and_are_those_of_the_example(own_names: None) -> None:
    example, play, *_ = blocks("README.md")
    assert "register_task" in example
    names: dict[str, Any] = {"__name__": "readme"}
    exec(example, names)
    assert get_tool("convert")(value=2, unit="m", to="cm") == 200
    env = ToolEnv(names["Lengths"]("test"))
    env.reset(options={"index": 3})
    *_, terminated, _, info = env.step("It is 700 cm.")
    assert terminated
    assert info["grade"].correct
    exec(play, names)
    assert isinstance(names["env"], gymnasium.Env)
    assert names["env"].reset(seed=0)[1]["example"]


def test_the_divergence_of_the_page_on_the_mathematics_can_be_used() -> None:
    (example,) = blocks("docs/opd_plus.md")
    exec(example, {})
    import torch

    assert advantage(torch.zeros(2), divergence="triangular").abs().max() < 1e-6
