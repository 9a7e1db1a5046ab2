"""One episode without an engine: the same as a rollout plays, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from opd_env.engines.base import Completion, Request, SamplingParams, ScriptedEngine
from opd_env.episode.env import ToolEnv
from opd_env.episode.limits import RolloutLimits
from opd_env.episode.play import EpisodePlay
from opd_env.episode.rollouts import rollout
from opd_env.episode.trajectory import StopReason
from opd_env.messages import assistant
from tests.episode.test_rollouts import CHAT, Doubles, call

LIMITS = RolloutLimits(max_turns=3, max_turn_tokens=90)


def turn_ids(turns: Sequence[str], number: int, most: int) -> list[int]:
    return CHAT.render_assistant(assistant(turns[number]))[:most]


@pytest.mark.parametrize(
    "turns",
    [
        ["The answer is 6."],
        [call("2*3"), "6"],
        [call("1/0"), "<tool_call>", call("1")],
        [call("1"), "x" * 100],
        [call("2*3") + call("7"), "Seven? No, 6."],
    ],
)
def test_an_episode_played_by_hand_is_the_rollouts(turns: list[str]) -> None:
    asked: list[Request] = []
    play = EpisodePlay(ToolEnv(Doubles(), limits=LIMITS, parse=CHAT.parse_text), CHAT, 3, seed=5, key=0)
    while (request := play.ask()) is not None:
        ids = turn_ids(turns, len(asked), request.params.max_tokens)
        asked.append(request)
        play.take(Completion(0, ids, [0.0] * len(ids), truncated=ids[-1] not in CHAT.stop_token_ids))

    told: list[Request] = []

    def respond(request: Request, turn: int) -> list[int]:
        told.append(request)
        return turn_ids(turns, turn, request.params.max_tokens)

    engine = ScriptedEngine(respond, CHAT.stop_token_ids)
    (expected,) = rollout(Doubles(), engine, CHAT, indices=[3], limits=LIMITS, seed=5).trajectories
    assert play.trajectory is not None
    assert play.trajectory.token_ids.tolist() == expected.token_ids.tolist()
    assert play.trajectory.kind.tolist() == expected.kind.tolist()
    assert (play.trajectory.stop_reason, play.trajectory.correct) == (expected.stop_reason, expected.correct)
    assert [(one.token_ids, one.params, one.seed) for one in asked] == [
        (one.token_ids, one.params, one.seed) for one in told
    ]
    assert play.ask() is None


def test_a_lower_budget_holds_from_the_first_turn() -> None:
    play = EpisodePlay(ToolEnv(Doubles(), limits=LIMITS, parse=CHAT.parse_text), CHAT, 3, sampling=SamplingParams())
    play.max_tokens = play.recorder.context_length + 4
    request = play.ask()
    assert request is not None
    assert request.params.max_tokens == 4
    play.take(Completion(0, [65] * 4, [0.0] * 4, truncated=True))
    assert play.trajectory is not None
    assert play.trajectory.stop_reason is StopReason.EPISODE_LENGTH


def test_an_episode_without_room_for_a_turn_is_over_at_once() -> None:
    play = EpisodePlay(ToolEnv(Doubles(), limits=LIMITS, parse=CHAT.parse_text), CHAT, 3)
    play.max_tokens = play.recorder.context_length
    assert play.ask() is None
    assert play.trajectory is not None
    assert (play.trajectory.num_sampled, play.trajectory.stop_reason) == (0, StopReason.EPISODE_LENGTH)
