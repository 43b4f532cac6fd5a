"""Greedy tokens of a code model in the engines that serve its export, beside its own.

  python benchmarks/engines.py                          1,000 tokens of a random model, in one sequence
  python benchmarks/engines.py --model runs/g/model     of a trained one, from one class after another
  python benchmarks/engines.py --vllm ENV/bin/vllm      vLLM too, which wants an environment of its own

The model is exported to a temporary folder, where transformers' LlamaForCausalLM, llama.cpp (the package
xllamacpp) and vLLM continue its start tokens greedily in float32. Where an engine takes another token first,
the model's own logits of the two must be closer than --margin: such a near tie is decided by rounding, and the
engine then continues from the model's token. Otherwise the command fails. Log-probabilities are those of the
tokens taken.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from modeling_simvq import (
    SimVQAudioGenerationConfig,
    SimVQForAudioGeneration,
    export_generator,
    export_gguf,
)

# Continues token ids by so many; returns those, and the logarithm of each one's probability.
Engine = Callable[[list[int], int], tuple[list[int], list[float]]]


def random_model(options: argparse.Namespace) -> PreTrainedModel:
    """Return a code model whose weights are so large that its predictions vary from token to token."""
    config = SimVQAudioGenerationConfig(
        codebook_size=options.codes,
        max_codes=options.tokens,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
    )
    generator = torch.Generator().manual_seed(options.seed)
    model = SimVQForAudioGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(
                1 + 0.1 * drawn if weight.ndim == 1 else 2 * drawn * weight.shape[-1] ** -0.5
            )
    return model.eval()


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> tuple[list[int], Tensor]:
    """Continue token ids; returns the new ones and all their logits (count, vocabulary)."""
    made = model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences[0, len(ids) :].tolist(), torch.cat(made.logits)


def taken(tokens: list[int], logits: Tensor) -> list[float]:
    """Return the logarithms of the probabilities of tokens."""
    return logits.log_softmax(-1)[range(len(tokens)), tokens].tolist()


def transformers_engine(folder: Path) -> tuple[str, Engine]:
    """LlamaForCausalLM of the exported folder."""
    llama = LlamaForCausalLM.from_pretrained(folder / "llama")

    def run(ids: list[int], count: int) -> tuple[list[int], list[float]]:
        tokens, logits = greedy(llama, ids, count)
        return tokens, taken(tokens, logits)

    return f"transformers {version('transformers')}", run


def llama_cpp_engine(model: PreTrainedModel, folder: Path) -> tuple[str, Engine]:
    """Server of llama.cpp on the exported GGUF file, which gets and gives text: its tokenizer runs too."""
    import xllamacpp

    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    params = xllamacpp.CommonParams()
    params.model.path = str(export_gguf(model, folder / "gguf"))
    params.n_ctx = model.config.longest_sequence
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    # By default keys and values are kept in float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    def run(ids: list[int], count: int) -> tuple[list[int], list[float]]:
        request = {
            "prompt": tokenizer.decode(ids),
            "max_tokens": count,
            "temperature": 0,
            "logprobs": 1,
        }
        choice = server.handle_completions(request)["choices"][0]
        tokens = tokenizer(choice["text"])["input_ids"]
        found = choice["logprobs"]["content"]
        if [one["id"] for one in found] != tokens:
            raise SystemExit("llama.cpp's text does not read as the tokens that it took")
        return tokens, [one["logprob"] for one in found]

    return f"xllamacpp {version('xllamacpp')}", run


def vllm_engine(folder: Path, command: str, stack: ExitStack) -> tuple[str, Engine]:
    """`vllm serve` of the exported folder, which gets and gives token ids, until the stack closes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "vllm.log", "w") as log:
        server = subprocess.Popen(
            [command, "serve", str(folder / "llama"), "--served-model-name", "codes", *options],
            stdout=log,
            stderr=subprocess.STDOUT,
            # Its environment has packages of its own.
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )
    stack.callback(server.wait)
    stack.callback(server.terminate)

    def ask(path: str, request: dict | None = None) -> dict:
        body = None if request is None else json.dumps(request).encode()
        kind = {"Content-Type": "application/json"}
        sent = urllib.request.Request(address + path, body, kind)  # noqa: S310 (on this machine)
        with urllib.request.urlopen(sent) as answer:  # noqa: S310
            return json.load(answer)

    while True:
        try:
            found = ask("/version")["version"]
            break
        except urllib.error.URLError:
            if server.poll() is not None:
                raise SystemExit(
                    f"vLLM ended:\n{(folder / 'vllm.log').read_text()[-2000:]}"
                ) from None
            time.sleep(1)

    def run(ids: list[int], count: int) -> tuple[list[int], list[float]]:
        request = {"prompt": ids, "max_tokens": count, "temperature": 0, "logprobs": 0}
        request |= {"model": "codes", "return_token_ids": True}
        choice = ask("/v1/completions", request)["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    return f"vllm {found}", run


def compare(
    engine: Engine, start: int, own: list[int], logits: Tensor, margin: float
) -> tuple[int, int, float]:
    """Continue a start token as the model did.

    Returns:
        How many tokens are equal, how many near ties are not, and the largest difference of a log-probability.
    """
    wanted, done, ties, worst = taken(own, logits), 0, 0, 0.0
    while done < len(own):
        tokens, chances = engine([start, *own[:done]], len(own) - done)
        same = 0
        while same < len(tokens) and tokens[same] == own[done + same]:
            worst = max(worst, abs(chances[same] - wanted[done + same]))
            same += 1
        done += same
        if done == len(own):
            break
        if same == len(tokens):
            raise SystemExit(f"the engine stopped after {done} of {len(own)} tokens")
        between = float(logits[done, own[done]] - logits[done, tokens[same]])
        if between > margin:
            raise SystemExit(
                f"token {done} after {start}: the engine takes {tokens[same]}, the model {own[done]}, whose "
                f"logit is {between:.2g} higher, more than --margin {margin:g}"
            )
        ties, done = ties + 1, done + 1
    return len(own) - ties, ties, worst


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a code model; a random one of audio otherwise")
    parser.add_argument("--tokens", type=int, default=1000, help="at least, in whole sequences")
    parser.add_argument("--codes", type=int, default=8192, help="K of the random model")
    parser.add_argument("--width", type=int, default=256, help="its width, a multiple of 64")
    parser.add_argument("--layers", type=int, default=6, help="its layers")
    parser.add_argument("--seed", type=int, default=0, help="of its weights")
    parser.add_argument(
        "--margin", type=float, default=1e-4, help="largest difference of logits of a near tie"
    )
    parser.add_argument(
        "--vllm", metavar="PROGRAM", help="the vllm that serves, of any environment"
    )
    parser.add_argument("--skip-llama-cpp", action="store_true")
    options = parser.parse_args()
    disable_progress_bar()
    model = AutoModel.from_pretrained(options.model) if options.model else random_model(options)
    model = model.float().eval()
    config, sequences = model.config, []
    while sum(len(own) for _, own, _ in sequences) < options.tokens:
        start = config.codebook_size + len(sequences) % config.num_start_tokens
        sequences.append((start, *greedy(model, [start], config.longest_sequence - 1)))
    total = sum(len(own) for _, own, _ in sequences)
    distinct = len({token for _, own, _ in sequences for token in own})
    print(
        f"{total:,} greedy tokens in {len(sequences)} sequences, {distinct:,} distinct, of K = "
        f"{config.codebook_size:,}; {torch.get_num_threads()} threads"
    )
    print("| engine | version | equal | near ties | log-probabilities differ by |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        export_generator(model, folder / "llama")
        engines = {"LlamaForCausalLM": lambda: transformers_engine(folder)}
        if not options.skip_llama_cpp:
            engines["llama.cpp"] = lambda: llama_cpp_engine(model, folder)
        if options.vllm:
            engines["vLLM"] = lambda: vllm_engine(folder, options.vllm, stack)
        for name, make in engines.items():
            release, engine = make()
            found = [compare(engine, *one, options.margin) for one in sequences]
            equal, ties, worst = zip(*found, strict=True)
            print(
                f"| {name} | {release} | {sum(equal):,} | {sum(ties)} | {max(worst):.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(main())
