"""Reads a run's first rollout by eye, and proves its numbers: every token's kind, log-probs and teacher score.

The scores are computed anew by the slowest and plainest way, one forward pass over one whole row with all its
logits. In the first step the student still has its initial weights, so three things can be checked: the log-probs
that the sampler recorded, the teacher's scores as the trainer gets them, and the teacher KL that the trainer logged.

Run it: ``python examples/inspect_rollout.py runs/smollm2_gsm8k 3`` (a run without sft_steps; 3 episodes are shown)
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_env.episode.store import load_trajectories
from opd_env.evaluation.read_run import read_metrics
from opd_env.formats.base import TokenKind
from opd_env.tasks import Task
from opd_env.tools import Toolbox
from opd_env.trainer.run.config import OPDConfig, load_config
from opd_env.trainer.run.setup import make_parts
from opd_env.trainer.teachers.base import LocalTeacher


def main(run: Path, shown: int) -> None:
    """Prints the teacher's prompt, then episodes token by token, then the three comparisons."""
    config = load_config([str(run / "config.yaml")])
    parts = make_parts(config, torch.device("cpu"))
    chat, task = parts.chat, parts.task
    trajectories = load_trajectories(run / "trajectories")[:]
    trajectories = [one for one in trajectories if one.seed == config.run.seed * 1_000_003]  # of the first step
    teacher = parts.teacher
    if not isinstance(teacher, LocalTeacher):
        sys.exit("the plain computation needs a teacher in this process, without teacher.engine=vllm or a server")
    scores_N = teacher.score(trajectories).numpy()
    schemas = schemas_of(config, task)
    examples = {example.id: example for example in task}

    print(chat.decode(parts.teachers.chat.render_prompt(examples[trajectories[0].example_id].messages, schemas)))
    sampler_gap, teacher_gap, kl, done = [], [], [], 0
    for number, one in enumerate(trajectories):
        if number < shown:
            print(f"\n{one.task} {one.example_id}: {one.stop_reason}, extracted {one.extracted}, drift {one.drift}")
            print(f"{'place':>5} {'kind':<12} {'student':>8} {'teacher':>8} {'log u':>7}  token")
        for row, read in zip(one.rows, teacher.rows([one]), strict=True):
            ids = one.token_ids[row].tolist()
            student_TV = logprobs(parts.student.model, ids, chat.vocab_size, config.sampling.temperature)
            teacher_ids = read.token_ids_T.tolist()
            teacher_TV = logprobs(teacher.loaded.model, teacher_ids, chat.vocab_size, config.sampling.temperature)
            for place in range(int(one.sampled[row].argmax()), len(ids)):
                at = row.start + place
                numbers = " " * 25
                if one.sampled[at]:
                    # What predicts a token is the position before it, in each row; both rows end alike.
                    student_V, teacher_V = student_TV[place - 1], teacher_TV[place - 1 + len(teacher_ids) - len(ids)]
                    sampler_gap.append(float(abs(student_V[ids[place]] - one.logprobs[at])))
                    teacher_gap.append(float(abs(teacher_V[ids[place]] - scores_N[done])))
                    kl.append(float((student_V.exp() * (student_V - teacher_V)).sum()))
                    log_ratio = scores_N[done] - one.logprobs[at]
                    numbers = f"{one.logprobs[at]:8.3f} {scores_N[done]:8.3f} {log_ratio:7.2f}"
                    done += 1
                if number < shown:
                    kind = TokenKind(one.kind[at]).name.lower()
                    print(f"{place:5} {kind:<12} {numbers}  {chat.decode([ids[place]])!a}")

    print(f"\n{len(trajectories)} episodes, {done} sampled tokens; largest differences from the plain computation:")
    print(f"sampler's log-probs {max(sampler_gap):.2e}, teacher's scores {max(teacher_gap):.2e}")
    logged = read_metrics(run / "metrics.jsonl")[0]["teacher/kl"]
    print(f"teacher KL of step 1: logged {logged:.6f}, plain {np.mean(kl):.6f}")


def schemas_of(config: OPDConfig, task: Task) -> list[dict[str, Any]]:
    """Tool schemas as the student's prompt shows them."""
    with Toolbox(task.tools if config.tools is None else config.tools) as toolbox:
        return toolbox.schemas


@torch.no_grad()
def logprobs(model: Any, ids: list[int], vocab_size: int, temperature: float) -> torch.Tensor:
    """Log-probs after every prefix of one row, shape ``[T, V]``."""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0, :, :vocab_size].float() / temperature, dim=-1)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/inspect_rollout.py RUN EPISODES")
    main(Path(sys.argv[1]), int(sys.argv[2]))
