"""Makes valid trajectories for tests, without a tokenizer or a model: one token per UTF-8 byte.

call = Call("calculator", '{"expression": "6*7"}', "42")
trajectory = make_trajectory(turns=[["Let me see. ", call], ["It is 42."]])
decode(trajectory.token_ids)        # the whole conversation as text
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_env.episode.trajectory import CallRecord, StopReason, Trajectory, TurnRecord
from opd_env.formats.base import TokenKind
from opd_env.tools import ToolErrorKind

SPECIAL_TOKENS = {256: "<|im_start|>", 257: "<|im_end|>"}
_IM_END = 257


def encode(text: str) -> list[int]:
    ids: list[int] = []
    while text:
        for token_id, special in SPECIAL_TOKENS.items():
            if text.startswith(special):
                ids.append(token_id)
                text = text[len(special) :]
                break
        else:
            ids += text[0].encode()
            text = text[1:]
    return ids


def decode(ids: Iterable[int]) -> str:
    pieces = (SPECIAL_TOKENS[i].encode() if i in SPECIAL_TOKENS else bytes([i]) for i in ids)
    return b"".join(pieces).decode("utf-8", "replace")


@dataclass(frozen=True)
class Call:
    """What a turn's call looks like: ``name`` None writes ``arguments`` as the (unreadable) block."""

    name: str | None
    arguments: str
    output: str = ""
    error: ToolErrorKind | None = None
    retries: int = 0

    @property
    def block(self) -> str:
        if self.name is None:
            return f"<tool_call>\n{self.arguments}\n</tool_call>"
        return f'<tool_call>\n{{"name": "{self.name}", "arguments": {self.arguments}}}\n</tool_call>'


def make_trajectory(
    *,
    turns: Sequence[Sequence[str | Call]] = (("It is 42.",),),
    question: str = "What is 6 * 7?",
    example_id: str = "0",
    sample: int = 0,
    correct: bool = True,
    stop_reason: StopReason = StopReason.ANSWER,
    encode: Callable[[str], list[int]] = encode,
    **fields: Any,
) -> Trajectory:
    """A trajectory whose assistant turns hold the given text pieces and calls, in order."""
    ids, kinds, numbers, logprobs = [], [], [], []
    rng = random.Random(f"{example_id}/{sample}/{question}")

    def append(text: str, kind: TokenKind, turn: int) -> tuple[int, int]:
        start = len(ids)
        new = encode(text)
        ids.extend(new)
        kinds.extend([kind] * len(new))
        numbers.extend([turn] * len(new))
        sampled = kind not in (TokenKind.PROMPT, TokenKind.SCAFFOLD, TokenKind.TOOL_OUTPUT)
        logprobs.extend(-rng.expovariate(3.0) if sampled else 0.0 for _ in new)
        return start, len(ids)

    append(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", TokenKind.PROMPT, 0)
    records = []
    for number, pieces in enumerate(turns, start=1):
        start, calls, text = len(ids), [], ""
        for piece in pieces:
            if isinstance(piece, Call):
                span = append(piece.block, TokenKind.TOOL_CALL, number)
                outcome = (piece.output, piece.error, 0.001, (), piece.retries)
                calls.append(CallRecord(piece.name, piece.arguments, *span, *outcome))
                text += piece.block
            else:
                append(piece, TokenKind.TEXT, number)
                text += piece
        append("<|im_end|>", TokenKind.TEXT, number)
        records.append(TurnRecord(start, len(ids), text, calls=tuple(calls), generate_seconds=0.25))
        if calls:
            append("\n<|im_start|>user", TokenKind.SCAFFOLD, number)
            for call in calls:
                append("\n<tool_response>\n", TokenKind.SCAFFOLD, number)
                append(call.output, TokenKind.TOOL_OUTPUT, number)
                append("\n</tool_response>", TokenKind.SCAFFOLD, number)
            append("<|im_end|>\n<|im_start|>assistant\n", TokenKind.SCAFFOLD, number)
    answer = records[-1].text if records and not records[-1].calls else None
    values: dict[str, Any] = {"task": "arithmetic", "answer": answer, "seconds": 0.5} | fields
    kind = np.array(kinds, dtype=np.uint8)
    return Trajectory(
        example_id=example_id,
        sample=sample,
        token_ids=np.array(ids, dtype=np.int32),
        sampled=np.isin(kind, (TokenKind.TEXT, TokenKind.THINKING, TokenKind.TOOL_CALL)),
        kind=kind,
        turn=np.array(numbers, dtype=np.int16),
        logprobs=np.array(logprobs, dtype=np.float32),
        turns=tuple(records),
        stop_reason=stop_reason,
        correct=correct,
        question=question,
        **values,
    )


def make_trajectories(
    problems: int, skill: float, *, samples: int = 1, seed: int = 0, encode: Callable[[str], list[int]] = encode
) -> list[Trajectory]:
    """Episodes of a student who gets about ``skill`` of the problems right, with every kind of mistake."""
    made = []
    for problem in range(problems):
        numbers = random.Random(f"{seed}/{problem}")
        a, b, c = (numbers.randint(11, 99) for _ in range(3))
        level = 1 + problem % 3
        question = f"Ana has {a} boxes with {b} pens each and finds {c} more. How many pens does she have?"
        for sample in range(samples):
            rng = random.Random(f"{seed}/{problem}/{sample}/{skill}")
            right = rng.random() < skill
            turns, stop = _play(rng, right, a, b, c)
            result = a * b + c if right else a * b + c + rng.randint(1, 9)
            if stop is StopReason.ANSWER:
                turns.append([f"She has {a * b} + {c} = {result} pens. The answer is {result}."])
            made.append(
                make_trajectory(
                    turns=turns, question=question, example_id=f"{problem:04d}", sample=sample, correct=right,
                    stop_reason=stop, difficulty=level, seed=seed, encode=encode,
                    extracted=str(result) if stop is StopReason.ANSWER else None,
                    grade_reason="" if right else f"expected {a * b + c}",
                )
            )  # fmt: skip
    return made


def _play(rng: random.Random, right: bool, a: int, b: int, c: int) -> tuple[list[list[str | Call]], StopReason]:
    good = Call("calculator", f'{{"expression": "{a} * {b} + {c}"}}', str(a * b + c))
    if right and rng.random() < 0.8:
        return [[good]], StopReason.ANSWER

    def slip_of(kind: ToolErrorKind, name: str | None, arguments: str, message: str) -> Call:
        return Call(name, arguments, json.dumps({"error": kind, "message": message}), kind)

    slip = rng.choice(
        [
            slip_of(
                ToolErrorKind.INVALID_JSON,
                None,
                f'{{"name": "calculator", "arguments": {{"{a}*{b}',
                "no JSON",
            ),
            slip_of(ToolErrorKind.UNKNOWN_TOOL, "calculater", f'{{"expression": "{a}*{b}"}}', "no such tool"),
            slip_of(ToolErrorKind.SCHEMA, "calculator", f'{{"expr": "{a}*{b}"}}', "expression is missing"),
            slip_of(ToolErrorKind.EXCEPTION, "calculator", f'{{"expression": "{a}/0"}}', "division by zero"),
        ]
    )
    if right:
        return [["I will compute it. ", slip], [good]], StopReason.ANSWER
    match rng.randrange(4):
        case 0:
            return [[slip], [slip], [slip]], StopReason.MAX_ERRORS
        case 1:
            return [], StopReason.ANSWER
        case 2:
            return [[slip], [good], [good]], StopReason.ANSWER
        case _:
            return [["pens " * rng.randint(5, 20)]], StopReason.TURN_LENGTH
