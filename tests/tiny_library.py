"""A tiny base with its tokenizer, low-rank experts of different ranks and targets, rows of toy tasks, and a bench."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from tiny_tokens import WORD_TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mediator_cli.bundle.factors import FactorDelta
from mediator_cli.evaluate.tasks import Row
from mediator_cli.strategies.batches import answer_loss, batches, read_examples
from mediator_cli.strategies.bench import Bench, TaskRows, open_bench
from mediator_cli.strategies.library import Change, Library
from mediator_cli.strategies.strategy import Fitted, Fixed

TASKS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")
HIDDEN, INNER, LAYERS = 16, 24, 2
SPECIALS = ("[UNK]", "<s>", "</s>", "<|user|>", "<|bot|>")
ASKED = {task: tuple(f"{task}{at}" for at in range(5)) for task in TASKS}
"""The words of a task's prompts: no two tasks share one."""
ANSWERS = {task: tuple(f"{task}-{end}" for end in "xyz") for task in TASKS}
VOCABULARY = (*SPECIALS, *(word for task in TASKS for word in (*ASKED[task], *ANSWERS[task])), "and", "is", "the")
TARGETS = (
    ("self_attn.q_proj", "self_attn.v_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"),
)
"""What experts change, in turn; expert n has rank 1 + n modulo 4."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words of VOCABULARY with a chat template."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", bos_token="<s>", eos_token="</s>", chat_template=WORD_TEMPLATE,
        extra_special_tokens=list(SPECIALS[3:]), padding_side="left",
    )  # fmt: skip


def write_base(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a tiny Llama of 2 layers as a model folder with tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tensor_shapes() -> dict[str, tuple[int, int]]:
    """Give the shapes [out, in] of all matrices that some expert may change."""
    sizes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in sizes.items()}


def random_change(at: int, size: float = 0.3, rank: int | None = None) -> Change:
    """Draw what an expert adds: the rank and the targets go with its number."""
    generator = torch.Generator().manual_seed(100 + at)
    r = rank or 1 + at % 4
    return {
        name: FactorDelta(
            torch.randn(r, shape[1], generator=generator) / shape[1] ** 0.5,
            torch.randn(shape[0], r, generator=generator) * size,
        )
        for name, shape in tensor_shapes().items()
        if any(f".{target}." in name for target in TARGETS[at % len(TARGETS)])
    }


def toy_rows(task: str, n: int, seed: int = 0, choices: bool = False) -> tuple[Row, ...]:
    """Make different rows of a task: three of its words, and the answer that the first and the last of them ask for."""
    asked, answers = ASKED[task], ANSWERS[task]
    prompts = [words for words in product(range(len(asked)), repeat=3)]
    Random(seed).shuffle(prompts)
    rows = []
    for words in prompts[:n]:
        answer = answers[words[0] % 3] if choices or words[2] < 3 else f"{answers[words[0] % 3]} {answers[0]}"
        prompt = " ".join(asked[word] for word in words)
        rows.append(Row(prompt=prompt, answer=answer, choices=list(answers) if choices else None))
    return tuple(rows)


def toy_task(name: str, n: int = 10, *, is_held_out: bool = False, train: int = 40) -> TaskRows:
    """Make the rows of a task: `n` to validate on and to test on, none of them twice; every second task has choices."""
    rows = toy_rows(name, 2 * n + train, choices=TASKS.index(name) % 2 == 1)
    expert = None if is_held_out else name
    return TaskRows(name, rows[2 * n :], rows[:n], rows[n : 2 * n], expert)


def tiny_bench(
    folder: Path, n_experts: int = 4, n_rows: int = 10, *, n_held_out: int = 1, steps: int = 0,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> Bench:  # fmt: skip
    """Make a bench in a new folder: experts alpha, beta, … with a task each, and held-out tasks after them.

    With `steps` each expert is trained for so many steps on its own task (about 20 ms each), else it is random.
    """
    base = write_base(folder / "base", seed, dtype)
    experts = {name: random_change(at) for at, name in enumerate(TASKS[:n_experts])}
    tasks = [
        toy_task(name, n_rows, is_held_out=at >= n_experts) for at, name in enumerate(TASKS[: n_experts + n_held_out])
    ]
    bench = open_bench(Library(base, experts, tensor_shapes()), tasks, seed)
    if steps:
        taught = {task.name: teach(bench, experts[task.name], task, steps) for task in bench.seen}
        bench.library = Library(base, taught, tensor_shapes())
    return bench


@cache
def taught_bench() -> Bench:
    """Give one bench of four trained experts with 10 rows a task; tests that leave it as it is share it."""
    folder = TemporaryDirectory(prefix="taught")
    bench = tiny_bench(Path(folder.name), 4, 10, steps=8)
    # The folder goes when the bench does.
    bench.found["folder"] = folder
    return bench


def teach(bench: Bench, start: Change, task: TaskRows, steps: int, rate: float = 0.1) -> Change:
    """Train the factors b of an expert, from zero, on a task's train rows."""
    own = {name: FactorDelta(d.a * 2, torch.zeros_like(d.b).requires_grad_()) for name, d in start.items()}
    optimizer = torch.optim.Adam([delta.b for delta in own.values()], lr=rate)
    examples = read_examples(bench.model, bench.tokenizer, task.train)
    for step in range(steps):
        batch = next(batches(examples, 16, step))
        with bench.answering(Fitted(experts={"own": own}, decision=Fixed({"own": 1.0}))) as model, model.mixing("own"):
            loss = answer_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: FactorDelta(delta.a, delta.b.detach()) for name, delta in own.items()}
