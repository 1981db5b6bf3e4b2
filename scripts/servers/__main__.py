"""How vLLM and llama.cpp read mixtures of experts: python -m scripts.servers, after make demo-experts.

Asks for everything that a format can say, on random little models. Results land in results.json beside this file, from
which scripts.servers.report makes the tables; it takes about half an hour.
"""

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from scripts.servers import toys
from scripts.servers.ask import RIGHT, SERVERS, Case, as_json, ask, rounded
from scripts.servers.reference import apart, refer, score, words_of
from scripts.servers.results import read_results, write_results

CHECKOUT = Path(__file__).parents[2]
TOKENIZER = CHECKOUT / "demo/base"
LENGTHS = (5, 12, 30, 60)
TOKENS = 16
AT_A_TIME = 8


def main() -> None:
    """Ask both servers for each toy that has no result yet."""
    parser = argparse.ArgumentParser(prog="python -m scripts.servers", description=__doc__)
    parser.add_argument("--only", default="", help="only models whose name has this in it")
    parser.add_argument("--again", action="store_true", help="also those that results.json has")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {} if arguments.again else read_results()
    chosen = [toy for toy in toys.toys() if arguments.only in toy.name and toy.name not in known]
    words = words_of(TOKENIZER)
    for _, group in groupby(enumerate(chosen), lambda pair: pair[0] // AT_A_TIME):
        _keep(read_toys([toy for _, toy in group], words))


def _keep(found: Mapping[str, Mapping[str, Any]]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for name, result in found.items():
        console.print(name, *(f"\n   {server}: {result[server]}" for server in SERVERS), markup=False)
    known = read_results() | dict(found)
    order = {toy.name: place for place, toy in enumerate(toys.toys())}
    write_results({name: known[name] for name in sorted(known, key=lambda name: order.get(name, len(order)))})


def read_toys(chosen: Sequence[toys.Toy], words: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Make some toys and ask both servers for them."""
    with tempfile.TemporaryDirectory() as work:
        made = [make_case(toy, words, Path(work) / str(place)) for place, toy in enumerate(chosen)]
        readings = {server: ask(server, [case for case, _ in made]) for server in SERVERS}
    return {
        toy.name: {"format": toy.format, "feature": toy.feature}
        | shows
        | {server: as_json(readings[server][place]) for server in SERVERS}
        for place, (toy, (_, shows)) in enumerate(zip(chosen, made, strict=True))
    }


def make_case(toy: toys.Toy, words: torch.Tensor, work: Path) -> tuple[Case, dict[str, float]]:
    """Make one toy; beside it how far apart the answers of a reader would be who ignores what is particular of it."""
    folder = work / "model"
    toys.make(toy, folder, words)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)
    drawn = torch.Generator().manual_seed(1)
    prompts = [words[torch.randint(len(words), (n,), generator=drawn)].tolist() for n in LENGTHS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = refer(model, prompts, TOKENS)
    blind = toys.make_blind(toy, model)
    far = apart(reference.logprobs, score(blind, prompts, reference.tokens)) if blind else 0.0
    return Case(folder, prompts, reference, work), {"shows": rounded(far)} if far > RIGHT else {}


if __name__ == "__main__":
    main()
