"""Which tensors of a checkpoint can be mixed for each row of a batch; the others are the same for all inputs.

The model answers that itself: a pass without numbers, on torch's `meta` device, shows which modules are called with all
tokens of the batch, and which have their parameters read by others past them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mediator_cli.errors import BundleError, Problem, first_line
from mediator_cli.runtime.forms import form_of
from mediator_cli.runtime.parameters import match_parameters

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn
    from transformers import PreTrainedModel

    from mediator_cli.runtime.parameters import Owner

_ROWS, _TOKENS = 3, 5
_SHOWN = 160
_BROKEN = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError)
FUSED = "tensors that transformers fuses or reshapes as it loads them"
UNKNOWN = "tensors that are no parameter of the model"


def empty_model(config: Mapping[str, Any]) -> PreTrainedModel:
    """Build a checkpoint's causal language model without weights, from its config alone; no remote code, no network.

    Raises BundleError with the reason when transformers knows none.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise BundleError(Problem(kind, "is not known to transformers here"))
    try:
        known: Any = CONFIG_MAPPING[kind].from_dict(dict(config))
        # BERT and its like build a causal head too, but were not trained to go on with a text.
        if known.is_encoder_decoder or (
            kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(known, "is_decoder", False)
        ):
            raise BundleError(Problem(kind, "is an encoder"))
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise BundleError(Problem(kind, "is of another kind"))
        with torch.device("meta"):
            # The kernels for experts ask for 16 bits.
            model: Any = AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16)
    except _BROKEN as error:
        reason = first_line(error)[:_SHOWN]
        raise BundleError(Problem(kind, f"does not build: {reason}")) from None
    return model.eval()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Unmixable:
    """The tensors that cannot be mixed, each with its kind, and the parameters that no tensor gives."""

    kinds: dict[str, str]
    missing: tuple[str, ...]


@dataclass
class _Calls:
    """The modules that a pass called, by path, and whether each call had one argument laid out by rows."""

    by_rows: dict[str, bool] = field(default_factory=dict)

    def note(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        is_plain = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].ndim > 0
        fits = is_plain and args[0].shape[0] in (1, _ROWS, _ROWS * _TOKENS)
        self.by_rows[path] = self.by_rows.get(path, True) and fits


def find_unmixable(model: PreTrainedModel, names: Iterable[str]) -> Unmixable:
    """Find the tensors of a checkpoint that cannot be mixed for each row in a model built on `meta`."""
    listed = list(names)
    loaded = match_parameters(model, listed)
    calls = _trace(model)
    kinds = dict.fromkeys(loaded.made, FUSED)
    for name in listed:
        if name in loaded.owners:
            if fault := _fault(loaded.owners[name], calls):
                kinds[name] = fault
        elif name not in kinds:
            kinds[name] = UNKNOWN
    return Unmixable({name: kinds[name] for name in listed if name in kinds}, loaded.missing)


def _fault(owners: tuple[Owner, ...], calls: _Calls) -> str:
    forms = {form_of(owner.module) for owner in owners}
    kind = f"{type(owners[0].module).__name__}.{owners[0].name}"
    if None in forms or ("transposed" in forms and len(forms) > 1):
        return kind
    if not all(calls.by_rows.get(owner.path, False) for owner in owners):
        return f"{kind}, which is used without a call of its own"
    return ""


def _trace(model: PreTrainedModel) -> _Calls:
    """Note what a pass calls. Of a pass that breaks off, what it reached counts: averaging the rest is always right."""
    found = _Calls()
    for mask in (torch.ones(_ROWS, 1, _TOKENS, _TOKENS, device="meta", dtype=model.dtype), None):
        calls = _Calls()
        if _run(model, mask, calls):
            return calls
        found = max(found, calls, key=lambda each: len(each.by_rows))
    return found


def _run(model: PreTrainedModel, mask: torch.Tensor | None, calls: _Calls) -> bool:
    def hook(path: str) -> Any:  # noqa: ANN401 - the type of hooks differs by version
        return lambda _, args, kwargs: calls.note(path, args, kwargs)

    modules: list[tuple[str, nn.Module]] = [(path, m) for path, m in model.named_modules() if form_of(m) is not None]
    hooks = [module.register_forward_pre_hook(hook(path), with_kwargs=True) for path, module in modules]
    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, NotImplementedError):
        return False
    finally:
        for each in hooks:
            each.remove()
    return True
