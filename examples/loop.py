"""The whole method on one page: on-policy distillation with nothing hidden.

The student plays episodes with real tool calls, the teacher scores the tokens that the student sampled, the OPD+
advantage weighs them, and AdamW takes a step. ``opd_env.trainer.OPDTrainer`` is the same with checkpoints, metrics,
many devices and refusals; this file is for reading, and for trying an idea.

Run it: ``python examples/loop.py`` (about half a minute for 10 steps on a laptop). So few steps show the parts at work
and no more: the packaged student needs some hundred updates, see ``configs/demo.yaml``.
"""

import numpy as np
import torch

from opd_env import RolloutLimits, load_task, rollout
from opd_env.engines.local import LocalEngine
from opd_env.engines.models import load_model
from opd_env.formats import get_format
from opd_env.trainer import advantage, policy_loss

STEPS, EPISODES = 10, 32


def main() -> None:
    """Distils the packaged student for a few steps and prints how far it is from its teacher."""
    student, teacher = load_model("packaged:student"), load_model("packaged:teacher")
    chat = get_format(student.tokenizer)
    engine = LocalEngine(student.model, chat.stop_token_ids, chat.vocab_size)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=2e-4)
    task = load_task("arithmetic")
    limits = RolloutLimits(max_turns=6, max_turn_tokens=48, max_tokens=384)
    for step in range(STEPS):
        indices = range(step * EPISODES, (step + 1) * EPISODES)
        trajectories = rollout(task, engine, chat, indices=indices, limits=limits, seed=step).trajectories

        # One row of each episode, as this template only appends.
        rows = [(one, place) for one in trajectories for place in one.rows]
        length = max(place.stop - place.start for _, place in rows)
        ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
        mask_BT = torch.zeros(len(rows), length, dtype=torch.bool)
        behaviour_BT = torch.zeros(len(rows), length)
        for row, (one, place) in enumerate(rows):
            size = place.stop - place.start
            ids_BT[row, :size] = torch.from_numpy(one.token_ids[place].astype(np.int64))
            mask_BT[row, :size] = torch.from_numpy(one.sampled[place])
            behaviour_BT[row, :size] = torch.from_numpy(one.logprobs[place])

        def logprobs(model: torch.nn.Module, ids_BT: torch.Tensor = ids_BT) -> torch.Tensor:
            """Log-prob of every token given those before it, shape ``[B, T - 1]``: position t scores token t + 1."""
            logits_BTV: torch.Tensor = model(ids_BT[:, :-1]).logits[..., : chat.vocab_size]
            return logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]

        mask_BT, behaviour_BT = mask_BT[:, 1:], behaviour_BT[:, 1:]
        with torch.no_grad():
            log_ratio_BT = logprobs(teacher.model) - behaviour_BT  # log u = teacher - student
        advantages_BT = advantage(log_ratio_BT, divergence="jsd", mode="opd_plus_centred")
        loss = policy_loss(logprobs(student.model), behaviour_BT, advantages_BT, mask_BT, num_tokens=int(mask_BT.sum()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()

        right = sum(one.correct for one in trajectories) / len(trajectories)
        print(f"step {step + 1:2d}  teacher KL {-log_ratio_BT[mask_BT].mean():.3f}  right {right:.0%}")


if __name__ == "__main__":
    main()
