"""Trains the packaged tokenizer, teacher and student from their seeds: ``make pretrain``.

All three come from the expert episodes of the ``arithmetic`` task, played through the real calculator. The teacher
learns them until it solves nearly every problem. The student stops where it has only begun to copy numbers from
the question into a call: it writes calls that can be read, and leaves the rest to distillation.

The matrices are trained with Muon (``torch.optim.Muon``), everything else with AdamW. The teacher begins to copy
after some 125 updates that way; with AdamW alone it had not begun after 240.

Writes ``opd_env/packaged/{teacher,student}`` (half precision, each with its tokenizer) and ``results.json`` with
seeds, sizes, time and the accuracy of the models as shipped.

Test it alone: ``pytest tests/test_packaged.py``
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from opd_env.engines.local import LocalEngine
from opd_env.engines.models import load_model
from opd_env.episode.expert import play_expert
from opd_env.evaluation.result import EvaluationResult
from opd_env.evaluation.run import evaluate
from opd_env.formats import ChatFormat, get_format
from opd_env.tasks import Task, load_task
from opd_env.tools import Toolbox
from opd_env.trainer.batch import PolicyModule, Row, pack, rows_of

HERE = Path(__file__).parent
LEVELS = (1, 2, 3)
EPISODES = 12_000
"""Expert episodes to train on."""
VALIDATION_EPISODES = 300
TOKENIZER_EPISODES = 3_000
TEST_PROBLEMS = 1000
VOCABULARY = 512
"""Most tokens; the text of the task has no pairs left to merge before that."""
CONTEXT = 2048
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tokens of their own, but text: they are read and written as Qwen's tokenizers do."""
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"
"""Words, single digits, runs of punctuation, white space. No token crosses them."""


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is made."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    """Most updates; the learning rate falls to a tenth over them."""
    learning_rate: float
    stop_at: float
    """Training ends when this share of validation episodes has every token right."""
    check_every: int
    """Updates between two looks at the validation episodes."""
    batch: int = 64
    warmup: int = 40
    weight_decay: float = 0.01
    seed: int = 0


RECIPES = {
    "teacher": Recipe(hidden=128, layers=4, heads=4, intermediate=256, steps=400, learning_rate=4e-3,
                      stop_at=1.0, check_every=50),
    "student": Recipe(hidden=96, layers=3, heads=3, intermediate=192, steps=600, learning_rate=2e-3,
                      stop_at=0.25, check_every=5),
}  # fmt: skip


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with single digits, learnt from ``texts``; any text survives it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    markup = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + TAGS)))
    tokenizer.train_from_iterator((part for text in texts for part in markup.split(text) if part), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=(HERE / "chat_template.jinja").read_text(),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def conversations(task: Task, count: int, tokenizer: Any) -> list[str]:
    """Text of expert conversations, as the chat template writes them."""
    with Toolbox(task.tools) as toolbox:
        schemas = toolbox.schemas
    return [
        tokenizer.apply_chat_template([*example.messages, *(task.expert(example) or [])], tools=schemas, tokenize=False)
        for example in task[:count]
    ]


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model of the recipe's size with random weights from its seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def expert_rows(task: Task, count: int, chat: ChatFormat, advance: Callable[[], None]) -> list[Row]:
    """Expert episodes as token rows; only what a student should write is marked as sampled."""
    rows = []
    for index in range(count):
        trajectory = play_expert(task, index, chat)
        if trajectory is None:
            raise RuntimeError(f"the expert of {task.name}/{task[index].id} does not hold")
        rows += rows_of(trajectory)
        advance()
    return rows


def cross_entropy(policy: PolicyModule, rows: Sequence[Row]) -> Iterator[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Micro-batches of similar length: loss summed over sampled tokens, which of them are wrong, the batch."""
    for batch in pack(rows, tokens_per_microbatch=6144):
        logits_NV = policy(batch, lambda hidden_NH, head: head(hidden_NH))
        loss = torch.nn.functional.cross_entropy(logits_NV, batch.targets_N, reduction="sum")
        yield loss, logits_NV.argmax(dim=-1) != batch.targets_N, batch


@torch.no_grad()
def share_right(policy: PolicyModule, rows: Sequence[Row]) -> float:
    """Share of expert episodes in which the model's first choice is right at every token."""
    right = 0
    for _, wrong_N, batch in cross_entropy(policy, rows):
        wrong_B = torch.zeros(len(batch.rows)).index_add(0, batch.row_N, wrong_N.float())
        right += int((wrong_B == 0).sum())
    return right / len(rows)


def optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    rate = recipe.learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: LlamaForCausalLM,
    recipe: Recipe,
    rows: Sequence[Row],
    validation: Sequence[Row],
    vocab_size: int,
    report: Callable[[int, float, float | None], None],
) -> int:
    """Supervised training on the sampled tokens of ``rows``; returns the updates made.

    Args:
        report: called after every update with its number, the loss in nats a token, and the share of right
            validation episodes when it was measured.
    """
    policy = PolicyModule(model, vocab_size)
    steppers = optimizers(model, recipe)
    draw = np.random.default_rng(recipe.seed)
    order: list[int] = []
    for step in range(1, recipe.steps + 1):
        if len(order) < recipe.batch:
            order = draw.permutation(len(rows)).tolist()
        chosen = [rows[order.pop()] for _ in range(recipe.batch)]
        tokens = sum(int(row.sampled_T.sum()) for row in chosen)
        total = 0.0
        for loss, _, _ in cross_entropy(policy, chosen):
            (loss / tokens).backward()
            total += loss.item() / tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        rate = recipe.learning_rate * min(1.0, step / recipe.warmup) * (0.1 + 0.9 * cosine)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate
            stepper.step()
            stepper.zero_grad()
        right = share_right(policy, validation) if step % recipe.check_every == 0 else None
        report(step, total, right)
        if right is not None and right >= recipe.stop_at:
            return step
    return recipe.steps


def test_model(folder: Path, name: str) -> EvaluationResult:
    """Greedy episodes of the saved model on held-out problems."""
    loaded = load_model(str(folder))
    chat = get_format(loaded.tokenizer)
    engine = LocalEngine(loaded.model, chat.stop_token_ids, chat.vocab_size, capacity=128)
    task = load_task("arithmetic", split="test", levels=LEVELS)
    result = evaluate(task, engine, chat, model=f"packaged:{name}", limit=TEST_PROBLEMS)
    if result.errors:
        raise RuntimeError(f"{len(result.errors)} episodes failed; the first: {result.errors[0].message}")
    return result


def make(name: str, tokenizer: PreTrainedTokenizerFast, output: Path, progress: Progress) -> dict[str, Any]:
    """Trains, saves and tests one model; returns what ``results.json`` says about it."""
    recipe = RECIPES[name]
    chat = get_format(tokenizer)
    rows = {}
    for split, count in (("train", EPISODES), ("validation", VALIDATION_EPISODES)):
        bar = progress.add_task(f"expert episodes to {split}", total=count)
        task = load_task("arithmetic", split=split, levels=LEVELS)
        rows[split] = expert_rows(task, count, chat, partial(progress.advance, bar))
    bar = progress.add_task(f"training the {name}", total=recipe.steps)

    def report(step: int, loss: float, right: float | None) -> None:
        progress.update(bar, completed=step)
        if right is not None:
            progress.console.print(f"{name} step {step}: loss {loss:.4f}, {right:.1%} of validation right")

    model = build_model(recipe, tokenizer)
    started = time.perf_counter()
    steps = train(model, recipe, rows["train"], rows["validation"], len(tokenizer), report)
    seconds = time.perf_counter() - started
    progress.update(bar, total=steps)
    model.half().save_pretrained(output / name)
    tokenizer.save_pretrained(output / name)
    for file in (output / name).iterdir():
        file.chmod(0o644)  # safetensors writes weights that only their owner may read
    tested = test_model(output / name, name)
    progress.console.print(f"{name}: {tested.summary.accuracy} of {tested.summary.n} test problems")
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": sum(file.stat().st_size for file in (output / name).iterdir()),
        "recipe": asdict(recipe),
        "steps": steps,
        "training_seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "test": tested.to_json(),
    }


def main() -> None:
    """Makes both models, or the one that is named."""
    parser = argparse.ArgumentParser(description="Trains the packaged tokenizer, teacher and student.")
    parser.add_argument("--only", choices=RECIPES, help="make this model and leave the other as it is")
    parser.add_argument("--output", type=Path, default=HERE.parent / "opd_env" / "packaged", help="folder to write")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = load_task("arithmetic", levels=LEVELS)
    tokenizer = build_tokenizer(conversations(task, TOKENIZER_EPISODES, build_tokenizer([])))
    with Progress() as progress:
        for name in [arguments.only] if arguments.only else RECIPES:
            entry = make(name, tokenizer, arguments.output, progress)
            record = arguments.output / "results.json"
            results = json.loads(record.read_text()) if record.exists() else {}
            record.write_text(json.dumps({**results, name: entry}, indent=2) + "\n")


if __name__ == "__main__":
    main()
