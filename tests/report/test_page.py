"""Reports are one self-contained page, whatever is missing and whatever a model wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from opd_env.episode.files import StoreError
from opd_env.episode.store import load_trajectories
from opd_env.evaluation.read_run import read_metrics
from opd_env.report.page import write_report
from opd_env.tools import ToolErrorKind
from tests.episode.trajectory_samples import Call, make_trajectories, make_trajectory
from tests.run_samples import make_run, write_evaluation
from tests.tiny import tiny_tokenizer

VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = (
    "</pre></style><script>alert(1)</script><img src=x onerror=alert(2)> \"' & \u202edesrever \x00\x1b[31m {{ 7*7 }}"
)


class Page(HTMLParser):
    """Checks that every tag is closed in order; collects tags, attributes and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def report(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo", problems=60, steps=12)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "demo")


def assert_self_contained(html: str, page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "img"} & set(page.tags)
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset", "action", "data"), (name, value)
        assert not name.startswith("on"), (name, value)
        assert "url(" not in value
    assert "@import" not in html
    assert "url(" not in html
    assert "default-src 'none'" in html


def test_a_mixture_of_teachers_shows_each_member_alone_and_says_so(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    first = results["teacher"] | {"weight": 0.75, "evaluation": "teacher"}
    second = write_evaluation(run / "evaluations" / "teacher_2", make_trajectories(60, 0.5))
    results["teachers"] = {"lab/mathematician": first, "searcher": second | {"weight": 0.25, "evaluation": "teacher_2"}}
    (run / "results.json").write_text(json.dumps(results))
    html, page = report(run)
    assert_self_contained(html, page)
    each = " and ".join(f"{100 * one['accuracy']:.1f} %" for one in (first, second))
    sentence = f"a mixture, 0.75 × lab/mathematician + 0.25 × searcher, whose members reach {each} alone; it plays no"
    assert sentence in " ".join(page.text.split())
    assert html.count('class="lane teacher"') == 2 * html.count('class="lane before"')
    assert "Teacher 1" in page.text
    assert "Teacher 2" in page.text
    for entry in results["teachers"].values():  # as earlier runs wrote it
        del entry["weight"], entry["evaluation"]
    (run / "results.json").write_text(json.dumps(results))
    assert "Teacher 2" not in report(run)[1].text


def test_a_finished_run_shows_numbers_curves_and_episodes(run: Path) -> None:
    html, page = report(run)
    assert_self_contained(html, page)
    results = json.loads((run / "results.json").read_text())
    for key in ("before", "after", "teacher"):
        assert f"{100 * results[key]['accuracy']:.1f}" in page.text
    for words in (
        "Student before", "Student after", "Teacher", "do not overlap", "Problem by problem", "KL to the teacher",
        "Tool-call validity", "How episodes ended", "Level 3", "opd_plus_centred", "3f2a91c07be4", "config.yaml",
        "Where the time went", "teacher/kl_tool_call", "arithmetic (with tools: calculator)",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.text.count("Ana has") >= 6
    assert html.count('class="chart"') > 12


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert report(run)[0] == report(run)[0]


def test_the_page_is_small(run: Path) -> None:
    assert len(report(run)[0]) < 1_000_000


def test_with_a_tokenizer_every_sampled_token_is_a_box(run: Path) -> None:
    tokenizer = tiny_tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    shutil.rmtree(run / "evaluations")
    for name, skill in (("before", 0.4), ("after", 0.9)):
        write_evaluation(run / "evaluations" / name, make_trajectories(12, skill, encode=encode))
    tokenizer.save_pretrained(run / "model")
    html, page = report(run)
    assert_self_contained(html, page)
    assert 'class="token scaffold"' in html
    assert html.count('title="student log-prob') > 400
    assert "The answer is" in page.text


def test_stored_log_ratios_shade_the_tokens(run: Path) -> None:
    place = run / "evaluations" / "after"
    trajectories = load_trajectories(place / "trajectories.parquet")
    ratios = {f"{one.example_id}/{one.sample}": [-3.0] * one.num_sampled for one in trajectories}
    (place / "log_ratios.json").write_text(json.dumps(ratios))
    tiny_tokenizer().save_pretrained(run / "model")
    html, page = report(run)
    assert "var(--less) 100%" in html
    assert "teacher minus student" in page.text


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_hostile_text_is_shown_and_does_nothing(run: Path, with_tokenizer: bool) -> None:
    tokenizer = tiny_tokenizer()
    call = Call("evil", '{"x": "</script>"}', HOSTILE, ToolErrorKind.EXCEPTION)
    trajectory = make_trajectory(
        question=HOSTILE,
        example_id=HOSTILE,
        turns=[[HOSTILE, call], [HOSTILE]],
        grade_reason=HOSTILE,
        correct=False,
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False),
    )
    for name in ("before", "after"):
        write_evaluation(run / "evaluations" / name, [trajectory])
    (run / "config.yaml").write_text("task: '<script>alert(3)</script>'\n")
    if with_tokenizer:
        tokenizer.save_pretrained(run / "model")
    html, page = report(run)
    assert_self_contained(html, page)
    assert "<script" not in html
    assert "\u202e" not in html
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "<script>alert(1)</script>" in page.text
    assert "<script>alert(3)</script>" in page.text
    assert "⟦U+202E⟧desrever ⟦U+0000⟧⟦U+001B⟧[31m {{ 7*7 }}" in page.text
    assert "49" not in page.text.split("desrever")[1][:40]


def test_a_run_that_was_stopped_shows_how_far_it_came(run: Path) -> None:
    for name in ("results.json", "config.yaml"):
        (run / name).unlink()
    shutil.rmtree(run / "evaluations")
    html, page = report(run)
    assert_self_contained(html, page)
    assert "has not finished" in page.text
    assert "KL to the teacher" in page.text
    assert "Episodes to read" not in page.text


def test_results_without_curves_or_episodes_are_enough(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "evaluations")
    results = json.loads((run / "results.json").read_text())
    keep = ("accuracy", "accuracy_ci", "tool_call_validity", "n")
    (run / "results.json").write_text(
        json.dumps({key: {name: results[key][name] for name in keep} for key in ("before", "after")})
    )
    html, page = report(run)
    assert_self_contained(html, page)
    assert "Student after" in page.text
    assert "How episodes ended" not in page.text


def test_an_evaluation_folder_has_a_report_too(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval", make_trajectories(30, 0.6))
    html, page = report(tmp_path / "eval")
    assert_self_contained(html, page)
    assert "Episodes to read" in page.text
    assert "Student before" not in page.text


@pytest.mark.parametrize("retries", [0, 7])
def test_calls_that_were_tried_again_are_told_where_there_are_any(tmp_path: Path, retries: int) -> None:
    call = Call("shop", "{}", "a pen", retries=retries)
    write_evaluation(tmp_path / "evaluation", [make_trajectory(turns=[[call], ["A pen."]])])
    _, page = report(tmp_path / "evaluation")
    assert ("tried again 7×" in page.text) == ("Errors that tools answered" in page.text) == bool(retries)


def test_missing_and_odd_metrics_leave_gaps(run: Path) -> None:
    rows = [
        {"step": 1, "teacher/kl": 1.0, "note": "text", "my/metric": 3},
        {"step": 2, "teacher/kl": None, "train/loss": float("nan"), "flag": True},
        {"step": 3, "teacher/kl": 0.5},
        {"step": 3, "eval/accuracy": 0.5},
        {"step": 4, "teacher/kl": 0.4},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "tea')
    html, page = report(run)
    assert_self_contained(html, page)
    assert "my/metric" in page.text
    assert "Loss" not in page.text  # never a number
    assert "flag" not in page.text
    assert len(read_metrics(run / "metrics.jsonl")) == 5
    chart = html.split("KL to the teacher")[1].split("</svg>")[0]
    assert chart.count("<polyline") == 1  # steps 3 and 4; the evaluation between them is no gap
    assert chart.count('class="line dot"') == 1  # step 1, before the gap


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\nnot json\n{"step": 2}\n', r"metrics\.jsonl:2: not JSON"),
        ("metrics.jsonl", "[1]\n", r"metrics\.jsonl:1: expected a JSON object, got list"),
        ("results.json", "{", r"results\.json is not JSON"),
        ("results.json", "[]", r"results\.json holds a list"),
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, content: str, message: str) -> None:
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to report"):
        write_report(tmp_path)


def test_a_report_that_cannot_be_written_leaves_the_old_one(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(StoreError, match=r"report\.html cannot be used"):
        write_report(run)
    assert [file.name for file in run.iterdir() if file.name.startswith(".")] == []


def test_importing_reports_pulls_in_no_heavy_library() -> None:
    code = "import sys, opd_env.report.page; print({'torch', 'pyarrow', 'matplotlib', 'jinja2', 'yaml'} & "
    code += "set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert printed.stdout.strip() == "set()"
