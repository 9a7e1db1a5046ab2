"""Settings: files, then options; every mistake is one sentence."""

import subprocess
import sys

import pytest

from opd_env.settings.fields import ConfigError, build, outline, to_dict, to_yaml
from opd_env.trainer.learn.settings import OptimizerSettings
from opd_env.trainer.learn.token_weights import Scheme, TokenWeights
from opd_env.trainer.math.modes import Estimator, Mode
from opd_env.trainer.run import config as config_module
from opd_env.trainer.run.config import LoRASettings, OPDConfig, Resume, StudentSettings, load_config
from opd_env.trainer.teachers.settings import TeacherSettings
from tests.trainer.settings import changed_by, config_of


@pytest.fixture
def run_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "task: arithmetic\ntask_options: {levels: [1, 2]}\nstudent: {model: s, lora: {rank: 4}}\nteacher: {model: t}\n"
        "optimizer: {learning_rate: 1e-4}\nobjective: {estimator: sampled, clip_ratio: null}\n"
        "sampling: {limits: {max_turns: 3}}\n"
    )
    return str(file)


def message(arguments):
    with pytest.raises(ConfigError) as caught:
        load_config(arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_file_fills_nested_settings_and_keeps_other_defaults(run_yaml):
    config = load_config([run_yaml])
    assert config.optimizer.learning_rate == 1e-4
    assert config.objective.estimator is Estimator.SAMPLED
    assert config.objective.clip_ratio is None
    assert config.sampling.limits.max_turns == 3
    assert config.sampling.limits.max_tokens == config_of().sampling.limits.max_tokens
    assert config.student.lora == LoRASettings(rank=4)
    assert config.task_options == {"levels": [1, 2]}


def test_options_win_over_files_and_later_files_over_earlier_ones(run_yaml, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("run: {steps: 7}\nstudent: {lora: null}\nobjective: {mode: opd}\n")
    config = load_config([run_yaml, str(second), "--objective.mode=opd_plus", "--sampling.limits.max_turns", "5"])
    assert (config.run.steps, config.student.lora) == (7, None)
    assert (config.objective.mode, config.sampling.limits.max_turns) == (Mode.OPD_PLUS, 5)


def test_options_may_use_dashes_lists_and_nested_keys(run_yaml):
    config = load_config(
        [run_yaml, "--optimizer.learning-rate", "2e-3", "--tools", "calculator,search", "--student.lora.alpha", "3",
         "--objective.divergence_options.alpha", "0.5", "--run.trackers", "[]", "--run.resume", "never",
         "--objective.token_weights.error_turns", "0", "--objective.weight-scheme", "sod"]
    )  # fmt: skip
    assert config.optimizer.learning_rate == 2e-3
    assert config.tools == ("calculator", "search")
    assert config.student.lora == LoRASettings(rank=4, alpha=3.0)
    assert config.objective.divergence_options == {"alpha": 0.5}
    assert config.run.trackers == ()
    assert config.run.resume is Resume.NEVER
    assert config.objective.token_weights == TokenWeights(error_turns=0.0)
    assert config.objective.weight_scheme is Scheme.SOD


def test_null_on_the_command_line_is_none(run_yaml):
    assert load_config([run_yaml, "--student.lora", "null"]).student.lora is None


def test_yaml_round_trip_gives_the_same_settings_and_hash(run_yaml, tmp_path):
    config = load_config([run_yaml, "--tools", "a,b", "--task_options.data", "x.jsonl"])
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(config))
    again = load_config([str(file)])
    assert again == config
    assert again.config_hash == config.config_hash
    assert build(OPDConfig, to_dict(config)) == config


def test_a_chat_format_is_named_and_repairs_are_asked_for(run_yaml):
    before, config = (
        load_config([run_yaml]),
        load_config([run_yaml, "--student.chat_format", "llama", "--student.repair_calls", "true"]),
    )
    assert (before.student.chat_format, before.student.repair_calls) == (None, False)
    assert (config.student.chat_format, config.student.repair_calls) == ("llama", True)
    assert build(OPDConfig, to_dict(config)) == config
    assert config.config_hash != before.config_hash
    assert "did you mean 'hermes'?" in message([run_yaml, "--student.chat_format", "hermess"])


def test_the_hash_ignores_where_things_are_written_and_nothing_else():
    config = config_of()
    same = changed_by(config, output="runs/other", checkpoint_every=1, trackers=())
    assert same.config_hash == config.config_hash
    for change in (
        {"seed": 1},
        {"learning_rate": 2e-3},
        {"lora": LoRASettings()},
        {"task_options": {"a": 1}},
    ):
        assert changed_by(config, **change).config_hash != config.config_hash


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--optimizer.learning_rat", "1"], "did you mean '--optimizer.learning_rate'?"),
        (["--learning_rat", "1"], "did you mean '--optimizer.learning_rate'?"),
        (["--sampling.limits.max_turn", "3"], "did you mean '--sampling.limits.max_turns'?"),
        (["--learning_rate", "1"], "unknown option --learning_rate; write --optimizer.learning_rate"),
        (["--teacher_engine", "vllm"], "unknown option --teacher_engine; write --teacher.engine"),
        (["--objective.steps", "3"], "unknown option --objective.steps; write --run.steps"),
        (["--dtype", "bfloat16"], "unknown option --dtype; write --student.dtype or --teacher.dtype"),
        (["--eval_every", "1"], "did you mean '--evaluation.every'?"),
        (["--task.name", "x"], "unknown option --task.name"),
        (["--top_p", "0.95"], "unknown option --top_p: it would make the rollouts off-policy"),
        (["--sampling.top_k", "4"], "OPD needs samples from the full distribution"),
        (["--zzzzzz", "3"], "--help-all lists all"),
        (["--optimizer.learning_rate", "abc"], "--optimizer.learning_rate is 'abc'; expected a number"),
        (["--optimizer.learning_rate", "5e-4x"], "--optimizer.learning_rate is '5e-4x'; expected a number"),
        (["--run.steps", "2.5"], "--run.steps is 2.5; expected a whole number"),
        (["--run.steps", "true"], "--run.steps is True; expected a whole number"),
        (["--student.repair_calls", "yess"], "--student.repair_calls is 'yess'; expected true or false"),
        (["--objective.estimator", "ful"], "objective.estimator='ful' is unknown (did you mean 'full'?); expected"),
        (["--sampling.limits.max_turns", "x"], "--sampling.limits.max_turns is 'x'; expected a whole number"),
        (["--student.lora.rank", "x"], "--student.lora.rank is 'x'; expected a whole number"),
        (["--student.lora", "7"], "--student.lora is 7; expected a mapping of rank, alpha, targets or null"),
        (["--student", "smollm2"], "--student is 'smollm2'; expected a mapping of model, dtype"),
        (["--objective.divergence_options.alpha", "x"], "expected a number"),
        (["--run.steps"], "--run.steps needs a value"),
        (["--run.steps", "0"], "run.steps=0 is out of range: it must be at least 1"),
        (["--student.lora.rank", "0"], "student.lora.rank=0 is out of range: it must be at least 1 and at most 1024"),
        (["--sampling.limits.max_turns", "0"], "sampling.limits.max_turns=0 must be positive"),
        (["--objective.gamma", "3"], "objective.gamma=3.0 is out of range"),
        (["--objective.gamma", ".nan"], "objective.gamma=nan is out of range"),
        (["--optimizer.learning_rate", ".inf"], "optimizer.learning_rate=inf is out of range"),
        (["--student.dtype", "float16"], "student.dtype=float16 loses small gradients"),
        (["-x"], "options have two dashes"),
        (["nowhere.yaml"], "no file 'nowhere.yaml'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_says_what_to_do(run_yaml, options, expected):
    assert expected in message([run_yaml, *options])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: {learning_rat: 1}\n", "'optimizer.learning_rat' (did you mean 'optimizer.learning_rate'?"),
        ("learning_rate: 1\n", "{file}: unknown key 'learning_rate'; write optimizer.learning_rate"),
        ("run: {divergence: jsd}\n", "{file}: unknown key 'run.divergence'; write objective.divergence"),
        ("student.model: x\n", "write it inside its group, student: {{model: …}}"),
        ("sampling: {limits: {max_turn: 1}}\n", "(did you mean 'sampling.limits.max_turns'?"),
        ("run: {steps: many}\n", "run.steps in {file} is 'many'; expected a whole number"),
        ("tools: calculator\n", "tools in {file} is 'calculator'; expected a list of names or null"),
        ("- a\n", "holds list; expected 'key: value' lines"),
        ("", "holds nothing"),
        ("a: [\n", "is not YAML"),
        ("student: {model: null}\nteacher: {model: t}\ntask: x\n", "student.model must be set"),
        ("teacher: {model: t}\ntask: x\n", "student.model must be set: in a YAML file, or --student.model"),
        ("{}\n", "task, student.model and teacher.model must be set"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    whole = "student: {model: s}\nteacher: {model: t}\ntask: x\n" if text.startswith(("run", "tools")) else ""
    file.write_text(whole + text)
    found = message([str(file)])
    assert expected.format(file=file) in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sampling_temperature": 0.0}, "temperature=0.0 is out of range"),
        ({"evaluation_split": "train"}, "evaluate on a split that is not trained on"),
        ({"samples_per_problem": 3}, "not a multiple of sampling.samples_per_problem=3"),
        ({"updates_per_step": 65}, "every update needs one"),
        ({"gamma": 0.5}, "objective.gamma=0.5 has no meaning with objective.estimator=full"),
        ({"clip_ratio": 0.2}, "objective.clip_ratio=0.2 has no meaning with objective.estimator=full"),
        ({"estimator": Estimator.SAMPLED, "clip_ratio": 0.2, "truncate_weight": 2.0}, "set one of them"),
        ({"estimator": "topk", "baseline": "value"}, "baseline=value has no meaning with objective.estimator=topk"),
        ({"estimator": "sampled", "baseline": "value", "mode": "opd"}, "has no meaning with objective.mode=opd"),
        ({"teacher_routes": {"calculator": "t2"}}, "teacher.routes is for log-probs, and objective.estimator=full"),
        ({"teacher_cache": "cache"}, "teacher.cache is for log-probs"),
        ({"topk_tokens": 0}, "topk_tokens=0 is out of range"),
        ({"reward_coefficient": 1.0}, "sampling.samples_per_problem=1 leaves nothing to compare"),
        ({"divergence_coefficient": 0.0}, "nothing would be learnt"),
        ({"warmup_steps": 101}, "optimizer.warmup_steps=101 is more than the run's 100 updates"),
        ({"student": ""}, "student.model is empty"),
        ({"steps": True}, "run.steps is True; expected a whole number"),
    ],
)  # fmt: skip
def test_settings_that_cannot_give_a_right_run_are_refused(change, expected):
    with pytest.raises(ConfigError) as caught:
        config_of(**change)
    assert expected in str(caught.value)


def test_choices_may_be_given_by_their_value_and_are_members_afterwards():
    config = config_of(estimator="sampled", mode="opd", resume="never")
    assert config.objective.estimator is Estimator.SAMPLED
    assert config.objective.mode is Mode.OPD
    assert config.run.resume is Resume.NEVER
    with pytest.raises(ConfigError, match=r"objective.estimator='sampeld' is unknown \(did you mean 'sampled'"):
        config_of(estimator="sampeld")


def test_a_group_made_in_python_checks_itself_and_names_its_place():
    with pytest.raises(ConfigError, match=r"^optimizer.learning_rate=-1.0 is out of range: it must be above 0$"):
        OptimizerSettings(learning_rate=-1)
    assert OptimizerSettings(learning_rate=1).learning_rate == 1.0
    config = OPDConfig(
        student=StudentSettings(model="s"), teacher=TeacherSettings(model="t"), task="x", optimizer=OptimizerSettings()
    )
    assert config == changed_by(config_of(), student="s", teacher="t", task="x")


def test_every_setting_is_documented_and_help_shows_what_most_runs_set(capsys):
    shown = {}
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stopped:
            load_config([word])
        assert stopped.value.code == 0
        shown[word] = capsys.readouterr().out
    assert len(shown["--help"].splitlines()) <= 40  # a page
    for name in OPDConfig.common:
        assert f"--{name} " in shown["--help"]
    for name in outline(OPDConfig):
        told = shown["--help-all"].partition(f"--{name} ")[2].splitlines()[1]
        assert len(told.strip()) > 10, f"{name} has no docstring"
    assert "{sampled,full,topk}" in shown["--help-all"]
    assert "[0.001]" in shown["--help-all"]


def test_names_load_on_first_use_and_settings_need_no_torch():
    code = (
        "import sys, opd_env.trainer as trainer; trainer.OPDConfig; assert 'torch' not in sys.modules; "
        "trainer.advantage; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = __import__("opd_env.trainer", fromlist=["x"]).nothing_here
    assert config_module.UNHASHED
