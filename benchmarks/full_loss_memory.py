"""Peak memory of the full-vocabulary loss beside the model's own forward and backward pass.

A model of SmolLM2-135M's shape with random weights (49,152 tokens), batch 4 x 512. Every case runs in a process of its
own; what counts is the peak resident set, as the kernel reports it:

- ``own``: the model's own loss, forward and backward (it holds the logits of all positions);
- ``loss``: the same model with ``full_divergence``; the teacher's hidden states are given;
- ``step``: the same with a teacher of the same size that computes them first.

Run it: ``python benchmarks/full_loss_memory.py`` (about 6 GB, two minutes on two cores)
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

CASES = ("own", "loss", "step")
ROWS, LENGTH, VOCABULARY = 4, 512, 49152


def measure(case: str, layers: int, chunk_size: int, divergence: str) -> dict[str, float]:
    """Peak memory in MiB before and after one forward and backward pass, and its CPU seconds over all threads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from opd_env.engines.models import split_model
    from opd_env.trainer.math.logprobs import full_divergence
    from opd_env.trainer.math.loss import mean_loss

    def model(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            )
        )  # fmt: skip

    student = model(0)
    decoder, head = split_model(student)
    teacher_decoder, teacher_head = split_model(model(1)) if case == "step" else (None, head)
    ids_BT = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    positions = ROWS * (LENGTH - 1)
    loaded = peak_mib()
    started = time.process_time()
    if case == "own":
        student(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    else:
        with torch.no_grad():
            teacher_NH = torch.randn(positions, 576)
            if teacher_decoder is not None:
                teacher_NH = teacher_decoder(ids_BT, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        student_NH = decoder(ids_BT, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        scores = full_divergence(
            student_NH, head, teacher_NH, teacher_head, divergence,
            token_ids_N=ids_BT[:, 1:].flatten(), chunk_size=chunk_size,
        )  # fmt: skip
        mean_loss(scores.loss_N, positions).backward()
    return {"loaded_mib": loaded, "peak_mib": peak_mib(), "seconds": time.process_time() - started}


def peak_mib() -> float:
    """The largest resident set of this process so far (Linux counts it in KiB, macOS in bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process (used by the script itself)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--divergence", default="jsd")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.layers, arguments.chunk_size, arguments.divergence)))
        return
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--layers", str(arguments.layers)]
        command += ["--chunk-size", str(arguments.chunk_size), "--divergence", arguments.divergence]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results[case] = json.loads(output.splitlines()[-1])
        one, own = results[case], results["own"]
        memory, seconds = one["peak_mib"] / own["peak_mib"], one["seconds"] / own["seconds"]
        print(
            f"{case:5} peak {one['peak_mib']:6.0f} MiB ({memory:.2f} of own), loaded {one['loaded_mib']:5.0f} MiB, "
            f"{one['seconds']:5.1f} CPU s ({seconds:.2f} of own)",
            flush=True,
        )


if __name__ == "__main__":
    main()
