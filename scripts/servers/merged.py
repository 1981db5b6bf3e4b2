"""Do servers answer as transformers does from what `mediator merge` writes? python -m scripts.servers.merged.

Merges the recipes beside this file, asks test questions of the demo in transformers, vLLM and llama.cpp, and fails
where a server that reads the format answers otherwise. Wants `make demo-experts`; takes a minute for each recipe.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from scripts.servers import toys
from scripts.servers.ask import SERVERS, Case, Reading, ask
from scripts.servers.reference import refer, words_of

CHECKOUT = Path(__file__).parents[2]
DEMO = CHECKOUT / "demo"
MODELS = DEMO / "servers"
RECIPES = Path(__file__).with_name("recipes")
QUESTIONS = {"maths": 3, "language": 3}
TOKENS = 8
NOT_READ = {
    ("qwen2_moe", "llama_cpp"): "llama.cpp wants a head of its own in Qwen2-MoE, the demo's models have a tied one",
    ("qwen2_moe_some_layers", "llama_cpp"): "llama.cpp wants experts in every layer",
}
"""What a server is known not to read: the tables of the README say so too."""


def main() -> None:
    """Merge, ask, compare; exit 1 if a server is wrong where it should be right."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="python -m scripts.servers.merged", description=__doc__)
    parser.add_argument("recipes", nargs="*", default=names, choices=[*names, []], help="default: all")
    chosen = parser.parse_args().recipes
    torch.set_num_threads(1)
    make_qwen3(MODELS / "qwen3")
    wrong = [name for name in chosen if not is_right(name)]
    if wrong:
        raise SystemExit(f"not as transformers: {', '.join(wrong)}")


def is_right(name: str) -> bool:
    """Merge one recipe and ask; print what came of it."""
    say = Console(soft_wrap=True, highlight=False).print
    merge = [Path(sys.executable).with_name("mediator"), "merge", RECIPES / f"{name}.yaml", "--overwrite", "--quiet"]
    subprocess.run(merge, check=True)
    found = read(MODELS / name)
    for server, reading in found.items():
        known = NOT_READ.get((name, server))
        say(f"{name:22} {server:10} {in_words(reading)}{f' (known: {known})' if known else ''}", markup=False)
    # One that is read after all is a change too: the list and the tables are out of date then.
    return all((reading.status == "right") != ((name, server) in NOT_READ) for server, reading in found.items())


def read(folder: Path) -> dict[str, Reading]:
    """Ask both servers for the same questions as transformers."""
    prompts = questions(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = refer(model, prompts, TOKENS)
    del model
    with tempfile.TemporaryDirectory() as work:
        case = Case(folder, prompts, reference, Path(work))
        return {server: ask(server, [case])[0] for server in SERVERS}


def questions(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Put the first test questions of each task in the chat template; as token ids."""
    lines = [
        line
        for task, count in QUESTIONS.items()
        for line in (DEMO / f"data/{task}.test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    ]
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in lines]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]


def in_words(reading: Reading) -> str:
    """Say how a server reads a model, in one line."""
    if reading.status == "refused":
        return f"refused: {reading.why}"
    text = f"{reading.status}: {reading.equal:.0%} of the answers equal, log probabilities {reading.apart:.1e} apart"
    if reading.first is not None:
        text += f"; first other token at {reading.first}, where transformers' leads by {reading.lead:.1e}"
    return text


def make_qwen3(folder: Path) -> None:
    """Write a random model of Qwen3's shape and three that differ from it."""
    words = words_of(DEMO / "base")
    for seed, name in enumerate(("base", "one", "two", "three")):
        toys.make(toys.Toy("qwen3", name, {"num_hidden_layers": 4}), folder / name, words)
        if seed:
            _change(folder / name, seed)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(DEMO / "base" / file, folder / name)


def _change(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "mlp" in name:
                tensor += 0.5 * tensor.std() * torch.randn_like(tensor)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
