"""What transformers and PEFT answer from the same export, without any server: the measure for all of them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mediator_cli.serve.router import open_router

TOKENS = 8
Mixture = Mapping[str, float]


class Offline:
    """The dense model with all adapters, in float32."""

    def __init__(self, folder: Path, experts: Sequence[str]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
        dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
        first, *others = experts
        self.model = PeftModel.from_pretrained(dense, folder / "adapters" / first, adapter_name=first).eval()
        for name in others:
            self.model.load_adapter(folder / "adapters" / name, adapter_name=name)
        self.known = set(experts)
        self.answers: dict[tuple[object, ...], str] = {}

    def answer(self, prompt: str, mixture: Mixture) -> str:
        """Answer greedily with a mixture of adapters; {} is the dense model."""
        key = (prompt, *sorted(mixture.items()))
        if key not in self.answers:
            self.answers[key] = self._answer(prompt, mixture)
        return self.answers[key]

    def _answer(self, prompt: str, mixture: Mixture) -> str:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        if not mixture:
            with self.model.disable_adapter():
                return self._generated(ids)
        self.model.set_adapter(self._adapter(mixture))
        return self._generated(ids)

    @torch.no_grad()
    def _generated(self, ids: Mapping[str, torch.Tensor]) -> str:
        found = self.model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
        return str(self.tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    def _adapter(self, mixture: Mixture) -> str:
        """Name the adapter of a mixture; one of several is put together by PEFT, exactly."""
        if list(mixture.values()) == [1.0]:
            return next(iter(mixture))
        name = "_".join(f"{expert}{round(100 * weight)}" for expert, weight in mixture.items())
        if name not in self.known:
            self.model.add_weighted_adapter(list(mixture), list(mixture.values()), name, combination_type="cat")
            self.known.add(name)
        return name


def top_one(router: Path, prompts: Iterable[str], share: float = 0.75) -> list[dict[str, float]]:
    """Tell who answers each prompt on a server that has one adapter for each expert."""
    opened = open_router(router)
    decided = [opened.decide_chat([{"role": "user", "content": prompt}]).weights for prompt in prompts]
    return [{name: 1.0 for name, weight in weights.items() if weight >= share} for weights in decided]
