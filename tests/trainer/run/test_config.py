"""Settings: files, then options; every mistake is one sentence."""

import dataclasses
import subprocess
import sys

import pytest

from opd_env.settings.fields import ConfigError, build, to_dict, to_yaml
from opd_env.trainer.learn.token_weights import Scheme, TokenWeights
from opd_env.trainer.run import config as config_module
from opd_env.trainer.run.config import Estimator, LoRASettings, Mode, OPDConfig, Resume, load_config

NAMES = {"student": "s", "teacher": "t", "task": "arithmetic"}


@pytest.fixture
def run_yaml(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "student: s\nteacher: t\ntask: arithmetic\nlearning_rate: 1e-4\nestimator: sampled\n"
        "clip_ratio: null\nlimits: {max_turns: 3}\nlora: {rank: 4}\ntask_options: {levels: [1, 2]}\n"
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
    assert config.learning_rate == 1e-4
    assert config.estimator is Estimator.SAMPLED
    assert config.clip_ratio is None
    assert config.limits.max_turns == 3
    assert config.limits.max_tokens == OPDConfig(**NAMES).limits.max_tokens
    assert config.lora == LoRASettings(rank=4)
    assert config.task_options == {"levels": [1, 2]}


def test_options_win_over_files_and_later_files_over_earlier_ones(run_yaml, tmp_path):
    second = tmp_path / "second.yaml"
    second.write_text("steps: 7\nlora: null\nmode: opd\n")
    config = load_config([run_yaml, str(second), "--mode=opd_plus", "--limits.max_turns", "5"])
    assert (config.steps, config.lora, config.mode, config.limits.max_turns) == (7, None, Mode.OPD_PLUS, 5)


def test_options_may_use_dashes_lists_and_nested_keys(run_yaml):
    config = load_config(
        [run_yaml, "--learning-rate", "2e-3", "--tools", "calculator,search", "--lora.alpha", "3",
         "--divergence_options.alpha", "0.5", "--trackers", "[]", "--resume", "never", "--weights.error_turns", "0",
         "--weight-scheme", "sod"]
    )  # fmt: skip
    assert config.learning_rate == 2e-3
    assert config.tools == ("calculator", "search")
    assert config.lora == LoRASettings(rank=4, alpha=3.0)
    assert config.divergence_options == {"alpha": 0.5}
    assert config.trackers == ()
    assert config.resume is Resume.NEVER
    assert config.weights == TokenWeights(error_turns=0.0)
    assert config.weight_scheme is Scheme.SOD


def test_null_on_the_command_line_is_none(run_yaml):
    assert load_config([run_yaml, "--lora", "null"]).lora is None


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
        load_config([run_yaml, "--chat_format", "llama", "--repair_calls", "true"]),
    )
    assert (before.chat_format, before.repair_calls) == (None, False)
    assert (config.chat_format, config.repair_calls) == ("llama", True)
    assert build(OPDConfig, to_dict(config)) == config
    assert config.config_hash != before.config_hash
    assert "did you mean 'hermes'?" in message([run_yaml, "--chat_format", "hermess"])


def test_the_hash_ignores_where_things_are_written_and_nothing_else():
    config = OPDConfig(**NAMES)
    same = dataclasses.replace(config, output="runs/other", checkpoint_every=1, trackers=())
    assert same.config_hash == config.config_hash
    for change in (
        {"seed": 1},
        {"learning_rate": 2e-3},
        {"lora": LoRASettings()},
        {"task_options": {"a": 1}},
    ):
        assert dataclasses.replace(config, **change).config_hash != config.config_hash


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--learning_rat", "1"], "did you mean '--learning_rate'?"),
        (["--limits.max_turn", "3"], "did you mean '--limits.max_turns'?"),
        (["--zzz", "3"], "--help lists all"),
        (["--learning_rate", "abc"], "--learning_rate is 'abc'; expected a number"),
        (["--steps", "2.5"], "--steps is '2.5'; expected a whole number"),
        (["--estimator", "ful"], "--estimator is 'ful'; expected one of sampled, full, topk"),
        (["--limits.max_turns", "x"], "--limits.max_turns is 'x'; expected a whole number"),
        (["--lora.rank", "x"], "--lora.rank is 'x'; expected a whole number"),
        (["--lora", "7"], "expected a mapping of keys to values or null"),
        (["--divergence_options.alpha", "x"], "expected a number"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "0"], "steps=0 is out of range: it must be at least 1"),
        (["--lora.rank", "0"], "lora.rank=0 is out of range"),
        (["--limits.max_turns", "0"], "max_turns=0 must be positive"),
        (["--gamma", "3"], "gamma=3.0 is out of range"),
        (["--gamma", ".nan"], "gamma=nan is out of range"),
        (["--learning_rate", ".inf"], "learning_rate=inf is out of range"),
        (["nowhere.yaml"], "no file 'nowhere.yaml'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_says_what_to_do(run_yaml, options, expected):
    assert expected in message([run_yaml, *options])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1\n", "unknown key 'learning_rat' (did you mean 'learning_rate'?"),
        ("limits: {max_turn: 1}\n", "unknown key 'limits.max_turn' (did you mean 'limits.max_turns'?"),
        ("steps: many\n", "steps in {file} is 'many'; expected a whole number"),
        ("- a\n", "holds list; expected 'key: value' lines"),
        ("", "holds nothing"),
        ("a: [\n", "is not YAML"),
        ("student: null\nteacher: t\ntask: x\n", "student must be set"),
        ("teacher: t\ntask: x\n", "student must be set"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, expected):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    found = message([str(file)])
    assert expected.format(file=file) in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"top_p": 0.95},
            "top_p=0.95 would make the rollouts off-policy (OPD needs samples from the full distribution); "
            "set top_p=1.0",
        ),
        ({"top_k": 20}, "top_k=20 would make the rollouts off-policy"),
        ({"temperature": 0.0}, "temperature=0.0 is out of range"),
        ({"eval_split": "train"}, "evaluate on a split that is not trained on"),
        ({"samples_per_problem": 3}, "not a multiple of samples_per_problem=3"),
        ({"updates_per_step": 65}, "every update needs one"),
        ({"gamma": 0.5}, "gamma=0.5 has no meaning with estimator=full"),
        ({"clip_ratio": 0.2}, "clip_ratio=0.2 has no meaning with estimator=full"),
        ({"estimator": Estimator.SAMPLED, "clip_ratio": 0.2, "truncate_weight": 2.0}, "set one of them"),
        ({"estimator": "topk", "baseline": "value"}, "baseline=value has no meaning with estimator=topk"),
        ({"estimator": "sampled", "baseline": "value", "mode": "opd"}, "has no meaning with mode=opd"),
        ({"teacher_routes": {"calculator": "t2"}}, "teacher_routes is for log-probs, and estimator=full takes"),
        ({"teacher_cache": "cache"}, "teacher_cache is for log-probs"),
        ({"topk_tokens": 0}, "topk_tokens=0 is out of range"),
        ({"reward_coefficient": 1.0}, "samples_per_problem=1 leaves nothing to compare"),
        ({"divergence_coefficient": 0.0}, "nothing would be learnt"),
        ({"warmup_steps": 101}, "warmup_steps=101 is more than the run's 100 updates"),
        ({"student": ""}, "student is empty"),
        ({"steps": True}, "steps=True is not a number"),
    ],
)  # fmt: skip
def test_settings_that_cannot_give_a_right_run_are_refused(change, expected):
    with pytest.raises(ConfigError) as caught:
        OPDConfig(**{**NAMES, **change})
    assert expected in str(caught.value)


def test_choices_may_be_given_by_their_value_and_are_members_afterwards():
    config = OPDConfig(**NAMES, estimator="sampled", mode="opd", resume="never")
    assert config.estimator is Estimator.SAMPLED
    assert config.mode is Mode.OPD
    assert config.resume is Resume.NEVER
    with pytest.raises(ConfigError, match=r"estimator='sampeld' is unknown \(did you mean 'sampled'"):
        OPDConfig(**NAMES, estimator="sampeld")


def test_every_field_is_documented_and_appears_in_the_help(capsys):
    import docstring_parser

    for settings in (OPDConfig, LoRASettings, TokenWeights):
        documented = {
            entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(settings).params
        }
        for field in dataclasses.fields(settings):
            assert documented.get(field.name), f"{settings.__name__}.{field.name} has no docstring"
    with pytest.raises(SystemExit) as stopped:
        load_config(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(OPDConfig):
        assert f"--{field.name}" in shown
    assert "{sampled,full,topk}" in shown


def test_names_load_on_first_use_and_settings_need_no_torch():
    code = (
        "import sys, opd_env.trainer as trainer; trainer.OPDConfig; assert 'torch' not in sys.modules; "
        "trainer.advantage; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = __import__("opd_env.trainer", fromlist=["x"]).nothing_here
    assert config_module.UNHASHED
