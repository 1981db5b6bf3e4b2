"""Quantised checkpoints: recognised by config or tensors and refused, each kind with the command that undoes it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mediator_cli.checkpoint.header import FLOAT_DTYPES
from mediator_cli.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mediator_cli.checkpoint.header import TensorInfo

_NAMES = {
    "aqlm": "AQLM", "auto-round": "AutoRound", "awq": "AWQ", "bitnet": "BitNet",
    "eetq": "EETQ", "fbgemm_fp8": "FBGEMM FP8", "fp8": "FP8", "fp_quant": "FP-Quant", "gptq": "GPTQ", "higgs": "HIGGS",
    "hqq": "HQQ", "modelopt": "ModelOpt", "mxfp4": "MXFP4", "mxfp8": "MXFP8", "nvfp4": "NVFP4", "quanto": "Quanto",
    "quark": "Quark", "spqr": "SpQR", "torchao": "torchao", "vptq": "VPTQ",
}  # fmt: skip
# What transformers 5 can turn into floats while it loads: its config class, and packages beyond transformers itself.
_AT_LOADING = {
    "fp8": ("FineGrainedFP8Config", "accelerate"),
    "mxfp8": ("FineGrainedFP8Config", "accelerate"),
    "mxfp4": ("Mxfp4Config", ""),
    "metal": ("MetalConfig", "accelerate"),
    "compressed-tensors": ("CompressedTensorsConfig", "compressed-tensors accelerate"),
}
_AFTER_LOADING = {"bitsandbytes": "bitsandbytes accelerate", "higgs": "flute-kernel accelerate"}
_FLOAT = "use the float checkpoint that it was made from; transformers cannot dequantise this kind"
_STALE = "where the tensors are float already, delete quantization_config from config.json"
# How packed tensors are called where no config says what they are; the first that fits names the kind.
_BY_NAME = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(weight_packed|weight_shape|weight_zero_point)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_2$"), "ModelOpt"),
    (re.compile(r"\.(weight_scale_inv|weight_scale|input_scale|qscale_weight)$"), "FP8"),
    (re.compile(r"\.SCB$|\.weight_format$"), "bitsandbytes, 8 bit"),
    (re.compile(r"\.(absmax|nested_absmax|quant_map|nested_quant_map)$|\.quant_state\."), "bitsandbytes, 4 bit"),
    (re.compile(r"_(blocks|scales)$"), "MXFP4"),
    (re.compile(r"\.(codebooks|codes)$"), "AQLM"),
    (re.compile(r"\.(W_q|W_nbits)$"), "HQQ"),
    (re.compile(r"\.weight\._(data|scale|shift)$|\.weight_qdata$"), "Quanto or torchao"),
    (re.compile(r"\.(centroids|res_centroids|indices)$"), "VPTQ"),
    (re.compile(r"\.scales$"), "unknown kind"),
)


def refuse_quantised_config(model: str, place: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the config of `model` (a folder or Hub id) says that its tensors are quantised."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return
    facts: Mapping[str, Any] = found if isinstance(found, dict) else {}
    message = f"is quantised ({_kind(facts)}); only float checkpoints can be merged"
    command = _command(model, str(facts.get("quant_method") or _bits_method(facts)), config)
    hint = f"dequantise it first: {command}; {_STALE}" if command else f"{_FLOAT}; {_STALE}"
    raise CheckpointError(Problem(f"{place} quantization_config", message, hint))


def refuse_quantised_tensors(tensors: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError at the first tensor that is packed or scaled, where the config did not say so."""
    for info in tensors:
        if kind := _kind_of_tensor(info):
            message = f"dtype {info.dtype}: the checkpoint is quantised ({kind}); only float checkpoints can be merged"
            hint = "use the float checkpoint that it was made from; its config.json lacks quantization_config, without "
            hint += "which transformers cannot dequantise it either"
            raise CheckpointError(Problem(f"{info.file}: {info.name}", message, hint))


def _bits_method(facts: Mapping[str, Any]) -> str:
    """Old configs of bitsandbytes name no method."""
    return "bitsandbytes" if facts.get("load_in_4bit") or facts.get("load_in_8bit") else "unknown"


def _kind(facts: Mapping[str, Any]) -> str:
    method = str(facts.get("quant_method") or _bits_method(facts))
    if method == "bitsandbytes":
        return next((f"bitsandbytes, {n} bit" for n in (4, 8) if facts.get(f"load_in_{n}bit")), "bitsandbytes")
    return _NAMES.get(method, method)


def _command(model: str, method: str, config: Mapping[str, Any]) -> str:
    """Give the shell command that writes a float copy of `model` beside it; empty where there is none."""
    if method not in _AT_LOADING and method not in _AFTER_LOADING:
        return ""
    name, packages = _AT_LOADING.get(method, ("", _AFTER_LOADING.get(method, "")))
    architecture = str((config.get("architectures") or [""])[0])
    auto = (
        "AutoModelForImageTextToText" if architecture.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"
    )
    asked = f", quantization_config=transformers.{name}(dequantize=True)" if name else ""
    program = (
        "import sys, transformers; source, target = sys.argv[1:]; "
        f'model = transformers.{auto}.from_pretrained(source, dtype="auto"{asked}); '
        f"{'' if name else 'model = model.dequantize(); '}"
        # Else transformers saves what it loaded, that is, quantises again.
        "model._weight_conversions = None; model.save_pretrained(target)"
    )
    if not Path(model).is_dir() or (Path(model) / "tokenizer_config.json").is_file():
        program += "; transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)"
    source = model.rstrip("/")
    install = f"pip install {packages} && " if packages else ""
    return f"{install}python -c {shlex.quote(program)} {shlex.quote(source)} {shlex.quote(f'{source}-float')}"


def _kind_of_tensor(info: TensorInfo) -> str:
    """Name the quantisation that a tensor belongs to; empty for plain tensors."""
    if info.name.endswith(("_blocks", "_scales")) and info.dtype != "U8":
        return ""
    if named := next((kind for pattern, kind in _BY_NAME if pattern.search(info.name)), ""):
        return named
    if info.dtype.startswith("F8"):
        return "FP8"
    is_packed = info.name.endswith(".weight") and info.dtype not in FLOAT_DTYPES
    return "unknown kind" if is_packed else ""
